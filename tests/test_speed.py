"""Options that change what a run costs, and not what it computes."""

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import SCRIPTS, interrupt, prepare, run, same
from torch.utils._python_dispatch import TorchDispatchMode

import data.run
import train_sft
from data.run import idle_cpus, microbatches, set_speed, start
from gpt import GPT, InputError, ScalarModel, generate
from kernels import linear_cross_entropy
from train_ppo import response_logprobs


def gradients(model, tokens):
    model.zero_grad()
    hidden = model(tokens[:, :-1])
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.head, tokens[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_recomputed_activations_give_the_same_bits(tiny):
    tokens = torch.randint(50, (3, 20))
    loss, expected = gradients(tiny, tokens)
    tiny.recompute = True
    again, found = gradients(tiny, tokens)
    assert again == loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recomputing_keeps_fewer_activations_for_the_backward_pass(tiny):
    def bytes_kept():
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            tiny(torch.randint(50, (3, 20)))
        return sum(kept.values())

    usual = bytes_kept()
    tiny.recompute = True
    assert bytes_kept() < usual / 3


def test_in_bfloat16_only_products_are_rounded(tiny):
    tokens = torch.randint(50, (3, 20))
    loss, expected = gradients(tiny, tokens)
    tiny.bf16 = True
    assert tiny(tokens).dtype == torch.bfloat16
    rounded, found = gradients(tiny, tokens)
    assert rounded == pytest.approx(loss, rel=0.01) and rounded != loss
    for name in expected:
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-6, name


def test_in_bfloat16_a_cpu_computes_attention_in_float32(tiny, monkeypatch):
    """There its backward pass takes several times as long in bfloat16. Sampling, one query at a
    time, stays in bfloat16: it reads the cache, and the cache is what takes time."""
    dtypes, attention = [], F.scaled_dot_product_attention

    def noted(q, *rest, **how):
        dtypes.append(q.dtype)
        return attention(q, *rest, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    tiny.bf16 = True
    tiny(torch.randint(50, (3, 20)))
    assert dtypes == [torch.float32] * 2  # blocks
    generate(tiny, [[1, 2, 3]], 2)
    assert dtypes[2:] == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize(
    "asked, gain, chosen",
    [(None, 2.1, True), (None, 1.9, False), (False, 9.0, False), (True, 0.5, True)],
)
def test_bfloat16_is_chosen_where_it_is_twice_as_fast(
    tiny, monkeypatch, capsys, asked, gain, chosen
):
    widths = []
    monkeypatch.setattr(data.run, "bfloat16_gain", lambda width: widths.append(width) or gain)
    cfg = train_sft.Config(bf16=asked)
    set_speed(cfg, tiny)
    assert cfg.bf16 is tiny.bf16 is chosen
    assert widths == ([16] if asked is None else [])  # the width of the model
    assert ("2.1 times as fast" in capsys.readouterr().out) == (asked is None and chosen)


def test_the_gain_of_bfloat16_compares_the_fastest_times(monkeypatch):
    clock = iter([0, 9, 0, 5] + [0, 6, 0, 2] * 4)  # float32, bfloat16; the first of each is slow
    monkeypatch.setattr(data.run.time, "perf_counter", lambda: next(clock))
    assert data.run.bfloat16_gain(16) == 6 / 2


def test_a_run_is_resumed_in_the_precision_that_it_began_with(chain, after_sft, monkeypatch):
    """Whatever is fast by then: the machine may be busier, or another one."""
    interrupt("pretrain", after_sft, monkeypatch)
    monkeypatch.setattr(data.run, "bfloat16_gain", lambda width: 3.0)
    with pytest.raises(InputError, match="had --no-bf16, not True"):
        run("pretrain", after_sft, bf16=True, resume=True)
    run("pretrain", after_sft, bf16=None, resume=True)
    assert same(after_sft / "pretrain", chain / "pretrain")


def test_sampling_rounds_no_weight_again_for_the_next_token(tiny):
    class CountWeights(TorchDispatchMode):
        rounded = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                self.rounded += 1
            return function(*args, **(kwargs or {}))

    weights = {parameter.data_ptr() for parameter in tiny.h.parameters()}
    tiny.bf16 = True
    for new_tokens in (1, 8):
        with CountWeights() as count:
            generate(tiny, [[1, 2, 3], [4]], new_tokens)
        # four matrices and four biases in each of two blocks
        assert count.rounded == 16


def test_a_token_of_all_rows_takes_twelve_operations_a_layer_and_few_beside(tiny):
    """On a GPU each is the launch of a kernel, which takes longer than what most compute."""
    views = (
        "view _unsafe_view transpose t unbind slice select unsqueeze squeeze split detach".split()
    )

    class CountOperations(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.total += function.overloadpacket.__name__ not in views
            return function(*args, **(kwargs or {}))

    def operations(model, new_tokens):
        with CountOperations() as count:
            generate(model, [[1, 2, 3], [4]], new_tokens, stop=-1)
        return count.total

    deeper = GPT(replace(tiny.config, n_layer=3)).eval()
    per_token = [(operations(model, 12) - operations(model, 4)) / 8 for model in (tiny, deeper)]
    # Of a layer: two norms, four products, GELU, attention, two sums, keys and values kept.
    assert per_token[1] - per_token[0] == 12
    assert per_token[0] - 2 * 12 <= 28  # embedding, mask, head, sampling, and who has ended


def test_in_bfloat16_sampling_and_scoring_nearly_agree(tiny):
    """Sampling computes logits in float32 from bfloat16 states, and so does the fused head."""
    tiny.bf16 = True
    replies, sampled = generate(tiny, [[1, 2, 3]] * 20, 8, temperature=1.0)
    for reply, given in zip(replies, sampled):
        tokens = torch.tensor([[1, 2, 3] + reply])
        mask = torch.tensor([[False] * 2 + [True] * len(reply)])
        logprobs, _ = response_logprobs(tiny(tokens[:, :-1]), tiny.head, tokens[:, 1:], mask, 1.0)
        torch.testing.assert_close(logprobs[mask], torch.tensor(given), atol=0.1, rtol=0)


def test_threads_and_seed_are_set_before_anything_is_made(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    drawn = []
    for cfg in (train_sft.Config(device="cpu"), train_sft.Config(device="cpu", threads=1, seed=5)):
        start(cfg)
        drawn.append(torch.rand(1))
        assert torch.equal(
            drawn[-1], torch.rand(1, generator=torch.Generator().manual_seed(cfg.seed))
        )
    assert threads == [1] and drawn[0] != drawn[1]  # 0 leaves the number to PyTorch


@pytest.mark.parametrize("idle, used", [(0.1, 1), (1.2, 1), (2.7, 3), (3.6, 4), (math.inf, 4)])
def test_a_run_takes_no_more_threads_than_other_programs_leave_cpus(
    monkeypatch, capsys, idle, used
):
    threads = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    looks = []
    monkeypatch.setattr(data.run, "idle_cpus", lambda: looks.append(1) or idle)
    start(train_sft.Config(device="cpu"))
    assert threads[-1] == used and len(looks) == (5 if used < 4 else 1)
    assert ("other programs" in capsys.readouterr().out) == (used < 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # whoever says how many gets them
    start(train_sft.Config(device="cpu"))
    start(train_sft.Config(device="cpu", threads=1))
    assert threads[2 if used < 4 else 1 :] == [1]


def test_idle_cpus_are_counted_by_linux_and_elsewhere_unknown(monkeypatch):
    stat = ["cpu  5 0 5 100 50 0 0 0 0 0\ncpu0 ...", "cpu  9 0 9 130 70 0 0 0 0 0\ncpu0 ..."]
    clock = iter([10.0, 10.25])
    monkeypatch.setattr(data.run.Path, "read_text", lambda path: stat.pop(0))
    monkeypatch.setattr(data.run.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(data.run.time, "perf_counter", lambda: next(clock))
    assert idle_cpus(0.0) == pytest.approx((0.3 + 0.2) / 0.25)  # 50 ticks of 10 ms in 250 ms

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(data.run.Path, "read_text", missing)
    monkeypatch.setattr(data.run.time, "perf_counter", lambda: 0.0)
    assert idle_cpus(0.0) == math.inf
    for hidden in ("", "cpu  0 0 0 0 0 0 0 0 0 0\n", "none of your business"):  # in some sandboxes
        monkeypatch.setattr(data.run.Path, "read_text", lambda path, hidden=hidden: hidden)
        assert idle_cpus(0.0) == math.inf


def test_options_of_speed_reach_the_model_inside_every_model(tiny, monkeypatch):
    """A reward model and a critic have a GPT inside."""
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    for off in ({}, {"bf16": True}, {"recompute": True}, {"compile": True}):
        cfg = train_sft.Config(**off)
        scalar = ScalarModel.from_gpt(tiny)
        set_speed(cfg, tiny, scalar)
        for model in (tiny, scalar.gpt):
            assert (model.bf16, model.recompute) == (cfg.bf16, cfg.recompute)
            assert any(model is one for one in compiled) == cfg.compile


def test_microbatches_are_slices_of_a_batch():
    assert microbatches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert microbatches([1, 2, 3], 0) == [[1, 2, 3]]


def logged(folder, stage, column):
    with open(folder / stage / "log.csv") as file:
        return np.array([float(row[column]) for row in csv.DictReader(file) if row[column]])


@pytest.fixture
def after_sft(chain, tmp_path):
    """A folder in which every stage can run, and change nothing in the chain that all share."""
    prepare(chain, tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo"])
def test_microbatches_add_up_to_the_batch(chain, after_sft, stage):
    """3 divides none of the batch sizes: the last part is smaller and must count for less."""
    run(stage, after_sft, microbatch=3)
    for column in ("loss", "grad_norm"):
        found, expected = logged(after_sft, stage, column), logged(chain, stage, column)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_runs_in_bfloat16_with_recomputed_activations(chain, after_sft, stage):
    run(stage, after_sft, bf16=True, recompute=True)
    column = "entropy" if stage == "ppo" else "loss"
    first, expected = (logged(folder, stage, column)[0] for folder in (after_sft, chain))
    assert first == pytest.approx(expected, rel=0.05)
    saved = torch.load(after_sft / stage / "ckpt.pt", weights_only=True)["model"]
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


@pytest.mark.thorough
def test_compiled_a_model_learns_the_same(chain, after_sft):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    run("pretrain", after_sft, compile=True)
    found, expected = (logged(folder, "pretrain", "loss") for folder in (after_sft, chain))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.thorough
def test_the_benchmark_at_gpt2s_size_runs(tmp_path):
    script, out = Path(__file__).parent / "bench" / "bench_gpt2.py", tmp_path / "bench.json"
    only = ["muon", "adamw", "sampling", "ppo"]
    subprocess.run([sys.executable, script, "--tiny", "--out", out, "--only", *only], check=True)
    results = json.loads(out.read_text())["results"]
    assert [*results] == only
    assert all(number > 0 for numbers in results.values() for number in numbers.values())
