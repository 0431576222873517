"""The fused head: values and gradients of full logits, in float64, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import linear_cross_entropy, linear_logprobs

CHUNK_LOGITS = kernels.CHUNK_LOGITS  # before it is made small


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that a test of a few rows meets several of them."""
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", 1)


def inputs(n=37, c=5, v=11, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(n, c, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, c, dtype=dtype, requires_grad=True)
    target = torch.randint(v, (n,))
    target[0], target[1] = 0, v - 1  # the first and the last token too
    return hidden, weight, target


def slow_logprobs(hidden, weight, target, temperature=1.0):
    logprobs = (hidden @ weight.T / temperature).log_softmax(1)
    return logprobs.gather(1, target[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(1)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_and_its_gradients_equal_those_of_full_logits(reduction):
    hidden, weight, target = inputs()
    target[5:9] = -100
    ours = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    theirs = F.cross_entropy(hidden @ weight.T, target, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(3 * ours, hidden, weight), gradients(3 * theirs, hidden, weight)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])  # log-probabilities, entropy, both
def test_logprobs_and_entropy_take_any_upstream_gradient(temperature, used):
    hidden, weight, target = inputs()
    ours = linear_logprobs(hidden, weight, target, temperature=temperature, return_entropy=True)
    theirs = slow_logprobs(hidden, weight, target, temperature)
    upstream = torch.randn(2, len(target), dtype=torch.float64)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    a = gradients(sum((upstream[i] * ours[i]).sum() for i in used), hidden, weight)
    b = gradients(sum((upstream[i] * theirs[i]).sum() for i in used), hidden, weight)
    torch.testing.assert_close(a, b)


def test_gradients_agree_with_finite_differences():
    hidden, weight, target = inputs(n=18, c=3, v=5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, target), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, target, temperature=0.8, return_entropy=True),
        (hidden, weight),
    )


def test_ignored_rows_give_zero_and_get_exactly_zero_gradient():
    hidden, weight, target = inputs()
    target[::3] = -100
    logprobs, entropy = linear_logprobs(hidden, weight, target, return_entropy=True)
    assert (logprobs[::3] == 0).all() and (entropy[::3] == 0).all() and (logprobs[1::3] < 0).all()
    d_hidden, _ = gradients((logprobs + entropy).sum(), hidden, weight)
    assert (d_hidden[::3] == 0).all() and (d_hidden[1::3] != 0).any(1).all()


def test_all_rows_ignored_gives_zero_not_nan():
    hidden, weight, target = inputs()
    target[:] = -100
    loss = linear_cross_entropy(hidden, weight, target)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, hidden, weight))


def test_empty_batch_gives_zero():
    hidden, weight, _ = inputs()
    assert linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64)) == 0
    assert linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_a_common_offset_of_the_logits_costs_no_digits():
    """GPT-2's logits lie around -80: exp(-80) is nearly nothing, but differences count."""
    hidden, weight, target = inputs(dtype=torch.float32)
    shifted = torch.cat([hidden.detach(), torch.ones(37, 1)], 1)
    offset = torch.cat([weight.detach(), torch.full((11, 1), -80.0)], 1)
    exact, _ = slow_logprobs(hidden.double(), weight.double(), target)
    torch.testing.assert_close(
        linear_logprobs(shifted, offset, target).double(), exact, atol=2e-5, rtol=1e-5
    )


def test_large_logits_stay_finite():
    hidden, weight, target = inputs(dtype=torch.float32)
    big = 500 * hidden  # exp of such logits is beyond float32
    logprobs, entropy = linear_logprobs(big, weight, target, return_entropy=True)
    gradient = torch.autograd.grad(logprobs.sum() + entropy.sum(), weight)[0]
    assert logprobs.isfinite().all() and entropy.isfinite().all() and gradient.isfinite().all()
    assert linear_cross_entropy(big, weight, target).isfinite()


@pytest.mark.parametrize("function, sign", [(linear_cross_entropy, 1), (linear_logprobs, -1)])
def test_gradient_keeps_its_digits_when_the_target_is_almost_certain(function, sign):
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[12.0], [0.0], [0.0]])
    target = torch.tensor([0])
    (ours,) = gradients(function(hidden, weight, target).sum(), hidden)
    exact_hidden = hidden.detach().double().requires_grad_()
    (exact,) = gradients(F.cross_entropy(exact_hidden @ weight.double().T, target), exact_hidden)
    torch.testing.assert_close(ours.double(), sign * exact, rtol=1e-5, atol=0)


