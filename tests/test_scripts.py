"""What the five scripts do as a whole, on a model so small that each takes a second or two."""

import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import asdict, fields, replace

import pytest
import torch
from tiny_runs import SCRIPTS, TINY, interrupt, prepare, run, same

import train_dpo
import train_ppo
import train_rm
import train_sft
from data.chat import encode_chat, encode_prompt, sample_replies
from data.files import held_out, write_rows
from data.run import Run, average_gradients
from data.tokenizer import load_tokenizer
from data.town.tasks import Case, Task
from gpt import (
    GPT,
    GPTConfig,
    InputError,
    ScalarModel,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from train_dpo import dpo_loss, sequence_logprobs
from train_ppo import response_logprobs
from train_rm import preference_loss


def column(folder, name):
    """A column of log.csv: the numbers that are there."""
    header, *rows = [row.split(",") for row in (folder / "log.csv").read_text().splitlines()]
    return [float(row[header.index(name)]) for row in rows if row[header.index(name)]]


def cost(folder):
    return json.loads((folder / "cost.json").read_text())["forward_equivalents"]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_leaves_its_files_and_nothing_unfinished(chain, stage):
    files = {path.name for path in (chain / stage).iterdir()}
    assert {"ckpt.pt", "log.csv", "curve.png", "samples.txt", "cost.json"} <= files
    assert not list(chain.glob(f"**/unfinished/{stage}/*"))
    checkpoint = torch.load(chain / stage / "ckpt.pt", weights_only=True)
    assert checkpoint["stage"] == stage
    measured = json.loads((chain / stage / "cost.json").read_text())
    assert measured["seconds"] > 0 and measured["forward_equivalents"] > 0


@pytest.mark.parametrize("stage", SCRIPTS)
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    chain, tmp_path, monkeypatch, stage
):
    prepare(chain, tmp_path, stage)
    interrupt(stage, tmp_path, monkeypatch)
    assert (tmp_path / "unfinished" / stage / "curve.png").exists()
    run(stage, tmp_path, resume=True)
    assert same(tmp_path / stage, chain / stage)
    assert (tmp_path / stage / "log.csv").read_text() == (chain / stage / "log.csv").read_text()
    assert cost(tmp_path / stage) == cost(chain / stage)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_stopped_in_its_last_step_a_run_still_finishes(chain, tmp_path, monkeypatch, stage):
    prepare(chain, tmp_path, stage)
    short = {"pretrain": dict(steps=3), "ppo": dict(iterations=3)}.get(stage, dict(epochs=1))
    if "epochs" in short:  # three batches
        rows = TINY["sft"]["demonstrations"]
        if stage != "sft":
            rows = len((chain / "preferences.jsonl").read_text().splitlines())
        short = dict(batch_size=math.ceil(rows / 3))
    interrupt(stage, tmp_path, monkeypatch, **short)
    assert run(stage, tmp_path, resume=True, **short)
    assert (tmp_path / stage / "ckpt.pt").exists()


def test_resuming_with_other_options_is_refused(chain, tmp_path, monkeypatch):
    log = Run.log
    monkeypatch.setattr(
        Run,
        "log",
        lambda self, step, **x: (log(self, step, **x), os.kill(os.getpid(), signal.SIGTERM)),
    )
    with pytest.raises(SystemExit):
        run("pretrain", tmp_path)
    with pytest.raises(InputError, match="had --batch_size 4, not 8"):
        run("pretrain", tmp_path, resume=True, batch_size=8)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_option_that_changes_what_is_learned_has_to_be_the_same_under_resume(
    tmp_path, monkeypatch, stage
):
    monkeypatch.chdir(tmp_path)  # where --out other leads
    Config, unchanged = SCRIPTS[stage].Config, set()
    saved = {"stage": stage, "model": {}, "model_config": {}, "tokenizer": {}, "made_from": {}}
    saved |= {"train_config": asdict(Config(out=str(tmp_path))), "step": 7}
    saved |= {"rows": [], "forwards": 0.0, "seconds": 0.0}
    for field in fields(Config):
        other = {str: "other", int: 12, float: 0.375}.get(field.type, True)
        cfg = Config(out=str(tmp_path))
        setattr(cfg, field.name, other)
        again = Run(stage, cfg, {})
        again.identity = {"made_from": {}}
        save_checkpoint(again.unfinished / "resume.pt", saved)
        try:
            assert again._load({}) == 7
            unchanged.add(field.name)
        except InputError as error:
            was = getattr(Config(), field.name)
            option = f"--no-{field.name}" if was is False else f"--{field.name} {was!r}"
            assert f"had {option}, not {other!r}" in str(error)
    files = {"init", "data", "rm"} & asdict(Config()).keys()  # what is in them is compared
    # These change what a run costs: after one that was out of memory, they are what helps.
    cost = {"microbatch", "recompute", "compile", "save_every"}
    assert unchanged == {"out", "name", "device", "threads", "resume", "check"} | cost | files


