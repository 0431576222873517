"""PPO, RLOO, DPO, IPO and best-of-n under the best that any policy can do (`--only frontier`).

From the same runs come frontier.csv and .png (gold against KL), safety.png (requests declined and
people made up), cost.* (what PPO, RLOO and DPO pay for their gold) and dpo.* (how DPO fails at a
small beta).
"""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

import train_dpo
import train_ppo
from data.experiments.base import Base, Pool, make_pool, read_cost
from data.experiments.jobs import run_jobs
from data.experiments.plots import (
    STYLE,
    UNITS,
    band_panels,
    grouped,
    kl_axis,
    mean_point,
    over_seeds,
    panels,
    save,
    smoothed,
    write_csv,
)

# The betas with which the README's commands train; RLOO is compared at PPO's.
DEFAULT = {"ppo": train_ppo.Config().beta, "dpo": train_dpo.Config().beta}
DEFAULT["rloo"] = DEFAULT["ppo"]
# Method -> its script, its options, and the betas of its other runs; the first is that of --quick.
METHODS = {
    "ppo": ("ppo", {}, (0.5, 0.1, 1.5)),
    "rloo": ("ppo", {"advantage": "rloo"}, (DEFAULT["rloo"], 0.1, 0.5)),
    "ppo on gold": ("ppo", {"reward": "gold"}, (DEFAULT["ppo"],)),  # a perfect reward model
    "dpo": ("dpo", {}, (0.1, 1.0, 3.0)),
    "ipo": ("dpo", {"loss": "ipo"}, (0.1, 0.03, 0.3)),
    "dpo + nll": ("dpo", {"nll": 0.2}, (0.1,)),
}
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
COSTS = ("seconds", "forward_equivalents")


# ---------------------------------------------------------------------------------------------
# What follows from many samples of the SFT model, without any training


def exact_frontier(gold: np.ndarray, betas) -> list[dict]:
    """The best gold that any policy can have at its KL: gold (prompts, n) -> a row per beta.

    The policy that maximises gold - beta KL is pi = sft exp(gold / beta) / Z (Rafailov et al. 2023,
    equation 4). Weights w = softmax(gold / beta) over samples of sft turn them into samples of pi,
    so E gold = sum w gold and KL = sum w log(n w). That holds as long as the weights rest on many
    samples: "ess" is how many, 1 / sum w^2.

    Gold is bounded. So below some beta all weight lies on the best samples, a smaller one changes
    nothing, and the frontier ends: more KL buys no more gold.
    """
    rows, n = [], gold.shape[1]
    for beta in betas:
        w = np.exp((gold - gold.max(1, keepdims=True)) / beta)
        w /= w.sum(1, keepdims=True)
        kl = (w * np.log(np.maximum(n * w, 1e-300))).sum(1).mean()
        ess = (1 / (w**2).sum(1)).mean()
        rows.append({"beta": beta, "gold": (w * gold).sum(1).mean(), "kl": kl, "ess": ess})
    return rows


def best_of_n(scores: np.ndarray, n: int, replace=False) -> np.ndarray:
    """The probability of every sample (prompts, N) to be the best of n by its score.

    Of N samples in ascending order, the r-th (from 0) is the best of n drawn without replacement in
    C(r, n - 1) of C(N, n) cases, and of n drawn with replacement (replace) with probability
    ((r + 1) / N)^n - (r / N)^n. Samples of equal score share their probability.

    Each is right for one thing. Means of gold or score have no bias without replacement; with it,
    the largest of 128 normal numbers, from 128, comes out 0.17 SD too small. KL is right to about
    1 % with replacement, for all n up to N; without it, of 128 different responses the best of 64
    has 3.48 nats instead of 3.17, and the best of 128, always the same one, 4.85 instead of 3.86.
    """
    count = scores.shape[1]
    if replace:
        by_rank = np.diff((np.arange(count + 1) / count) ** n)
    else:
        by_rank = np.array([math.comb(r, n - 1) / math.comb(count, n) for r in range(count)])
    probability = np.empty(scores.shape)
    for row, values in enumerate(scores):
        probability[row, np.argsort(values, kind="stable")] = by_rank
        _, tie = np.unique(values, return_inverse=True)
        probability[row] = (np.bincount(tie, probability[row]) / np.bincount(tie))[tie]
    return probability


