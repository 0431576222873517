"""Does RL need a critic, which KL should it pay for, and when does it find out that thinking pays?
(`--only critics`)

PPO beside RLOO, GRPO and Dr. GRPO, trained on the reward model with equal numbers of rollouts and
equal beta; and RLOO with each estimator of the KL, in the reward and in the loss. Then PPO and GRPO
on long sums alone, where the reward is only whether the last number is right: both from the SFT
model, and PPO also from one that has seen so few demonstrations that it cannot do the single steps.
"""

import random
import re
from pathlib import Path

import numpy as np

from data.chat import question
from data.experiments.base import Base, read_cost
from data.experiments.expected import read_log
from data.experiments.jobs import run_jobs
from data.experiments.plots import band_panels, save, write_csv
from data.run import COLOURS
from data.talk import Speaker
from data.town.tasks import KINDS
from data.town.words import long_sum

BETA = 0.13  # at which the first four of these have about the same KL, 1.7 to 1.9 nats
# Methods -> options of PPO.
METHODS = {
    "ppo": {},
    "rloo": {"advantage": "rloo"},
    "dr_grpo": {"advantage": "dr_grpo"},
    "grpo": {"advantage": "grpo"},
    "grpo, k3 in the loss": {"advantage": "grpo", "kl": "k3-loss"},
}
KLS = {
    f"rloo, {k} in the {place}": {"advantage": "rloo", "kl": f"{k}-{place}"}
    for place, estimators in (("reward", ("k2", "k3")), ("loss", ("k1", "k2", "k3")))
    for k in estimators
}
# A reward of 0 or 1 differs less than a reward model's scores do, so beta is smaller.
ON_SUMS = {"tasks": "chain", "reward": "exact", "beta": 0.05}
THINKING = {  # where from, how -> options of PPO, beside ON_SUMS
    "SFT, ppo": {},
    "SFT, grpo": {"advantage": "grpo"},
    "weak SFT, ppo": {},
}
WEAK = {"tasks": "chain", "demonstrations": 1500, "epochs": 1}  # of SFT: no step comes out right
MARKERS = "o^sDv"


def critics(out: Path, results: Path, bases: list[Base], quick: bool):
    """Train with and without a critic, and on long sums; measure, and draw both."""
    jobs, compared, thinking = [], [], []  # the latter two: (name, seed, folder of the run)
    for seed, base in enumerate(bases):
        for name, options in (METHODS if quick else METHODS | KLS).items():
            job = base.job(out / f"{name}, seed {seed}", "ppo", beta=BETA, **options)
            jobs.append(job)
            compared.append((name, seed, job.folder))
        where, init = out / f"weak, seed {seed}", base.out / "pretrain/ckpt.pt"
        weak = base.job(where, "sft", 0.2, init=init, **WEAK)
        jobs.append(weak)
        for name, options in THINKING.items():
            start = {"init": weak.result} if name.startswith("weak") else {}
            where = out / f"thinking, {name}, seed {seed}"
            job = base.job(where, "ppo", 0.8, **start, **ON_SUMS, **options)
            jobs.append(job)
            thinking.append((name, seed, job.folder))
    run_jobs(jobs)

    rows = []
    for name, seed, run in compared:
        log, cost = read_log(run / "log.csv"), read_cost(run)
        row = {"method": name, "seed": seed, **bases[seed].measure(run)}
        row |= {"seconds": cost["seconds"], "peak_gb": cost["peak_gb"]}
        # What the estimators say of the last rollouts, and the KL over the whole vocabulary.
        for column in ("kl", "kl_k3", "kl_full"):
            row[f"log_{column}"] = np.mean([some[column] for some in log[-5:]])
        equal = [some["equal_groups"] for some in log if "equal_groups" in some]
        rows.append(row | ({"equal_groups": np.mean(equal)} if equal else {}))
    write_csv(rows, results / "critics.csv")

    columns = ("exact_match", "shows_work", "length", "kl")
    curves = [
        {"run": name, "seed": seed, "iteration": row["step"], **{c: row[c] for c in columns}}
        for name, seed, run in thinking
        for row in read_log(run / "log.csv")
    ]
    write_csv(curves, results / "thinking.csv")
    draw_thinking(curves, results / "critics.png")

    before, longer = [("SFT", seed, base.out / "sft") for seed, base in enumerate(bases)], []
    for name, seed, run in before + thinking:
        speaker = Speaker(run / "ckpt.pt", bases[seed].device)
        for n_steps in (2, 3, 4):
            right = ask_sums(speaker, n_steps)
            longer.append({"run": name, "seed": seed, "steps": n_steps, "right": right})
    write_csv(longer, results / "longer.csv")


def ask_sums(speaker: Speaker, n_steps: int, n: int = 150) -> float:
    """The fraction of sums of so many steps that are right, greedily; demonstrations have three."""
    rng = random.Random(f"sums of {n_steps} steps")
    sums = [long_sum(rng, n_steps) for _ in range(n)]
    asked = [question(KINDS["chain"].cores[0].format(sum=text)) for text, _, _ in sums]
    replies = speaker.answer(asked, 48, seed=0, temperature=0.0)
    # One answer, and the right one: several would be guesses.
    found = [re.findall(r"The answer is (\d+)\.", reply.text) for reply in replies]
    return float(np.mean([said == [str(value)] for said, (_, _, value) in zip(found, sums)]))


def draw_thinking(rows: list[dict], path: Path):
    """How often the answer is right, whether the work is shown, and how long responses are."""
    lines = []
    for name, colour, marker in zip(THINKING, COLOURS, MARKERS):
        some = [row for row in rows if row["run"] == name]
        lines.append((name, some, {"color": colour, "marker": marker, "markersize": 3}))
    units = {
        "exact_match": "right answers, temperature 1",
        "shows_work": "responses that show their work",
        "length": "tokens per response",
    }
    figure, axes = band_panels(lines, "iteration", units, "iteration of PPO or GRPO")
    for axis in axes[:2]:
        axis.set_ylim(-0.02, 1.02)
    save(figure, path, columns=3)