def test_same_seed_trains_the_same_model_and_another_seed_another(chain, tmp_path):
    run("pretrain", tmp_path / "a")
    run("pretrain", tmp_path / "b", seed=1)
    assert same(tmp_path / "a" / "pretrain", chain / "pretrain")
    assert not same(tmp_path / "b" / "pretrain", chain / "pretrain")


def test_loss_that_is_not_finite_stops_and_leaves_the_earlier_results(tmp_path):
    run("pretrain", tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "pretrain").iterdir() if p.is_file()}
    with pytest.raises(InputError, match="at step [12].*last checkpoint is untouched"):
        run("pretrain", tmp_path, lr=1e30, optimizer="adamw")
    after = {p.name: p.read_bytes() for p in (tmp_path / "pretrain").iterdir() if p.is_file()}
    assert before == after


def test_a_reward_model_of_half_the_layers_costs_half_and_serves_ppo(chain, tmp_path):
    run("pretrain", tmp_path, n_layer=2)
    run("sft", tmp_path)
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    run("rm", tmp_path)
    run("rm", tmp_path, n_layer=1, name="small")
    assert cost(tmp_path / "small") == cost(tmp_path / "rm") / 2
    small = load_checkpoint(tmp_path / "small" / "ckpt.pt")
    assert small["model_config"]["n_layer"] == 1
    run("ppo", tmp_path, rm=str(tmp_path / "small" / "ckpt.pt"), iterations=1)


def test_a_reward_model_of_as_many_layers_as_the_sft_model_has_is_one_of_all(chain, tmp_path):
    prepare(chain, tmp_path, "rm")
    run("rm", tmp_path, n_layer=1)
    assert same(tmp_path / "rm", chain / "rm")


def test_first_losses_are_those_of_models_that_have_learned_nothing_yet(chain):
    def first(stage, name):
        return column(chain / stage, name)[0]

    assert first("rm", "loss") == pytest.approx(math.log(2), abs=1e-5)
    assert first("dpo", "loss") == pytest.approx(math.log(2), abs=1e-4)
    assert first("dpo", "margin") == pytest.approx(0, abs=1e-4)
    assert first("ppo", "kl") == first("ppo", "kl_k3") == first("ppo", "kl_full") == 0
    assert first("ppo", "first_ratio_error") < 1e-5
    assert first("ppo", "objective") == first("ppo", "proxy")  # no KL, no penalty


def test_policy_leaves_its_reference(chain):
    """And the reference stays where it was, as an assertion at the end of train_ppo.py says."""
    for estimate in ("kl", "kl_k3", "kl_full"):
        kl = column(chain / "ppo", estimate)
        assert kl[0] == 0 and kl[-1] != 0


def test_ppo_takes_the_rounding_of_logits_that_lie_near_minus_80_for_what_it_is(chain, tmp_path):
    """GPT-2's do. Softmax cannot see the offset, but float32 has two digits less for the rest."""
    sft = torch.load(chain / "sft" / "ckpt.pt", weights_only=True)
    config = GPTConfig(**{**sft["model_config"], "n_layer": 2, "n_embd": 128})
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() == 2):
            matrix *= 5  # as far apart as those of a trained model
        direction = torch.randn(config.n_embd)
        model.ln_f.bias.copy_(-direction)
        model.wte.weight += 80 * direction / direction.square().sum()
    save_checkpoint(
        tmp_path / "sft" / "ckpt.pt",
        {**sft, "model": model.state_dict(), "model_config": asdict(config)},
    )
    last = run(
        "ppo", tmp_path, reward="gold", iterations=1, rollouts=32, minibatch=16, max_new_tokens=30
    )
    assert last["first_ratio_error"] < 1e-3  # 2e-5 where products of other sizes round otherwise