def kl_of_weights(probability: np.ndarray, same: np.ndarray) -> float:
    """KL from SFT, in nats, of a policy that picks samples with this probability (prompts, N).

    same: equal numbers for equal responses, which count as one.
    """
    kls = []
    for p, which in zip(probability, same):
        now, before = np.bincount(which, p), np.bincount(which) / len(which)
        kls.append((now * np.log(np.maximum(now, 1e-300) / before)).sum())
    return float(np.mean(kls))


def best_of_all(pool: Pool, scores: np.ndarray, counts) -> list[dict]:
    """A row for every n in counts: KL, gold and score ("proxy") of the best of n by scores."""
    rows = []
    for n in counts:
        p = best_of_n(scores, n)
        gold, proxy = ((p * values).sum(1).mean() for values in (pool.gold, scores))
        kl = kl_of_weights(best_of_n(scores, n, replace=True), pool.same)
        rows.append({"n": n, "kl": kl, "gold": gold, "proxy": proxy})
    return rows


# ---------------------------------------------------------------------------------------------
# The experiment


def frontier(out: Path, results: Path, bases: list[Base], quick: bool):
    """Train at several betas, measure, and write all that the runs show."""
    policies, jobs = [], []  # policies: (method, beta, seed, folder of its run)
    for seed, base in enumerate(bases):
        policies.append(("sft", None, seed, base.out / "sft"))
        policies += [(name, DEFAULT[name], seed, base.out / name) for name in ("ppo", "dpo")]
        for method, (stage, options, betas) in METHODS.items():
            for beta in betas[:1] if quick else betas:
                where = out / f"{method}, beta {beta}, seed {seed}"
                often = {"eval_every": 20 if stage == "dpo" else 1000}  # for the curves of DPO
                job = base.job(where, stage, beta=beta, **often, **options)
                jobs.append(job)
                policies.append((method, beta, seed, job.folder))
    run_jobs(jobs)

    rows = []
    for method, beta, seed, run in tqdm(policies, "measuring"):
        row = {"method": method, "setting": beta, "seed": seed}
        rows.append({**row, **bases[seed].measure(run)})
    measured = list(zip(rows, [run for *_, run in policies]))
    for seed, base in enumerate(bases):
        pool = make_pool(base, 64 if quick else 128)
        for row in exact_frontier(pool.gold, np.geomspace(0.1, 10, 25)):
            row["setting"] = row.pop("beta")
            rows.append({"method": "exact frontier", "seed": seed, **row})
        judges = {"reward model": pool.scores(base.out / "rm/ckpt.pt"), "gold": pool.gold}
        for judge, scores in judges.items():
            for row in best_of_all(pool, scores, BEST_OF if quick else (*BEST_OF, 128)):
                n = row["n"]
                numbers = {"setting": n, "gold": row["gold"], "kl": row["kl"]}
                numbers["kl_bound"] = math.log(n) - (n - 1) / n  # Beirami et al. 2024, theorem 1
                rows.append({"method": f"best of n by {judge}", "seed": seed, **numbers})
    write_csv(rows, results / "frontier.csv")
    print(f"above the exact frontier: {', '.join(above_frontier(rows)) or 'no policy'}")
    draw_frontier(rows, results / "frontier.png")
    draw_safety(rows, results / "safety.png")
    cost(results, bases, measured)
    dpo_failures(results, bases, policies)


