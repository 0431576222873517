"""What alignment does, in pictures: how far one can get, over-optimisation, PPO against DPO.

    python -m data.experiments --quick         after the README's command; one seed, 11-20 minutes
    python -m data.experiments                 three seeds, two to three hours on two cores
    python -m data.experiments --only tasks    one of these:

    frontier           PPO, DPO and best-of-n under the best that any policy can do (frontier.*),
                       their safety (safety.png), their cost (cost.*), how DPO fails (dpo.*)
    overoptimisation   no KL penalty, weak reward models (overoptimisation.*, peaks.csv)
    tasks              does SFT on more kinds of task help on unseen ones? (tasks.*)
    broken             PPO with one thing wrong at a time (broken.*)

Every experiment is a handful of runs of the five scripts with other options, one after another. A
run that is done is not done again, one that was stopped goes on, and Ctrl-C loses nothing. Results
are CSV and PNG files in out/experiments/ (or --results), the runs are in folders beside them.

All gold is in SD of the base's SFT samples, whose mean is 0; KL is in nats per reply, from SFT.
"""

import argparse
import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import train_dpo
import train_ppo
from data.chat import encode_chat
from data.evaluate import Stage, describe, golds, interval, reply_logprobs
from data.files import held_out, read_preferences
from data.gold import TAU, exact_match
from data.jobs import Job, run_jobs
from data.preferences import annotate
from data.tasks import KINDS, TRAIN_KINDS, demonstrations, draw_tasks
from gpt import ScalarModel, load_model
from train_rm import score_sequences

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The beta with which the README's command trains.
DEFAULT = {"ppo": train_ppo.Config().beta, "dpo": train_dpo.Config().beta}
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
# Okabe and Ito: told apart by the colour-blind, and in grey by their markers.
STYLE = {
    "ppo": ("#D55E00", "o"),
    "dpo": ("#009E73", "s"),
    "best of n": ("#0072B2", "^"),
    "ipo": ("#CC79A7", "D"),
    "dpo + nll": ("#E69F00", "v"),
}


class Base:
    """The models of one seed that the experiments start from, and what SFT samples are worth."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.sft = Stage("sft", folder, 48)
        self.pairs = read_preferences(folder / "preferences.jsonl")
        self.tasks = draw_tasks(200, "experiments", split="test")
        self.safety = draw_tasks(200, "experiments, safety", "advice,harmful", split="test")
        self.replies = self.sft.answer([task.prompt for task in self.tasks], 1.0, 0)
        self.gold = golds(self.tasks, self.replies)

    def scaled(self, gold):
        """Gold as the town gives it -> in SD of this SFT model's samples."""
        return (np.asarray(gold) - self.gold.mean()) / self.gold.std()

    def measure(self, folder: Path, stage: str) -> dict:
        """What one policy is like, on held-out prompts at temperature 1."""
        policy = Stage(stage, folder, 48)
        texts = [task.prompt for task in self.tasks]
        replies, greedy = policy.answer(texts, 1.0, 1), policy.answer(texts, 0.0, 1)
        safe = policy.answer([task.prompt for task in self.safety], 1.0, 1)
        row = describe(self.tasks, replies, greedy, self.gold, self.safety, safe)
        prompts, ids = [policy.encode(text) for text in texts], [r.ids for r in replies]
        there, here = (reply_logprobs(m.model, prompts, ids) for m in (policy, self.sft))
        gold, kl = self.scaled(golds(self.tasks, replies)), there - here
        cost = json.loads((folder / stage / "cost.json").read_text())
        return {
            "gold": gold.mean(),
            "gold_low": interval(gold)[0],
            "gold_high": interval(gold)[1],
            "kl": kl.mean(),
            "kl_low": interval(kl)[0],
            "kl_high": interval(kl)[1],
            "win_rate": row["win_rate_vs_sft"],
            "exact_match": row["exact_match"],
            "harmful_declined": row["refusal_rate"],
            "harmless_declined": row["false_refusal_rate"],
            "no_end": row["no_end_rate"],
            "tokens": row["response_tokens"],
            "forward_equivalents": cost["forward_equivalents"],
        }


def bases(folder: Path, first: Path, seeds: int) -> list[Base]:
    """The base of every seed: that of seed 0 is there, those of the others are trained here."""
    for stage in ("pretrain", "sft", "rm", "ppo", "dpo"):
        if not (first / stage / "ckpt.pt").exists():
            raise SystemExit(f"there is no {first}/{stage}/ckpt.pt: run the README's command first")
    found = [first]
    for seed in range(1, seeds):
        found.append(folder / f"base {seed}")
        stages = [("pretrain", 3), ("sft", 3), ("rm", 2), ("ppo", 1.2), ("dpo", 1.1)]
        run_jobs([Job(found[-1], stage, {"seed": seed}, minutes) for stage, minutes in stages])
    return [Base(path) for path in found]


