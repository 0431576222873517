"""How many preferences does it take, and how right must they be? (`--only pairs`)

A reward model and PPO on it, and DPO, learn from more and more pairs: 1,664 pairs are as many
responses as PPO samples in its 26 iterations. Then from all pairs with a quarter of the labels
flipped, and here RLOO, too. Few pairs are seen more often: at least 8,000 by a reward model, at
least 4,000 by DPO.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.chat import encode_prompt, encode_reply
from data.experiments.base import Base
from data.experiments.jobs import run_jobs
from data.experiments.plots import STYLE, UNITS, band, grouped, panels, save, write_csv
from data.files import held_out, read_preferences, write_rows
from data.metrics import judge
from gpt import ScalarModel, load_model
from train_rm import score_sequences

COUNTS = (416, 1664)  # beside all
FLIPPED = 0.25


def pairs(out: Path, results: Path, bases: list[Base], quick: bool):
    """Train on some pairs, on all, and on all with wrong labels; measure judges and policies."""
    files = [read_preferences(base.out / "preferences.jsonl") for base in bases]
    everything = min(len(held_out(rows)[0]) for rows in files)  # seeds differ by some in a hundred
    settings = [(count, 0.0) for count in (COUNTS[:1] if quick else COUNTS)]
    settings.append((everything, FLIPPED))
    runs, jobs = [], []  # runs: (pairs, flipped, seed, reward model, {method: folder})
    for seed, (base, rows) in enumerate(zip(bases, files)):
        clean = base.job(out / f"all pairs, seed {seed}", "ppo", advantage="rloo")
        jobs.append(clean)
        folders = {"ppo": base.out / "ppo", "dpo": base.out / "dpo", "rloo": clean.folder}
        runs.append((everything, 0.0, seed, base.out / "rm/ckpt.pt", folders))
        for count, flip in settings:
            where = out / f"{count} pairs, {flip} flipped, seed {seed}"
            write_rows(some_pairs(rows, count, seed, flipped(flip)), where / "pairs.jsonl")
            data = {"data": where / "pairs.jsonl", "eval_every": 1000}
            rm = base.job(where, "rm", 0.8, epochs=max(-(-8000 // count), 2), **data)
            ppo = base.job(where, "ppo", rm=rm.result)
            dpo = base.job(where, "dpo", 0.8, epochs=max(-(-4000 // count), 1), **data)
            some = {"ppo": ppo, "dpo": dpo}
            if flip:
                some["rloo"] = base.job(where / "rloo", "ppo", rm=rm.result, advantage="rloo")
            jobs += [rm, *some.values()]
            folders = {method: job.folder for method, job in some.items()}
            runs.append((count, flip, seed, rm.result, folders))
    run_jobs(jobs)

    table = []
    for count, flip, seed, rm, folders in runs:
        judged = judge_pairs(bases[seed], rm)
        for method, folder in folders.items():
            line = {"pairs": count, "flipped": flip, "seed": seed, "method": method}
            table.append({**line, **judged, **bases[seed].measure(folder)})
    write_csv(table, results / "pairs.csv")
    draw_pairs(table, results / "pairs.png")


def flipped(fraction: float) -> Callable[[dict], float]:
    """Annotators who give the wrong label to this fraction of the pairs, whatever they say."""
    return lambda row: 1 - fraction


def some_pairs(rows: list[dict], count: int, seed: int, agrees: Callable) -> list[dict]:
    """`count` of the training pairs with labels of other annotators, and a ninth as many to test.

    agrees(row): the probability that they, too, prefer the chosen response. Chosen and rejected are
    exchanged here, so that the labels are the only thing that differs.
    """
    train, test = held_out(rows)
    rng, labelled = np.random.default_rng(seed), []
    for row in train[:count]:
        if rng.random() >= agrees(row):
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            row["gold"], row["p"] = row["gold"][::-1], 1 - row["p"]
        labelled.append(row)
    return labelled + test[: max(count // 9, 1)]


def judge_pairs(base: Base, reward_model: Path) -> dict:
    """What a reward model makes of the base's held-out pairs, whose labels are as they are."""
    _, rows = held_out(read_preferences(base.out / "preferences.jsonl"))
    model, _ = load_model(reward_model, base.device, ScalarModel)
    tokenizer = base.sft.tokenizer
    scores = []
    for side in ("chosen", "rejected"):
        sequences = [
            encode_prompt(tokenizer, row["messages"]) + encode_reply(tokenizer, row[side])
            for row in rows
        ]
        scores.append(score_sequences(model, sequences, tokenizer.pad))
    report, _ = judge(*scores, rows, float(model.reward_sd))
    return {name: report[name] for name in ("accuracy", "bayes_accuracy", "ece", "spearman_gold")}


def draw_pairs(rows: list[dict], path: Path):
    """Accuracy and calibration of the reward model, and gold, against the number of pairs; hollow
    where a quarter of the labels is flipped."""
    figure, axes = panels(3, 2)
    methods = grouped(rows, "method")
    lines = [  # panel, column, rows, what they are
        (axes[0], "accuracy", methods["ppo"], "reward model", {"color": "black", "marker": "D"}),
        (axes[1], "ece", methods["ppo"], "reward model", {"color": "black", "marker": "D"}),
        (axes[2], "gold", methods["ppo"], "ppo", STYLE["ppo"]),
        (axes[2], "gold", methods["dpo"], "dpo", STYLE["dpo"]),
    ]
    for axis, column, some, label, style in lines:
        style = {**style, "ms": 5}
        clean = [row for row in some if not row["flipped"]]
        band(axis, clean, "pairs", column, label=label, **style)
        wrong = [row for row in some if row["flipped"]]
        y = np.mean([row[column] for row in wrong])
        label = f"{label}, a quarter of the labels flipped"
        axis.plot(wrong[0]["pairs"], y, ls="", mfc="none", label=label, **style)
    units = ["held-out accuracy", "expected calibration error", UNITS["gold"]]
    for axis, unit in zip(axes, units):
        axis.set(xlabel="pairs (logarithmic)", ylabel=unit, xscale="log")
        axis.set_xticks(counts := list(grouped(rows, "pairs")), [f"{n:,.0f}" for n in counts])
        axis.minorticks_off()
    save(figure, path, columns=3)