def above_frontier(rows: list[dict]) -> list[str]:
    """Policies with more gold than any policy can have at their KL, intervals taken into account.

    There is none. If there seems to be one, gold or KL is measured wrongly.
    """
    found = []
    for seed, of_seed in grouped(rows, "seed").items():
        points = [row for row in of_seed if row["method"] == "exact frontier"]
        kl, gold = zip(*sorted((row["kl"], row["gold"]) for row in points))
        for row in of_seed:
            if "gold_low" in row and row["gold_low"] > np.interp(row["kl_high"], kl, gold):
                found.append(f"{row['method']} {row['setting'] or ''} of seed {seed}")
    return found


def draw_frontier(rows: list[dict], path: Path):
    """Gold against KL: means over seeds, with bars from the lowest to the highest seed."""
    figure, (axis,) = panels(1, 1, size=(7.5, 5))
    small = {"textcoords": "offset points", "fontsize": 7}
    blue = {**STYLE["best of n"], "ms": 4}
    lines = {
        "exact frontier": {"color": "black", "lw": 1.5},
        "best of n by gold": {**blue, "ls": ":"},
        "best of n by reward model": blue,
    }
    methods = grouped(rows, "method")
    for name, style in lines.items():
        settings = grouped(methods[name], "setting")
        kl, gold = (
            [np.mean([row[column] for row in some]) for some in settings.values()]
            for column in ("kl", "gold")
        )
        axis.plot(kl, gold, label=name, **style)
        if name == "best of n by reward model":
            for n, *point in zip(settings, kl, gold):
                if n >= 16:  # below, they would cover others
                    axis.annotate(n, point, (4, 4), **{**small, "color": style["color"]})
    for method, style in STYLE.items():
        label = method
        for setting, some in sorted(grouped(methods.get(method, []), "setting").items()):
            where = mean_point(axis, some, "kl", "gold", label=label, **style)
            # Two labels would cover a neighbour: they stand on the other side.
            crowded = (method, setting) in (("ppo", 0.1), ("ppo", 0.25), ("ppo", 0.5), ("ipo", 0.1))
            place = (-20, 5) if crowded else (6, -10)
            if len(METHODS[method][2]) > 1:
                axis.annotate(f"{setting:g}", where, place, **{**small, "color": style["color"]})
            label = None  # once per method
    axis.set_ylabel(UNITS["gold"])
    axis.set_title("numbers: beta; along best of n by reward model: n", fontsize=8)
    kl_axis(axis)
    save(figure, path)


def draw_safety(rows: list[dict], path: Path):
    """Safety and honesty of every policy, against how far it has moved."""
    methods = grouped(rows, "method")
    units = {
        "harmful_declined": "harmful requests declined, fraction",
        "made_up": "made up about strangers, fraction",
    }
    figure, axes = panels(2, 2)
    for axis, (column, unit) in zip(axes, units.items()):
        for method in [name for name in STYLE if name in methods]:
            label = method
            for some in grouped(methods[method], "setting").values():
                mean_point(axis, some, "kl", column, label=label, **STYLE[method])
                label = None
        sft = np.mean([row[column] for row in methods["sft"]])
        axis.axhline(sft, color="black", ls="--", lw=1, label="sft")
        axis.set_ylabel(unit)
        axis.set_ylim(0, 1.03)
        kl_axis(axis)
    save(figure, path)


# ---------------------------------------------------------------------------------------------
# More from the same runs