def test_ppo_without_learning_keeps_every_ratio_at_one(chain, tmp_path):
    prepare(chain, tmp_path)
    last = run("ppo", tmp_path, lr=0.0)
    assert last["clipfrac"] == 0 and last["approx_kl"] < 1e-9 and last["kl_full"] == 0
    assert same(tmp_path / "ppo", tmp_path / "sft")


def test_sampling_colder_than_scoring_is_noticed_at_the_first_iteration(
    chain, tmp_path, monkeypatch
):
    prepare(chain, tmp_path)
    run("ppo", tmp_path, temperature=0.7)

    def at_1(model, tokenizer, prompts, max_new_tokens, seed, temperature):
        return sample_replies(model, tokenizer, prompts, max_new_tokens, seed, 1.0)

    monkeypatch.setattr(train_ppo, "sample_replies", at_1)
    with pytest.raises(AssertionError, match="the sampler's log-probabilities are off by"):
        run("ppo", tmp_path, temperature=0.7)


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_a_reference_that_is_not_the_policy_is_noticed_at_the_first_step(
    chain, tmp_path, monkeypatch, stage
):
    prepare(chain, tmp_path)
    loaded = []

    def differing(*args):
        model, checkpoint = load_model(*args)
        model.ln_f.bias.data += 0.3 * len(loaded)  # the second one is another
        loaded.append(model)
        return model, checkpoint

    monkeypatch.setattr(SCRIPTS[stage], "load_init", differing)
    with pytest.raises(AssertionError, match="policy and reference"):
        run(stage, tmp_path)


def test_a_reference_that_moves_is_noticed_before_there_are_results(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path)
    models = []
    monkeypatch.setattr(train_ppo, "set_speed", lambda cfg, *given: models.extend(given))

    def average_and_move(model, max_norm):
        _, ref, *_ = models
        ref.ln_f.weight.data += 1e-6
        return average_gradients(model, max_norm)

    monkeypatch.setattr(train_ppo, "average_gradients", average_and_move)
    with pytest.raises(AssertionError, match="the reference must not move"):
        run("ppo", tmp_path, iterations=1)
    assert not (tmp_path / "ppo").exists()


def test_a_ratio_that_is_not_1_before_any_update_stops_ppo(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path)

    def off_while_learning(*args):
        logprobs, entropy = response_logprobs(*args)
        return logprobs + 0.02 * torch.is_grad_enabled(), entropy

    monkeypatch.setattr(train_ppo, "response_logprobs", off_while_learning)
    with pytest.raises(AssertionError, match="a ratio is off by 0.02.* before any update"):
        run("ppo", tmp_path)


def test_first_losses_that_are_not_ln_2_stop_the_reward_model_and_dpo(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path)
    monkeypatch.setattr(train_dpo, "dpo_loss", lambda *args: dpo_loss(*args) + 0.02)
    with pytest.raises(AssertionError, match="ln 2"):
        run("dpo", tmp_path)
    monkeypatch.setattr(train_rm, "preference_loss", lambda *args: preference_loss(*args) + 1e-5)
    with pytest.raises(AssertionError, match="ln 2"):
        run("rm", tmp_path)


@pytest.mark.parametrize("off", [1.0, -1.0])
def test_a_policy_that_reads_all_pairs_differently_stops_dpo(chain, tmp_path, monkeypatch, off):
    """Chosen and rejected alike, up or down: the margin is 0, and the loss ln 2."""
    prepare(chain, tmp_path)

    def off_while_learning(*args):
        return sequence_logprobs(*args) + off * torch.is_grad_enabled()

    monkeypatch.setattr(train_dpo, "sequence_logprobs", off_while_learning)
    with pytest.raises(AssertionError, match="policy and reference start as the same model"):
        run("dpo", tmp_path)


def test_dpo_with_a_term_that_keeps_chosen_likely_does_not_begin_at_ln_2(chain, tmp_path):
    prepare(chain, tmp_path)
    run("dpo", tmp_path, nll=0.2)
    assert column(tmp_path / "dpo", "loss")[0] > math.log(2) + 0.1


