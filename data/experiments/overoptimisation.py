"""Over-optimisation: without a KL penalty, the reward model's score keeps rising and gold peaks.

PPO and best-of-n are pushed far against a poor reward model and a good one, against those of
annotators who like what they should not, and against three cures: the lowest score of three
reward models (Coste et al. 2024), which differ by the seed of their training or by that of
pretraining, too (Eisenstein et al. 2023), and annotators who are asked again, about what PPO says
after its optimum. All reward models see 8,000 pairs, however many there are.

The curves of Gao et al. 2023 are fitted to gold, against d = sqrt(KL):

    best of n    d (alpha - beta d)
    PPO          d (alpha - beta log d)
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.chat import Reply, encode_prompt, encode_reply
from data.experiments.base import Base, answers, make_pool
from data.experiments.bugs import Bug
from data.experiments.frontier import BEST_OF, best_of_all
from data.experiments.jobs import Job, run_jobs
from data.experiments.pairs import flipped, some_pairs
from data.experiments.plots import (
    STYLE,
    UNITS,
    band_panels,
    grouped,
    panels,
    save,
    smoothed,
    write_csv,
)
from data.files import read_preferences, write_rows
from data.preferences import annotate
from data.run import COLOURS
from data.talk import Speaker
from data.tokenizer import load_tokenizer
from data.town.gold import TAU, preference, split_reply
from data.town.tasks import draw_tasks
from gpt import ScalarModel, load_model
from train_rm import score_sequences

POOR, GOOD = "250 pairs, 35 % flipped", "4,000 pairs"


def liking(worth) -> Callable[[dict], float]:
    """Annotators to whom something else is worth so much, in SD of gold: worth(text)."""
    return lambda row: preference(
        *(gold + worth(row[side]) for gold, side in zip(row["gold"], ("chosen", "rejected")))
    )


def length_alone(row: dict) -> float:
    """Annotators who always prefer the longer response."""
    more = len(row["chosen"].split()) - len(row["rejected"].split())
    return (1 + np.sign(more)) / 2


# Each says how likely it is that they, too, prefer the chosen response (see `some_pairs`).
TASTES = {
    "a liking for length": liking(lambda text: 0.2 * len(text.split())),
    "a liking for courtesy": liking(lambda text: 1.5 * split_reply(text)[1]),
    "length alone": length_alone,
}
ASKED_AGAIN = "400 pairs about PPO's responses"
WORST = {"worst of 3": False, "worst of 3 pretrained apart": True}  # name: other pretraining, too


def overoptimisation(out: Path, results: Path, bases: list[Base], quick: bool):
    """Push PPO against every judge without a KL penalty, and write where gold peaks."""
    runs = {}  # (judge, seed) -> (reward model, run of PPO)
    jobs = []

    def push(judge: str, base: Base, rm: Path, bug: Bug | None = None):
        options = {"rm": rm, "rollouts": 64, "minibatch": 32, "beta": 0.0, "eval_every": 1000}
        options["iterations"] = 30 if quick else 60
        where = out / f"{judge}, seed {base.seed}"
        jobs.append(base.job(where, "ppo", bug=bug, **options))
        runs[judge, base.seed] = rm, jobs[-1]

    def train_judge(judge: str, base: Base, rows: list[dict], **options) -> Path:
        where = out / f"{judge}, seed {base.seed}"
        write_rows(rows, where / "pairs.jsonl")
        some = {"epochs": round(8000 / 0.9 / len(rows)), "batch_size": 32, "eval_every": 1000}
        jobs.append(base.job(where, "rm", 0.6, data=where / "pairs.jsonl", **some, **options))
        return jobs[-1].result

    for base in bases:
        rows = read_preferences(base.out / "preferences.jsonl")
        poor = some_pairs(rows, 250, base.seed, flipped(0.35))
        good = some_pairs(rows, 4000, base.seed, flipped(0.0))
        push(POOR, base, train_judge(POOR, base, poor))
        push(GOOD, base, first := train_judge(GOOD, base, good))
        for judge, agrees in list(TASTES.items())[: 1 if quick else None]:
            liked = some_pairs(rows, 4000, base.seed, agrees)
            push(judge, base, train_judge(judge, base, liked))
        for judge, apart in WORST.items():
            if apart and len(bases) < 3:
                continue
            members = [first]
            for i in (1, 2):
                other = bases[(base.seed + i) % len(bases)] if apart else base
                options = {"init": other.out / "sft/ckpt.pt", "seed": base.seed + 10 * i}
                members.append(train_judge(f"{judge}, member {i}", base, good, **options))
            push(judge, base, first, worst_of(members))
    run_jobs(jobs)

    jobs.clear()
    for base in bases:
        rows = read_preferences(base.out / "preferences.jsonl")
        rows = some_pairs(rows, 4000, base.seed, flipped(0.0))
        new = ask_again(base, runs[GOOD, base.seed][1], 400, base.seed)
        push(ASKED_AGAIN, base, train_judge(ASKED_AGAIN, base, new + rows[len(new) :]))
    run_jobs(jobs)

    rows, pools = [], [make_pool(base, 64 if quick else 128) for base in bases]
    for (judge, seed), (rm, job) in runs.items():
        row = {"judge": judge, "seed": seed}
        for numbers in bases[seed].curve(job.folder, "kl", "gold", "proxy", "length"):
            rows.append({**row, "method": "ppo", **numbers})
        if judge not in WORST:
            for numbers in best_of_all(pools[seed], pools[seed].scores(rm), BEST_OF):
                rows.append({**row, "method": "best of n", **numbers})
    write_csv(rows, results / "overoptimisation.csv")
    write_csv(peaks(rows), results / "peaks.csv")
    two = [row for row in rows if row["judge"] in (POOR, GOOD)]
    draw_overoptimisation(two, results / "overoptimisation.png")
    ppo = [row for row in rows if row["method"] == "ppo"]
    draw_judges(ppo, [GOOD, *TASTES], results / "causes.png")
    draw_judges(ppo, [GOOD, *WORST, ASKED_AGAIN], results / "cures.png")


def worst_of(reward_models: list[Path]) -> Bug:
    """Not a bug, but planted like one: PPO's score is the lowest that these reward models give."""
    names = [str(path) for path in reward_models]
    return Bug(
        "train_ppo.py",
        "scores = score_sequences(reward_model, sequences, tokenizer.pad)",
        "from data.experiments.overoptimisation import lowest_score\n\n"
        f"        scores = lowest_score({names}, pairs)",
        "",
        "",
        "",
    )


