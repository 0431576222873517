"""--trace: its numbers are those of loops that read one token at a time."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from data import talk
from data.chat import Reply, encode_prompt, question, sample_replies
from data.tokenizer import load_tokenizer
from data.trace import draw, inside_pair, inside_ppo, load_stages, tokens_of
from gpt import InputError, ScalarModel, load_checkpoint, load_model, save_checkpoint
from train_dpo import Config as DPOConfig
from train_ppo import Config as PPOConfig


@pytest.fixture
def models(chain):
    """(policy, ref, reward model, tokenizer) of a tiny run; all of them differ."""
    policy, checkpoint = load_model(chain / "ppo" / "ckpt.pt")
    ref, _ = load_model(chain / "sft" / "ckpt.pt")
    reward_model, _ = load_model(chain / "rm" / "ckpt.pt", kind=ScalarModel)
    return policy, ref, reward_model, load_tokenizer(checkpoint["tokenizer"])


def conversation(tokenizer, *texts):
    """The row of a prompt, and replies to it."""
    row = {"ids": encode_prompt(tokenizer, question("What is 12-5?"))}
    replies = [Reply(tokenizer.encode(text) + [tokenizer.end], text, True) for text in texts]
    return row, replies


@torch.no_grad()
def log_ratios(policy, ref, row, reply):
    """log pi - log pi_ref of every token of a reply, one forward pass for each."""
    found = []
    for t, token in enumerate(reply.ids):
        ids = torch.tensor([row["ids"] + reply.ids[:t]])
        logp, logq = ((m(ids)[0, -1] @ m.head.T).log_softmax(0)[token] for m in (policy, ref))
        found.append((logp - logq).item())
    return found


@pytest.mark.parametrize("ended", [True, False])
def test_what_ppo_sees_of_a_reply_is_what_a_loop_over_its_tokens_finds(models, ended):
    policy, ref, reward_model, tokenizer = models
    row, (reply,) = conversation(tokenizer, "12-5 is 7. Have a lovely day!")
    cfg, reply = PPOConfig(beta=0.3, gamma=0.9, lam=0.8), reply._replace(ended=ended)
    found = inside_ppo(policy, ref, reward_model, [row], [reply], cfg, tokenizer.pad)
    n, first = len(reply.ids), len(row["ids"]) - 1
    assert found["mask"].tolist() == [[False] * first + [True] * n]
    found = {name: values[0, first:].tolist() for name, values in found.items()}

    ratios = log_ratios(policy, ref, row, reply)
    with torch.no_grad():
        read = reward_model(torch.tensor([row["ids"] + reply.ids]))[0].tolist()
    rewards = [-0.3 * ratio for ratio in ratios]
    rewards[-1] += read[-1] if ended else cfg.no_end_score
    values = read[first:-1] + [0.0]  # nothing comes after the last token
    advantages, after = [], 0.0
    for t in reversed(range(n)):
        after = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * after
        advantages.insert(0, after)
    close = dict(abs=1e-4)
    assert found["pi / pi_ref"] == pytest.approx(torch.tensor(ratios).exp().tolist(), **close)
    assert found["penalty"] == pytest.approx([-0.3 * ratio for ratio in ratios], **close)
    assert found["reward R"] == pytest.approx(rewards, **close)
    assert found["value V"] == pytest.approx(values[:-1], **close)
    assert found["advantage A"] == pytest.approx(advantages, **close)
    difference = torch.tensor(found["log pi"]) - torch.tensor(found["log pi_ref"])
    assert difference.tolist() == pytest.approx(ratios, **close) and max(map(abs, ratios)) > 1e-3


def test_what_dpo_and_the_reward_model_see_of_a_pair_is_what_loops_find(models):
    policy, ref, reward_model, tokenizer = models
    row, replies = conversation(tokenizer, "12-5 is 7. Have a lovely day!", "No.")
    found = inside_pair(
        policy, ref, reward_model, [row] * 2, replies, DPOConfig(beta=0.5), tokenizer.pad
    )
    h, scores, first = [], [], len(row["ids"]) - 1
    for i, reply in enumerate(replies):
        ratios, n = log_ratios(policy, ref, row, reply), len(reply.ids)
        rewards = found["implicit reward"][i]
        assert rewards[first : first + n].tolist() == pytest.approx(
            [0.5 * ratio for ratio in ratios], abs=1e-4
        )
        assert (rewards[:first] == 0).all() and (rewards[first + n :] == 0).all()
        read = []
        for t in range(n):
            with torch.no_grad():
                read.append(reward_model(torch.tensor([row["ids"] + reply.ids[: t + 1]]))[0, -1])
        so_far = found["score so far"][i]
        torch.testing.assert_close(so_far[first : first + n], torch.stack(read), atol=1e-4, rtol=0)
        h.append(sum(ratios))
        scores.append(read[-1].item())
    margin = torch.tensor(0.5 * (h[0] - h[1]))
    assert found["margin"] == pytest.approx(margin.item(), abs=1e-4)
    assert found["dpo_loss"] == pytest.approx(-margin.sigmoid().log().item(), abs=1e-4)
    off = torch.tensor(scores[0] - scores[1])
    assert found["rm_loss"] == pytest.approx(-off.sigmoid().log().item(), abs=1e-4)


@pytest.mark.parametrize("kl", ["k2-reward", "k1-loss"])
def test_a_trace_obeys_the_temperature_and_the_kl_of_its_run(models, kl):
    policy, ref, reward_model, tokenizer = models
    row, (reply,) = conversation(tokenizer, "12-5 is 7.")
    cfg = PPOConfig(kl=kl, temperature=0.5, beta=0.3)
    found = inside_ppo(policy, ref, reward_model, [row], [reply], cfg, tokenizer.pad)
    first, n = len(row["ids"]) - 1, len(reply.ids)
    ids = torch.tensor([row["ids"] + reply.ids[:-1]])
    with torch.no_grad():
        logprobs = ((model(ids)[0, first:] @ model.head.T / 0.5) for model in (policy, ref))
        p, q = (logits.log_softmax(1)[range(n), reply.ids] for logits in logprobs)
    penalty = -0.3 * (p - q) ** 2 / 2 if kl == "k2-reward" else 0 * p
    assert (p - q).abs().max() > 1e-3
    for name, wanted, end in (("log pi", p, n), ("penalty", penalty, n), ("reward R", penalty, -1)):
        torch.testing.assert_close(found[name][0, first:][:end], wanted[:end], atol=1e-5, rtol=1e-4)


def test_the_margin_of_a_loss_that_divides_by_length_divides_by_that_of_each_reply(models):
    policy, ref, reward_model, tokenizer = models
    row, replies = conversation(tokenizer, "12-5 is 7. Have a lovely day!", "No.")
    cfg = DPOConfig(loss="simpo")
    found = inside_pair(policy, ref, reward_model, [row] * 2, replies, cfg, tokenizer.pad)
    means = []
    for reply in replies:
        ids, first = torch.tensor([row["ids"] + reply.ids[:-1]]), len(row["ids"]) - 1
        with torch.no_grad():
            logprobs = (policy(ids)[0, first:] @ policy.head.T).log_softmax(1)
        means.append(logprobs[range(len(reply.ids)), reply.ids].mean().item())
    assert found["margin"] == pytest.approx(cfg.beta * (means[0] - means[1]), abs=1e-4)


def test_tokens_are_shown_as_what_they_add_to_the_text(models):
    tokenizer = models[-1]
    _, (reply,) = conversation(tokenizer, "12-5 is 7. Rubu!")
    tokens = tokens_of(tokenizer, reply)
    assert len(tokens) == len(reply.ids) and tokens[-1] == "<|end|>"
    assert "".join(tokens[:-1]).lstrip("·") == "12-5·is·7.·Rubu!"


def test_a_trace_is_two_pages_of_numbers_and_a_picture(chain, tmp_path, capsys):
    shutil.copytree(chain, tmp_path / "out")
    talk.main(talk.Config(out=str(tmp_path / "out"), trace="What is 4-2?", max_new_tokens=12))
    said = capsys.readouterr().out
    of_ppo, of_pair = re.findall(r"^token .*", said, re.M)
    assert of_ppo.split()[1:3] == ["log", "pi"] and of_pair.count("implicit reward") == 2
    assert (tmp_path / "out" / "trace.png").stat().st_size > 30_000
    last = float(re.search(r"The score of the response, (\S+), arrives", said)[1])
    *_, row = said[: said.index("\nThe score of the")].rstrip().split("\n")
    penalty, reward = map(float, row.split()[-4:-2])
    assert last == pytest.approx(reward - penalty, abs=2e-3) and "\nchosen: " in said
    margin, loss = map(float, re.search(r"margin (\S+), loss (\S+)", said).groups())
    assert loss == pytest.approx(-torch.tensor(margin).sigmoid().log().item(), abs=1e-3)


def test_a_trace_asks_the_policy_and_twice_the_sft_model_and_names_the_better_one_chosen(
    chain, tmp_path, capsys
):
    out = shutil.copytree(chain, tmp_path / "out")
    checkpoint = load_checkpoint(out / "ppo" / "ckpt.pt")
    checkpoint["train_config"]["temperature"] = 0.7
    save_checkpoint(out / "ppo" / "ckpt.pt", checkpoint)
    (policy, _), (dpo, _), (ref, of_sft) = (
        load_model(out / name / "ckpt.pt") for name in ("ppo", "dpo", "sft")
    )
    reward_model, _ = load_model(out / "rm" / "ckpt.pt", kind=ScalarModel)
    tokenizer = load_tokenizer(of_sft["tokenizer"])
    ids = encode_prompt(tokenizer, question("Hi?"))
    talk.main(talk.Config(out=str(out), trace="Hi?", max_new_tokens=9, seed=3))
    text = capsys.readouterr().out

    def say(model, n, temperature):
        return sample_replies(model, tokenizer, [ids] * n, 9, 3, temperature)

    def score(reply):
        with torch.no_grad():
            return reward_model(torch.tensor([ids + reply.ids]))[0, -1].item()

    (said,) = say(policy, 1, 0.7)
    pair = sorted(say(ref, 2, 1.0), key=score, reverse=True)
    assert f") says: {said.text}\n" in text
    assert f"\nchosen: {pair[0].text}\nrejected: {pair[1].text}\n" in text
    row, beta = {"ids": ids}, talk.load_init(out / "dpo/ckpt.pt")[1]["train_config"]["beta"]
    rewards = [beta * sum(log_ratios(dpo, ref, row, reply)) for reply in pair]
    numbers = re.search(r"implicit rewards (\S+) and (\S+), margin (\S+), loss", text).groups()
    wanted = [*rewards, rewards[0] - rewards[1]]
    assert list(map(float, numbers)) == pytest.approx(wanted, abs=2e-3)
    numbers = re.search(r"reward model: scores (\S+) and (\S+), loss (\S+)", text).groups()
    loss = -torch.tensor(score(pair[0]) - score(pair[1])).sigmoid().log().item()
    assert list(map(float, numbers)) == pytest.approx([*map(score, pair), loss], abs=2e-3)
    # Beside one another, the tables of both: a token, its implicit reward, the score so far.
    tables = text[text.index("beside it rejected:") :].split("\n")[2:]
    first = [float(tables[0][50 * i + 12 :].split()[0]) for i in (0, 1)]
    wanted = [beta * log_ratios(dpo, ref, row, reply)[0] for reply in pair]
    assert first == pytest.approx(wanted, abs=2e-3)
    assert "was trained from another model" not in text


def test_a_model_of_another_sft_model_or_of_a_smaller_context_is_named(chain, tmp_path, capsys):
    out = shutil.copytree(chain, tmp_path / "out")
    checkpoint = load_checkpoint(out / "dpo" / "ckpt.pt")
    checkpoint["made_from"]["init"] = "another"
    save_checkpoint(out / "dpo" / "ckpt.pt", checkpoint)
    loaded = load_stages(out, "cpu")
    said = capsys.readouterr().out
    assert f"note: {out}/dpo/ckpt.pt was trained from another model than {out}/sft" in said
    assert said.count("note: ") == 1 and list(loaded) == ["sft", "rm", "ppo", "dpo"]
    checkpoint["model_config"]["context"] -= 1
    checkpoint["model"]["wpe.weight"] = checkpoint["model"]["wpe.weight"][:-1].clone()
    save_checkpoint(out / "dpo" / "ckpt.pt", checkpoint)
    with pytest.raises(InputError, match="dpo/ckpt.pt has a smaller context than .*sft"):
        load_stages(out, "cpu")


def test_dollars_in_a_response_are_drawn_as_they_are(tmp_path):
    said = "It was $5, 10 % off, is $4.50"  # no formula, and as one it would be wrong
    draw(tmp_path / "a.png", [(said, said.split(), {"value V": [0.0] * 8})] * 2)
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("missing", ["rm", "dpo"])
def test_a_trace_needs_all_stages_and_names_the_one_that_is_missing(chain, tmp_path, missing):
    shutil.copytree(chain, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / missing)
    wanted = f"--trace needs .*{missing}/ckpt.pt: run `python train_{missing}.py` first"
    with pytest.raises(InputError, match=wanted):
        talk.main(talk.Config(out=str(tmp_path / "out"), trace="Hi."))


def test_a_model_that_reads_other_tokens_is_named(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "out")
    path = Path(tmp_path / "out" / "ppo" / "ckpt.pt")
    checkpoint = load_checkpoint(path)
    checkpoint["tokenizer"] = {**checkpoint["tokenizer"], "merges": []}
    save_checkpoint(path, checkpoint)
    with pytest.raises(
        InputError, match="ppo/ckpt.pt has another tokenizer or stage than it should: train"
    ):
        talk.main(talk.Config(out=str(tmp_path / "out"), trace="Hi."))
