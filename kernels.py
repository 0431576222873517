"""From hidden states to cross-entropy, log-probabilities and entropy, without keeping the logits.

On a first reading this file is optional: `linear_cross_entropy(x, W, t)` is the number that
`F.cross_entropy(x @ W.T, t)` gives, and `linear_logprobs(x, W, t)` is minus that for every row.

Every stage ends in the same product, hidden states (N, C) times the transposed token table (C, V),
and wants one or two numbers per row of the result. The full logits (N, V) are by far the largest
tensor of a training step: 8192 tokens and a vocabulary of 50304 are 1.6 GB in float32, and as much
again for their gradient. So both functions here work through the rows in chunks, reduce each chunk
to what is asked for while it is in memory, and discard it.

Per row, with hidden state x, logits z = x W^T / temperature and target t:

    m = max_j z_j        s = sum_j exp(z_j - m)        p_j = exp(z_j - m) / s
    log p_t = (z_t - m) - log s
    H       = -sum_j p_j log p_j = log s - (1/s) sum_j exp(z_j - m) (z_j - m)

Subtracting m before the logarithm keeps the digits when all logits share a large offset, as GPT-2's
do. The gradients are short:

    d(-log p_t)/dz_j = p_j - [j = t]          dH/dz_j = -p_j (log p_j + H)

so that a loss with the gradients g = dL/d(log p_t) and h = dL/dH has

    dL/dz_j = g ([j = t] - p_j) - h p_j (log p_j + H)

- `linear_cross_entropy` knows in the forward pass that its result will be scaled by one number, so
  it computes the gradient right there, chunk by chunk: three matrix products in all.
- `linear_logprobs` gets a different upstream gradient for every row (advantages, in PPO), known
  only in the backward pass, so it computes each chunk of logits twice: four matrix products.

All this takes only three kinds of pass over a chunk of logits. They are the three functions that
`_use_triton` switches: `_statistics` (m, s, H and log p_t), `_exponentials` (p up to a factor
per row) and `_logit_gradients` (dz from any upstream gradient). Their lines in PyTorch define them.
On a GPU one Triton kernel computes a tile of logits in registers, in float32, and turns it there
into what is wanted. From logits rounded to bfloat16, log p_t would be off by 0.01 and more;
from these it is off by 2e-5 on an H100 (7e-5 with 4096 channels), and by 2e-4 if all logits are
near -80, as GPT-2's are.

**The kernel.** A tile is BLOCK_N rows times BLOCK_V tokens, and its logits are float32 sums of
products, as the tensor cores add them up. A row's V logits are spread over V / BLOCK_V tiles, which
know nothing of each other. So each tile gives the statistics of its own part, and a few lines of
PyTorch merge them afterwards: parts a and b, each with its m, s and u = sum exp(z - m) (z - m),
combine to

    m = max(m_a, m_b)      s = s_a e^(m_a - m) + s_b e^(m_b - m)
    u = sum over both parts of e^(m_i - m) (u_i + s_i (m_i - m))

since exp(z - m) = exp(z - m_a) e^(m_a - m) and z - m = (z - m_a) + (m_a - m): the online softmax
(Milakov and Gimelshein 2018). No atomics and no locks: the same bits on every run. (With few
rows PyTorch merges in another order, so that the same row may differ in its last bits.)

The gradient of a cross-entropy needs p in the same pass that finds m and s. It does without them:
E_j = exp(z_j - z_t) is p_j up to a factor, sum_j E_j = 1 / p_t, and z_t is cheap to find first.
bfloat16 has float32's exponents, so E can be stored in it, up to a token whose loss is 70 nats.

**Memory** of the kernel. In training, one chunk of E or dz: at most 1 GiB (WORKSPACE), the gradient
of W in float32, and W once more where it has to be padded or rounded. Without gradients, three
numbers per row and tile. (PyTorch has two or three chunks of logits at a time, of 8 MB on a CPU.)

Results are float32, or float64 for float64 inputs; gradients have the dtype of their tensor. The
same holds inside a caller's torch.autocast and torch.compile.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd import Function

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Windows and macOS: the PyTorch path does everything
    triton = None

IGNORE = -100  # the target of a row that does not count; the same number as in PyTorch

# Logits held at one time on a CPU: 2^21 float32 numbers are 8 MB, about what stays in its cache.
CHUNK_LOGITS = 2**21
WORKSPACE = 2**30  # bytes of logits, or of their gradient, held at one time on a GPU
INTERPRET = False  # tests set it, to run the kernel on a CPU in Triton's interpreter


def _untraced(function):
    """Inside a caller's torch.compile, run as outside: PyTorch 2.11 cannot trace `out_dtype`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            # Only when needed: it imports the compiler, which takes seconds.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@_untraced
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy of softmax(hidden @ weight.T) against target, as one scalar.

    hidden (N, C) and weight (V, C), floating point; target (N,), int64. Rows whose target is -100
    (IGNORE) count for nothing, in value and in gradient. reduction "mean" divides by the number
    of rows that count, "sum" does not; without such rows the result is 0.

    Returns a float32 scalar (float64 for float64 inputs). Gradients flow to hidden and weight.
    Raises ValueError for shapes or a reduction that do not fit, IndexError for a target outside
    0..V-1 (checked on the CPU only), RuntimeError when differentiated twice.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not {reduction!r}')
    hidden, weight, target, _ = _prepare(hidden, weight, target)
    scale = 1 / max(len(target), 1) if reduction == "mean" else 1.0
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return scale * _CrossEntropySum.apply(hidden, weight, target)
    total, n_tokens = hidden.new_zeros((), dtype=_precision(hidden)), len(weight)
    weight = _for_kernel(weight, hidden)
    for rows in _chunks(target, weight):
        logprob, _, _ = _statistics(hidden[rows], weight, n_tokens, target[rows], 1.0, False)
        total -= logprob.sum()
    return scale * total


