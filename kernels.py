"""From hidden states to cross-entropy, log-probabilities and entropy, without keeping the logits.

Every stage ends in the same product, hidden states (N, C) times the transposed token table (C, V),
and wants one or two numbers per row of the result. The full logits (N, V) are by far the largest
tensor of a training step: 8192 tokens and a vocabulary of 50304 are 1.6 GB in float32, and as much
again for their gradient. So both functions here work through the rows in chunks, reduce each chunk
to what is asked for while it is at hand, and throw it away.

Per row, with logits z = h W^T / temperature and target t:

    m = max_j z_j        s = sum_j exp(z_j - m)        p_j = exp(z_j - m) / s
    log p_t = (z_t - m) - log s
    H       = -sum_j p_j log p_j = log s - (1/s) sum_j exp(z_j - m) (z_j - m)

Subtracting m before the logarithm keeps the digits when all logits share a large offset, as GPT-2's
do. The gradients are short:

    d(-log p_t)/dz_j = p_j - [j = t]          dH/dz_j = -p_j (log p_j + H)

- `linear_cross_entropy` knows in the forward pass that its result will be scaled by one number, so
  it computes the gradient right there, chunk by chunk: three matrix products in all.
- `linear_logprobs` meets a different upstream gradient for every row (advantages, in PPO), known
  only in the backward pass, so it computes each chunk of logits twice: four matrix products.

Results are float32, or float64 for float64 inputs; logits are computed in that precision.
"""

import torch
from torch.autograd import Function

# Logits held at one time: 2^21 float32 numbers are 8 MB, about what stays in a CPU's cache.
CHUNK_LOGITS = 2**21


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against target, as one scalar.

    hidden (N, C) and weight (V, C), floating point; target (N,), int64. Rows whose target is
    ignore_index count for nothing, in value and in gradient. reduction "mean" divides by the number
    of rows that count, "sum" does not; without such rows the result is 0. z_loss adds
    z_loss * log(sum_j exp z_j)^2 per row (PaLM, https://arxiv.org/abs/2204.02311, section 5).

    Returns a float32 scalar (float64 for float64 inputs). Gradients flow to hidden and weight.
    Raises ValueError for shapes or a reduction that do not fit, IndexError for a target outside
    0..V-1 (checked on the CPU only), RuntimeError when differentiated twice.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')
    hidden, target, _ = _rows_that_count(hidden, weight, target, ignore_index)
    scale = 1 / max(len(target), 1) if reduction == "mean" else 1.0
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return scale * _CrossEntropySum.apply(hidden, weight, target, z_loss)
    total = hidden.new_zeros((), dtype=_precision(hidden))
    for rows in _chunks(len(target), len(weight)):
        _, logprob, top, log_s = _softmax(_logits(hidden[rows], weight), target[rows])
        total += (z_loss * (top + log_s) ** 2 - logprob).sum()
    return scale * total


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at target, for every row.

    hidden (N, C) and weight (V, C), floating point; target (N,), int64. Returns logprobs (N,), or
    with return_entropy (logprobs (N,), entropy (N,)), in nats, float32 (float64 for float64
    inputs). Rows whose target is ignore_index give exactly 0 and receive no gradient. Any upstream
    gradient is allowed, for both results at once. Raises as `linear_cross_entropy` does.
    """
    kept_hidden, kept_target, kept = _rows_that_count(hidden, weight, target, ignore_index)
    logprobs, entropy = _Logprobs.apply(
        kept_hidden, weight, kept_target, temperature, return_entropy
    )
    if kept is not None:  # put the results back in their rows, zeros elsewhere
        zeros = logprobs.new_zeros(len(target))
        logprobs, entropy = (zeros.masked_scatter(kept, x) for x in (logprobs, entropy))
    return (logprobs, entropy) if return_entropy else logprobs


def _rows_that_count(hidden, weight, target, ignore_index):
    """Drop ignored rows: (hidden, target, mask of the rows kept, or None if that is all)."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must have one entry per row of hidden")
    kept = target != ignore_index
    if not kept.all():
        hidden, target = hidden[kept], target[kept]
    else:
        kept = None
    if target.device.type == "cpu" and len(target):
        low, high = target.aminmax()
        if low < 0 or high >= len(weight):
            raise IndexError(f"target out of range: {low}..{high} with {len(weight)} tokens")
    return hidden, target, kept


