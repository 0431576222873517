"""Alarms: bugs that make a run inert are planted, and each is named; right runs are silent."""

import inspect
import re

import pytest
import torch
from tiny_runs import SCRIPTS, prepare, run

import train_dpo
import train_ppo
import train_rm
from data.alarms import ALARMS, Watch
from gpt import load_checkpoint, save_checkpoint


def alarms_of(capsys, stage, out, **options):
    """What a run says that begins with ALARM, each as its first words."""
    capsys.readouterr()
    run(stage, out, **options)
    said = capsys.readouterr().out.split("\n")
    alarms = [line.removeprefix("ALARM: ") for line in said if line.startswith("ALARM")]
    return [re.sub(r"^\d+ of \d+ ", "", text)[:38] for text in alarms]


GRADIENT = "the policy's gradient is 0, so it lear"
SCORES = "all responses have the same score, so "
GROUPS = "within every group all responses have "
ADVANTAGES = "all tokens have the same advantage, so"
NEVER = "no response scores above 0: is none ev"
UNMOVED = "weight matrices of the model, such as "


def test_ppo_is_told_after_two_iterations_and_other_stages_after_three_steps(
    chain, tmp_path, monkeypatch
):
    patience = {}

    class Noted(Watch):
        def __init__(self, models, patience):
            patiences.append(patience)
            super().__init__(models, patience)

    monkeypatch.setattr("data.run.Watch", Noted)
    prepare(chain, tmp_path)
    for stage in ("sft", "ppo"):
        patiences = []
        run(stage, tmp_path)
        patience[stage] = patiences
    assert patience == {"sft": [3], "ppo": [2]}


def test_a_kl_of_24_nats_is_no_alarm_and_one_of_26_is():
    rings = [any(alarm.sign({"kl_full": kl}) for alarm in ALARMS) for kl in (24.0, 26.0)]
    assert rings == [False, True]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_no_alarm_rings_in_a_right_run(chain, tmp_path, capsys, monkeypatch, stage):
    prepare(chain, tmp_path, stage)
    if stage == "ppo":  # so little trained, no model is ever right: here longer texts are better
        monkeypatch.setattr(train_ppo, "proxy_reward", by_length)
    options = dict(reward="gold") if stage == "ppo" else {}
    assert alarms_of(capsys, stage, tmp_path, **options) == []


def by_length(cfg, rows, replies, *rest):
    """A reward that differs from response to response, whatever a model has learned."""
    return torch.tensor([float(len(reply.text)) for reply in replies])


@pytest.fixture
def ppo(chain, tmp_path, capsys):
    """Run PPO and return its alarms. By gold: the tiny reward model has learned nothing."""
    prepare(chain, tmp_path, "ppo")
    return lambda **options: alarms_of(capsys, "ppo", tmp_path, **{"reward": "gold", **options})


def test_no_alarm_rings_where_every_iteration_is_one_step(ppo, monkeypatch):
    """Then no ratio ever leaves 1, and that is as it should be."""
    monkeypatch.setattr(train_ppo, "proxy_reward", by_length)
    assert ppo(epochs=1, minibatch=8, advantage="rloo", group=4) == []


@pytest.mark.parametrize("reward", [0.7, -0.7])
def test_a_constant_reward_is_named(ppo, monkeypatch, reward):
    """Advantages still differ, since the critic has to learn that nothing does."""
    constant = lambda cfg, rows, *_: torch.full((len(rows),), reward)  # noqa: E731
    monkeypatch.setattr(train_ppo, "proxy_reward", constant)
    assert ppo() == [SCORES] + [NEVER] * (reward < 0)