def test_a_conversation_without_a_response_stops_sft(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path, "sft")

    def without_mask(tokenizer, messages):
        ids, _ = encode_chat(tokenizer, messages)
        return ids, [0] * len(ids)

    monkeypatch.setattr(train_sft, "encode_chat", without_mask)
    with pytest.raises(AssertionError, match="a row without a supervised token"):
        run("sft", tmp_path)


def test_every_process_samples_with_luck_of_its_own(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path)
    seeds = {0: [], 1: []}

    def noted(model, tokenizer, prompts, max_new_tokens, seed, temperature):
        seeds[rank].append(seed)
        return sample_replies(model, tokenizer, prompts, max_new_tokens, seed, temperature)

    monkeypatch.setattr(train_ppo, "sample_replies", noted)
    for rank in (0, 1):
        monkeypatch.setattr(train_ppo, "RANK", rank)
        run("ppo", tmp_path, iterations=3)
    assert len(set(seeds[0])) == 4  # three iterations, and a greedy evaluation
    assert not {*seeds[0]} & {*seeds[1]} - {0}


def test_every_response_is_paid_its_own_score_at_its_last_token(chain, tmp_path, monkeypatch):
    """On their way from the sampler to the loss responses are sorted by length: scores as well?"""
    prepare(chain, tmp_path)
    padded, paid, pad, gae = [], [], train_ppo.pad, train_ppo.gae

    def watched_pad(rows, value):
        padded.append(rows)
        return pad(rows, value)

    def watched_gae(rewards, *rest):
        paid.append(rewards.tolist())
        return gae(rewards, *rest)

    monkeypatch.setattr(train_ppo, "pad", watched_pad)
    monkeypatch.setattr(train_ppo, "gae", watched_gae)
    options = dict(beta=0.0, target_kl=0.0)  # without a penalty, all reward is the score
    run("ppo", tmp_path, iterations=1, rollouts=32, **options)
    reward_model, checkpoint = load_model(tmp_path / "rm" / "ckpt.pt", kind=ScalarModel)
    end, scores = load_tokenizer(checkpoint["tokenizer"]).end, []
    for ids, rewards in zip(padded[0], paid[0], strict=True):
        scores.append(reward_model(torch.tensor([ids]))[0, -1].item() if ids[-1] == end else -2.0)
        before, after = [0.0] * (len(ids) - 2), [0.0] * (len(rewards) - len(ids) + 1)
        assert rewards == pytest.approx([*before, scores[-1], *after], abs=1e-4)
    assert 0 < scores.count(-2.0) < len(scores) - 2  # some of both kinds


def test_an_entropy_bonus_keeps_the_policy_from_settling(chain, tmp_path):
    prepare(chain, tmp_path)
    options = dict(iterations=6, lr=1e-2, warmup=0, reward="gold", beta=0.0, target_kl=0.0)
    run("ppo", tmp_path, name="without", **options)
    run("ppo", tmp_path, name="with", **options, entropy_bonus=5.0)
    without, with_bonus = (column(tmp_path / x, "entropy")[-1] for x in ("without", "with"))
    assert with_bonus > without


