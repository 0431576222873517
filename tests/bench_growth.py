"""How cost grows: seconds and memory of a step of every stage against context, batch and so on.

    python tests/bench_growth.py                       about 15 minutes on two cores, no network
    python tests/bench_growth.py --stages dpo --rounds 3

Runs the scripts as they are, from random weights, on random text, with one size changed at a time;
every measurement is a process of its own, and the first step is not counted. Writes growth.csv and
growth.png to --results. The exponent k of cost ~ size^k is the slope of a line through the points
on double logarithmic axes: 1 is proportional, less means that something else costs, too.
"""

import argparse
import contextlib
import csv
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny_runs import SCRIPTS  # noqa: E402

import train_pretrain  # noqa: E402
from data.tokenizer import make_tokenizer  # noqa: E402
from gpt import GPT, GPTConfig, ScalarModel, save_checkpoint  # noqa: E402

matplotlib.use("Agg")

USUAL = {"context": 64, "batch": 32, "vocabulary": 1024, "channels": 128}
SIZES = {
    "context": (32, 64, 128, 256, 512),
    "batch": (8, 16, 32, 64, 128),
    "vocabulary": (256, 1024, 4096, 16384),
    "channels": (64, 128, 256, 512),
}
AXES = {
    "context": "context, tokens",
    "batch": "batch: sequences, pairs or rollouts",
    "vocabulary": "vocabulary, tokens",
    "channels": "channels (parameters ~ channels²)",
}
STEPS = 4
# Okabe and Ito, and markers, for the colour-blind and for print.
STYLE = dict(
    zip(SCRIPTS, [("#000000", "o"), ("#0072B2", "s"), ("#E69F00", "v"), ("#D55E00", "^")])
) | {"dpo": ("#009E73", "D")}


def characters(count: int) -> list[str]:
    """So many different characters: a character tokenizer has one id for each."""
    return [chr(0x10000 + i) for i in range(count)]


def prepare(folder, context, batch, vocabulary, channels, layers=2, heads=4) -> dict:
    """Checkpoints with random weights, and rows that fill the context; returns common options."""
    alphabet = characters(vocabulary - 5)  # the tokenizer has five special ids of its own
    tokenizer = make_tokenizer("char", ["".join(alphabet)], vocabulary)
    shape = GPTConfig(tokenizer.n_vocab, context, layers, heads, channels)
    torch.manual_seed(0)
    for stage, model in (("sft", GPT(shape)), ("rm", ScalarModel(shape))):
        about = {"stage": stage, "model_config": vars(shape), "tokenizer": tokenizer.state}
        save_checkpoint(folder / stage / "ckpt.pt", {**about, "model": model.state_dict()})
    rng, half = random.Random(0), context // 2
    count = (STEPS + 2) * batch * 10 // 9 + 20

    def text(length):
        return "".join(rng.choices(alphabet, k=length))

    # A conversation has three tokens besides its text; a PPO prompt leaves room for the reply.
    rows = [
        {"prompt": text(half - 3), "chosen": text(half - 2), "rejected": text(half - 2)}
        for _ in range(count)
    ]
    for row in rows:
        row["response"] = row["chosen"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [text(context * 2) for _ in range(count)] + ["".join(alphabet)] * 20
    (folder / "text.txt").write_text("<|endoftext|>".join(words), encoding="utf-8")
    return {"out": str(folder), "eval_every": 10**9, "save_every": 10**9}


def measure(stage: str, sizes: dict, **more) -> dict:
    """Seconds per step of a script and peak memory; sizes as `prepare` has them, more: options."""
    script, times = SCRIPTS[stage], []
    steps = train_pretrain.Run.steps

    class Enough(Exception):
        pass

    def watched(self, total, *args, **parts):
        for step in steps(self, total, *args, **parts):
            times.append(time.perf_counter())
            if len(times) > STEPS + 1:  # before the last step, which evaluates
                raise Enough
            yield step

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = prepare(folder, **sizes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if stage == "pretrain":
            options.update(data=str(folder / "text.txt"), tokenizer="char")
            options.update(n_layer=sizes.get("layers", 2), n_head=sizes.get("heads", 4))
            options.update(context=sizes["context"], n_embd=sizes["channels"])
            options.update(batch_size=sizes["batch"], steps=STEPS + 3)
        else:
            options.update(data=str(folder / "rows.jsonl"), init=str(folder / "sft/ckpt.pt"))
            if stage == "ppo":
                options.update(rollouts=sizes["batch"], minibatch=sizes["batch"])
                options.update(iterations=STEPS + 3, max_new_tokens=sizes["context"] // 2)
            else:
                options.update(batch_size=sizes["batch"], epochs=2, max_new_tokens=1)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with mock.patch.object(train_pretrain.Run, "steps", watched):
                with contextlib.suppress(Enough):
                    script.main(script.Config(**options, **more))
    seconds = statistics.median(b - a for a, b in itertools.pairwise(times[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "megabytes": (peak - before) / 1024}


def exponent(x, y) -> float:
    """k of the best y ~ x^k."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(rows: list[dict], path: Path):
    """Seconds above, memory below, one column per size; the legend has the exponents."""
    figure, axes = plt.subplots(
        2, len(SIZES), figsize=(4 * len(SIZES), 7), sharex="col", sharey="row"
    )
    for (row_of_axes, what), (column, size) in itertools.product(
        enumerate(("seconds", "megabytes")), enumerate(SIZES)
    ):
        axis = axes[row_of_axes, column]
        for stage in dict.fromkeys(row["stage"] for row in rows):
            mine = [r for r in rows if r["stage"] == stage and r["varied"] == size]
            x, y = [r[size] for r in mine], [r[what] for r in mine]
            colour, marker = STYLE[stage]
            label = f"{stage}: {exponent(x, y):.2f}"
            axis.loglog(x, y, marker=marker, color=colour, label=label, ms=4)
        axis.set_xticks(SIZES[size], SIZES[size])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8, title="exponent", title_fontsize=8, loc="upper left")
        axes[1, column].set(xlabel=AXES[size])
    # Above the lines there is room for the legends.
    axes[0, 0].set_ylim(top=12 * max(row["seconds"] for row in rows))
    axes[0, 0].set_ylabel("seconds per step (PPO: per iteration)")
    axes[1, 0].set_ylim(top=4 * max(row["megabytes"] for row in rows))
    axes[1, 0].set_ylabel("MB beyond the libraries, at the peak")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    found = {}
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
        for what in ("seconds", "megabytes"):
            row[what] = round(statistics.median(n[what] for n in numbers), 4)
        rows.append(row)
    args.results.mkdir(parents=True, exist_ok=True)
    with open(args.results / "growth.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.results / "growth.png")
    print(args.results / "growth.png")


if __name__ == "__main__":
    main()