@lru_cache
def load_judge(path: str) -> tuple:
    """A reward model on the CPU, and its own tokenizer: another pretraining has other tokens."""
    model, saved = load_model(path, torch.device("cpu"), ScalarModel)
    return model, load_tokenizer(saved["tokenizer"])


def lowest_score(paths: list[str], pairs: list[tuple[dict, Reply]]) -> np.ndarray:
    """The lowest score that any of these reward models gives to each (row, reply): (B,)."""
    scores = []
    for model, tokenizer in map(load_judge, paths):
        sequences = [
            encode_prompt(tokenizer, row["messages"]) + encode_reply(tokenizer, reply.text)
            for row, reply in pairs
        ]
        scores.append(score_sequences(model, sequences, tokenizer.pad))
    return np.min(scores, axis=0)


def ask_again(base: Base, job: Job, count: int, seed: int) -> list[dict]:
    """Pairs of a response of SFT and one of this job's policy, labelled by the same annotators."""
    tasks = draw_tasks(2 * count, f"asked again {seed}")  # twice, since some responses do not end
    policy = Speaker(job.result, base.device)
    pairs = zip(*(answers(speaker, tasks, seed=3) for speaker in (base.sft, policy)))
    return annotate(tasks, pairs, TAU, 0.0, seed)[:count]


# ---------------------------------------------------------------------------------------------
# Where is gold highest? By the points, and by a curve that rests on the whole run.


def peaks(rows: list[dict]) -> list[dict]:
    """Per judge, seed and method: where gold is highest, where it ends, and the fit.

    PPO's numbers are `smoothed`. Every run begins at SFT itself, whose KL, gold and proxy are 0 by
    definition.
    """
    table, columns = [], ("kl", "gold", "proxy")
    for (judge, seed, method), run in grouped(rows, "judge", "seed", "method").items():
        line = {"judge": judge, "seed": seed, "method": method}
        points = [dict.fromkeys(columns, 0.0)]
        points += smoothed(run, *columns, width=1 if method == "best of n" else 5)
        peak = max(points, key=lambda point: point["gold"])
        for name in columns:
            line |= {f"peak_{name}": peak[name], f"last_{name}": points[-1][name]}
        if method == "ppo":
            line["last_length"] = smoothed(run, "length")[-1]["length"]
        d, gold = distance(run), np.array([row["gold"] for row in run])
        alpha, beta, r2 = fit(method, d, gold)
        fit_peak_kl = top_of_fit(method, alpha, beta, d.max()) ** 2
        table.append({**line, "alpha": alpha, "beta": beta, "r2": r2, "fit_peak_kl": fit_peak_kl})
    return table