def test_the_size_of_a_microbatch_does_not_change_what_ppo_learns(chain, tmp_path):
    norms = []
    for microbatch in (2, 4):
        out = tmp_path / str(microbatch)
        prepare(chain, out)
        last = run("ppo", out, iterations=1, microbatch=microbatch)
        norms.append([last["policy_grad_norm"], last["critic_grad_norm"]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_scores_of_sft_samples_that_end_have_mean_0_and_sd_1(chain):
    sft, checkpoint = load_model(chain / "sft" / "ckpt.pt")
    reward_model, _ = load_model(chain / "rm" / "ckpt.pt", kind=ScalarModel)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    rows = [json.loads(line) for line in (chain / "preferences.jsonl").read_text().splitlines()]
    rows, _ = held_out(rows)
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in rows]
    replies = sample_replies(sft, tokenizer, prompts, TINY["rm"]["max_new_tokens"], seed=0)
    pairs = zip(prompts, replies)
    sequences = [prompt + reply.ids for prompt, reply in pairs if reply.ended]
    scores = train_rm.score_sequences(reward_model, sequences, tokenizer.pad)
    assert 10 < len(scores) < len(prompts)
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3


def test_where_no_sample_ends_scores_of_unfinished_responses_have_mean_0_and_sd_1(
    chain, tmp_path, monkeypatch
):
    prepare(chain, tmp_path, "rm")
    sequences = []

    def endless(model, tokenizer, prompts, *how):
        replies = sample_replies(model, tokenizer, prompts, *how)
        sequences.extend(prompt + reply.ids for prompt, reply in zip(prompts, replies))
        return [reply._replace(ended=False) for reply in replies]

    monkeypatch.setattr(train_rm, "sample_replies", endless)
    run("rm", tmp_path)
    reward_model, checkpoint = load_model(tmp_path / "rm" / "ckpt.pt", kind=ScalarModel)
    pad = load_tokenizer(checkpoint["tokenizer"]).pad
    scores = train_rm.score_sequences(reward_model, sequences, pad)
    assert abs(scores.mean()) < 1e-3 and abs(scores.std() - 1) < 1e-3


def test_a_reward_model_is_normalised_on_samples_from_all_of_a_large_file(
    chain, tmp_path, monkeypatch
):
    """On about 512 of them, since more would tell no more."""
    shutil.copytree(chain / "sft", tmp_path / "sft")
    rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(1800)]
    write_rows(rows, tmp_path / "rows.jsonl")
    asked = []

    def noted(model, tokenizer, prompts, *how):
        asked.extend(int(tokenizer.decode(ids)[:-1]) for ids in prompts)
        return sample_replies(model, tokenizer, prompts, *how)

    monkeypatch.setattr(train_rm, "sample_replies", noted)
    run("rm", tmp_path, data=str(tmp_path / "rows.jsonl"), batch_size=1000, max_new_tokens=2)
    assert asked == list(range(0, 1620, 3))  # every third of those that are not held out


def test_a_file_of_few_prompts_is_asked_again_and_again(chain, tmp_path, monkeypatch):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    rows = [{"prompt": f"Say {i}.", "response": f"{i}"} for i in range(5)]
    write_rows(rows, tmp_path / "rows.jsonl")
    options = dict(reward="exact", data=str(tmp_path / "rows.jsonl"), iterations=1)
    assert run("ppo", tmp_path, **options)["no_end"] < 1  # 8 rollouts of 4 prompts


def test_groups_are_of_different_prompts_where_there_are_enough(chain, tmp_path, monkeypatch):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    rows = [{"prompt": f"Say {i}.", "response": f"{i}"} for i in range(5)]
    write_rows(rows, tmp_path / "rows.jsonl")
    counts = []

    def noted(model, tokenizer, prompts, *how, **more):
        counts.append(sorted(Counter(map(tuple, prompts)).values()))
        return sample_replies(model, tokenizer, prompts, *how, **more)

    monkeypatch.setattr(train_ppo, "sample_replies", noted)
    options = dict(reward="exact", data=str(tmp_path / "rows.jsonl"), eval_every=100)
    run("ppo", tmp_path, **options, advantage="rloo", group=2)
    assert counts == [[2, 2, 2, 2]] * 4 + [[1]]  # 4 iterations of 8 rollouts, one held-out prompt


def test_a_reward_model_that_reads_other_tokens_is_refused(chain, tmp_path):
    prepare(chain, tmp_path)
    checkpoint = torch.load(tmp_path / "rm" / "ckpt.pt", weights_only=True)
    checkpoint["tokenizer"]["merges"][-1] = [0, 1]
    torch.save(checkpoint, tmp_path / "rm" / "ckpt.pt")
    with pytest.raises(InputError, match="rm/ckpt.pt has another tokenizer than .*sft/ckpt.pt"):
        run("ppo", tmp_path)


@pytest.mark.parametrize("made_from, is_noted", [({}, False), ({"init": "0" * 16}, True)])
def test_a_reward_model_of_another_model_is_noted_but_not_one_of_an_unknown_model(
    chain, tmp_path, capsys, made_from, is_noted
):
    path = tmp_path / "ckpt.pt"
    checkpoint = torch.load(chain / "rm" / "ckpt.pt", weights_only=True)
    save_checkpoint(path, {**checkpoint, "made_from": made_from})
    _, sft = load_model(chain / "sft" / "ckpt.pt")
    train_ppo.load_reward_model(train_ppo.Config(rm=str(path)), sft, "cpu")
    assert ("was trained from another model" in capsys.readouterr().out) == is_noted


