"""Time the fused head against its peers, each beside its memory and its error.

    python tests/bench/bench_kernels.py      under ten minutes, no network; out/bench_kernels.json

Rows of the table: ours; the bare matrix products (the floor: no softmax); linear + cross-entropy as
one writes it, as it is and under torch.compile; F.linear_cross_entropy; Liger; cut-cross-entropy.
What is not installed is named and skipped. Inputs are random with logits of SD 3, rounds are
interleaved, times are medians. Memory is the peak beyond the inputs: of the allocator on a GPU, of
a process of its own on a CPU. Errors are against float64 on the first rows: of the result the
largest, in nats; of the gradients relative. A last table has the error of log-probabilities where
rounded logits hurt most, at SD 6 and with 80 subtracted from all of them, as GPT-2 does it.
On a GPU in bfloat16; on a CPU in float32, where there is no peer but PyTorch.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import kernels  # noqa: E402
from kernels import linear_cross_entropy, linear_logprobs  # noqa: E402

CUDA = torch.cuda.is_available()
SIZES = {  # rows, channels, tokens
    True: [(8192, 768, 50257), (8192, 768, 50304), (8192, 4096, 128256), (8192, 4096, 151936)],
    False: [(2048, 256, 16384), (4096, 128, 1024)],
}


def eager_loss(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def eager_logprobs(hidden, weight, target):
    logprobs = F.linear(hidden, weight).float().log_softmax(1)
    return logprobs.gather(1, target[:, None]).squeeze(1)


def eager_with_entropy(hidden, weight, target):
    logprobs = F.linear(hidden, weight).float().log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return torch.stack([logprobs.gather(1, target[:, None]).squeeze(1), entropy])


def our_logprobs_with_entropy(hidden, weight, target):
    return torch.stack(linear_logprobs(hidden, weight, target, return_entropy=True))


def bare_products(n):
    """n matrix products of the size of the logits: what no exact head can do without."""

    def run(hidden, weight, target):
        with torch.no_grad():
            logits = hidden @ weight.T
            if n >= 3:
                logits @ weight, logits.T @ hidden
            if n == 4:  # the logits once more, in the backward pass
                hidden @ weight.T

    return run


def peers() -> tuple[dict, list]:
    """name -> loss(hidden, weight, target), of the peers that are installed; and what is not."""
    found, missing = {}, []
    if not CUDA:
        missing.append("Liger, cut-cross-entropy, torch.compile: measured on a GPU only")
    else:
        try:
            from liger_kernel.ops import fused_linear_cross_entropy as liger

            loss = liger.LigerFusedLinearCrossEntropyFunction
            found["liger"] = lambda h, w, t: loss.apply(h, w, t)[0]
        except ImportError:
            missing.append("Liger: not installed, skipped")
        try:
            from cut_cross_entropy import linear_cross_entropy as cce

            found["cut-cross-entropy, filtered"] = cce
        except ImportError:
            missing.append("cut-cross-entropy: not installed, skipped")
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    else:
        missing.append(f"F.linear_cross_entropy: not in torch {torch.__version__}, skipped")
    return found, missing


def tasks() -> dict:
    """task -> (provider -> function, its definition for float64, whether backward follows)."""
    loss = {"ours": linear_cross_entropy, "linear + cross_entropy": eager_loss}
    logprobs = {"ours": linear_logprobs, "linear + log_softmax": eager_logprobs}
    both = {"ours": our_logprobs_with_entropy, "linear + log_softmax": eager_with_entropy}
    if CUDA:
        torch._dynamo.config.recompile_limit = 64  # one for every size, or it would run eagerly
        loss["torch.compile"] = torch.compile(eager_loss, dynamic=False)
        logprobs["torch.compile"] = torch.compile(eager_logprobs, dynamic=False)
        both["torch.compile"] = torch.compile(eager_with_entropy, dynamic=False)
    loss |= peers()[0]
    four = {"4 bare products": bare_products(4)}
    return {
        "loss, forward + backward": (
            {**loss, "3 bare products": bare_products(3)},
            eager_loss,
            True,
        ),
        "log-probabilities, forward + backward": ({**logprobs, **four}, eager_logprobs, True),
        "log-probabilities + entropy, forward + backward": (
            {**both, **four},
            eager_with_entropy,
            True,
        ),
        "log-probabilities, forward": (
            {**logprobs, "1 bare product": bare_products(1)},
            eager_logprobs,
            False,
        ),
    }


def make_inputs(n, c, v, sd=3.0, offset=0.0):
    """Random hidden (n, c), weight (v, c) with logits of this SD and offset, target, upstream."""
    torch.manual_seed(0)
    place = dict(device="cuda" if CUDA else "cpu", dtype=torch.bfloat16 if CUDA else torch.float32)
    hidden, weight = torch.randn(n, c, **place), torch.randn(v, c, **place) * sd / c**0.5
    if offset:
        hidden[:, 0], weight[:, 0] = offset, 1.0
    target = torch.randint(v, (n,), device=hidden.device)
    return hidden, weight, target, torch.randn(2, n, **place).float()


def run(function, backward, inputs):
    """The result and the gradients of hidden and weight."""
    hidden, weight, target, upstream = inputs
    hidden, weight = (x.detach().requires_grad_(backward) for x in (hidden, weight))
    with torch.set_grad_enabled(backward):
        result = function(hidden, weight, target)
        if result is not None and backward:
            g = {0: None, 1: upstream[0], 2: upstream}[result.ndim]
            result.backward(None if g is None else g.to(result.dtype))
    return result, hidden.grad, weight.grad


def once(function, backward, inputs):
    """Seconds, and on a GPU the peak of memory beyond the inputs in MiB."""
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    results = run(function, backward, inputs)
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del results
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if CUDA else None


def resident_peak():
    """The largest resident memory that this process has had, in MiB. Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def peak_of_process(task, provider, size):
    """MiB by which the resident memory of this process, a fresh one, grows beyond the inputs."""
    providers, _, backward = tasks()[task]
    inputs = make_inputs(*size)
    hidden, weight, target, upstream = inputs
    small = hidden[:64], weight, target[:64], upstream[:, :64]
    run(providers[provider], backward, small)  # what is allocated once and for all
    before = resident_peak()
    results = run(providers[provider], backward, inputs)
    peak = resident_peak() - before
    del results
    return peak