def test_chunks_on_a_cpu_have_at_most_two_million_logits_and_cover_all_rows(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_LOGITS", CHUNK_LOGITS)
    chunks = kernels._chunks(torch.zeros(1000), torch.empty(50257, 1))
    rows = chunks[0].stop
    assert rows * 50257 <= 2**21 < (rows + 1) * 50257
    assert torch.cat([torch.arange(1000)[c] for c in chunks]).equal(torch.arange(1000))


def test_frozen_hidden_or_weight_gets_no_gradient():
    hidden, weight, target = inputs()
    full = gradients(linear_cross_entropy(hidden, weight, target), hidden, weight)
    (d_weight,) = gradients(linear_cross_entropy(hidden.detach(), weight, target), weight)
    (d_hidden,) = gradients(linear_cross_entropy(hidden, weight.detach(), target), hidden)
    torch.testing.assert_close((d_hidden, d_weight), full)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_hidden_states_and_weight_may_differ_in_dtype(function):
    dtypes = [torch.bfloat16, torch.float32, torch.double]
    for of_hidden, of_weight in itertools.permutations(dtypes, 2):
        hidden, weight, target = inputs()
        hidden, weight = (
            x.detach().to(dtype).requires_grad_()
            for x, dtype in ((hidden, of_hidden), (weight, of_weight))
        )
        dtype = torch.double if of_hidden == torch.double else torch.float32
        result = function(hidden, weight, target).sum()
        alike = function(hidden.detach().to(dtype), weight.detach().to(dtype), target).sum()
        assert result.dtype == dtype and result.item() == pytest.approx(alike.item(), rel=1e-5)
        grads = torch.autograd.grad(result, (hidden, weight))
        assert [g.dtype for g in grads] == [of_hidden, of_weight]


@pytest.mark.parametrize("wrong", [-101, -99, -1, 11])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_target_out_of_range_is_an_error(function, wrong):
    hidden, weight, target = inputs()
    target[3] = wrong
    with pytest.raises(IndexError, match="out of range"):
        function(hidden, weight, target)


def test_shapes_that_do_not_fit_are_an_error():
    hidden, weight, target = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        linear_logprobs(hidden[:, :3], weight, target)
    with pytest.raises(ValueError, match="flatten batch and time"):
        linear_logprobs(hidden[None], weight, target[None])
    with pytest.raises(ValueError, match="one entry per row"):
        linear_logprobs(hidden, weight, target[:3])
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, target, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_autocast_around_the_head_changes_no_bit(function, cast_to, dtype):
    """Its float32 sums would be rounded: log-probabilities off by 0.2 nats at GPT-2's size."""
    hidden, weight, target = inputs(c=40, dtype=dtype)
    how = {"return_entropy": True} if function is linear_logprobs else {}

    def all_results(**how):
        result = function(hidden, weight, target, **how)
        result = torch.stack(result) if how else result
        return result.detach(), *gradients(result.sum(), hidden, weight)

    expected = all_results(**how)
    with torch.autocast("cpu", cast_to):
        assert (hidden @ weight.T).dtype == cast_to  # it is on
        found = all_results(**how)
        with torch.no_grad():
            alone = function(hidden, weight, target)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    torch.testing.assert_close(alone, expected[0][0] if how else expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_compiler_around_the_head_leaves_it_as_it_is(function, monkeypatch):
    hidden, weight, target = inputs()
    traced, chunks = [], kernels._chunks

    def watched(*args):
        traced.append(torch.compiler.is_compiling())
        return chunks(*args)

    monkeypatch.setattr(kernels, "_chunks", watched)

    def loss(hidden, weight):
        return 2 * function(3 * hidden, weight, target).mean()

    compiled = torch.compile(loss, backend="eager")  # traces all the same, and needs no compiler
    torch.testing.assert_close(compiled(hidden, weight), loss(hidden, weight))
    ours, theirs = (gradients(f(hidden, weight), hidden, weight) for f in (compiled, loss))
    torch.testing.assert_close(ours, theirs)
    assert traced and not any(traced)


def test_differentiating_twice_is_an_error_and_not_a_wrong_number():
    hidden, weight, target = inputs()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(
            linear_logprobs(hidden, weight, target).sum(), hidden, create_graph=True
        )