@pytest.mark.parametrize("reward, with_data", [("gold", True), ("best", True), ("best", False)])
def test_a_reward_that_cannot_be_had_is_a_clear_error(reward, with_data):
    with pytest.raises(ValueError, match=f"--reward {reward}: there are rm, exact and, without --"):
        train_ppo.Config(reward=reward, data="rows.json" * with_data)


def test_what_cannot_be_done_without_a_critic_is_a_clear_error():
    with pytest.raises(ValueError, match="--advantage ppo: there are gae, rloo, grpo and dr_grpo"):
        train_ppo.Config(advantage="ppo")
    for group in (1, 0, 5):
        with pytest.raises(ValueError, match=f"--group {group}: .* divides --rollouts 128"):
            train_ppo.Config(advantage="rloo", group=group)
    train_ppo.Config(group=5)  # with a critic it does not matter
    for kl in ("k4-loss", "k1", "k1-score"):
        with pytest.raises(ValueError, match=f"--kl {kl}: it is k1, k2 or k3, then -reward or -l"):
            train_ppo.Config(kl=kl)


def test_without_a_critic_a_run_is_stopped_and_resumed_to_the_same_bits(
    chain, tmp_path, monkeypatch
):
    options = dict(advantage="grpo", group=4, kl="k3-loss")
    shutil.copytree(chain / "sft", tmp_path / "sft")
    shutil.copytree(chain / "rm", tmp_path / "rm")
    run("ppo", tmp_path, **options, name="whole")
    interrupt("ppo", tmp_path, monkeypatch, **options)
    run("ppo", tmp_path, **options, resume=True)
    assert same(tmp_path / "ppo", tmp_path / "whole")
    log = (tmp_path / "ppo" / "log.csv").read_text()
    assert log == (tmp_path / "whole" / "log.csv").read_text()
    assert "equal_groups" in log and "critic" not in log and "value" not in log


def test_ppo_with_tasks_asks_these_kinds_alone_as_often_as_their_weights_say(
    chain, tmp_path, monkeypatch
):
    """To learn from and to be measured on, whatever the reward."""
    prepare(chain, tmp_path)
    asked, task_rows = [], train_ppo.task_rows
    monkeypatch.setattr(train_ppo, "task_rows", lambda x: asked.append(x) or task_rows(x))
    for reward in ("rm", "gold", "exact"):
        run("ppo", tmp_path, reward=reward, tasks="chain:3,and_sums", iterations=1)
        trained, tested = ([task.kind for task in tasks] for tasks in asked[-2:])
        assert (trained.count("chain"), trained.count("and_sums")) == (6, 2)
        assert (tested.count("chain"), tested.count("and_sums")) == (113, 37)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_tasks_that_there_are_not_are_named_with_those_that_there_are(chain, tmp_path, stage):
    prepare(chain, tmp_path, stage)
    for tasks, wrong in (("sum", "'sum'"), ("one_sum,fact:many", "'fact:many'")):
        message = f"--tasks {tasks}: {wrong} is not kind or kind:weight; the kinds are one_sum"
        with pytest.raises(InputError, match=message):
            run(stage, tmp_path, tasks=tasks)
    with pytest.raises(InputError, match="--tasks fact:0: all weights are 0"):
        run(stage, tmp_path, tasks="fact:0")


def test_rows_without_an_answer_are_not_asked_where_answers_are_rewarded(
    chain, tmp_path, monkeypatch, capsys
):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    rows = [{"prompt": f"Say {i}."} | ({"response": "1"} if i % 3 else {}) for i in range(12)]
    write_rows(rows, tmp_path / "rows.jsonl")
    asked = set()

    def noted(model, tokenizer, prompts, *how, **more):
        asked.update(tokenizer.decode(ids) for ids in prompts)
        return sample_replies(model, tokenizer, prompts, *how, **more)

    monkeypatch.setattr(train_ppo, "sample_replies", noted)
    options = dict(reward="exact", data=str(tmp_path / "rows.jsonl"))
    run("ppo", tmp_path, **options)
    assert asked == {f"Say {i}." for i in range(12) if i % 3}
    assert "left out 4 of 12 rows" in capsys.readouterr().out
    write_rows(rows[::3], tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="--reward exact needs responses to compare with"):
        run("ppo", tmp_path, **options)