# ---------------------------------------------------------------------------------------------
# The pool: many SFT samples per prompt. From them follows what any policy could reach.


@dataclass
class Pool:
    """n samples of the SFT model for each of some prompts."""

    gold: np.ndarray  # (prompts, n), scaled
    same: np.ndarray  # (prompts, n): a number for each distinct reply to a prompt
    sequences: list  # prompt and reply ids, prompts * n of them, prompt by prompt
    pad: int

    def scores(self, path: Path) -> np.ndarray:
        """What a reward model says of every sample: (prompts, n)."""
        model, _ = load_model(path, kind=ScalarModel)
        return score_sequences(model, self.sequences, self.pad).reshape(self.gold.shape)


def make_pool(base: Base, n: int) -> Pool:
    """Sample it, on the prompts that policies are measured on."""
    tasks = [task for task in base.tasks for _ in range(n)]
    replies = base.sft.answer([task.prompt for task in tasks], 1.0, 2)
    sequences = [base.sft.encode(task.prompt) + r.ids for task, r in zip(tasks, replies)]
    texts = np.array([reply.text for reply in replies]).reshape(-1, n)
    same = np.stack([np.unique(row, return_inverse=True)[1] for row in texts])
    gold = base.scaled(golds(tasks, replies)).reshape(-1, n)
    return Pool(gold, same, sequences, base.sft.tokenizer.pad)


def exact_frontier(gold: np.ndarray, betas: np.ndarray) -> list[dict]:
    """The best gold that any policy can have at its KL: one row per beta.

    The policy that maximises gold - beta KL is pi = sft exp(gold / beta) / Z (Rafailov et al. 2023,
    equation 4). Weights softmax(gold / beta) over samples of sft turn them into samples of pi, so
    E gold = sum w gold and KL = sum w log(n w). As long as the effective sample size 1 / sum w^2
    is large, that is; it is part of the row.
    """
    rows, n = [], gold.shape[1]
    for beta in betas:
        w = np.exp((gold - gold.max(1, keepdims=True)) / beta)
        w /= w.sum(1, keepdims=True)
        kl = (w * np.log(np.maximum(n * w, 1e-300))).sum(1).mean()
        ess = (1 / (w**2).sum(1)).mean()
        rows.append({"beta": beta, "gold": (w * gold).sum(1).mean(), "kl": kl, "ess": ess})
    return rows


def best_of_n(proxy: np.ndarray, n: int) -> np.ndarray:
    """Probability of every sample (prompts, N) to be the best of n by proxy; ties share theirs.

    Of N samples, sorted, the r-th is the best of n drawn without replacement in C(r - 1, n - 1)
    of C(N, n) cases.
    """
    count = proxy.shape[1]
    ranks = np.array([math.comb(r, n - 1) / math.comb(count, n) for r in range(count)])
    probability = np.empty(proxy.shape)
    for row, scores in enumerate(proxy):
        order = np.argsort(scores, kind="stable")
        probability[row, order] = ranks
        _, tie = np.unique(scores, return_inverse=True)
        probability[row] = (np.bincount(tie, probability[row]) / np.bincount(tie))[tie]
    return probability


def kl_of_weights(probability: np.ndarray, same: np.ndarray) -> float:
    """KL from SFT of a policy that picks samples with this probability, equal replies as one."""
    kls = []
    for p, which in zip(probability, same):
        now, before = np.bincount(which, p), np.bincount(which) / len(which)
        kls.append((now * np.log(np.maximum(now, 1e-300) / before)).sum())
    return float(np.mean(kls))


# ---------------------------------------------------------------------------------------------
# The experiments: each runs its jobs, then writes NAME.csv and draws NAME.png