def errors(function, exactly, backward, inputs, rows=256):
    """Of the result (largest, nats) and of both gradients (relative), on the first rows."""
    hidden, weight, target, upstream = inputs
    inputs = hidden[:rows], weight, target[:rows], upstream[:, :rows]
    result, *gradients = run(function, backward, inputs)
    if result is None:
        return None
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact, *exact_gradients = run(exactly, backward, double)
    numbers = {"result": (result.double() - exact).abs().max().item()}
    for name, ours, theirs in zip(("dX", "dW"), gradients, exact_gradients):
        if backward:
            numbers[name] = ((ours.double() - theirs).norm() / theirs.norm()).item()
    return numbers


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/bench_kernels.json", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 7)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    version = kernels.triton.__version__ if kernels.triton else "none"
    print(f"{device}, torch {torch.__version__}, triton {version}")
    print("\n".join(peers()[1]))
    rows = []
    for task, (providers, exactly, backward) in tasks().items():
        for size in SIZES[CUDA]:
            inputs = make_inputs(*size)
            times, failed = {name: [] for name in providers}, {}
            for round in range(-2, args.rounds):  # two rounds to warm up
                for name, function in providers.items():
                    if name in failed:
                        continue
                    try:
                        measured = once(function, backward, inputs)
                    except Exception as error:  # a peer that fails is a line, not the end
                        failed[name] = f"failed: {error}".splitlines()[0][:60]
                        continue
                    if round >= 0:
                        times[name].append(measured)
            print(f"\n{task}, {size[0]} x {size[1]} x {size[2]}")
            ours = statistics.median(seconds for seconds, _ in times["ours"])
            for name, function in providers.items():
                if name in failed:
                    print(f"  {name:28} {failed[name]}")
                    continue
                median = statistics.median(seconds for seconds, _ in times[name])
                memory = times[name][-1][1]
                if not CUDA:
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        memory = pool.submit(peak_of_process, task, name, size).result()
                wrong = errors(function, exactly, backward, inputs)
                rows.append(
                    {
                        "task": task,
                        "size": size,
                        "provider": name,
                        "ms": 1e3 * median,
                        "of_ours": median / ours,
                        "extra_mib": memory,
                        "errors": wrong,
                    }
                )
                shown = "  ".join(f"{k} {e:.1e}" for k, e in (wrong or {}).items())
                print(
                    f"  {name:28} {1e3 * median:9.2f} ms {median / ours:6.2f} x ours "
                    f"{memory:8.0f} MiB  {shown}"
                )
    print("\nlargest error of a log-probability at SD 6 and offset -80, in nats")
    providers, exactly, _ = tasks()["log-probabilities, forward"]
    inputs = make_inputs(1024, *SIZES[CUDA][0][1:], sd=6.0, offset=-80.0)
    for name, function in providers.items():
        wrong = errors(function, exactly, False, inputs, rows=1024)
        if wrong:
            rows.append({"task": "SD 6, offset -80", "provider": name, "errors": wrong})
            print(f"  {name:28} {wrong['result']:.1e}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