def _precision(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(n_rows, n_tokens):
    """Slices over the rows, each with at most CHUNK_LOGITS logits (and at least 16 rows)."""
    size = max(CHUNK_LOGITS // max(n_tokens, 1), 16)
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def _logits(hidden, weight, temperature=1.0):
    dtype = _precision(hidden)
    z = hidden.to(dtype) @ weight.to(dtype).T
    return z if temperature == 1.0 else z.div_(temperature)


def _softmax(z, target):
    """Logits (n, V) -> probabilities p (n, V) and, per row, log p_t, m = max z, log s."""
    p = z.softmax(1)
    top = z.amax(1)
    log_s = -p.amax(1).log()  # the largest logit enters s as exp(0) = 1, so its p is 1/s
    logprob = z.gather(1, target[:, None]).squeeze(1) - top - log_s
    return p, logprob, top, log_s


class _CrossEntropySum(Function):
    """Sum over rows of -log p_t + z_loss * lse^2; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, target, z_loss):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=_precision(weight)) if need_weight else None
        total = hidden.new_zeros((), dtype=_precision(hidden))
        for rows in _chunks(len(target), len(weight)):
            z = _logits(hidden[rows], weight)
            dz, logprob, top, log_s = _softmax(z, target[rows])  # dz starts as p
            lse = top + log_s
            total += (z_loss * lse**2 - logprob).sum()
            # dz_j = p_j (1 + 2 z_loss lse) - [j = t]. At the target, p_t - 1 would lose its digits
            # as p_t approaches 1, so it is written as minus the sum of all other probabilities.
            t, p_t = target[rows, None], logprob.exp()[:, None]
            at_target = -dz.scatter_(1, t, 0.0).sum(1, keepdim=True)
            if z_loss:
                dz *= 1 + 2 * z_loss * lse[:, None]
                at_target += 2 * z_loss * lse[:, None] * p_t
            dz.scatter_(1, t, at_target)
            _accumulate(dz, hidden, weight, rows, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        _forbid_double_backward()
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * upstream).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None


class _Logprobs(Function):
    """log p_t and, if asked for, H of every row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, with_entropy):
        logprobs = hidden.new_empty(len(target), dtype=_precision(hidden))
        entropy = torch.zeros_like(logprobs)
        for rows in _chunks(len(target), len(weight)):
            z = _logits(hidden[rows], weight, temperature)
            p, logprobs[rows], top, log_s = _softmax(z, target[rows])
            if with_entropy:
                entropy[rows] = log_s - (p * (z - top[:, None])).sum(1)
        ctx.save_for_backward(hidden, weight, target, entropy)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        _forbid_double_backward()
        hidden, weight, target, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=_precision(weight)) if need_weight else None
        for rows in _chunks(len(target), len(weight)):
            z = _logits(hidden[rows], weight, ctx.temperature)
            p, logprob, top, log_s = _softmax(z, target[rows])
            # dz_j = g ([j = t] - p_j) - h p_j (log p_j + H), with g and h from upstream
            g, t = d_logprobs[rows, None], target[rows, None]
            dz = -g * p
            dz.scatter_(1, t, 0.0)
            dz.scatter_(1, t, -dz.sum(1, keepdim=True))  # 1 - p_t, with all its digits
            if ctx.with_entropy:
                log_p = z - (top + log_s)[:, None]
                dz -= d_entropy[rows, None] * p * (log_p + entropy[rows, None])
            dz /= ctx.temperature
            _accumulate(dz, hidden, weight, rows, d_hidden, d_weight)
        if need_weight:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def _accumulate(dz, hidden, weight, rows, d_hidden, d_weight):
    """Carry the gradient of one chunk of logits on to its hidden states and to the weight."""
    if d_hidden is not None:
        d_hidden[rows] = dz @ weight.to(dz.dtype)
    if d_weight is not None:
        d_weight.addmm_(dz.T, hidden[rows].to(dz.dtype))


def _forbid_double_backward():
    if torch.is_grad_enabled():  # create_graph=True, and our gradient has no graph of its own
        raise RuntimeError("the fused head cannot be differentiated twice")