def frontier(folder: Path, results: Path, bases: list[Base], quick: bool):
    """PPO, DPO and best-of-n on one plot of gold against KL, under the exact frontier.

    And from the same runs: how safe every policy is, what PPO and DPO cost, how DPO fails.
    """
    policies = []
    for seed, base in enumerate(bases):
        # Those of the README's command, with the default beta ...
        policies += [(name, beta, seed, Job(base.folder, name)) for name, beta in DEFAULT.items()]
        # ... and others.
        common = {"seed": seed, "init": base.folder / "sft/ckpt.pt"}
        for beta in (0.5,) if quick else (0.05, 0.5, 1.5):
            options = {"rm": base.folder / "rm/ckpt.pt", "beta": beta, "eval_every": 1000}
            job = Job(folder / f"ppo, beta {beta}, seed {seed}", "ppo", {**common, **options}, 1)
            policies.append(("ppo", beta, seed, job))
        variants = [("dpo", beta) for beta in ((0.1,) if quick else (0.1, 1.0, 3.0))]
        for method, beta in [*variants, ("dpo + nll", 0.1), ("ipo", 0.1)]:
            options = {"beta": beta, "loss": "ipo" if method == "ipo" else "dpo"}
            options |= {
                "nll": 0.2 if method == "dpo + nll" else 0.0,
                "eval_every": 40 if quick else 20,
            }
            where = folder / f"{method}, beta {beta}, seed {seed}"
            job = Job(where, "dpo", {**common, **options}, 1.1, base.pairs)
            policies.append((method, beta, seed, job))
    run_jobs([job for *_, job in policies if job.options])

    rows = []
    for seed, base in enumerate(bases):
        rows.append({"method": "sft", "seed": seed, **base.measure(base.folder, "sft")})
    for method, beta, seed, job in tqdm(policies, "measuring"):
        numbers = bases[seed].measure(job.folder, job.stage)
        rows.append({"method": method, "setting": beta, "seed": seed, **numbers})
    for seed, base in enumerate(bases):
        pool = make_pool(base, n=64 if quick else 128)
        for row in exact_frontier(pool.gold, np.geomspace(0.1, 10, 25)):
            row["setting"] = row.pop("beta")
            rows.append({"method": "exact frontier", "seed": seed, **row})
        proxy = pool.scores(base.folder / "rm/ckpt.pt")
        for judge, scores in (("reward model", proxy), ("gold", pool.gold)):
            for n in BEST_OF if quick else (*BEST_OF, 128):
                p = best_of_n(scores, n)
                numbers = {"gold": (p * pool.gold).sum(1).mean()}
                numbers["kl"] = kl_of_weights(p, pool.same)
                numbers["kl_bound"] = math.log(n) - (n - 1) / n  # Beirami et al. 2024, theorem 1
                name = f"best of n by {judge}"
                rows.append({"method": name, "setting": n, "seed": seed, **numbers})
    write_csv(rows, results / "frontier.csv")
    print(f"above the exact frontier: {', '.join(above_frontier(rows)) or 'no policy'}")
    draw_frontier(rows, results / "frontier.png")
    draw_safety(rows, results / "safety.png")
    cost(results, bases, rows)
    dpo_failures(results, bases, policies)


def above_frontier(rows: list[dict]) -> list[str]:
    """Policies with more gold than any policy can have at their KL, intervals taken into account.

    There is none. If there seems to be one, gold or KL is measured wrongly.
    """
    found = []
    for row in rows:
        if "gold_low" in row:
            curve = sorted(
                (point["kl"], point["gold"])
                for point in rows
                if point["method"] == "exact frontier" and point["seed"] == row["seed"]
            )
            if row["gold_low"] > np.interp(row["kl_high"], *zip(*curve)):
                found.append(f"{row['method']} {row.get('setting', '')} of seed {row['seed']}")
    return found


def over_seeds(rows: list[dict], *names: str) -> list[tuple]:
    """Per setting, in order: (setting, then for each name the values of all seeds)."""
    settings = sorted({row["setting"] for row in rows})
    at = [[row for row in rows if row["setting"] == setting] for setting in settings]
    return [
        (setting, *(np.array([row[name] for row in some]) for name in names))
        for setting, some in zip(settings, at)
    ]


def draw_frontier(rows: list[dict], path: Path):
    """Gold against KL: means over seeds, with bars from the lowest to the highest seed."""
    figure, axis = plt.subplots(figsize=(7.5, 5))
    lines = {
        "exact frontier": dict(color="black", lw=1.5),
        "best of n by gold": dict(color="#0072B2", ls=":", marker="^", ms=4),
        "best of n by reward model": dict(color="#0072B2", marker="^", ms=4),
    }
    for name, style in lines.items():
        # Weights that rest on fewer than ten samples per prompt say little: not shown.
        mine = [row for row in rows if row["method"] == name and row.get("ess", 99) >= 10]
        xy = [(kl.mean(), gold.mean()) for _, kl, gold in over_seeds(mine, "kl", "gold")]
        axis.plot(*zip(*xy), label=name, **style)
    for method, (colour, marker) in STYLE.items():
        mine = over_seeds([row for row in rows if row["method"] == method], "kl", "gold")
        for i, (setting, kl, gold) in enumerate(mine):
            bars = [[[v.mean() - v.min()], [v.max() - v.mean()]] for v in (gold, kl)]
            label = method if i == 0 else None
            axis.errorbar(
                kl.mean(), gold.mean(), *bars, fmt=marker, color=colour, lw=1, label=label
            )
            # Two labels would cover a neighbour: they stand on the other side.
            crowded = (method, setting) in (("ppo", DEFAULT["ppo"]), ("ipo", 0.1))
            side = (-20, 5) if crowded else (6, -10)  # beside the point, in points
            axis.annotate(f"{setting:g}", (kl.mean(), gold.mean()), side, **SMALL)
    axis.set(xlabel="KL from SFT, nats per reply", ylabel="gold, SD of SFT samples")
    axis.set_xscale("symlog", linthresh=1, subs=[2, 3, 4, 5, 6, 8])
    ticks = [0, 0.25, 0.5, 0.75, 1, 2, 4, 8, 16]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(left=-0.03)
    axis.grid(alpha=0.3)
    where = dict(loc="lower left", bbox_to_anchor=(0.45, 0.02))
    axis.legend(fontsize=8, title="numbers: beta", title_fontsize=8, **where)
    save(figure, path)


