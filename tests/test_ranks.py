"""Two processes under torchrun do what one does: same weights, one voice, no endless waiting."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, TINY, prepare, run, same

import data.run
from data.chat import Reply

# What torchrun starts: one stage, whose replies (PPO's rollouts) do not depend on the rank.
DRIVER = """
import json, os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import data.run, test_ranks, tiny_runs, train_pretrain
from data.town.documents import documents
train_pretrain.documents = lambda n, seed: documents(min(n, 300), seed)  # as in tiny_runs.run
stage, out, options, die_at, stop_at = [*sys.argv[1:3], *map(json.loads, sys.argv[3:])]
script = tiny_runs.SCRIPTS[stage]
if stage == "ppo":
    script.sample_replies = test_ranks.replies_without_chance
log = data.run.Run.log
def log_and_die(self, step, **numbers):
    if data.run.RANK == 1 and step in (die_at, stop_at):
        os.kill(os.getpid(), signal.SIGKILL if step == die_at else signal.SIGTERM)
    log(self, step, **numbers)
data.run.Run.log = log_and_die
sys.argv = [stage, f"--out={{out}}"]
sys.argv += tiny_runs.as_options(options)
data.run.run_script(script.main, script.Config)
"""


def replies_without_chance(model, tokenizer, prompts, max_new_tokens, seed, temperature):
    """Replies that follow from the prompt and its place in the whole batch alone, some without an
    end, and how likely they are."""
    replies = []
    for number, prompt in enumerate(prompts):
        # A shard has every WORLD-th prompt; held-out ones, asked greedily, are not shared.
        place = data.run.RANK + data.run.WORLD * number if temperature else 0
        about = sum(prompt) + place
        ids = [(7 * about + i) % tokenizer.pad for i in range(1 + about % 3)]
        ended = about % 5 > 0
        text, ids = tokenizer.decode(ids), ids + [tokenizer.end] * ended
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0] @ model.head.T  # (T, V)
        logprobs = (logits / (temperature or 1.0)).log_softmax(1)
        before = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        replies.append(
            Reply(ids, text, ended, [logprobs[t, i].item() for t, i in zip(before, ids)])
        )
    return replies


def two_ranks(stage, out, tmp_path, die_at=-1, stop_at=-1, **options):
    """Run a stage on two ranks; at the given steps rank 1 is killed, or asked to stop."""
    (tmp_path / "driver.py").write_text(
        DRIVER.format(root=str(ROOT), tests=str(Path(__file__).parent))
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={port}", tmp_path / "driver.py", stage, out]
    command += [json.dumps({**TINY[stage], **options}), die_at, stop_at]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120
    )


LONGER = {  # about 20 steps of each
    # 5 rows a batch: one rank has three of them, the other one two
    "pretrain": dict(steps=20, batch_size=5, optimizer="adamw", save_every=100, eval_every=20),
    "sft": dict(epochs=3, lr=2e-3, warmup=20, save_every=100, eval_every=20),
    "rm": dict(epochs=2, save_every=100, eval_every=20),
    "ppo": dict(iterations=5, rollouts=9, save_every=100, eval_every=5, target_kl=1.0),
    "dpo": dict(epochs=3, save_every=100, eval_every=20),
}
LONGER["ppo, without a critic"] = {**LONGER["ppo"], "advantage": "rloo", "group": 3}


LONG = pytest.mark.thorough


@pytest.mark.parametrize(
    "what", ["pretrain", *(pytest.param(x, marks=LONG) for x in LONGER if x != "pretrain")]
)
def test_two_ranks_reach_the_weights_of_one_process(chain, tmp_path, monkeypatch, what):
    stage = what.split(",")[0]
    for out in (tmp_path / "one", tmp_path / "two"):
        prepare(chain, out, stage)
    monkeypatch.setattr("train_ppo.sample_replies", replies_without_chance)
    run(stage, tmp_path / "one", **LONGER[what])
    result = two_ranks(stage, tmp_path / "two", tmp_path, **LONGER[what])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes on cpu") == result.stdout.count("results in") == 1
    assert "gradient is 0" not in result.stdout

    one, two = (
        torch.load(tmp_path / n / stage / "ckpt.pt", weights_only=True)["model"]
        for n in ("one", "two")
    )
    # Two kinds of numbers change nothing: the bias of the keys adds the same to all scores of a
    # query, which softmax does not see, and the bias of the reward adds the same to both replies.
    # Their gradients are rounding noise, which Adam blows up to steps of ordinary size.
    if stage == "rm":
        for model in (one, two):
            model["reward_mean"] = model["reward_mean"] - model.pop("score.bias")
    for name in one:
        a, b = one[name], two[name]
        if name.endswith("c_attn.bias"):
            C = len(a) // 3
            a, b = (torch.cat([x[:C], x[2 * C :]]) for x in (a, b))
        torch.testing.assert_close(
            a, b, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    logs = [(tmp_path / n / stage / "log.csv").read_text().splitlines() for n in ("one", "two")]
    assert logs[0][0] == logs[1][0] and len(logs[0]) == len(logs[1])
    accuracy = logs[0][0].split(",").index("accuracy") if stage == "dpo" else None
    for step, line in enumerate(zip(*(log[1:] for log in logs))):
        a, b = ([float(x or 0) for x in row.split(",")] for row in line)
        if step == 0 and accuracy:  # all margins are 0 but for rounding: any accuracy will do
            a[accuracy] = b[accuracy]
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.thorough
def test_stopped_and_resumed_two_ranks_end_with_the_same_bits(tmp_path):
    options = dict(steps=30, optimizer="adamw", save_every=100, eval_every=100)
    assert two_ranks("pretrain", tmp_path / "whole", tmp_path, **options).returncode == 0
    half = two_ranks("pretrain", tmp_path / "half", tmp_path, stop_at=7, **options)
    assert half.returncode != 0 and "stopped after step 8" in half.stdout
    resumed = two_ranks("pretrain", tmp_path / "half", tmp_path, **options, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert same(tmp_path / "whole" / "pretrain", tmp_path / "half" / "pretrain")


def test_a_rank_that_dies_ends_the_run_within_a_minute(tmp_path):
    start = time.monotonic()
    result = two_ranks("pretrain", tmp_path / "out", tmp_path, die_at=3, steps=100_000)
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out" / "pretrain" / "ckpt.pt").exists()


def test_shards_are_together_the_batch(monkeypatch):
    monkeypatch.setattr(data.run, "WORLD", 3)
    shards = []
    for rank in range(3):
        monkeypatch.setattr(data.run, "RANK", rank)
        shards.append(data.run.shard(list(range(12))))
    assert [len(shard) for shard in shards] == [4, 4, 4]
    assert sorted(sum(shards, [])) == list(range(12))

    def all_gather(into, shard):
        into[:] = shards

    monkeypatch.setattr(data.run.distributed, "all_gather_object", all_gather)
    assert data.run.gather(shards[0]) == list(range(12))  # in the order of the batch
    assert data.run.microbatches(data.run.shard([1, 2]), 0) == []  # the third has nothing to do


def test_microbatches_of_all_ranks_are_the_batch_without_columns_of_mere_padding(monkeypatch):
    widths = [2, 3, 3, 5, 7, 8, 8]  # of rows 0..6, shortest first
    monkeypatch.setattr(data.run, "WORLD", 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(data.run, "RANK", rank)
        seen += data.run.shard_microbatches(np.array([0, 1, 3, 4, 6]), widths, 2)
    seen = [(rows.tolist(), columns.stop) for rows, columns in seen]
    assert sorted(seen) == [([0, 1], 3), ([3, 4], 7), ([6], 8)]
