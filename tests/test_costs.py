"""What a run costs, counted by hand: one unit for all stages, and padding is free.

The unit is a forward pass of the language model over one token; a backward pass is two. So a
training pass over a token costs 3, whatever the batch it is in was padded to.
"""

import json

import numpy as np
import pytest
from tiny_runs import TINY, prepare, run

import train_pretrain
from data.chat import encode_chat, encode_prompt, encode_reply, length_batches, sample_replies
from data.files import held_out, read_preferences
from data.tokenizer import load_tokenizer
from data.town.demonstrations import demonstrations
from gpt import load_checkpoint


def cost(folder):
    return json.loads((folder / "cost.json").read_text())["forward_equivalents"]


def read_tokenizer(chain):
    return load_tokenizer(load_checkpoint(chain / "sft" / "ckpt.pt")["tokenizer"])


def lengths_of_pairs(chain):
    """(N, 2): tokens of every pair to train on, of prompt + chosen and of prompt + rejected."""
    tokenizer, lengths = read_tokenizer(chain), []
    rows, test_rows = held_out(read_preferences(chain / "preferences.jsonl"))
    for row in rows + test_rows:
        prompt = len(encode_prompt(tokenizer, row["messages"]))
        sides = (len(encode_reply(tokenizer, row[side])) for side in ("chosen", "rejected"))
        lengths.append([prompt + n for n in sides])
    return np.array(lengths[: len(rows)]), np.array(lengths)


def trained_on(lengths, size):
    """Tokens of an epoch. Its batches are of similar length; an incomplete last one is dropped."""
    longer = lengths.max(1)
    return sum(lengths[batch].sum() for batch in length_batches(longer, size, of_epoch_0()))


def of_epoch_0():
    return np.random.default_rng([0, 0])  # seed, epoch


def test_pretraining_costs_three_passes_over_full_contexts(chain):
    steps, batch, context = 6, 4, train_pretrain.Config().context
    assert (TINY["pretrain"]["steps"], TINY["pretrain"]["batch_size"]) == (steps, batch)
    assert cost(chain / "pretrain") == 3 * steps * batch * context


def test_sft_costs_three_passes_over_its_conversations(chain):
    tokenizer = read_tokenizer(chain)
    rows = demonstrations(TINY["sft"]["demonstrations"], seed=0)
    lengths = np.array([[len(encode_chat(tokenizer, row["messages"])[0])] for row in rows])
    lengths = lengths[lengths[:, 0] <= train_pretrain.Config().context]  # the others are left out
    assert cost(chain / "sft") == 3 * trained_on(lengths, TINY["sft"]["batch_size"])


def test_reward_model_costs_three_passes_over_both_sides(chain):
    lengths, _ = lengths_of_pairs(chain)
    assert cost(chain / "rm") == 3 * trained_on(lengths, TINY["rm"]["batch_size"])


def test_dpo_costs_the_same_and_one_pass_of_the_reference_over_all_pairs(chain):
    lengths, with_held_out = lengths_of_pairs(chain)
    training = 3 * trained_on(lengths, TINY["dpo"]["batch_size"])
    assert cost(chain / "dpo") == training + with_held_out.sum()
    assert training == cost(chain / "rm")  # of the same pairs, in batches of the same size


@pytest.mark.parametrize("reward", ["rm", "gold"])
def test_ppo_costs_seventeen_passes_over_each_rollout_or_sixteen_without_reward_model(
    chain, tmp_path, monkeypatch, reward
):
    prepare(chain, tmp_path)
    tokens = 0

    def counting(model, tokenizer, prompts, max_new_tokens, seed, temperature):
        nonlocal tokens
        how = (model, tokenizer, prompts, max_new_tokens, seed, temperature)
        replies = sample_replies(*how)
        if temperature:  # a rollout, and not the greedy evaluation
            tokens += sum(len(p) + len(r.ids) for p, r in zip(prompts, replies))
        return replies

    monkeypatch.setattr("train_ppo.sample_replies", counting)
    run("ppo", tmp_path, reward=reward)
    policy = 1 + 1 + 2 * 3  # sampling, old log-probabilities, two epochs of updates
    reference, critic, reward_model = 1, 1 + 2 * 3, int(reward == "rm")
    assert cost(tmp_path / "ppo") == tokens * (policy + reference + critic + reward_model)


def test_more_padding_costs_no_more(chain, tmp_path):
    """One batch of all rows is padded to the longest of all, batches of similar rows hardly."""
    prepare(chain, tmp_path, "sft")
    n = TINY["sft"]["demonstrations"]
    for size in (n, n // 10):
        run("sft", tmp_path, name=f"by_{size}", batch_size=size)
    assert cost(tmp_path / f"by_{n}") == cost(tmp_path / f"by_{n // 10}")