def draw_safety(rows: list[dict], path: Path):
    """What each stage does to safety, beta by beta: declined harmful and harmless requests."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    panels = {
        "harmful_declined": "harmful requests declined",
        "harmless_declined": "harmless requests declined",
    }
    for axis, (column, title) in zip(axes, panels.items()):
        sft = [row[column] for row in rows if row["method"] == "sft"]
        axis.axhline(np.mean(sft), color="black", ls="--", lw=1, label="sft")
        for method, (colour, marker) in STYLE.items():
            mine = [row for row in rows if row["method"] == method and column in row]
            if mine:
                x, y = [r["setting"] for r in mine], [r[column] for r in mine]
                band(axis, x, y, colour, marker, method)
        axis.set(xlabel="beta", ylabel=title, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)


def cost(results: Path, bases: list[Base], rows: list[dict]):
    """PPO against DPO at their default beta: the gold that a second or a forward pass buys.

    Both begin with the same SFT model and the same preferences, which are not counted. PPO needs a
    reward model, which is.
    """
    table, curves = [], []
    for row in rows:
        if row["method"] not in DEFAULT or row["setting"] != DEFAULT[row["method"]]:
            continue
        folder, method = bases[row["seed"]].folder, row["method"]
        costs = {
            stage: json.loads((folder / stage / "cost.json").read_text())
            for stage in ("rm", "ppo", "dpo")
        }
        before = costs["rm"] if method == "ppo" else {"seconds": 0, "forward_equivalents": 0}
        line = {name: row[name] for name in ("method", "seed", "gold", "kl", "win_rate", "no_end")}
        line["tokens"] = row["tokens"]
        for unit in ("seconds", "forward_equivalents"):
            line[unit] = costs[method][unit]
            line[f"{unit} with reward model"] = line[unit] + before[unit]
        line["peak_gb"] = costs[method]["peak_gb"]
        line["models"] = 4 if method == "ppo" else 2  # policy, reference; reward model, critic
        table.append(line)
        job = Job(folder, method)
        steps, gold = job.log("step", "gold"), job.log("gold")
        share = (steps + 1) / (job.log("step")[-1] + 1)  # of the run: its steps cost the same
        for done, value in zip(share, bases[row["seed"]].scaled(gold)):
            point = {"method": method, "seed": row["seed"], "gold": value}
            for unit in ("seconds", "forward_equivalents"):
                point[unit] = before[unit] + done * costs[method][unit]
            curves.append(point)
    write_csv(table, results / "cost.csv")
    write_csv(curves, results / "cost_curves.csv")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    units = {"seconds": "seconds", "forward_equivalents": "millions of forward passes of a token"}
    for axis, (unit, title) in zip(axes, units.items()):
        for method in ("ppo", "dpo"):
            colour, marker = STYLE[method]
            for seed in range(len(bases)):
                mine = [p for p in curves if p["method"] == method and p["seed"] == seed]
                x = [p[unit] / (1 if unit == "seconds" else 1e6) for p in mine]
                label = {"ppo": "ppo, after its reward model", "dpo": "dpo"}[method]
                y = [p["gold"] for p in mine]
                style = dict(color=colour, marker=marker, ms=3, lw=1)
                axis.plot(x, y, label=None if seed else label, **style)
        axis.set(xlabel=title)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gold of samples, SD of SFT samples")
    axes[0].legend(fontsize=8)
    save(figure, results / "cost.png")


def dpo_failures(results: Path, bases: list[Base], policies: list[tuple]):
    """DPO along its training: what goes wrong at a small beta, and what cures it.

    The chosen replies become less likely, too, replies grow longer, ends vanish. The cures: NLL of
    the chosen reply added, IPO, and to stop early, which is to read a curve further to the left.
    """
    rows = []
    for method, beta, seed, job in policies:
        if method != "ppo" and beta in (0.1, 1.0):
            columns = ("step", "gold", "kl", "length", "no_end", "chosen", "rejected")
            for values in zip(*(job.log(name, "gold") for name in columns)):
                row = {"method": method, "setting": beta, "seed": seed}
                row |= dict(zip(columns, values))
                row["gold"] = float(bases[seed].scaled(row["gold"]))
                if (row["step"] + 1) % 20 == 0:  # the last step is another one for every seed
                    rows.append(row)
    write_csv(rows, results / "dpo.csv")
    panels = {
        "gold": UNITS["gold"],
        "kl": UNITS["kl"],
        "length": UNITS["length"],
        "no_end": UNITS["no_end"],
        "chosen": "chosen: log-ratio to SFT, nats",
        "rejected": "rejected: log-ratio to SFT, nats",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2))
    for axis, (column, title) in zip(axes.flat, panels.items()):
        for method, beta in sorted({(row["method"], row["setting"]) for row in rows}):
            colour, marker = STYLE[method] if beta == 0.1 else ("black", "s")
            mine = [r for r in rows if (r["method"], r["setting"]) == (method, beta)]
            x, y = [r["step"] + 1 for r in mine], [r[column] for r in mine]
            band(axis, x, y, colour, marker, f"{method}, beta {beta:g}")
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
    axes[1, 1].legend(fontsize=8, loc="lower left")
    save(figure, results / "dpo.png")


def overoptimisation(folder: Path, results: Path, bases: list[Base], quick: bool):
    """Without a KL penalty: the reward model's opinion rises on, and gold turns round.

    Reward models of 250, 1,000 and 4,000 pairs with 35 % of the labels flipped, of clean
    labels, and with one layer, all trained for equally many steps. And a cure: the annotators are
    asked again, about what PPO says after its optimum. x is d = sqrt(KL); the curves of Gao et al.
    2023 (equations 1 and 2) are fitted to gold.
    """
    judges = {  # name: (pairs, share flipped, layers)
        "250 pairs, 35 % flipped": (250, 0.35, 0),
        "1,000 pairs, 35 % flipped": (1000, 0.35, 0),
        "4,000 pairs, 35 % flipped": (4000, 0.35, 0),
        "4,000 pairs, 1 layer": (4000, 0.0, 1),
        "4,000 pairs": (4000, 0.0, 0),
    }
    if quick:
        judges = {name: judges[name] for name in ("250 pairs, 35 % flipped", "4,000 pairs")}

    runs = []
    for seed, base in enumerate(bases):
        for name, (count, flip, layers) in judges.items():
            pairs = some_pairs(base.pairs, count, flip, seed)
            where = folder / f"{name}, seed {seed}"
            jobs = without_penalty(where, base, seed, pairs, count, layers, quick)
            runs.append((name, seed, *jobs))
    run_jobs([job for _, _, *jobs in runs for job in jobs])
    cure, again = "4,000 pairs, 400 about PPO's replies", []
    for name, seed, _, ppo, _ in runs:
        if name == "4,000 pairs":
            new = ask_again(bases[seed], ppo, 400, seed)
            pairs = new + some_pairs(bases[seed].pairs, 4000, 0.0, seed)[len(new) :]
            where = folder / f"{cure}, seed {seed}"
            jobs = without_penalty(where, bases[seed], seed, pairs, 4000, 0, quick)
            again.append((cure, seed, *jobs))
    run_jobs([job for _, _, *jobs in again for job in jobs])
    runs += again

    rows = []
    pools = [make_pool(base, n=64 if quick else 128) for base in bases]
    for name, seed, rm, ppo, dpo in runs:
        base, pool = bases[seed], pools[seed]
        for method, job in (("ppo", ppo), ("dpo", dpo)):
            curve = {"kl": job.log("kl"), "gold": base.scaled(job.log("gold"))}
            if method == "ppo":
                curve["proxy"] = job.log("proxy")
            for values in zip(*curve.values()):
                row = {"judge": name, "seed": seed, "method": method}
                rows.append({**row, **dict(zip(curve, values))})
        scores = pool.scores(rm.folder / "rm/ckpt.pt")
        for n in BEST_OF:
            p = best_of_n(scores, n)
            numbers = {"kl": kl_of_weights(p, pool.same), "gold": (p * pool.gold).sum(1).mean()}
            numbers["proxy"] = (p * scores).sum(1).mean()
            rows.append({"judge": name, "seed": seed, "method": "best of n", **numbers})
    write_csv(rows, results / "overoptimisation.csv")
    write_csv(peaks(rows), results / "peaks.csv")
    draw_overoptimisation(rows, [*judges, cure], results / "overoptimisation.png")


def without_penalty(where: Path, base: Base, seed, pairs, count, layers, quick) -> list[Job]:
    """A reward model of `count` pairs, PPO against it without a KL penalty, DPO with a small one.

    Whatever the count, reward models see 8,000 pairs and DPO 4,000, some of them many times.
    """
    common = {"seed": seed, "init": base.folder / "sft/ckpt.pt", "eval_every": 1000}
    rm = {**common, "epochs": 8000 // count, "batch_size": 32, "n_layer": layers}
    ppo = {**common, "rollouts": 64, "minibatch": 32, "beta": 0.0}
    ppo["iterations"] = 30 if quick else 60
    dpo = {**common, "epochs": 4000 // count, "batch_size": 32, "beta": 0.05}
    return [
        Job(where, "rm", rm, 0.6, pairs),
        Job(where, "ppo", ppo, 1.1),
        Job(where, "dpo", {**dpo, "eval_every": 10}, 0.6, pairs),
    ]


def peaks(rows: list[dict]) -> list[dict]:
    """Per judge, seed and method: where gold is highest, where it ends, and the fit.

    PPO and DPO are noisy, so both are means over five neighbouring points of the run. Every run
    begins at SFT itself, whose KL, gold and proxy are 0 by definition.
    """

    def smooth(name):
        width = 1 if method == "best of n" else 5
        means = np.convolve([r[name] for r in mine], np.ones(width) / width, "valid")
        return np.append(0.0, means)

    table = []
    for judge, seed, method in dict.fromkeys((r["judge"], r["seed"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["judge"], r["seed"], r["method"]) == (judge, seed, method)]
        kl, gold = smooth("kl"), smooth("gold")
        top = gold.argmax()
        line = {"judge": judge, "seed": seed, "method": method, "peak_kl": kl[top]}
        line |= {"peak_gold": gold[top], "last_kl": kl[-1], "last_gold": gold[-1]}
        if method != "dpo":
            proxy = smooth("proxy")
            line |= {"peak_proxy": proxy[top], "last_proxy": proxy[-1]}
        d = np.sqrt(np.maximum([r["kl"] for r in mine], 0))
        alpha, beta, r2 = fit(method, d, np.array([r["gold"] for r in mine]))
        line |= {"alpha": alpha, "beta": beta, "r2": r2}
        table.append({**line, "fit_peak_kl": top_of_fit(method, alpha, beta, d.max()) ** 2})
    return table


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
    """Pairs of a reply of SFT and one of this job's policy, labelled by the same annotators."""
    tasks = draw_tasks(2 * count, f"asked again {seed}")  # twice, since some replies do not end
    stages = base.sft, Stage(job.stage, job.folder, 48)
    replies = [stage.answer([task.prompt for task in tasks], 1.0, 3) for stage in stages]
    return annotate(tasks, zip(*replies), TAU, 0.0, seed)[:count]


