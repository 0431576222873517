"""Make the bands that --check compares with, from folders of finished default runs.

    python -m data.experiments.expected OUT OUT ...      each with another seed

writes data/experiments/expected/<stage>.csv: a row per curve and window of steps, with the lowest
and the highest mean of that window over the runs.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from data.check import CAUSES, FOLDER, window_mean
from data.experiments.plots import write_csv
from data.run import run_script
from gpt import InputError

# Ends of the windows, as fractions of the run: narrow at first, where bugs show, curves are steep.
ENDS = (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def make_bands(stage: str, logs: list[list[dict]]) -> list[dict]:
    """Bands from the logs of several runs of the same length: one row per column and window.

    low and high are the range over the runs; width is that of the range, but at least the mean of
    the column's ranges and 0.01: runs that happen to agree make no narrow band.
    """
    steps = int(logs[0][-1]["step"]) + 1
    ends = sorted({max(round(fraction * steps), 1) for fraction in ENDS})
    bands = []
    for column in CAUSES[stage]:
        windows = []  # of this column
        for first, end in zip([0, *ends], ends):
            means = [window_mean(rows, column, first, end - 1) for rows in logs]
            if np.isfinite(means).all():
                low, high = min(means), max(means)
                row = {"column": column, "first": first, "last": end - 1, "low": low, "high": high}
                windows.append(row)
        typical = np.mean([row["high"] - row["low"] for row in windows])
        for row in windows:
            row["width"] = max(row["high"] - row["low"], typical, 0.01)
        bands += windows
    return bands


def read_log(path: Path) -> list[dict]:
    """Rows of a log.csv, without the columns that a step lacks."""
    with open(path) as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def main():
    """The command line: write the bands of every stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders with all five stages")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    if len(args.runs) < 2:
        raise InputError("one run has no range: name several folders")
    for stage in CAUSES:
        logs = {run / stage / "log.csv": read_log(run / stage / "log.csv") for run in args.runs}
        if len({len(rows) for rows in logs.values()}) > 1:
            steps = ", ".join(f"{path} has {len(rows)} steps" for path, rows in logs.items())
            raise InputError(f"runs of different length make no band: {steps}")
        bands = make_bands(stage, list(logs.values()))
        write_csv(bands, args.to / f"{stage}.csv")
        print(f"{args.to / stage}.csv: {len(bands)} windows of {len(CAUSES[stage])} curves")


if __name__ == "__main__":
    run_script(main)