def test_samples_that_are_all_alike_are_named(ppo, monkeypatch):
    """As from a seed per prompt, or a cache that repeats one sample for the whole group."""
    sample = train_ppo.sample_replies

    def one_per_group(policy, tokenizer, asked, *rest, **options):
        replies = sample(policy, tokenizer, asked, *rest, **options)
        return [replies[i // 4 * 4] for i in range(len(replies))]

    monkeypatch.setattr(train_ppo, "sample_replies", one_per_group)
    assert GROUPS in ppo(advantage="dr_grpo", group=4)


def test_advantages_of_0_are_named_with_all_that_follows(ppo, monkeypatch):
    nothing = lambda returns, *_: torch.zeros_like(returns)  # noqa: E731
    monkeypatch.setattr(train_ppo, "group_advantages", nothing)
    found = ppo(advantage="rloo", group=4)
    assert {GRADIENT, ADVANTAGES, UNMOVED} <= set(found) and SCORES not in found


def test_a_reward_that_the_policy_never_meets_is_named(ppo):
    assert NEVER in ppo(reward="exact", tasks="three_sums")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_weights_that_do_not_move_are_named(chain, tmp_path, capsys, stage):
    """Here since the learning rate is 0; it is the same if an optimizer holds other weights."""
    prepare(chain, tmp_path, stage)
    off = {"pretrain": dict(optimizer="adamw"), "ppo": dict(reward="gold")}.get(stage, {})
    assert UNMOVED in alarms_of(capsys, stage, tmp_path, lr=0.0, **off)


@pytest.mark.parametrize("stage", ["sft", "ppo", "rm"])
def test_a_trunk_without_gradient_is_named_though_the_head_learns(
    chain, tmp_path, capsys, monkeypatch, stage
):
    """As from a detach between the blocks and the head, which has weights of its own."""
    prepare(chain, tmp_path, stage)
    average = SCRIPTS[stage].average_gradients

    def head_alone(model, *rest):
        for name, weight in model.named_parameters():
            if "h." in name:
                weight.grad = None
        return average(model, *rest)

    monkeypatch.setattr(SCRIPTS[stage], "average_gradients", head_alone)
    monkeypatch.setattr(train_ppo, "proxy_reward", by_length)
    found = alarms_of(capsys, stage, tmp_path, **({"reward": "gold"} if stage == "ppo" else {}))
    assert UNMOVED in found
    assert (stage == "ppo") == any("matrices of the critic" in text for text in found)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_pair_that_is_compared_with_itself_is_named(chain, tmp_path, capsys, monkeypatch, stage):
    """The loss stays ln 2, and what is left of the gradient is rounding."""
    prepare(chain, tmp_path, stage)
    loss, margin = train_rm.preference_loss, train_dpo.dpo_margin
    monkeypatch.setattr(train_rm, "preference_loss", lambda chosen, rejected: loss(chosen, chosen))
    twice = lambda logprobs, ref, *rest: margin(logprobs[[0, 0]], ref[[0, 0]], *rest)  # noqa: E731
    monkeypatch.setattr(train_dpo, "dpo_margin", twice)
    found = alarms_of(capsys, stage, tmp_path)
    assert "the gradient is 0, so nothing is lear" in " ".join(found)
    assert any(text.startswith("chosen and rejected") for text in found) == (stage == "dpo")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_a_gradient_of_0_is_named(chain, tmp_path, capsys, monkeypatch, stage):
    """As if the loss were that of another model: no gradient reaches this one."""
    prepare(chain, tmp_path, stage)
    no_gradient = lambda model, *_: sum(p.grad.zero_().sum() for p in model.parameters())  # noqa: E731
    average = f"train_{stage}.average_gradients"
    monkeypatch.setattr(average, lambda model, *rest: no_gradient(model).item())
    assert "the gradient is 0, so nothing is lear" in " ".join(alarms_of(capsys, stage, tmp_path))


@pytest.mark.parametrize("when_stored", [False, True])
def test_a_sum_across_the_padding_is_named(ppo, monkeypatch, when_stored):
    """GAE that does not know where a response ends: its mask is left out, or comes too late."""
    source = inspect.getsource(train_ppo.gae)
    assert source.count(" * mask[:, t]") == 2
    source = source.replace(" * mask[:, t]", "")
    if when_stored:
        source = source.replace("] = next_advantage", "] = next_advantage * mask[:, t]")
    exec(source, planted := vars(train_ppo).copy())
    monkeypatch.setattr(train_ppo, "gae", planted["gae"])
    with pytest.raises(AssertionError, match="summed across the padding"):
        ppo()


def test_a_response_without_tokens_is_named(ppo, monkeypatch):
    sample = train_ppo.sample_replies
    empty = lambda *args, **options: [  # noqa: E731
        reply._replace(ids=[], logprobs=[]) for reply in sample(*args, **options)
    ]
    monkeypatch.setattr(train_ppo, "sample_replies", empty)
    with pytest.raises(AssertionError, match="without tokens teaches nothing"):
        ppo()


def test_a_reward_model_at_chance_is_named_before_ppo_begins(chain, tmp_path, capsys):
    prepare(chain, tmp_path, "ppo")
    path = tmp_path / "rm" / "ckpt.pt"
    checkpoint = load_checkpoint(path)
    for accuracy, rings in ((0.52, True), (0.549, True), (0.551, False), (0.8, False), (0.3, True)):
        checkpoint["report"] |= {"accuracy": accuracy, "pairs": 400}  # two standard errors: 0.05
        save_checkpoint(path, checkpoint)
        capsys.readouterr()
        run("ppo", tmp_path, iterations=1)
        sentence = (
            f"ALARM: {path} agrees with only {accuracy:.1%} of 400 held-out labels, as a coin"
        )
        assert (sentence in capsys.readouterr().out) == rings


class Still(torch.nn.Linear):
    """A model that nobody trains."""

    def __init__(self):
        super().__init__(1, 1)

    def move(self):
        with torch.no_grad():
            self.weight += 1


def test_a_sign_has_to_last_and_only_kl_rings_later():
    model = Still()
    watch = Watch({"model": model}, patience=3)
    model.move()
    far, zero, good = {"kl_full": 26.0}, {"grad_norm": 0.0}, {"grad_norm": 1.0, "kl_full": 2.0}
    rows, said = [], []
    for row in (zero, zero, good, zero, zero, zero, far, far, good, far, far, far, far):
        rows.append(row)
        said.append([text.split(":")[1].split()[1] for text in watch.look(rows)])
    assert said == [[]] * 11 + [["KL"]] + [[]]  # and once only


# One row for each alarm, in their order.
ROWS = [{"score_sd": 0.0}, {"best_score": 0.0}, {"equal_groups": 1.0}, {"advantage_sd": 0.0}]
ROWS += [{"margin": 0.0}, {"grad_norm": 5e-7}, {"policy_grad_norm": 0.0}]
ROWS += [{"critic_grad_norm": 0.0}, {"kl_full": 25.1}]


def test_every_sign_is_seen_in_its_own_row_alone():
    seen = [[alarm.sign(row) for row in ROWS] for alarm in ALARMS]
    assert seen == torch.eye(len(ROWS), dtype=torch.bool).tolist()
    right = {"grad_norm": 0.1, "policy_grad_norm": 1e-6, "critic_grad_norm": 1e-6, "score_sd": 0.1}
    right |= {"equal_groups": 0.99, "advantage_sd": 1.0, "best_score": 0.1, "kl_full": 2.0}
    right |= {"margin": -1e-4}
    assert not any(alarm.sign(right) for alarm in ALARMS)