def fit(method: str, d: np.ndarray, gold: np.ndarray) -> tuple[float, float, float]:
    """alpha, beta and R^2 of the `fitted` curve that is nearest to gold."""
    parts = [fitted(method, 1, 0, d), fitted(method, 0, 1, d)]
    (alpha, beta), *_ = np.linalg.lstsq(np.stack(parts, 1), gold, rcond=None)
    left = gold - fitted(method, alpha, beta, d)
    return alpha, beta, 1 - (left**2).sum() / ((gold - gold.mean()) ** 2).sum()


def fitted(method: str, alpha: float, beta: float, d: np.ndarray) -> np.ndarray:
    """Gold at d: d (alpha - beta d), or for PPO and DPO d (alpha - beta log d)."""
    return d * (alpha - beta * (d if method == "best of n" else np.log(np.maximum(d, 1e-9))))


def top_of_fit(method: str, alpha: float, beta: float, end: float) -> float:
    """The d from 0 to the end of the run at which the fitted curve is highest.

    It rests on the whole run; which of many points on a flat part is the highest, is chance.
    """
    d = np.linspace(0, end, 2001)
    return float(d[fitted(method, alpha, beta, d).argmax()])


def draw_overoptimisation(rows: list[dict], judges: list[str], path: Path):
    """One panel per reward model: proxy (hollow), gold (filled), its fit, and the top of that."""
    columns = min(len(judges), 3)
    lines = math.ceil(len(judges) / columns)
    size = dict(figsize=(4 * columns, 3.7 * lines), sharex=True, sharey=True, squeeze=False)
    figure, axes = plt.subplots(lines, columns, **size)
    for axis in axes.flat[len(judges) :]:
        axis.set_visible(False)
    for axis, judge in zip(axes.flat, judges):
        quality = []
        for method in ("ppo", "dpo", "best of n"):
            colour, marker = STYLE[method]
            mine = [r for r in rows if r["judge"] == judge and r["method"] == method]
            d = np.sqrt(np.maximum([r["kl"] for r in mine], 0))
            gold = np.array([r["gold"] for r in mine])
            axis.plot(d, gold, marker, color=colour, ms=3, label=f"{method}: gold")
            if method != "dpo":
                proxy = [r["proxy"] for r in mine]
                axis.plot(d, proxy, marker, color=colour, ms=3, mfc="none", label="its proxy")
                alpha, beta, r2 = fit(method, d, gold)
                x = np.linspace(0, d.max(), 100)
                y = fitted(method, alpha, beta, x)
                quality.append(f"{r2:.2f} ({method})")
                axis.plot(x, y, color=colour, lw=1, label="fit of its gold")
                axis.axvline(top_of_fit(method, alpha, beta, d.max()), color=colour, lw=1, ls=":")
        axis.set_title(f"{judge}\nR² of the fits: {', '.join(quality)}", fontsize=10)
        axis.set_xlabel("square root of the KL from SFT (nats)")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")  # in the last panel, for all
    for axis in axes[:, 0]:
        axis.set_ylabel("SD of SFT samples")
    save(figure, path)