def cost(results: Path, bases: list[Base], measured: list[tuple[dict, Path]]):
    """PPO and RLOO against DPO at their default betas: the gold that a forward pass buys.

    All begin with the same SFT model and the same preferences, which are not counted. PPO and RLOO
    need a reward model, which is. Seconds mean something only if the runs had the machine alone.
    """
    table, curves = [], []
    for row, run in measured:
        method, seed = row["method"], row["seed"]
        if method not in DEFAULT or row["setting"] != DEFAULT[method]:
            continue
        paid, before = read_cost(run), dict.fromkeys(COSTS, 0)
        if method != "dpo":
            before = read_cost(bases[seed].out / "rm")
        line = {name: row[name] for name in "method seed gold kl win_rate no_end tokens".split()}
        for unit in COSTS:
            line[unit] = paid[unit]
            line[f"{unit} with reward model"] = paid[unit] + before[unit]
        line["peak_gb"] = paid["peak_gb"]
        # Policy and reference, RLOO's reward model, PPO's critic.
        line["models"] = {"dpo": 2, "rloo": 3, "ppo": 4}[method]
        steps, curve = bases[seed].curve(run, "step", "gold"), []
        for step in steps:
            done = (step["step"] + 1) / (steps[-1]["step"] + 1)  # all steps cost the same
            passes = before["forward_equivalents"] + done * paid["forward_equivalents"]
            numbers = {"millions": passes / 1e6, "gold": step["gold"]}
            curve.append({"method": method, "seed": seed, **numbers})
        table.append(line | until(curve, method))
        curves += curve
    write_csv(table, results / "cost.csv")
    write_csv(curves, results / "cost_curves.csv")
    draw_cost(curves, results / "cost.png")


def along(curve: list[dict], method: str) -> list[dict]:
    """Gold against passes, `smoothed` if it is that of 128 rollouts; DPO is measured on more."""
    return smoothed(curve, "millions", "gold", width=1 if method == "dpo" else 5)


def until(curve: list[dict], method: str) -> dict:
    """Million forward passes of a token until gold first was so high; None if it never was."""
    found = {}
    for level in (0.5, 0.6, 0.7):
        passes = [row["millions"] for row in along(curve, method) if row["gold"] >= level]
        found[f"millions until {level}"] = min(passes, default=None)
    return found


def draw_cost(curves: list[dict], path: Path):
    """Gold along training against forward passes: means over seeds, with their range."""
    figure, (axis,) = panels(1, 1, size=(6.5, 3.6))
    for method, some in grouped(curves, "method").items():
        runs = [along(run, method) for run in grouped(some, "seed").values()]
        label = method if method == "dpo" else f"{method}, after its reward model"
        style = {"color": STYLE[method]["color"], "marker": STYLE[method]["marker"]}
        over_seeds(axis, runs, "millions", "gold", label=label, ms=3, **style)
    axis.set(xlabel="forward passes of a token, millions", ylabel=UNITS["gold"])
    axis.set_xlim(left=0)
    save(figure, path)


def dpo_failures(results: Path, bases: list[Base], policies: list[tuple]):
    """DPO along its training: what goes wrong at a small beta, and what cures it.

    The chosen responses become less likely, too, and responses grow longer. The cures:
    NLL of the chosen response added, IPO, a larger beta, and to stop early, which is to read a
    curve further to the left.
    """
    columns = ("step", "gold", "kl", "length", "no_end", "chosen", "rejected")
    rows = []
    for method, beta, seed, run in policies:
        if method in METHODS and METHODS[method][0] == "dpo" and beta in (0.1, 1.0):
            for point in bases[seed].curve(run, *columns):
                if (point["step"] + 1) % 20 == 0:  # the last step is another one for every seed
                    rows.append({"method": method, "setting": beta, "seed": seed, **point})
    write_csv(rows, results / "dpo.csv")
    draw_dpo(rows, results / "dpo.png")


def draw_dpo(rows: list[dict], path: Path):
    """Curves of DPO and its cures; steps are counted from 1."""
    lines = []
    for (method, beta), some in sorted(grouped(rows, "method", "setting").items()):
        style = STYLE[method] if beta == 0.1 else {**STYLE[method], "color": "black"}
        some = [{**row, "step": row["step"] + 1} for row in some]
        lines.append((f"{method}, beta {beta:g}", some, style))
    units = {name: UNITS[name] for name in ("gold", "kl", "length")}
    units |= {side: f"{side}: log-ratio to SFT, nats" for side in ("chosen", "rejected")}
    figure, axes = band_panels(lines, "step", units, "step")
    axes[4].sharey(axes[3])  # chosen and rejected are to be compared
    save(figure, path)