@_untraced
def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at target, for every row.

    hidden (N, C) and weight (V, C), floating point; target (N,), int64. Returns logprobs (N,), or
    with return_entropy (logprobs (N,), entropy (N,)), in nats, float32 (float64 for float64
    inputs). Rows whose target is -100 (IGNORE) give exactly 0 and receive no gradient. Any upstream
    gradient is allowed, for both results at once. Raises as `linear_cross_entropy` does.
    """
    n_rows = len(hidden)
    hidden, weight, target, kept = _prepare(hidden, weight, target)
    logprobs, entropy = _Logprobs.apply(hidden, weight, target, temperature, return_entropy)
    if kept is not None:  # put the results back in their rows, zeros elsewhere
        zeros = logprobs.new_zeros(n_rows)
        logprobs, entropy = (zeros.masked_scatter(kept, x) for x in (logprobs, entropy))
    return (logprobs, entropy) if return_entropy else logprobs


def _prepare(hidden, weight, target):
    """Check the inputs, and drop ignored rows.

    Returns hidden, weight, target, and the mask of the rows kept, or None if that is all.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: they must "
            "be (N, C) and (V, C), so flatten batch and time"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must have one entry per row of hidden")
    # Dropped before the product and not masked after it: in SFT most rows are prompt or padding.
    kept = target != IGNORE
    if not kept.all():
        hidden, target = hidden[kept], target[kept]
    else:
        kept = None
    # On a GPU the check would be one more wait for its result.
    if target.device.type == "cpu" and len(target):
        low, high = target.aminmax()
        if low < 0 or high >= len(weight):
            raise IndexError(f"target out of range: {low}..{high} with {len(weight)} tokens")
    if _use_triton(hidden) and hidden.shape[1] % 8:  # TMA needs rows of whole 16 bytes
        hidden, weight = (F.pad(x, (0, -x.shape[1] % 8)) for x in (hidden, weight))
    return hidden, weight, target, kept