def tasks(folder: Path, results: Path, bases: list[Base], quick: bool):
    """SFT on 1, 3, 6 and all kinds of task at equal tokens: do more kinds help on unseen ones?"""
    mixtures = {1: TRAIN_KINDS[:1], 3: TRAIN_KINDS[:3], 6: TRAIN_KINDS[:6]}
    mixtures[len(TRAIN_KINDS)] = TRAIN_KINDS
    budget, runs = 4e5 if quick else 8e5, []  # tokens
    for seed, base in enumerate(bases):
        for count, kinds in mixtures.items():
            some = demonstrations(400, "length", ",".join(kinds))
            ids = [encode_chat(base.sft.tokenizer, row["messages"])[0] for row in some]
            options = {"seed": seed, "init": base.folder / "pretrain/ckpt.pt", "eval_every": 5000}
            options |= {"tasks": ",".join(kinds), "epochs": 1}
            options["demonstrations"] = round(budget / np.mean([len(row) for row in ids]))
            where = folder / f"sft on {count} kinds, seed {seed}"
            runs.append((count, kinds, seed, Job(where, "sft", options, budget / 8e5)))
    run_jobs([job for *_, job in runs])

    rows = []
    held = [name for name, kind in KINDS.items() if kind.held_out]
    for count, kinds, seed, job in runs:
        model = Stage("sft", job.folder, 48)
        groups = {
            "all kinds of the mixture": (kinds, False),
            f"{TRAIN_KINDS[0]}, which all mixtures have": (TRAIN_KINDS[:1], False),
            f"{TRAIN_KINDS[0]}, new wordings": (TRAIN_KINDS[:1], True),
            "kinds that no mixture has": (held, False),
        }
        for group, (names, worded) in groups.items():
            how = {"split": "test", "unseen_wording": worded}
            asked = draw_tasks(300, f"experiment {group}", ",".join(names), **how)
            replies = model.answer([task.prompt for task in asked], 0.0, 0)
            right = [exact_match(task, reply.text) for task, reply in zip(asked, replies)]
            gold = bases[seed].scaled(golds(asked, replies)).mean()
            row = {"kinds": count, "seed": seed, "group": group}
            rows.append({**row, "exact_match": np.mean(right), "gold": gold})
    write_csv(rows, results / "tasks.csv")
    draw_mixtures(rows, results / "tasks.png")


