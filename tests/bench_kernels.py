"""Time the fused head against its peers, each beside its memory and its error.

    python tests/bench_kernels.py      under ten minutes, no network; out/bench_kernels.json

Rows of the table: ours; the bare matrix products (the floor: no softmax); linear + cross-entropy as
one writes it, as it is and under torch.compile; F.linear_cross_entropy; Liger; cut-cross-entropy.
What is not installed is named and skipped. Inputs are random with logits of SD 3, rounds are
interleaved, times are medians. Errors are relative, of the gradients, against float64 on the first
rows. On a GPU in bfloat16, on a CPU in float32, where there is no peer but PyTorch.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: E402
from kernels import linear_cross_entropy, linear_logprobs  # noqa: E402

CUDA = torch.cuda.is_available()
SIZES = {  # rows, channels, tokens
    True: [(8192, 768, 50304), (32768, 768, 50304), (8192, 2048, 50304), (8192, 4096, 128256)],
    False: [(2048, 256, 16384), (4096, 128, 1024)],
}


def eager_loss(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def eager_logprobs(hidden, weight, target):
    logprobs = F.linear(hidden, weight).float().log_softmax(1)
    return logprobs.gather(1, target[:, None]).squeeze(1)


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


def peers() -> dict:
    """name -> loss(hidden, weight, target), of the peers that are installed."""
    found = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found["liger"] = lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t)[0]
    except ImportError:
        print("liger: not installed, skipped")
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cut-cross-entropy, filtered"] = cce
    except ImportError:
        print("cut-cross-entropy: not installed, skipped")
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    else:
        print(f"F.linear_cross_entropy: not in torch {torch.__version__}, skipped")
    return found


def tasks() -> dict:
    """task -> (provider -> function, whether a backward pass follows)."""
    loss = {"ours": linear_cross_entropy, "linear + cross_entropy": eager_loss}
    logprobs = {"ours": linear_logprobs, "linear + log_softmax": eager_logprobs}
    if CUDA:
        loss["torch.compile"] = torch.compile(eager_loss)
        logprobs["torch.compile"] = torch.compile(eager_logprobs)
    else:
        print("torch.compile: measured on a GPU only")
    loss |= peers()
    return {
        "loss, forward + backward": ({**loss, "3 bare products": bare_products(3)}, True),
        "log-probabilities, forward + backward": (
            {**logprobs, "4 bare products": bare_products(4)},
            True,
        ),
        "log-probabilities, forward": ({**logprobs, "1 bare product": bare_products(1)}, False),
    }


def once(function, backward, inputs):
    """Seconds, peak memory beyond the inputs (MiB, None on a CPU), result and gradients."""
    hidden, weight, target, upstream = inputs
    hidden, weight = (x.detach().requires_grad_(backward) for x in (hidden, weight))
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        result = function(hidden, weight, target)
        if result is not None and backward:
            result.backward(upstream if result.ndim else None)
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if CUDA else None
    return seconds, memory, result, hidden.grad, weight.grad


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def errors(function, backward, inputs, rows=256):
    """Of the result (absolute, nats) and of both gradients (relative), on the first rows."""
    hidden, weight, target, upstream = inputs
    hidden, target, upstream = hidden[:rows], target[:rows], upstream[:rows]
    _, _, result, dx, dw = once(function, backward, (hidden, weight, target, upstream))
    if result is None:
        return None
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = eager_exact(h, w, target)
    if result.ndim == 0:
        exact = -exact.mean()
    numbers = {"result": (result.double() - exact).abs().max().item()}
    if backward:
        exact.backward(upstream.double() if exact.ndim else None)
        numbers |= {"dX": relative(dx, h.grad), "dW": relative(dw, w.grad)}
    return numbers


def eager_exact(hidden, weight, target):
    return (hidden @ weight.T).log_softmax(1).gather(1, target[:, None]).squeeze(1)


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
    rows = []
    for task, (providers, backward) in tasks().items():
        for n, c, v in SIZES[CUDA]:
            torch.manual_seed(0)
            place = dict(device="cuda" if CUDA else "cpu")
            place["dtype"] = torch.bfloat16 if CUDA else torch.float32
            inputs = (
                torch.randn(n, c, **place),
                torch.randn(v, c, **place) * 3 / c**0.5,
                torch.randint(v, (n,), device=place["device"]),
                torch.randn(n, device=place["device"]),
            )
            times, notes = {name: [] for name in providers}, {}
            for round in range(-2, args.rounds):  # two rounds to warm up
                for name, function in providers.items():
                    if name in notes:
                        continue
                    try:
                        seconds, memory, *_ = once(function, backward, inputs)
                    except Exception as error:  # a peer that fails is a line, not the end
                        notes[name] = f"failed: {error}".splitlines()[0][:60]
                        continue
                    if round >= 0:
                        times[name].append((seconds, memory))
            print(f"\n{task}, {n} x {c} x {v}")
            ours = statistics.median(seconds for seconds, _ in times["ours"])
            for name, function in providers.items():
                if name in notes:
                    print(f"  {name:28} {notes[name]}")
                    continue
                median = statistics.median(seconds for seconds, _ in times[name])
                memory = times[name][-1][1]
                row = dict(task=task, size=[n, c, v], provider=name, ms=1e3 * median)
                row |= dict(of_ours=median / ours, extra_mib=memory)
                row["errors"] = errors(function, backward, inputs)
                rows.append(row)
                shown = ""
                if row["errors"]:
                    shown = "  ".join(f"{k} {e:.1e}" for k, e in row["errors"].items())
                extra = "" if memory is None else f"{memory:8.0f} MiB"
                print(
                    f"  {name:28} {row['ms']:9.2f} ms {row['of_ours']:6.2f} x ours {extra}  {shown}"
                )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
