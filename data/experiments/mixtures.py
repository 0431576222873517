"""Does SFT on more kinds of task help on unseen ones? (`--only tasks`)

SFT on 1, 3, 6 and all kinds, at equal tokens, is asked kinds and templates that it was trained on,
and others. In FLAN (Wei et al. 2021) more tasks in training were better for unseen ones.
"""

from pathlib import Path

import numpy as np

from data.chat import encode_chat
from data.evaluate import golds
from data.experiments.base import Base, answers
from data.experiments.jobs import Job, run_jobs
from data.experiments.plots import STYLE, UNITS, band_panels, grouped, save, write_csv
from data.talk import Speaker
from data.town.gold import exact_match
from data.town.tasks import KINDS, TRAIN_KINDS, demonstrations, draw_tasks

HELD_OUT = [name for name, kind in KINDS.items() if kind.held_out]


def mixtures(out: Path, results: Path, bases: list[Base], quick: bool):
    """SFT on ever more kinds, and what each model makes of four groups of prompts."""
    budget = 4e5 if quick else 8e5  # tokens
    runs = []  # (kinds, seed, job)
    for seed, base in enumerate(bases):
        for count in (1, 3, 6, len(TRAIN_KINDS)):
            kinds = TRAIN_KINDS[:count]
            some = demonstrations(400, "length", ",".join(kinds))
            ids = [encode_chat(base.sft.tokenizer, row["messages"])[0] for row in some]
            options = {"seed": seed, "init": base.out / "pretrain/ckpt.pt", "eval_every": 5000}
            options |= {"tasks": ",".join(kinds), "epochs": 1}
            options["demonstrations"] = round(budget / np.mean([len(row) for row in ids]))
            where = out / f"sft on {count} kinds, seed {seed}"
            runs.append((kinds, seed, Job(where, "sft", options, budget / 8e5)))
    run_jobs([job for *_, job in runs])

    first, rows = TRAIN_KINDS[:1], []
    for kinds, seed, job in runs:
        model = Speaker(job.result, bases[seed].device)
        groups = {  # name: (kinds, whether templates are ones never trained on)
            "all kinds of the mixture": (kinds, False),
            f"{first[0]}, which all mixtures have": (first, False),
            f"{first[0]}, unseen template": (first, True),
            "kinds that no mixture has": (HELD_OUT, False),
        }
        for group, (names, unseen) in groups.items():
            how = {"split": "test", "unseen_template": unseen}
            asked = draw_tasks(300, f"experiment {group}", ",".join(names), **how)
            replies = answers(model, asked, seed=0, temperature=0.0)
            right = [exact_match(task, reply.text) for task, reply in zip(asked, replies)]
            gold = bases[seed].scaled(golds(asked, replies)).mean()
            row = {"kinds": len(kinds), "seed": seed, "group": group}
            rows.append({**row, "exact_match": np.mean(right), "gold": gold})
    write_csv(rows, results / "tasks.csv")
    draw_mixtures(rows, results / "tasks.png")


def draw_mixtures(rows: list[dict], path: Path):
    """Exact match and gold against the number of kinds, for every group of prompts."""
    styles = zip(grouped(rows, "group").items(), STYLE.values())
    lines = [(group, some, style) for (group, some), style in styles]
    units = {"exact_match": "exact match", "gold": UNITS["gold"]}
    xlabel = "kinds of task in SFT, at equal tokens"
    figure, axes = band_panels(lines, "kinds", units, xlabel, columns=2)
    for axis in axes:
        axis.set_xticks(list(grouped(rows, "kinds")))
    save(figure, path, columns=2)