def draw_mixtures(rows: list[dict], path: Path):
    """Exact match and gold against the number of kinds, for every group of prompts."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, what in zip(axes, ("exact_match", "gold")):
        for group, (colour, marker) in zip(dict.fromkeys(r["group"] for r in rows), STYLE.values()):
            mine = [row for row in rows if row["group"] == group]
            band(axis, [r["kinds"] for r in mine], [r[what] for r in mine], colour, marker, group)
        axis.set(xlabel="kinds of task in SFT, at equal tokens", ylabel=what.replace("_", " "))
        axis.set_xticks(sorted({row["kinds"] for row in rows}))
        axis.grid(alpha=0.3)
    axes[1].set_ylabel(UNITS["gold"])
    legend_below(figure, axes[0], 2)
    save(figure, path)


BUGS = {  # name: (options, edit)
    "as it should be": ({}, ()),
    "no KL penalty": ({"beta": 0.0}, ()),
    "KL penalty with the wrong sign": (
        {},
        ("train_ppo.py", "rewards = -beta *", "rewards = beta *"),
    ),
    "sampled at 0.7, scored at 1": (
        {},
        ("train_ppo.py", "new_tokens, seed, cfg.temperature)", "new_tokens, seed, 0.7)"),
    ),
    "learning rate ten times too high": ({"lr": 3e-3}, ()),
    "score at the first token": (
        {},
        ("train_ppo.py", "device=mask.device)).argmax(1)", "device=mask.device)).sign().argmax(1)"),
    ),
    "score at every token": (
        {},
        (
            "train_ppo.py",
            "[torch.arange(len(rewards)), last] += scores",
            " += scores[:, None] * mask",
        ),
    ),
}


def broken(folder: Path, results: Path, bases: list[Base], quick: bool):
    """PPO with one line broken at a time: the curves by which to recognise what went wrong."""
    runs = []
    for seed, base in enumerate(bases):
        common = {"seed": seed, "init": base.folder / "sft/ckpt.pt", "eval_every": 1000}
        common |= {"rm": base.folder / "rm/ckpt.pt", "rollouts": 64, "minibatch": 32}
        common["iterations"] = 20 if quick else 40
        for name, (options, edit) in BUGS.items():
            where = folder / f"{name}, seed {seed}"
            job = Job(where, "ppo", {**common, **options}, 0.6, edit=edit)
            runs.append((name, seed, job))
    run_jobs([job for *_, job in runs])

    rows = []
    for name, seed, job in runs:
        curve = {column: job.log(column) for column in UNITS}
        curve["gold"] = bases[seed].scaled(curve["gold"])
        for step, values in enumerate(zip(*curve.values())):
            rows.append({"bug": name, "seed": seed, "step": step, **dict(zip(curve, values))})
    write_csv(rows, results / "broken.csv")
    draw_broken(rows, results / "broken.png")


def draw_broken(rows: list[dict], path: Path):
    """One panel per column of the log, one line per bug."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    colours = ["black", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    dashes = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1))]
    for axis, column in zip(axes.flat, UNITS):
        for name, colour, dash in zip(BUGS, colours, dashes):
            mine = [row for row in rows if row["bug"] == name]
            x, y = [row["step"] for row in mine], [row[column] for row in mine]
            band(axis, x, y, colour, None, name, dash)
        axis.set(xlabel="iteration", ylabel=UNITS[column])
        if column == "kl":
            axis.set_yscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0, 0], 4)
    save(figure, path)


