"""Does SFT on more kinds of task help on unseen ones? (`--only tasks`)

SFT on 1, 3, 6 and all kinds, at equal tokens, is asked new cases of `last`, which all have, in
frames that it was and was not trained with; then held-out cells (see data/town/tasks.py), those of
`last`, such as "the last animal", those of all picking and of all kinds, some of which the smaller
mixtures lack altogether; and whole kinds that no mixture has. In FLAN (Wei et al. 2021) more tasks
in training were better for unseen ones.
"""

from pathlib import Path

import numpy as np

from data.chat import encode_chat
from data.evaluate import WITH_CELLS
from data.experiments.base import Base, answers
from data.experiments.jobs import run_jobs
from data.experiments.plots import band_panels, grouped, save, write_csv
from data.run import COLOURS
from data.talk import Speaker
from data.town.demonstrations import demonstrations
from data.town.gold import exact_match
from data.town.tasks import KINDS, TRAIN_KINDS, draw_tasks

MIXTURES = [
    ["last"],
    ["last", "one_sum", "fact"],
    ["last", "one_sum", "fact", "first", "reverse", "translate"],
    TRAIN_KINDS,
]
# What each model is asked: the kinds, and what is new about the prompts (see `draw`).
GROUPS = {
    "last: new cases": (["last"], ""),
    "last: in frames new to it": (["last"], "frame"),
    "last: held-out cells": (["last"], "cell"),
    "held-out cells, picking from a list": (["first", "second", "last"], "cell"),
    "held-out cells, all": (WITH_CELLS, "cell"),
    "kinds that no mixture has": ([name for name, kind in KINDS.items() if kind.held_out], ""),
}


def mixtures(out: Path, results: Path, bases: list[Base], quick: bool):
    """SFT on ever more kinds, and what each model makes of six groups of prompts."""
    budget = 4e5 if quick else 8e5  # tokens
    runs = []  # (number of kinds, seed, job)
    for seed, base in enumerate(bases):
        for kinds in MIXTURES:
            some = demonstrations(400, "length", ",".join(kinds))  # to estimate tokens per task
            ids = [encode_chat(base.sft.tokenizer, row["messages"])[0] for row in some]
            options = {"init": base.out / "pretrain/ckpt.pt", "eval_every": 5000, "epochs": 1}
            options["demonstrations"] = round(budget * 400 / sum(len(row) for row in ids))
            where = out / f"sft on {len(kinds)} kinds, seed {seed}"
            job = base.job(where, "sft", budget / 8e5, tasks=",".join(kinds), **options)
            runs.append((len(kinds), seed, job))
    run_jobs([job for *_, job in runs])

    rows = []
    for n_kinds, seed, job in runs:
        model = Speaker(job.result, bases[seed].device)
        for group, (kinds, new) in GROUPS.items():
            asked = draw_tasks(300, f"experiment {group}", ",".join(kinds), split="test", new=new)
            replies = answers(model, asked, seed=0, temperature=0.0)
            right = [exact_match(task, reply.text) for task, reply in zip(asked, replies)]
            row = {"kinds": n_kinds, "seed": seed, "group": group}
            rows.append({**row, "exact_match": np.mean(right)})
    write_csv(rows, results / "tasks.csv")
    draw_mixtures(rows, results / "tasks.png")


def draw_mixtures(rows: list[dict], path: Path):
    """Exact match against the number of kinds, for every group of prompts."""
    styles = [{"color": colour, "marker": marker} for colour, marker in zip(COLOURS, "o^vDsX")]
    lines = [(*group, style) for group, style in zip(grouped(rows, "group").items(), styles)]
    xlabel = "kinds of task in SFT, at equal tokens (logarithmic)"
    figure, (axis,) = band_panels(lines, "kinds", {"exact_match": "exact match"}, xlabel, columns=1)
    axis.set_xscale("log")
    axis.set_xticks(counts := list(grouped(rows, "kinds")), map(str, counts))
    axis.minorticks_off()
    save(figure, path, columns=2)