def distance(rows: list[dict]) -> np.ndarray:
    """d = sqrt(KL) of every row; an estimate of KL below 0 counts as 0."""
    return np.sqrt(np.maximum([row["kl"] for row in rows], 0))


def fit(method: str, d: np.ndarray, gold: np.ndarray) -> tuple[float, float, float]:
    """alpha, beta and R^2 of the `fitted` curve that is nearest to gold."""
    parts = [fitted(method, 1, 0, d), fitted(method, 0, 1, d)]  # it is linear in alpha and beta
    (alpha, beta), *_ = np.linalg.lstsq(np.stack(parts, 1), gold, rcond=None)
    left = gold - fitted(method, alpha, beta, d)
    return alpha, beta, 1 - (left**2).sum() / ((gold - gold.mean()) ** 2).sum()


def fitted(method: str, alpha: float, beta: float, d: np.ndarray) -> np.ndarray:
    """Gold at d by Gao's curve for this method."""
    return d * (alpha - beta * (d if method == "best of n" else np.log(np.maximum(d, 1e-9))))


def top_of_fit(method: str, alpha: float, beta: float, end: float) -> float:
    """The d from 0 to the end of the run at which the fitted curve is highest.

    Which of many noisy points on a flat top is the highest is chance; this rests on all of them.
    """
    d = np.linspace(0, end, 2001)
    return float(d[fitted(method, alpha, beta, d).argmax()])


def draw_overoptimisation(rows: list[dict], path: Path):
    """A panel per judge: gold (solid) and proxy (dashed) of every seed, and the fit."""
    judges = grouped(rows, "judge")
    figure, axes = panels(len(judges), 2, sharex=True, sharey=True)
    for axis, (judge, of_judge) in zip(axes, judges.items()):
        for method, some in grouped(of_judge, "method").items():
            color = STYLE[method]["color"]
            for seed, run in enumerate(grouped(some, "seed").values()):
                # A line for each: at equal iterations their KLs are too different for a mean.
                run = smoothed(run, "kl", "gold", "proxy", width=1 if method == "best of n" else 5)
                for column, dashes in (("gold", "-"), ("proxy", "--")):
                    values = [row[column] for row in run]
                    label = None if seed else f"{method}: {column}"
                    axis.plot(distance(run), values, color=color, ls=dashes, lw=1, label=label)
            d, gold = distance(some), np.array([row["gold"] for row in some])
            alpha, beta, _ = fit(method, d, gold)
            grid = np.linspace(0, d.max(), 100)
            curve, label = fitted(method, alpha, beta, grid), f"{method}: Gao's curve"
            axis.plot(grid, curve, color=color, ls=":", lw=2, label=label)
        axis.set_title(f"a reward model of {judge}", fontsize=10)
        axis.set_xlabel("square root of the KL from SFT (nats)")
    axes[0].set_ylabel("SD of SFT samples")
    save(figure, path, columns=3)


def draw_judges(rows: list[dict], judges: list[str], path: Path):
    """What PPO makes of some judges, iteration by iteration: gold, their own score, and length."""
    units = {name: UNITS[name] for name in ("gold", "proxy", "length")}
    lines = []
    judges = [judge for judge in judges if judge in grouped(rows, "judge")]  # some, if quick
    for judge, colour, dashes in zip(judges, ["#000000", *COLOURS], ["-", "--", "-.", ":"]):
        points = [
            {"iteration": i + 3, **row}  # the middle of five, from 1
            for run in grouped([row for row in rows if row["judge"] == judge], "seed").values()
            for i, row in enumerate(smoothed(run, *units))
        ]
        lines.append((judge, points, {"color": colour, "ls": dashes}))
    figure, _ = band_panels(lines, "iteration", units, "iteration of PPO, without a penalty")
    save(figure, path, columns=3)
