"""How good is a measurement, and how good is a judge: intervals, calibration, rank correlation.

Reports are made of these; no training loss is.
"""

import math
from pathlib import Path

import numpy as np

from data.run import COLOURS


def mean_or_none(values) -> float | None:
    """The mean; None where there are no values."""
    values = list(values)
    return float(np.mean(values)) if values else None


def interval(values) -> list[float]:
    """95 % interval of the mean of values (N,), by the normal approximation: [low, high]; N > 1."""
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def expected_calibration_error(p: np.ndarray, won: np.ndarray, bins: int = 10):
    """How far predicted win rates are from observed ones (Guo et al. 2017, equation 3).

    p (N,): predicted probability that the first response wins; won (N,): 1 if it did. Returns the
    error and, per filled bin, (mean p, observed rate, count).
    """
    which = np.minimum((p * bins).astype(int), bins - 1)
    table = [
        (p[which == b].mean(), won[which == b].mean(), (which == b).sum())
        for b in range(bins)
        if (which == b).any()
    ]
    return sum(n * abs(mean - rate) for mean, rate, n in table) / len(p), table


def spearman(x, y) -> float | None:
    """Rank correlation of x and y (N,); equal values share their mean rank. None if all of one are
    equal."""

    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count + 1) / 2)[place]

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def judge(chosen, rejected, rows: list[dict], scale: float) -> tuple[dict, list]:
    """What scores of held-out pairs say about a reward model; with gold, if the rows have it.

    chosen, rejected (N,): scores. scale: what turns a difference of scores back into the log-odds
    that the reward model was trained on, its SD before normalisation. Returns the table that
    `plot_reliability` draws, after a report, in which a tie is half right:
        accuracy, ece        agreement with the labels; expected calibration error
        bayes_accuracy       what an oracle judge, who knows gold, scores on average over labels
        gold_accuracy        what that judge scores on these very labels
        gold_order           how often the scores have gold's order, where gold differs
        spearman_gold        rank correlation with gold
        by_task              the same for every kind of task
    """
    log_odds = scale * (chosen - rejected)
    agrees = 0.5 + 0.5 * np.sign(log_odds)  # with the label
    # "Chosen" always wins. So every pair is looked at from both sides.
    p = 0.5 + 0.5 * np.tanh(log_odds / 2)  # the sigmoid, without an overflow
    both, won = np.append(p, 1 - p), np.repeat([1.0, 0.0], len(p))
    ece, table = expected_calibration_error(both, won)
    report = {"pairs": len(rows), "accuracy": float(agrees.mean()), "ece": float(ece)}
    if all("gold" in row for row in rows):
        gold = np.array([row["gold"] for row in rows])  # (N, 2): of chosen, of rejected
        p = np.array([row["p"] for row in rows])  # of the label, exactly
        order = np.sign(gold[:, 0] - gold[:, 1])  # 1: gold, too, prefers the chosen one
        right, differs = 0.5 + 0.5 * np.sign(log_odds) * order, order != 0
        report["bayes_accuracy"] = float(np.maximum(p, 1 - p).mean())
        report["gold_accuracy"] = float(0.5 + 0.5 * order.mean())
        report["spearman_gold"] = spearman(np.concatenate([chosen, rejected]), gold.T.flatten())
        report["gold_order"] = mean_or_none(right[differs])
        report["by_task"] = {}
        for kind in sorted({row["kind"] for row in rows}):
            of_kind = np.array([row["kind"] == kind for row in rows])
            report["by_task"][kind] = {
                "pairs": int(of_kind.sum()),
                "accuracy": float(agrees[of_kind].mean()),
                "bayes_accuracy": float(np.maximum(p, 1 - p)[of_kind].mean()),
                "gold_order": mean_or_none(right[of_kind & differs]),
            }
    return report, table


def plot_reliability(table, path: Path):
    """Predicted against observed win rates; on the diagonal a probability means what it says."""
    predicted, observed, count = map(np.array, zip(*table))
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    figure = Figure(figsize=(4.5, 4.5))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="grey", lw=1, label="calibrated")
    axis.errorbar(
        predicted,
        observed,
        1.96 * np.sqrt(observed * (1 - observed) / count),
        fmt="o-",
        color=COLOURS[0],
        capsize=3,
        label="reward model, 95 % interval",
    )
    axis.set(xlabel="predicted win rate", ylabel="observed win rate", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")  # points lie near the diagonal
    figure.tight_layout()
    figure.savefig(path, dpi=120)
