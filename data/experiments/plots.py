"""What the experiments' tables and pictures have in common.

A result is a list of rows, dicts from column to value, one of whose columns is the seed.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data import run
from data.run import COLOURS

# Told apart by colour, and in grey by their markers.
STYLE = {
    "best of n": {"color": COLOURS[0], "marker": "^"},
    "ppo": {"color": COLOURS[1], "marker": "o"},
    "rloo": {"color": COLOURS[5], "marker": "P"},
    "ppo on gold": {"color": COLOURS[6], "marker": "*"},
    "dpo": {"color": COLOURS[2], "marker": "s"},
    "ipo": {"color": COLOURS[3], "marker": "D"},
    "dpo + nll": {"color": COLOURS[4], "marker": "v"},
}
UNITS = {  # column -> what it measures
    "gold": "gold, SD of SFT samples",
    "proxy": "score of the reward model, SD",
    "kl": "KL from SFT, nats per response",
    "entropy": "entropy, nats per token",
    "length": "tokens per response",
    "no_end": "fraction without end",
}


def grouped(rows: list[dict], *columns: str) -> dict:
    """Rows by their values in some columns, in order of appearance: value or values -> rows."""
    groups = {}
    for row in rows:
        values = tuple(row.get(column) for column in columns)
        groups.setdefault(values if len(values) > 1 else values[0], []).append(row)
    return groups


def write_csv(rows: list[dict], path: Path):
    """One line per row, with four digits; columns that a row lacks stay empty."""
    run.write_csv(
        [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        path,
    )


def panels(count: int, columns: int, size=(4.3, 3.4), **share) -> tuple[Figure, list]:
    """A figure of so many panels, with `columns` in a line, and its axes. size: inches of each."""
    lines = -(-count // columns)  # rounded up
    figure = Figure(figsize=(size[0] * columns, size[1] * lines))
    axes = list(figure.subplots(lines, columns, squeeze=False, **share).flat)
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def band(axis, rows: list[dict], x: str, y: str, **style):
    """Column y against column x: the mean over seeds as a line, their range as a band."""
    points = sorted((place, [row[y] for row in some]) for place, some in grouped(rows, x).items())
    places, values = zip(*points)
    (line,) = axis.plot(places, [np.mean(v) for v in values], **style)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axis.fill_between(places, low, high, color=line.get_color(), alpha=0.15, lw=0)


def smoothed(run: list[dict], *columns: str, width: int = 5) -> list[dict]:
    """Means of these columns over so many neighbouring rows: 64 rollouts alone are noisy."""
    window = np.ones(width) / width
    means = [np.convolve([row[name] for row in run], window, "valid") for name in columns]
    return [dict(zip(columns, map(float, values))) for values in zip(*means)]


def mean_point(axis, rows: list[dict], x: str, y: str, **style) -> tuple[float, float]:
    """Draw means of columns x and y, which it returns, with bars from lowest to highest seed."""
    xs, ys = (np.array([row[name] for row in rows]) for name in (x, y))
    # (rounding can put the mean of equal numbers beyond them)
    bars = [np.maximum([[v.mean() - v.min()], [v.max() - v.mean()]], 0) for v in (ys, xs)]
    axis.errorbar(xs.mean(), ys.mean(), *bars, ls="", elinewidth=1, **style)
    return xs.mean(), ys.mean()


def kl_axis(axis):
    """Make x an axis of KL on which small ones have room: policies differ most near SFT."""
    root_and_back = (lambda kl: np.sign(kl) * np.sqrt(np.abs(kl)), lambda d: d * np.abs(d))
    axis.set_xscale("function", functions=root_and_back)
    ticks = [0, 0.25, 1, 2, 4, 8, 16]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(left=-0.003)
    axis.set_xlabel(f"{UNITS['kl']} (square-root scale)")


def over_seeds(axis, runs: list[list[dict]], x: str, y: str, **style):
    """Column y against column x, of runs of equal length: means over the runs of a point's x and
    y as a line, the range of y as a band."""
    xs, ys = (np.array([[row[name] for row in run] for run in runs]) for name in (x, y))
    (line,) = axis.plot(xs.mean(0), ys.mean(0), **style)
    axis.fill_between(xs.mean(0), ys.min(0), ys.max(0), color=line.get_color(), alpha=0.15, lw=0)


def band_panels(lines: list[tuple], x: str, units: dict, xlabel: str, columns=2):
    """A panel for every column of units, in which every line is a `band`.

    lines: (label, rows, style) of each. units: column -> label of its axis.
    """
    figure, axes = panels(len(units), columns)
    for axis, (column, unit) in zip(axes, units.items()):
        for label, rows, style in lines:
            band(axis, rows, x, column, label=label, **style)
        axis.set(xlabel=xlabel, ylabel=unit)
    return figure, axes


def save(figure: Figure, path: Path, columns=4):
    """Write a picture. The legend of all its panels stands in the place of a missing panel or, in
    so many columns, below: where it hides nothing."""
    legend = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    empty = [axis for axis in figure.axes if not axis.get_visible()]
    if empty:
        empty[0].set_visible(True)
        empty[0].set_axis_off()
        empty[0].legend(legend.values(), legend.keys(), frameon=False, loc="center")
    else:
        where = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)
        figure.legend(legend.values(), legend.keys(), frameon=False, **where)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(path)