def _precision(x):
    """Sums over a vocabulary need float32 at least: bfloat16 would stop counting at 256."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(target, weight):
    """Slices over the rows, each with about as many logits as there is room for."""
    # Many small chunks waste time in launches and in rereading W; few large ones waste memory.
    if _use_triton(weight):
        size = WORKSPACE // (len(weight) * weight.element_size()) // 128 * 128  # whole tiles
    else:
        room = CHUNK_LOGITS if weight.device.type == "cpu" else WORKSPACE // 4
        size = room // max(len(weight), 1)
    size = max(size, 16)
    return [slice(start, start + size) for start in range(0, len(target), size)]


# ---------------------------------------------------------------------------------------------
# Gradients: the same code for PyTorch and Triton


class _CrossEntropySum(Function):
    """Sum over rows of -log p_t; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        ctx.n_tokens, ctx.weight_dtype = len(weight), weight.dtype
        weight = _for_kernel(weight, hidden)
        # The gradient for an upstream of 1. The true one is a factor, known in the backward pass.
        d_hidden, d_weight = _empty_gradients(ctx, hidden, weight)
        total = hidden.new_zeros((), dtype=_precision(hidden))
        for rows in _chunks(target, weight):
            t = target[rows]
            e, factor, others, logprob = _exponentials(hidden[rows], weight, ctx.n_tokens, t)
            total -= logprob.sum()
            # dz_j = p_j - [j = t], with p = factor * e, so dz = factor * e but for the target.
            # There it is p_t - 1, which would lose its digits as p_t nears 1: so PyTorch's path has
            # minus the sum of all other probabilities (Triton's has not: see `_exponentials`).
            e.scatter_(1, t[:, None], (-others / factor)[:, None].to(e.dtype))
            _accumulate(e, factor, hidden[rows], weight, rows, d_hidden, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        _forbid_double_backward()
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * upstream.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight[: ctx.n_tokens]
            scaled = torch.empty_like(d_weight, dtype=ctx.weight_dtype)
            d_weight = torch.mul(d_weight, upstream, out=scaled)  # scale and cast in one pass
        return d_hidden, d_weight, None


class _Logprobs(Function):
    """log p_t and, if asked for, H of every row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, with_entropy):
        statistics = hidden.new_empty(3, len(target), dtype=_precision(hidden))
        ctx.n_tokens, ctx.weight_dtype = len(weight), weight.dtype
        weight = _for_kernel(weight, hidden)
        for rows in _chunks(target, weight):
            inputs = hidden[rows], weight, ctx.n_tokens, target[rows]
            statistics[:, rows] = torch.stack(_statistics(*inputs, temperature, with_entropy))
        # Three numbers per row are kept instead of V: with them, p follows from z computed again.
        ctx.save_for_backward(hidden, weight, target, statistics)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # what no loss uses has upstream None, and costs nothing
        logprobs, _, entropy = statistics.clone()
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, h):
        _forbid_double_backward()
        hidden, weight, target, statistics = ctx.saved_tensors
        g = torch.zeros_like(statistics[0]) if g is None else g.contiguous()
        h = None if h is None else h.contiguous()  # the gradient of .sum() is one number, expanded
        d_hidden, d_weight = _empty_gradients(ctx, hidden, weight)
        for rows in _chunks(target, weight):
            inputs = hidden[rows], weight, ctx.n_tokens, target[rows]
            upstream = g[rows], None if h is None else h[rows]
            dz = _logit_gradients(*inputs, ctx.temperature, statistics[:, rows], *upstream)
            v = torch.full_like(g[rows], 1 / ctx.temperature)
            _accumulate(dz, v, hidden[rows], weight, rows, d_hidden, d_weight)
        if d_weight is not None:
            d_weight = d_weight[: ctx.n_tokens].to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _empty_gradients(ctx, hidden, weight):
    """Buffers for the gradients of hidden and weight; None for one that is not needed."""
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    new = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills it
    d_weight = new(weight, dtype=_precision(hidden)) if need_weight else None
    return d_hidden, d_weight


def _accumulate(dz, v, hidden, weight, rows, d_hidden, d_weight):
    """Propagate v * dz, the gradient of one chunk of logits, to its hidden states and the weight.

    dz (n, V); v (n,): a factor per row; rows: the chunk's slice of d_hidden. Products of bfloat16
    numbers are added up, and added to d_weight, in float32.
    """
    # v goes to the n x C hidden states and not to the n x V logits, of which there are many more.
    weight, hidden = weight.to(dz.dtype), (v[:, None] * hidden).to(dz.dtype)
    in_float32 = dict(out_dtype=torch.float32)
    if dz.dtype != torch.bfloat16:
        in_float32 = {}
    elif not dz.is_cuda:  # where out_dtype does not exist
        dz, weight, hidden, in_float32 = dz.float(), weight.float(), hidden.float(), {}
    with _no_autocast(dz):
        if d_hidden is not None:
            d_hidden[rows] = v[:, None] * torch.mm(dz, weight, **in_float32)
        if d_weight is not None:
            beta = min(rows.start, 1)  # 0 for the first chunk: what d_weight held is not read
            torch.addmm(d_weight, dz.T, hidden, beta=beta, out=d_weight, **in_float32)


def _no_autocast(x):
    """Inside somebody's torch.autocast, float32 products would be rounded to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def _forbid_double_backward():
    if torch.is_grad_enabled():  # create_graph=True, and our gradient has no graph of its own
        raise RuntimeError("the fused head cannot be differentiated twice")


# ---------------------------------------------------------------------------------------------
# Three passes over the logits of a chunk. Each is defined in PyTorch, and done in Triton on a GPU.
# n_tokens: how many rows of weight are tokens; the others are padding (see `_for_kernel`).


def _statistics(hidden, weight, n_tokens, target, temperature, with_entropy):
    """log p_t, log sum exp z and (if with_entropy, else 0) H of every row: three of (n,)."""
    if _use_triton(hidden):
        # Merge the tiles of a row, as the formulas above do it for two: (n, tiles) -> (n,).
        m, s, u = _run_kernel("statistics", hidden, weight, n_tokens, temperature, with_entropy)
        top = m.amax(1)
        scale = (m - top[:, None]).exp()  # e^(m_i - m), which is 0 for a tile far below the top
        total = (s * scale).sum(1)
        entropy = torch.zeros_like(top)
        if with_entropy:
            entropy = total.log() - (scale * (u + s * (m - top[:, None]))).sum(1) / total
        z_t = _target_logits(hidden, weight, target, temperature)
        # z_t is summed in another order than the tile's logits: rounding could make p_t exceed 1.
        return ((z_t - top) - total.log()).clamp(max=0), top + total.log(), entropy
    z = _logits(hidden, weight, temperature)
    p, logprob, top, log_s = _softmax(z, target)
    entropy = torch.zeros_like(logprob)
    if with_entropy:
        entropy = log_s - (p * (z - top[:, None])).sum(1)
    return logprob, top + log_s, entropy


def _exponentials(hidden, weight, n_tokens, target):
    """e (n, V), and per row: factor, with p = factor * e but for the target; 1 - p_t; log p_t."""
    if _use_triton(hidden):
        z_t = _target_logits(hidden, weight, target, 1.0)
        e, s = _run_kernel("exponentials", hidden, weight, n_tokens, base=z_t)
        total = s.sum(1).clamp(min=1)  # exp(z_t - z_t) = 1 is one term, up to rounding
        # 1 - p_t from a sum that holds p_t: unlike below, its digits end at 1e-7
        return e, 1 / total, (total - 1) / total, -total.log()
    z = _logits(hidden, weight)
    p, logprob, top, _ = _softmax(z, target)
    p.scatter_(1, target[:, None], 0.0)
    return p, torch.ones_like(top), p.sum(1), logprob


def _logit_gradients(hidden, weight, n_tokens, target, temperature, statistics, g, h):
    """dz_j = g ([j = t] - p_j) - h p_j (log p_j + H), (n, V), for upstream g and h (or None)."""
    logprob, lse, entropy = statistics
    t = target[:, None]
    if _use_triton(hidden):
        how = n_tokens, temperature, h is not None
        dz = _run_kernel("gradients", hidden, weight, *how, lse, entropy, g, h)
        at_target = -g * torch.expm1(logprob)  # g (1 - p_t); the tile's 1 - p_t has lost digits
        if h is not None:
            at_target -= h * logprob.exp() * (logprob + entropy)
        return dz.scatter_(1, t, at_target[:, None].to(dz.dtype))
    z = _logits(hidden, weight, temperature)
    p, logprob, top, log_s = _softmax(z, target)
    dz = -g[:, None] * p
    dz.scatter_(1, t, 0.0)
    dz.scatter_(1, t, -dz.sum(1, keepdim=True))  # g (1 - p_t), with all its digits
    if h is not None:
        log_p = z - (top + log_s)[:, None]
        dz -= h[:, None] * p * (log_p + entropy[:, None])
    return dz


def _logits(hidden, weight, temperature=1.0):
    dtype = _precision(hidden)  # the product of bfloat16 matrices would be rounded to bfloat16
    with _no_autocast(hidden):
        z = hidden.to(dtype) @ weight.to(dtype).T
    return z if temperature == 1.0 else z.div_(temperature)


def _softmax(z, target):
    """Logits (n, V) -> probabilities p (n, V) and, per row, log p_t, m = max z, log s."""
    p = z.softmax(1)
    top = z.amax(1)
    log_s = -p.amax(1).log()  # the largest logit enters s as exp(0) = 1, so its p is 1/s
    logprob = z.gather(1, target[:, None]).squeeze(1) - top - log_s
    return p, logprob, top, log_s


def _target_logits(hidden, weight, target, temperature):
    """z_t of every row (n,), float32: a product of n rows with n rows of the weight."""
    return (hidden.float() * weight[target].float()).sum(1) / temperature


# ---------------------------------------------------------------------------------------------
# Triton


def backend(device: torch.device) -> str:
    """What computes the head of float32 tensors on a device: "Triton" or "PyTorch"."""
    on_nvidia = device.type == "cuda" and torch.version.cuda
    return "Triton" if triton and on_nvidia else "PyTorch"


def _use_triton(x):
    """Whether x is bfloat16 or float32 on an NVIDIA GPU. (In float16 exp(z_j - z_t) overflows.)"""
    if not triton or x.dtype not in (torch.bfloat16, torch.float32):
        return False
    if not x.is_cuda or not torch.version.cuda:  # AMD's GPUs are "cuda", too: never tried there
        return INTERPRET
    # Before Ampere (8, 0) tensor cores cannot multiply bfloat16, and the kernel would crawl.
    return x.dtype == torch.float32 or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _for_kernel(weight, hidden):
    """The weight in the form that kernel and products read, made once for all chunks.

    In the dtype of hidden, and with rows of zeros up to a multiple of 16: at GPT-2's 50257 tokens,
    an odd number, cuBLAS is five times slower, and Triton stores two bytes at a time instead of 16.
    """
    if not _use_triton(hidden):
        return weight
    padding = -len(weight) % 16
    if not padding:
        return _aligned(weight.to(hidden.dtype))
    shape = len(weight) + padding, weight.shape[1]
    padded = torch.empty(shape, device=weight.device, dtype=hidden.dtype)
    padded[: len(weight)] = weight
    padded[len(weight) :] = 0
    return padded


def _aligned(x):
    """x, contiguous and starting at a multiple of 16 bytes: TMA fetches from nowhere else."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _run_kernel(
    mode, hidden, weight, n_tokens, temperature=1.0, with_entropy=False,
    base=None, entropies=None, g=None, h=None,
):  # fmt: skip
    """Launch one program per tile. Returns what the mode makes:

    "statistics"    m, s, u (n, tiles): max z, sum e^(z - m), sum e^(z - m) (z - m) of every tile
    "exponentials"  E (n, V) = e^min(z - base, 70), base being z_t, and its sums s (n, tiles)
    "gradients"     dz (n, V) = -(g + h (z - base + H)) e^(z - base), base being log sum exp z

    E and dz have the dtype of hidden, and zeros where weight has padding.
    """
    hidden = _aligned(hidden)
    (n, C), V = hidden.shape, len(weight)  # V with the padding of `_for_kernel`
    room = None
    if hidden.is_cuda:
        gpu = torch.cuda.get_device_properties(hidden.device)
        room = gpu.shared_memory_per_block_optin
    block, options = _tile(hidden.dtype, room)
    tiles = triton.cdiv(V, block["BLOCK_V"])
    new = dict(device=hidden.device, dtype=torch.float32)
    m, s = torch.empty(2, n, tiles, **new)
    u = torch.empty(n, tiles, **new) if with_entropy and mode == "statistics" else None
    out = None
    if mode != "statistics":
        out = torch.empty(n, V, device=hidden.device, dtype=hidden.dtype)
    if n:
        x, w = hidden, weight
        if block["TMA"]:
            x = TensorDescriptor.from_tensor(x, [block["BLOCK_N"], block["BLOCK_C"]])
            w = TensorDescriptor.from_tensor(w, [block["BLOCK_V"], block["BLOCK_C"]])
        with torch.cuda.device_of(hidden):  # Triton launches on the current GPU
            _tile_kernel[(triton.cdiv(n, block["BLOCK_N"]) * tiles,)](
                x, w, out, m, s, u, base, entropies, g, h,
                n, n_tokens, V, 1 / temperature,
                CHANNELS=C, MODE=mode, ENTROPY=with_entropy, **block, **options,
            )  # fmt: skip
    if mode == "statistics":
        return m, s, u
    return (out, s) if mode == "exponentials" else out


def _tile(dtype, shared_memory):
    """Shape of a tile and how to compile it: (constants of the kernel, options of the compiler).

    shared_memory: bytes that one program may have; None in Triton's interpreter.
    """
    bf16 = dtype == torch.bfloat16
    if shared_memory is None:  # the interpreter is slow, and cannot multiply bfloat16
        shape = dict(BLOCK_N=16, BLOCK_V=32, BLOCK_C=16)
        return dict(**shape, TMA=bf16, UPCAST=True, PRECISION="ieee"), {}
    # Prefetching while multiplying takes num_stages times (BLOCK_N + BLOCK_V) x BLOCK_C numbers of
    # shared memory: 196,608, 98,304 or 49,152 bytes of bfloat16. Only recent GPUs have as much as
    # the first, and they also have a tensor memory accelerator (TMA).
    if bf16 and shared_memory >= 200_000:
        shape, stages, tma = dict(BLOCK_N=128, BLOCK_V=256, BLOCK_C=64), 4, True
    elif bf16:
        channels = 64 if shared_memory >= 98304 else 32
        shape, stages, tma = dict(BLOCK_N=128, BLOCK_V=128, BLOCK_C=channels), 3, False
    else:
        shape, stages, tma = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_C=32), 3, False
    # "ieee", since Triton's own choice for float32 is TF32, with 10 bits
    constants = dict(**shape, TMA=tma, UPCAST=False, PRECISION="tf32" if bf16 else "ieee")
    return constants, dict(num_warps=8, num_stages=stages)


if triton:
    # Triton recompiles for every alignment of its arguments. Those with one number per row may
    # start anywhere, and are read too rarely for it to matter.
    @triton.jit(
        do_not_specialize=["n_rows"],
        do_not_specialize_on_alignment=[*"MSU", "BASE", "ENTROPIES", "D_LOGPROB", "D_ENTROPY"],
    )
    def _tile_kernel(
        X, W, OUT, M, S, U, BASE, ENTROPIES, D_LOGPROB, D_ENTROPY,
        n_rows, n_tokens, out_stride, scale,
        CHANNELS: tl.constexpr, MODE: tl.constexpr, ENTROPY: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
        TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One tile of logits, and what `_run_kernel` says its mode makes of it."""
        # Neighbouring programs take different rows of the same tokens, whose part of W stays in L2.
        row_tiles = tl.cdiv(n_rows, BLOCK_N)
        row_tile, v_tile = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
        # int64, since row * stride passes 2^31 in large batches
        rows = (row_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # (BLOCK_N,)
        tokens = (v_tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)  # (BLOCK_V,)
        channels = tl.arange(0, BLOCK_C)  # (BLOCK_C,)
        row_in, token_in = rows < n_rows, tokens < n_tokens

        # The product: BLOCK_C channels at a time, summed in float32.
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for first in range(0, CHANNELS, BLOCK_C):
            if TMA:  # X and W are descriptors, from which a block is fetched; beyond an edge are 0s
                x = X.load([row_tile * BLOCK_N, first])  # (BLOCK_N, BLOCK_C)
                w = W.load([v_tile * BLOCK_V, first]).T  # (BLOCK_C, BLOCK_V)
            else:
                inside = channels < CHANNELS - first
                x = X + rows[:, None] * CHANNELS + first + channels[None, :]  # addresses
                w = W + tokens[None, :] * CHANNELS + first + channels[:, None]
                x = tl.load(x, mask=row_in[:, None] & inside[None, :], other=0.0)
                w = tl.load(w, mask=token_in[None, :] & inside[:, None], other=0.0)
            if UPCAST:  # Triton's interpreter cannot multiply bfloat16
                x, w = x.to(tl.float32), w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        z *= scale

        part = rows * tl.cdiv(n_tokens, BLOCK_V) + v_tile  # where (row, tile) stands in M, S, U
        if MODE == "statistics":
            # Columns beyond the vocabulary are not tokens: as zeros they would enter every sum. Nor
            # may they be -inf, for then e * z would be 0 * -inf.
            z = tl.where(token_in[None, :], z, -1e30)
            m = tl.max(z, 1)
            z -= m[:, None]
            e = tl.exp(z)
            tl.store(M + part, m, mask=row_in)
            tl.store(S + part, tl.sum(e, 1), mask=row_in)
            if ENTROPY:
                tl.store(U + part, tl.sum(e * z, 1), mask=row_in)
        else:
            out = OUT + rows[:, None] * out_stride + tokens[None, :]
            base = tl.load(BASE + rows, mask=row_in, other=0.0)  # z_t, or log sum exp z
            if MODE == "exponentials":
                e = tl.exp(tl.minimum(z - base[:, None], 70.0))
                e = tl.where(token_in[None, :], e, 0.0)
                tl.store(S + part, tl.sum(e, 1), mask=row_in)
            else:
                g = tl.load(D_LOGPROB + rows, mask=row_in, other=0.0)
                log_p = z - base[:, None]
                upstream = g[:, None]
                if ENTROPY:
                    h = tl.load(D_ENTROPY + rows, mask=row_in, other=0.0)
                    entropy = tl.load(ENTROPIES + rows, mask=row_in, other=0.0)
                    upstream = g[:, None] + h[:, None] * (log_p + entropy[:, None])
                e = tl.where(token_in[None, :], -upstream * tl.exp(log_p), 0.0)
            # The padding of a row is written, too, as zeros: whole vectors up to its end.
            inside = tokens < out_stride
            tl.store(out, e.to(OUT.dtype.element_ty), mask=row_in[:, None] & inside[None, :])
