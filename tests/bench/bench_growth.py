"""How cost grows: seconds and memory of a step of every stage against context, batch and so on.

    python tests/bench/bench_growth.py                 about 15 minutes on two cores, no network
    python tests/bench/bench_growth.py --stages dpo --rounds 3

Runs the scripts as they are, in float32, from random weights, on random text, with one size changed
at a time. Every measurement is a process of its own, and the first step is not counted. Prints a
table of exponents, and writes growth.csv and growth.png to --results. The exponent k of
cost ~ size^k is the slope of a line through the points on double logarithmic axes: 1 is
proportional, less means that something else costs, too.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_pretrain  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from data.experiments.plots import grouped, panels, save, write_csv  # noqa: E402
from data.run import COLOURS, Run  # noqa: E402
from data.tokenizer import make_tokenizer  # noqa: E402
from gpt import GPT, GPTConfig, ScalarModel, fingerprint, save_checkpoint  # noqa: E402

SCRIPTS = {
    "pretrain": train_pretrain,
    "sft": train_sft,
    "rm": train_rm,
    "ppo": train_ppo,
    "dpo": train_dpo,
}
USUAL = {"context": 64, "batch": 32, "vocabulary": 1024, "width": 128, "depth": 2}
SIZES = {
    "context": (64, 128, 256, 512),
    "batch": (16, 32, 64, 128),
    "vocabulary": (1024, 4096, 16384),
    "width": (128, 256, 512),
    "depth": (2, 4, 8),
}
AXES = {
    "context": "context, tokens",
    "batch": "batch: sequences, pairs, rollouts",
    "vocabulary": "vocabulary, tokens",
    "width": "width, channels",
    "depth": "depth, blocks",
}
STEPS = 4  # that are timed, after one that is not


def prepare(folder: Path, context: int, batch: int, vocabulary: int, width: int, depth: int):
    """Checkpoints with random weights, rows that fill the context, and text for pretraining."""
    alphabet = [chr(0x10000 + i) for i in range(vocabulary - 5)]  # beside five special tokens
    tokenizer = make_tokenizer("char", ["".join(alphabet)], vocabulary)
    shape = GPTConfig(tokenizer.n_vocab, context, depth, 4, width)
    torch.manual_seed(0)
    for stage, model in (("sft", GPT(shape)), ("rm", ScalarModel(shape))):
        about = {"stage": stage, "model_config": vars(shape), "tokenizer": tokenizer.state}
        about["fingerprint"] = fingerprint(tokenizer.state)
        save_checkpoint(folder / stage / "ckpt.pt", {**about, "model": model.state_dict()})
    rng, half, count = random.Random(0), context // 2, (STEPS + 3) * batch * 10 // 9 + 20

    def text(length):
        return "".join(rng.choices(alphabet, k=length))

    # A conversation has three tokens besides its text; a prompt of PPO leaves room for the reply.
    rows = [
        {"prompt": text(half - 3), "chosen": text(half - 2), "rejected": text(half - 2)}
        for _ in range(count)
    ]
    rows = [{**row, "response": row["chosen"]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text(context * 2) for _ in range(count)] + ["".join(alphabet)] * 20
    (folder / "text.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")


def measure(stage: str, sizes: dict) -> dict:
    """Seconds per step of a script, and its peak memory beyond what the libraries take, in MB."""
    script, steps, times = SCRIPTS[stage], Run.steps, []

    class Enough(Exception):
        """Raised before the last step, which evaluates."""

    def watched(self, total, *args, **parts):
        for step in steps(self, total, *args, **parts):
            times.append(time.perf_counter())
            if len(times) == STEPS + 2:
                raise Enough
            yield step

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, **sizes)
        options = {"out": name, "eval_every": 10**9, "save_every": 10**9, "bf16": False}
        options["threads"] = torch.get_num_threads()
        if stage == "pretrain":
            options |= {"data": str(folder / "text.txt"), "tokenizer": "char", "n_head": 4}
            options |= {"context": sizes["context"], "n_layer": sizes["depth"]}
            options |= {"n_embd": sizes["width"], "batch_size": sizes["batch"], "steps": STEPS + 3}
        else:
            options |= {"data": str(folder / "rows.jsonl"), "init": str(folder / "sft/ckpt.pt")}
            if stage == "ppo":
                options |= {"rollouts": sizes["batch"], "minibatch": sizes["batch"]}
                options |= {"iterations": STEPS + 3, "max_new_tokens": sizes["context"] // 2}
            else:
                options |= {"batch_size": sizes["batch"], "max_new_tokens": 1}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with mock.patch.object(Run, "steps", watched), contextlib.suppress(Enough):
                script.main(script.Config(**options))
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (peak - before) / 1024}


def exponent(x, y) -> float:
    """k of the best y ~ x^k."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def exponents(rows: list[dict]) -> str:
    """A Markdown table: of every stage and size, the exponents of seconds and of memory."""
    lines = ["| seconds; memory | " + " | ".join(SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for stage, of_stage in grouped(rows, "stage").items():
        cells = []
        for size, some in grouped(of_stage, "varied").items():
            x = [row[size] for row in some]
            both = (exponent(x, [row[cost] for row in some]) for cost in ("seconds", "megabytes"))
            cells.append("; ".join(f"{k:.2f}" for k in both))
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path):
    """Seconds of a step against every size, a line per stage."""
    figure, axes = panels(len(SIZES), 2, sharey=True)
    for axis, size in zip(axes, SIZES):
        for (stage, some), colour, marker in zip(grouped(rows, "stage").items(), COLOURS, "osv^D"):
            points = [(row[size], row["seconds"]) for row in some if row["varied"] == size]
            axis.loglog(*zip(*points), marker=marker, ms=4, color=colour, label=stage)
        axis.set_xticks(SIZES[size], map(str, SIZES[size]))
        axis.minorticks_off()
        axis.set(xlabel=AXES[size])
    for axis in axes[::2]:
        axis.set_ylabel("seconds per step (PPO: iteration)")
    save(figure, path, columns=5)


def main():
    """Measure all, write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each (default: 1)")
    parser.add_argument("--results", type=Path, default=Path("out"), help="(default: out)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args.one[0], json.loads(args.one[1]))))
    found = {}  # (stage, size, value) -> measurements
    for _, stage, size in itertools.product(range(args.rounds), args.stages, SIZES):
        for value in SIZES[size]:
            sizes = json.dumps({**USUAL, size: value})
            command = [sys.executable, __file__, "--one", stage, sizes]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{stage}, {size} {value}: {done.stderr[-2000:]}")
            numbers = json.loads(done.stdout.splitlines()[-1])
            found.setdefault((stage, size, value), []).append(numbers)
            print(f"{stage:9} {size:10} {value:6} {numbers['seconds']:.3f} s", flush=True)
    rows = []
    for (stage, size, value), numbers in found.items():
        row = {"stage": stage, "varied": size, **USUAL, size: value}
        for cost in ("seconds", "megabytes"):
            row[cost] = statistics.median(some[cost] for some in numbers)
        rows.append(row)
    args.results.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.results / "growth.csv")
    draw(rows, args.results / "growth.png")
    print(exponents(rows))


if __name__ == "__main__":
    main()