@pytest.mark.parametrize(
    "loss, at_start",
    [("cdpo", math.log(2)), ("ipo", (0 - 1 / (2 * 0.4)) ** 2), ("simpo", None)],
)
def test_every_variant_of_dpo_starts_where_its_formula_says_and_learns(
    chain, tmp_path, loss, at_start
):
    prepare(chain, tmp_path)
    run("dpo", tmp_path, loss=loss, lr=3e-3, epochs=6, eval_every=100)
    losses = column(tmp_path / "dpo", "loss")
    assert at_start is None or losses[0] == pytest.approx(at_start, abs=1e-3)
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


# ---------------------------------------------------------------------------------------------
# Bad input


def test_missing_earlier_stage_names_the_command_to_run(tmp_path):
    for stage, needed in (("sft", "pretrain"), ("rm", "sft"), ("ppo", "sft"), ("dpo", "sft")):
        with pytest.raises(InputError, match=f"run `python train_{needed}.py --out .*` first"):
            run(stage, tmp_path)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_missing_preferences_name_their_command_and_no_stage_samples_them(
    chain, tmp_path, monkeypatch, stage
):
    """What a stage costs would else depend on which of the two came first."""
    monkeypatch.setattr("data.preferences.sample_pairs", lambda *_: pytest.fail("pairs sampled"))
    shutil.copytree(chain / "sft", tmp_path / "sft")
    with pytest.raises(InputError, match="preferences.jsonl: run `python -m data.preferences`"):
        run(stage, tmp_path)
    assert not (tmp_path / "preferences.jsonl").exists()
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    before = (tmp_path / "preferences.jsonl").read_bytes()
    os.utime(tmp_path / "preferences.jsonl", (0, 0))  # older than the model: still left alone
    run(stage, tmp_path)
    assert (tmp_path / "preferences.jsonl").read_bytes() == before


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_preferences_about_another_model_are_noted_by_who_learns_from_them(
    chain, tmp_path, capsys, stage
):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    text = (chain / "preferences.jsonl").read_text()
    (tmp_path / "preferences.jsonl").write_text(text)
    run(stage, tmp_path)
    assert "responses of another model" not in capsys.readouterr().out
    sampled_from = json.loads(text.splitlines()[0])["sampled_from"]
    (tmp_path / "preferences.jsonl").write_text(text.replace(sampled_from, "0" * 16))
    run(stage, tmp_path)
    assert "responses of another model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage, options, message",
    [
        ("pretrain", dict(n_head=3, n_embd=128), "--n_head 3 must divide --n_embd 128"),
        ("pretrain", dict(context=1), "--context 1: a text of two tokens is the shortest"),
        ("pretrain", dict(optimizer="sgd"), "--optimizer sgd: there are muon and adamw"),
        ("ppo", dict(temperature=0), "--temperature 0: PPO learns from samples"),
        ("ppo", dict(target_kl=1.0, beta=0.0), "--target_kl adapts --beta by factors"),
        ("ppo", dict(reward="best"), "--reward best: there are rm, exact"),
        ("ppo", dict(tasks="fact", data="x.jsonl"), "--tasks are those of the town: with --data"),
        ("sft", dict(tasks="fact", data="x.jsonl"), "--tasks are those of the town: with --data"),
        ("dpo", dict(beta=0), "--beta 0: preferences would count for nothing"),
        ("dpo", dict(loss="dop"), "--loss dop: there are dpo, cdpo, ipo and simpo"),
    ],
)
def test_config_that_makes_no_sense_cannot_be_made(stage, options, message):
    """As a ValueError, which a notebook can catch; on the command line argparse says it."""
    with pytest.raises(ValueError, match=message):
        SCRIPTS[stage].Config(**options)


def test_option_that_does_not_fit_the_checkpoint_is_a_clear_error(chain, tmp_path):
    with pytest.raises(InputError, match="--n_layer 9: .*sft/ckpt.pt has 1"):
        run("rm", tmp_path, init=str(chain / "sft/ckpt.pt"), n_layer=9)


