"""Over-optimisation: without a KL penalty, the reward model's score keeps rising and gold peaks.

Reward models of 250, 1,000 and 4,000 pairs with 35 % of the labels flipped, of clean labels, and
with one layer, all trained for equally many steps. PPO, DPO and best-of-n are pushed far against
each. And a cure: the annotators are asked again, about what PPO says after its optimum.

The curves of Gao et al. 2023 are fitted to gold, against d = sqrt(KL):

    best of n         d (alpha - beta d)
    PPO, and DPO      d (alpha - beta log d)
"""

from pathlib import Path

import numpy as np

from data.experiments.base import Base, answers, make_pool
from data.experiments.frontier import BEST_OF, best_of_all
from data.experiments.jobs import Job, run_jobs
from data.experiments.plots import STYLE, grouped, panels, save, write_csv
from data.files import held_out, read_preferences, write_rows
from data.preferences import annotate
from data.talk import Speaker
from data.town.gold import TAU
from data.town.tasks import draw_tasks

JUDGES = {  # name: (pairs, fraction of labels flipped, layers; 0: as many as SFT has)
    "250 pairs, 35 % flipped": (250, 0.35, 0),
    "1,000 pairs, 35 % flipped": (1000, 0.35, 0),
    "4,000 pairs, 35 % flipped": (4000, 0.35, 0),
    "4,000 pairs, 1 layer": (4000, 0.0, 1),
    "4,000 pairs": (4000, 0.0, 0),
    "4,000 pairs, 400 about PPO's responses": (4000, 0.0, 0),
}
*WEAK, GOOD, CURE = JUDGES


def overoptimisation(out: Path, results: Path, bases: list[Base], quick: bool):
    """Train and push every judge, then the cure, and write where gold peaks."""
    runs = {}  # (judge, seed) -> jobs: reward model, PPO, DPO
    for judges in ([*(WEAK[:1] if quick else WEAK), GOOD], [CURE]):
        for seed, base in enumerate(bases):
            pairs = read_preferences(base.out / "preferences.jsonl")
            for judge in judges:
                count, flip, _ = JUDGES[judge]
                some = some_pairs(pairs, count, flip, seed)
                if judge == CURE:  # it needs a policy of the first round
                    new = ask_again(base, runs[GOOD, seed][1], 400, seed)
                    some[: len(new)] = new
                runs[judge, seed] = without_penalty(out, judge, base, seed, some, quick)
        run_jobs([job for (judge, _), jobs in runs.items() if judge in judges for job in jobs])

    rows, pools = [], [make_pool(base, 64 if quick else 128) for base in bases]
    for (judge, seed), (rm, *jobs) in runs.items():
        for job in jobs:
            columns = ("kl", "gold", "proxy") if job.stage == "ppo" else ("kl", "gold")
            for numbers in bases[seed].curve(job.folder, *columns):
                rows.append({"judge": judge, "seed": seed, "method": job.stage, **numbers})
        for row in best_of_all(pools[seed], pools[seed].scores(rm.result), BEST_OF):
            del row["n"]
            rows.append({"judge": judge, "seed": seed, "method": "best of n", **row})
    write_csv(rows, results / "overoptimisation.csv")
    write_csv(peaks(rows), results / "peaks.csv")
    draw_overoptimisation(rows, results / "overoptimisation.png")
    two = [row for row in rows if row["judge"] in ("250 pairs, 35 % flipped", "4,000 pairs")]
    draw_overoptimisation(two, results / "overoptimisation_two.png")


def without_penalty(out: Path, judge: str, base: Base, seed, pairs, quick) -> list[Job]:
    """A reward model of these pairs, PPO against it without a KL penalty, DPO with a small one.

    However many they are, reward models see 8,000 pairs and DPO 4,000, some of them many times.
    """
    where, (count, _, layers) = out / f"{judge}, seed {seed}", JUDGES[judge]
    write_rows(pairs, where / "preferences.jsonl")
    common = {"seed": seed, "init": base.out / "sft/ckpt.pt", "eval_every": 1000}
    rm = {**common, "epochs": 8000 // count, "batch_size": 32, "n_layer": layers}
    ppo = {**common, "rollouts": 64, "minibatch": 32, "beta": 0.0}
    ppo["iterations"] = 30 if quick else 60
    dpo = {**common, "epochs": 4000 // count, "batch_size": 32, "beta": 0.05, "eval_every": 10}
    return [Job(where, "rm", rm, 0.6), Job(where, "ppo", ppo, 1.1), Job(where, "dpo", dpo, 0.6)]


def some_pairs(pairs: list[dict], count: int, flip: float, seed: int) -> list[dict]:
    """`count` of the training pairs, some with chosen and rejected exchanged, and a ninth to test.

    The flipped ones are drawn here, so that the noise is the only thing that differs.
    """
    train, test = held_out(pairs)
    rng, rows = np.random.default_rng(seed), []
    for row in train[:count]:
        if rng.random() < flip:
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            row["gold"], row["p"] = row["gold"][::-1], 1 - row["p"]
        rows.append(row)
    return rows + test[: max(count // 9, 1)]


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

    PPO and DPO are noisy, so both are means over five neighbouring points of the run. Every run
    begins at SFT itself, whose KL, gold and proxy are 0 by definition.
    """
    table = []
    for (judge, seed, method), run in grouped(rows, "judge", "seed", "method").items():
        line = {"judge": judge, "seed": seed, "method": method}
        width = 1 if method == "best of n" else 5
        smooth = {}
        for name in ("kl", "gold") if method == "dpo" else ("kl", "gold", "proxy"):
            means = np.convolve([row[name] for row in run], np.ones(width) / width, "valid")
            smooth[name] = np.append(0.0, means)
        top = smooth["gold"].argmax()
        for name, values in smooth.items():
            line |= {f"peak_{name}": values[top], f"last_{name}": values[-1]}
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
    """One panel per reward model: proxy (hollow), gold (filled), its fit, and the top of that."""
    judges = grouped(rows, "judge")
    columns = min(len(judges), 3)
    figure, axes = panels(len(judges), columns, sharex=True, sharey=True)
    for axis, (judge, of_judge) in zip(axes, judges.items()):
        quality = []
        for method, run in grouped(of_judge, "method").items():
            d, gold = distance(run), np.array([row["gold"] for row in run])
            points = {**STYLE[method], "ls": "", "ms": 3}
            axis.plot(d, gold, **points, label=f"{method}: gold")
            if method == "dpo":  # it has no proxy, and too few points for a fit
                continue
            proxy = [row["proxy"] for row in run]
            axis.plot(d, proxy, **points, mfc="none", label=f"{method}: proxy")
            alpha, beta, r2 = fit(method, d, gold)
            quality.append(f"{r2:.2f} ({method})")
            x, colour = np.linspace(0, d.max(), 100), STYLE[method]["color"]
            y = fitted(method, alpha, beta, x)
            axis.plot(x, y, color=colour, lw=1, label=f"{method}: fit of gold")
            top = top_of_fit(method, alpha, beta, d.max())
            axis.axvline(top, color=colour, lw=1, ls=":", label=f"{method}: top of the fit")
        axis.set_title(f"{judge}\nR² of the fits: {', '.join(quality)}", fontsize=10)
        axis.set_xlabel("square root of the KL from SFT (nats)")
        axis.tick_params(labelbottom=True)
    for axis in axes[::columns]:
        axis.set_ylabel("SD of SFT samples")
    save(figure, path)
