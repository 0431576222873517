"""Runs at the edge of what is possible: one rollout, two rows, a context for a few words."""

import json
import shutil

import pytest
import torch
from tiny_runs import prepare, run

import data.run
from data.run import average_gradients, microbatches, shard
from gpt import InputError


def test_one_rollout_of_one_token_is_an_iteration_like_any_other(chain, tmp_path):
    """A variance of one number would be nan if it were divided by n - 1."""
    prepare(chain, tmp_path)
    last = run("ppo", tmp_path, rollouts=1, minibatch=1, iterations=2, max_new_tokens=1)
    assert last["length"] == 1 and last["no_end"] in (0, 1)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_two_rows_are_one_to_train_on_and_one_to_test_on(chain, tmp_path, stage):
    prepare(chain, tmp_path, stage)
    rows = [
        {"prompt": f"Say {i}.", "response": f"{i}!", "chosen": f"{i}!", "rejected": "No."}
        for i in "ab"
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert run(stage, tmp_path, data=str(tmp_path / "rows.json"), name="two")
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(InputError, match="at least two rows"):
        run(stage, tmp_path, data=str(tmp_path / "rows.json"), name="one")


def test_a_reward_model_that_has_learned_nothing_is_reported_like_any_other(chain, tmp_path):
    """All its scores are equal, so there is no order, no spread and one bin of probabilities."""
    prepare(chain, tmp_path, "rm")
    report = run("rm", tmp_path, lr=0.0)
    assert report["accuracy"] == 0.5 and report["spearman_gold"] is None
    assert (tmp_path / "rm" / "reliability.png").exists()


def test_a_context_too_short_for_some_questions_costs_no_finished_run(tmp_path):
    run("pretrain", tmp_path, context=24)
    run("sft", tmp_path)
    samples = (tmp_path / "sft" / "samples.txt").read_text()
    assert "\n(no room in the context for a response)\n" in samples


def test_what_a_stage_will_need_at_its_end_is_checked_before_its_first_step(chain, tmp_path):
    run("pretrain", tmp_path, context=40)
    run("sft", tmp_path)
    shutil.copy(chain / "preferences.jsonl", tmp_path)
    with pytest.raises(InputError, match="context of 40 tokens; pretrain with a larger --context"):
        run("dpo", tmp_path)
    with pytest.raises(
        InputError, match="no row fits into 0 tokens .the context minus --max_new_tokens"
    ):
        run("ppo", tmp_path, reward="gold", max_new_tokens=40)


def test_frozen_parameters_stay_where_they_are_also_on_several_processes(monkeypatch):
    """Zeros in place of no gradient would let weight decay move them."""
    monkeypatch.setattr(data.run, "WORLD", 2)
    monkeypatch.setattr(data.run.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False).fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    gradient = model.weight.grad.clone()
    average_gradients(model, 0.0)
    torch.testing.assert_close(model.weight.grad, gradient)  # (g + g) / 2
    optimizer.step()
    assert model.bias.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_mean_over_a_batch_needs_no_equal_shards(monkeypatch, world):
    """Each rank divides the sum over its shard by the batch's size / WORLD; ranks are averaged."""
    batch = [3.0, 1.0, 4.0, 1.0, 5.0]
    monkeypatch.setattr(data.run, "WORLD", world)
    means = []
    for rank in range(world):
        monkeypatch.setattr(data.run, "RANK", rank)
        parts = microbatches(shard(batch), 2)
        means.append(sum(sum(part) for part in parts) / (len(batch) / world))
    assert sum(means) / world == pytest.approx(sum(batch) / len(batch))