def test_questions_of_the_town_that_fill_the_context_stop_dpo_before_it_trains(
    chain, tmp_path, monkeypatch
):
    prepare(chain, tmp_path)
    model, checkpoint = load_model(tmp_path / "sft" / "ckpt.pt")
    long = Task("one_sum", "7" + "a7" * 46, Case("7.", "8.", {}))
    ids = encode_prompt(load_tokenizer(checkpoint["tokenizer"]), long.messages)
    assert len(ids) == model.config.context  # every letter and every digit is a token
    monkeypatch.setattr(train_dpo, "draw_tasks", lambda *_, **how: [long])
    with pytest.raises(InputError, match="questions of the town leave no room for a response"):
        run("dpo", tmp_path)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_files_that_are_not_named_are_those_of_the_folder_of_all_runs(stage):
    Config = SCRIPTS[stage].Config
    resolve = getattr(Config, "resolved", lambda cfg: cfg)
    found = asdict(resolve(replace(Config(), out="here")))  # also if --out is set afterwards
    for name in ("init", "data", "rm"):
        assert found.get(name, "") in ("", *(f"here/{file}" for file in FILES[stage].split())), name
    assert set(FILES[stage].split()) <= {str(x).removeprefix("here/") for x in found.values()}
    named = asdict(resolve(Config(out="here", init="there.pt", data="there.json")))
    assert (named["init"], named["data"]) == ("there.pt", "there.json")


FILES = {
    "pretrain": "",
    "sft": "pretrain/ckpt.pt",
    "rm": "sft/ckpt.pt preferences.jsonl",
    "ppo": "sft/ckpt.pt rm/ckpt.pt",
    "dpo": "sft/ckpt.pt preferences.jsonl",
}


def test_gradients_are_clipped_to_a_largest_norm_and_0_means_off():
    for largest, expected in ((2.0, [1.2, 1.6]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])):
        model = torch.nn.Linear(2, 1, bias=False)
        (3 * model.weight[0, 0] + 4 * model.weight[0, 1]).backward()
        assert average_gradients(model, largest) == 5.0
        torch.testing.assert_close(model.weight.grad, torch.tensor([expected]))


# ---------------------------------------------------------------------------------------------
# Your own data


def test_all_stages_run_on_files_of_your_own(tmp_path):
    text = "\n".join(f"Line {i} of some book, and {i} more." for i in range(800))
    (tmp_path / "book.txt").write_text(text)
    rows = [
        {
            "instruction": "Say a number.",
            "input": str(i),
            "output": f"{i}!",
            "chosen": f"{i}!",
            "rejected": "No.",
        }
        for i in range(100)
    ]
    rows[7]["instruction"] = "Say " * 200  # does not fit the context
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    run("pretrain", out, data=str(tmp_path / "book.txt"), context=48)
    for stage in ("sft", "rm", "ppo", "dpo"):
        numbers = run(stage, out, data=str(tmp_path / "rows.json"))
        header = (out / stage / "log.csv").read_text().split("\n")[0].split(",")
        assert "gold" not in header  # no gold reward here: no column, rather than zeros
        assert numbers
    assert "gold_order" not in torch.load(out / "rm" / "ckpt.pt", weights_only=True)["report"]


def test_dpo_asks_nothing_of_the_town_where_some_pairs_are_of_elsewhere(
    chain, tmp_path, monkeypatch
):
    prepare(chain, tmp_path)
    path = tmp_path / "preferences.jsonl"
    first, *others = map(json.loads, path.read_text().splitlines())
    write_rows([{k: first[k] for k in ("messages", "chosen", "rejected")}, *others], path)
    monkeypatch.setattr(train_dpo, "draw_tasks", lambda *_, **how: pytest.fail("it asks"))
    assert "gold" not in run("dpo", tmp_path)


def test_characters_and_a_single_text_can_be_pretrained_on(tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, " * 100)
    numbers = run(
        "pretrain",
        tmp_path,
        data=str(tmp_path / "book.txt"),
        tokenizer="char",
        context=16,
        lr=0.01,
        steps=80,
        eval_every=80,
        save_every=80,
    )
    assert numbers["val_loss"] < 0.7  # ln 9 = 2.2 at the start; what it has read decides the rest
    bits = numbers["val_loss"] / math.log(2)  # one character is one byte here
    assert numbers["bits_per_byte"] == pytest.approx(bits)
