"""PPO with one thing wrong at a time: the curves by which to recognise what it is.

Most of these bugs raise no error: the run goes to its end, and only its curves tell.
"""

from pathlib import Path

from data.experiments.base import Base
from data.experiments.jobs import Job, run_jobs
from data.experiments.plots import UNITS, band_panels, grouped, save, write_csv
from data.run import COLOURS

PPO = "train_ppo.py"
BUGS = {  # name: (options, (file, right, wrong))
    "as it should be": ({}, ()),
    "no KL penalty": ({"beta": 0.0}, ()),
    "KL penalty with the wrong sign": ({}, (PPO, "rewards = -beta *", "rewards = beta *")),
    # The KL that is penalised, and logged, is that of the policy from itself, 0. So this is a run
    # without a penalty, and looks like one in all curves but that of KL.
    "policy as its own reference": (
        {},
        (PPO, "ref_hidden, ref.head, y, m", "hidden, policy.head, y, m"),
    ),
    "learning rate ten times too high": ({"lr": 3e-3}, ()),
    "score at the first token": (
        {},
        (PPO, "device=mask.device)).argmax(1)", "device=mask.device)).sign().argmax(1)"),
    ),
    "score at every token": (
        {},
        (PPO, "[torch.arange(len(rewards)), last] += scores", " += scores[:, None] * mask"),
    ),
}


def broken(out: Path, results: Path, bases: list[Base], quick: bool):
    """Run PPO with every bug and each seed, and draw six columns of its log."""
    runs = []  # (bug, seed, job)
    for seed, base in enumerate(bases):
        common = {"seed": seed, "init": base.out / "sft/ckpt.pt", "eval_every": 1000}
        common |= {"rm": base.out / "rm/ckpt.pt", "rollouts": 64, "minibatch": 32}
        common["iterations"] = 20 if quick else 40
        for bug, (options, edit) in BUGS.items():
            where = out / f"{bug}, seed {seed}"
            runs.append((bug, seed, Job(where, "ppo", {**common, **options}, 0.6, edit)))
    run_jobs([job for *_, job in runs])

    rows = []
    for bug, seed, job in runs:
        for step, numbers in enumerate(bases[seed].curve(job.folder, *UNITS)):
            rows.append({"bug": bug, "seed": seed, "step": step, **numbers})
    write_csv(rows, results / "broken.csv")
    draw_broken(rows, results / "broken.png")


def draw_broken(rows: list[dict], path: Path):
    """One panel per column of the log, one line per bug."""
    colours = ["#000000", *COLOURS]  # the correct run in black
    dashes = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))]
    lines = [
        (bug, some, {"color": colour, "ls": dash})
        for (bug, some), colour, dash in zip(grouped(rows, "bug").items(), colours, dashes)
    ]
    figure, axes = band_panels(lines, "step", UNITS, "iteration")
    axes[list(UNITS).index("kl")].set_yscale("symlog", linthresh=1)
    save(figure, path)
