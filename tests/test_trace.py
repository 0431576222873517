"""--trace: its numbers are those of loops that read one token at a time."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from data import talk
from data.chat import Reply, encode_prompt, question
from data.tokenizer import load_tokenizer
from data.trace import draw, inside_pair, inside_ppo, tokens_of
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
