"""PPO with one thing wrong at a time: the curves by which to recognise what it is.

Most of these bugs raise no error: the run goes to its end, and only its curves tell.
"""

from itertools import cycle
from pathlib import Path

from data.experiments.base import Base
from data.experiments.bugs import BUGS
from data.experiments.jobs import run_jobs
from data.experiments.plots import UNITS, band_panels, grouped, save, write_csv
from data.run import COLOURS

OPTIONS = {  # name: options of PPO
    "as it should be": {},
    "no KL penalty": {"beta": 0.0},
    "learning rate ten times too high": {"lr": 3e-3},
}
PLANTED = {name: bug for name, bug in BUGS.items() if bug.file == "train_ppo.py"}


def broken(out: Path, results: Path, bases: list[Base], quick: bool):
    """Run PPO with every bug and each seed, and draw six columns of its log."""
    runs = []  # (name, seed, job)
    for seed, base in enumerate(bases):
        common = {"eval_every": 1000, "rollouts": 64, "minibatch": 32}
        common["iterations"] = 20 if quick else 40
        for name in [*OPTIONS, *PLANTED]:
            options, where = {**common, **OPTIONS.get(name, {})}, out / f"{name}, seed {seed}"
            runs.append((name, seed, base.job(where, "ppo", 0.6, PLANTED.get(name), **options)))
    run_jobs([job for *_, job in runs])

    rows = []
    for name, seed, job in runs:
        for step, numbers in enumerate(bases[seed].curve(job.folder, *UNITS)):
            rows.append({"bug": name, "seed": seed, "step": step, **numbers})
    write_csv(rows, results / "broken.csv")
    draw_broken(rows, results / "broken.png")


def draw_broken(rows: list[dict], path: Path):
    """One panel per column of the log, one line per bug."""
    colours = ["#000000", *COLOURS]  # the correct run in black
    dashes = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))]
    lines = [
        (bug, some, {"color": colour, "ls": dash})
        for (bug, some), colour, dash in zip(grouped(rows, "bug").items(), colours, cycle(dashes))
    ]
    figure, axes = band_panels(lines, "step", UNITS, "iteration")
    axes[list(UNITS).index("kl")].set_yscale("symlog", linthresh=1)
    save(figure, path)
