"""GPT-2's size on one GPU: pretraining, sampling, PPO; and the whole progression of the town.

    python tests/bench_gpu.py            under ten minutes on one GPU, no network
    python tests/bench_gpu.py --tiny     the same code on models so small that a CPU runs them

Random weights of GPT-2's shape (124 million parameters) in bfloat16, with and without
torch.compile. Prints one row per measurement, after the rate at which this GPU multiplies matrices,
and writes out/bench_gpu.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_growth import measure

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from gpt import GPT, GPTConfig, generate  # noqa: E402

GPT2 = dict(context=1024, vocabulary=50257, channels=768, layers=12, heads=12)
TINY = dict(context=32, vocabulary=100, channels=32, layers=2, heads=2)


def now() -> float:
    """Seconds, after all that the GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(n: int, device: str) -> float:
    """TFLOP/s of a product of two n x n matrices in bfloat16: the most that training can reach."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    times = []
    for _ in range(20):
        started = now()
        a @ b
        times.append(now() - started)
    return 2 * n**3 / statistics.median(times) / 1e12


def flops_per_token(shape: dict) -> float:
    """Of forward and backward: 6 per weight of a matrix, and attention over half the context."""
    C, T = shape["channels"], shape["context"]
    weights = 12 * shape["layers"] * C * C + shape["vocabulary"] * C
    return 6 * weights + 6 * shape["layers"] * T * C


def sampling(shape: dict, prompts: int, tokens: int, device: str) -> float:
    """Tokens per second of `generate` from prompts of 32 tokens, all replies of full length."""
    sizes = [shape[name] for name in ("vocabulary", "context", "layers", "heads", "channels")]
    model = GPT(GPTConfig(*sizes)).to(device).eval()
    model.bf16 = True
    asked = torch.randint(shape["vocabulary"], (prompts, min(32, shape["context"] // 4))).tolist()
    generate(model, asked, 4)
    started = now()
    replies, _ = generate(model, asked, tokens)
    return sum(map(len, replies)) / (now() - started)


def progression() -> float:
    """Seconds of the README's command."""
    stages = ("pretrain", "sft", "rm", "ppo", "dpo")
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as out:
        started = now()
        for script in [[f"train_{stage}.py"] for stage in stages] + [["-m", "data.evaluate"]]:
            command = [sys.executable, *script, "--out", out]
            subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        return now() - started


def main():
    """Measure all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="try the code, on any machine")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("there is no GPU here; --tiny tries the code without one")
    shape = TINY if args.tiny else GPT2
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    results = {"device": name, "torch": torch.__version__, "rows": []}
    print(f"{name}, torch {torch.__version__}")

    def report(what: str, value: float, unit: str):
        results["rows"].append({"what": what, "value": value, "unit": unit})
        print(f"{what:60} {value:12,.2f} {unit}", flush=True)

    rate = matrix_rate(256 if args.tiny else 8192, device)
    report("product of two square matrices, bfloat16", rate, "TFLOP/s")
    batch, small = (4, 2) if args.tiny else (64, 32)
    tokens = batch * shape["context"]
    for compiled in (False, True):
        options = dict(bf16=True, microbatch=small, optimizer="adamw", compile=compiled)
        seconds = measure("pretrain", {**shape, "batch": batch}, **options)["seconds"]
        how = "compiled" if compiled else "eager"
        report(f"pretraining, {how}", tokens / seconds, "tokens/s")
        share = tokens * flops_per_token(shape) / seconds / 1e12 / rate
        report(f"pretraining, {how}: share of that rate", 100 * share, "%")
    prompts, length = (4, 8) if args.tiny else (512, 128)
    report("sampling", sampling(shape, prompts, length, device), "tokens/s")
    ppo = {**shape, "context": 2 * length, "batch": prompts}
    options = dict(bf16=True, microbatch=2 if args.tiny else 64)
    seconds = measure("ppo", ppo, **options)["seconds"]
    report(f"PPO iteration, {prompts} rollouts of {length} tokens", seconds, "s")
    if not args.tiny:
        report("the README's command: five scripts and the report", progression(), "s")
    path = Path("out/bench_gpu.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(path)


if __name__ == "__main__":
    main()