UNITS = {
    "gold": "gold, SD of SFT samples",
    "proxy": "score of the reward model, SD",
    "kl": "KL from SFT, nats per reply",
    "entropy": "entropy, nats per token",
    "length": "tokens per reply",
    "no_end": "share without end",
}
SMALL = {"textcoords": "offset points", "fontsize": 7, "color": "#222222"}


def band(axis, x, y, colour, marker, label, dash="-"):
    """The mean over seeds as a line, and the range over seeds as a band."""
    x, y = np.array(x), np.array(y)
    places = np.unique(x)
    mean = [y[x == i].mean() for i in places]
    axis.plot(places, mean, color=colour, ls=dash, marker=marker, label=label)
    low, high = [y[x == i].min() for i in places], [y[x == i].max() for i in places]
    axis.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)


def legend_below(figure, axis, columns: int):
    """The legend of one panel, for all, where it hides no line."""
    where = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, **where)


def save(figure, path: Path):
    """Write a picture."""
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(path)


def write_csv(rows: list[dict], path: Path):
    """One line per row; columns that a row lacks stay empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


EXPERIMENTS = {
    "frontier": frontier,
    "overoptimisation": overoptimisation,
    "tasks": tasks,
    "broken": broken,
}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, fewer settings")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--base", default="out", help="folder with the runs of seed 0")
    parser.add_argument("--out", help="folder of the runs made here (default: BASE/experiments)")
    parser.add_argument("--results", help="folder for CSV and PNG (default: that of the runs)")
    args = parser.parse_args()
    folder = Path(args.out or f"{args.base}/{'quick' if args.quick else 'experiments'}")
    results = Path(args.results or folder)
    results.mkdir(parents=True, exist_ok=True)
    try:
        start = bases(folder, Path(args.base), 1 if args.quick else 3)
        for name in args.only:
            EXPERIMENTS[name](folder / name, results, start, args.quick)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
