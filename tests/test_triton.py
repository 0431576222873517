"""The Triton kernel against full logits in float64, and what a compiler makes of it.

Without a GPU the kernel runs in Triton's interpreter, with tiles of 16 x 32; with one, compiled.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import linear_cross_entropy, linear_logprobs

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative, of gradients
DTYPES = list(TOLERANCE)
# rows, channels, tokens: no multiples of a tile, and a table smaller than one
SIZES = [(37, 40, 101), (20, 48, 33), (5, 17, 130)]


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    """Take the kernel on the CPU too, with a workspace so small that there are several chunks."""
    monkeypatch.setattr(kernels, "INTERPRET", DEVICE == "cpu")
    monkeypatch.setattr(kernels, "WORKSPACE", 1)


def inputs(n, c, v, dtype, spread=1.0):
    """hidden, weight with logits of SD spread, and targets with the first and the last token."""
    torch.manual_seed(0)
    hidden = torch.randn(n, c).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(v, c) * spread / c**0.5).to(DEVICE, dtype).requires_grad_()
    target = torch.randint(v, (n,), device=DEVICE)
    target[0], target[1] = 0, v - 1
    return hidden, weight, target


def slow(hidden, weight, target, temperature=1.0):
    """log p_t and H from full logits in float64: (2, N)."""
    logprobs = (hidden.double() @ weight.double().T / temperature).log_softmax(1)
    of_target = logprobs.gather(1, target[:, None]).squeeze(1)
    return torch.stack([of_target, -(logprobs.exp() * logprobs).sum(1)])


def assert_same_gradients(ours, theirs, *tensors):
    ours, theirs = (torch.autograd.grad(x, tensors, retain_graph=True) for x in (ours, theirs))
    for a, b, tensor in zip(ours, theirs, tensors):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert a.dtype == tensor.dtype and error < TOLERANCE[tensor.dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_equal_those_of_full_logits(size, dtype, temperature):
    hidden, weight, target = inputs(*size, dtype)
    theirs = slow(hidden, weight, target, temperature)
    ours = linear_logprobs(hidden, weight, target, temperature=temperature, return_entropy=True)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(torch.stack(ours).double(), theirs, rtol=0, atol=1e-5)
    alone = linear_logprobs(hidden, weight, target, temperature=temperature)
    assert torch.equal(alone, ours[0])
    upstream = torch.randn(2, len(target), device=DEVICE)
    for used in ([0], [1], [0, 1]):  # log-probability, entropy, both
        a = sum((upstream[i] * ours[i]).sum() for i in used)
        b = sum((upstream[i] * theirs[i]).sum() for i in used)
        assert_same_gradients(a, b, hidden, weight)
    assert_same_gradients((upstream[0] * alone).sum(), (upstream[0] * theirs[0]).sum(), hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy_equals_that_of_full_logits(size, dtype):
    hidden, weight, target = inputs(*size, dtype)
    target[3] = -100
    logits = hidden.double() @ weight.double().T
    theirs = F.cross_entropy(logits, target)
    ours = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert_same_gradients(3 * ours, 3 * theirs, hidden, weight)
    with torch.no_grad():  # no gradient, so another pass; the same number
        again = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(again, ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_exactly_zero(dtype):
    hidden, weight, target = inputs(*SIZES[0], dtype)
    target[5:9] = -100
    logprobs = linear_logprobs(hidden, weight, target)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert (logprobs[5:9] == 0).all() and (grad[5:9] == 0).all() and grad[4].abs().sum() > 0
    for nothing in (torch.full_like(target, -100), target[:0]):
        rows = hidden[: len(nothing)]
        loss = (
            linear_cross_entropy(rows, weight, nothing)
            + linear_logprobs(rows, weight, nothing).sum()
        )
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (rows, weight)))


def test_a_row_has_the_same_bits_in_any_batch():
    hidden, weight, target = inputs(40, 24, 70, torch.float32)
    with torch.no_grad():
        everybody = linear_logprobs(hidden, weight, target, return_entropy=True)
        for rows in (slice(0, 1), slice(7, 30), slice(33, 40)):
            few = linear_logprobs(hidden[rows], weight, target[rows], return_entropy=True)
            for a, b in zip(everybody, few):
                assert torch.equal(a[rows], b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_workspace_full_of_nan_does_not_show(dtype, monkeypatch):
    hidden, weight, target = inputs(*SIZES[0], dtype)

    def results():
        loss = linear_cross_entropy(hidden, weight, target)
        logprobs, entropy = linear_logprobs(hidden, weight, target, return_entropy=True)
        return torch.autograd.grad(loss + (logprobs + entropy).sum(), (hidden, weight))

    clean, empty = results(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    for a, b in zip(clean, results()):
        assert torch.equal(a, b)


def test_nan_in_one_row_stays_in_that_row():
    hidden, weight, target = inputs(20, 24, 70, torch.float32)
    clean = linear_logprobs(hidden, weight, target)
    broken = hidden.detach().clone()
    broken[6] = float("nan")
    broken.requires_grad_()
    logprobs = linear_logprobs(broken, weight, target)
    (grad,) = torch.autograd.grad(logprobs.sum(), broken)
    others = torch.arange(20, device=DEVICE) != 6
    assert logprobs[6].isnan() and torch.equal(logprobs[others], clean[others])
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("offset", [-80.0, -500.0, 500.0])
def test_a_common_offset_of_all_logits_changes_nothing(offset):
    hidden, weight, target = inputs(37, 40, 101, torch.float32)
    ones = torch.ones(37, 1, device=DEVICE)
    theirs = slow(hidden, weight, target)
    hidden = torch.cat([hidden, ones], 1)
    weight = torch.cat([weight, torch.full((101, 1), offset, device=DEVICE)], 1)
    ours = torch.stack(linear_logprobs(hidden, weight, target, return_entropy=True))
    # float32 numbers near 500 lie 3e-5 apart
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-4)
    loss = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss.double(), -theirs[0].mean(), rtol=0, atol=3e-4)


def test_logits_of_500_stay_finite():
    hidden, weight, target = inputs(37, 40, 101, torch.float32, spread=500.0)
    ours = linear_logprobs(hidden, weight, target)
    torch.testing.assert_close(ours.double(), slow(hidden, weight, target)[0], rtol=1e-5, atol=3e-4)
    # Beyond 70 nats the loss of training saturates; value and gradient are finite all the same.
    loss = linear_cross_entropy(hidden, weight, target)
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, (hidden, weight))))


def test_certain_target_has_no_loss_and_hardly_a_gradient():
    hidden, weight, target = inputs(20, 101, 101, torch.float32)
    with torch.no_grad():
        weight.copy_(torch.eye(101))
        hidden.copy_(F.one_hot(target, 101) * 12.0)  # 1 - p_t = 100 e^-12 = 6e-4
    theirs = slow(hidden, weight, target)[0]
    ours = linear_logprobs(hidden, weight, target)
    assert (ours <= 0).all()
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)
    loss = linear_cross_entropy(hidden, weight, target)
    a, b, c = (
        torch.autograd.grad(x, hidden, retain_graph=True)[0]
        for x in (ours.mean(), -loss, theirs.mean())
    )
    torch.testing.assert_close(a, c, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(b, c, rtol=2e-3, atol=1e-9)


def test_hidden_states_and_weight_need_not_be_contiguous():
    hidden, weight, target = inputs(37, 40, 96, torch.float32)  # 96: not padded, so not copied
    whole = linear_logprobs(hidden, weight, target)
    wide = torch.zeros(37, 80, device=DEVICE)
    wide[:, ::2] = hidden.detach()
    assert torch.equal(linear_logprobs(wide[:, ::2], weight, target), whole)
    assert torch.equal(linear_logprobs(hidden, weight.T.contiguous().T, target), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_may_begin_anywhere_in_memory(dtype):
    """A parameter inside a flat buffer, say; TMA fetches from multiples of 16 bytes alone."""
    hidden, weight, target = inputs(20, 48, 32, dtype)
    whole = linear_logprobs(hidden, weight, target)

    def moved(x):
        flat = torch.cat([x.new_zeros(1), x.detach().flatten()])
        return flat[1:].view(x.shape)

    assert torch.equal(linear_logprobs(moved(hidden), moved(weight), target), whole)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_frozen_tensors_get_no_gradient_and_the_other_the_same(function):
    hidden, weight, target = inputs(*SIZES[0], torch.float32)
    both = torch.autograd.grad(function(hidden, weight, target).sum(), (hidden, weight))
    (a,) = torch.autograd.grad(function(hidden, weight.detach(), target).sum(), hidden)
    (b,) = torch.autograd.grad(function(hidden.detach(), weight, target).sum(), weight)
    assert torch.equal(a, both[0]) and torch.equal(b, both[1])


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_backward_twice_gives_the_same_and_double_backward_is_refused(function):
    hidden, weight, target = inputs(*SIZES[0], torch.float32)
    loss = function(hidden, weight, target).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_around_the_kernel_changes_no_bit(dtype, cast_to):
    hidden, weight, target = inputs(*SIZES[1], dtype)

    def results():
        loss = linear_cross_entropy(hidden, weight, target)
        logprobs, entropy = linear_logprobs(hidden, weight, target, return_entropy=True)
        total = loss + (logprobs + entropy).sum()
        return loss, logprobs, entropy, *torch.autograd.grad(total, (hidden, weight))

    expected = results()
    with torch.autocast(DEVICE, cast_to):
        found = results()
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_float16_takes_the_pytorch_path(monkeypatch):
    monkeypatch.setattr(kernels, "_run_kernel", None)  # would fail if it were called
    hidden, weight, target = inputs(*SIZES[0], torch.float16)
    assert linear_cross_entropy(hidden, weight, target).isfinite()


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0)])
def test_bfloat16_takes_the_kernel_only_where_tensor_cores_multiply_it(capability, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor = dict(is_cuda=True, device="cuda:0")
    assert kernels._use_triton(SimpleNamespace(**tensor, dtype=torch.float32))
    is_ampere = capability >= (8, 0)
    assert kernels._use_triton(SimpleNamespace(**tensor, dtype=torch.bfloat16)) == is_ampere


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [65536, 101376, 166912, 232448])  # T4, RTX 4090, A100, H100
def test_tiles_fit_the_shared_memory_and_float32_is_not_rounded(room, dtype):
    tile, options = kernels._tile(dtype, room)
    numbers = options["num_stages"] * (tile["BLOCK_N"] + tile["BLOCK_V"]) * tile["BLOCK_C"]
    assert numbers * dtype.itemsize <= room
    assert tile["TMA"] == (dtype == torch.bfloat16 and room >= 200_000)
    assert dtype == torch.bfloat16 or tile["PRECISION"] == "ieee"


def test_rounding_makes_no_probability_exceed_1(monkeypatch):
    hidden, weight, target = (x[:1].detach() for x in inputs(2, 8, 2, torch.float32))
    z_t = kernels._target_logits(hidden, weight, target, 1.0)[:, None]
    s = torch.full_like(z_t, 1 - 1e-7)  # the sum over a tile, whose largest term is exp(0) = 1
    made = {"statistics": (z_t, s, None), "exponentials": (torch.ones_like(z_t), s)}
    monkeypatch.setattr(kernels, "_run_kernel", lambda mode, *args, **how: made[mode])
    logprob, _, _ = kernels._statistics(hidden, weight, 1, target, 1.0, False)
    assert logprob == 0
    _, factor, others, logprob = kernels._exponentials(hidden, weight, 1, target)
    assert factor == 1 and others == 0 and logprob == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_more_logits_than_32_bits_can_count():
    n, v = 45056, 50304
    assert n * v > 2**31
    hidden, weight, target = (x.detach() for x in inputs(n, 64, v, torch.bfloat16))
    base = kernels._target_logits(hidden, weight, target, 1.0)
    e, _ = kernels._run_kernel("exponentials", hidden, weight, v, base=base)
    theirs = (hidden[-8:].double() @ weight.double().T - base[-8:, None]).exp()
    torch.testing.assert_close(e[-8:].double(), theirs, rtol=1e-2, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_kernel_is_compiled_once_for_any_number_of_rows():
    def compiled():
        return len(kernels._tile_kernel.device_caches[torch.cuda.current_device()][0])

    def everything(n):
        hidden, weight, target = inputs(n, 48, 70, torch.bfloat16)
        logprobs, entropy = linear_logprobs(hidden, weight, target, return_entropy=True)
        loss = linear_cross_entropy(hidden, weight, target) + (logprobs + entropy).sum()
        torch.autograd.grad(loss, hidden)

    everything(64)
    before = compiled()
    for n in (3, 17, 32, 33):
        everything(n)
    assert compiled() == before > 0


def test_chunks_fill_the_workspace_with_whole_tiles_and_cover_all_rows(monkeypatch):
    target, weight = torch.zeros(10_000), torch.empty(50257, 1, dtype=torch.bfloat16)
    monkeypatch.setattr(kernels, "INTERPRET", True)
    monkeypatch.setattr(kernels, "WORKSPACE", 2**28)
    chunks = kernels._chunks(target, weight)
    rows = chunks[0].stop
    assert rows % 128 == 0 and rows * 50257 * 2 <= 2**28 < (rows + 128) * 50257 * 2
    assert torch.cat([torch.arange(10_000)[c] for c in chunks]).equal(torch.arange(10_000))


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.thorough)])
def test_kernel_compiles_to_tensor_cores_without_spilling(capability):
    """Ahead of time, for GPUs that need not be there (A100: 80, H100: 90)."""
    script = Path(__file__).parent / "bench" / "compile_kernel.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    run = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        kernel = json.loads(line)
        assert kernel["stack_bytes"] == 0, kernel  # registers that spill live on the stack
        assert kernel["programs_at_a_time"] >= 1, kernel  # they fit registers and shared memory
        if kernel["mode"] != "statistics":  # logits of an odd vocabulary, too, are stored whole
            assert "STG.E.128" in kernel["stores"] and "STG.E.U16" not in kernel["stores"], kernel
        if kernel["dtype"] == "bfloat16":
            expected = {80: ["mma.sync"], 90: ["bulk.tensor", "wgmma"]}[capability]
            assert kernel["instructions"] == expected, kernel
