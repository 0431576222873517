"""Does this run look like a right one? Bands of five right ones, and what usually leaves them.

    python train_sft.py --check          says which curve leaves its band, when, and what to look at
    python -m data.expected OUT OUT ...  makes the bands from folders of finished default runs, each
                                         with another seed: data/expected/<stage>.csv

The band of a curve is its range over the runs, in some twelve windows of steps, in each of which it
is averaged. A right run with another seed may leave the range of five now and then; it is `off` if
it does so by more than three times the range.
"""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "expected"
# Widths beyond the range. Each of the five runs was checked with the bands of the other four: with
# 1.5, 5 of DPO's 450 windows were off; with 3, no window of any stage.
SLACK = 3.0
# Ends of the windows, as shares of the run: narrow at first, where bugs show and curves are steep.
ENDS = (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FREE = ("seed", "out", "device", "resume", "check", "save_every")  # options that keep the curves

# stage -> column of log.csv -> what to look at if it is above its band, and if it is below.
CAUSES = {
    "pretrain": {
        "loss": (
            "is the target the next token, is the learning rate right? A right model starts near "
            "ln(vocabulary) = 7.05; more at the first steps is the initialisation",
            "does a position see what it is to predict: is the causal mask there?",
        ),
        "val_loss": (
            "if loss is not: is text repeated so often that the model knows it by heart?",
            "has the validation text slipped into the training text?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step, is the initialisation right?",
            "do all parameters get a gradient, is the loss divided twice?",
        ),
    },
    "sft": {
        "loss": (
            "is the loss mask shifted by a token, do prompts count, is it the pretrained model?",
            "does the loss count padding or other tokens that are easy?",
        ),
        "val_loss": (
            "if loss is not: are the demonstrations few, or seen too often?",
            "have held-out cases slipped into the demonstrations?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step, is the loss a mean and not a sum?",
            "is the mean taken over prompts and padding too?",
        ),
    },
    "rm": {
        "loss": (
            "is the score read at the last token and not at padding, is chosen minus rejected the "
            "right way round?",
            "can the model see which side is which, other than by the reply?",
        ),
        "accuracy": (
            "can the model see which side is which, other than by the reply?",
            "is the score read at the last token, is chosen minus rejected the right way round?",
        ),
        "val_loss": (
            "if loss is not: too many epochs, or too few pairs?",
            "have prompts of the test pairs slipped into training?",
        ),
        "val_accuracy": (
            "have prompts of the test pairs slipped into training?",
            "if accuracy is not: too many epochs, or too few pairs?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step, does the new head start at zero?",
            "does the gradient reach the trunk, and not the head alone?",
        ),
    },
    "ppo": {
        "proxy": (
            "is the KL penalty missing, are samples drawn colder than they are scored?",
            "does the score arrive at the last token of the reply, do the signs of advantage and "
            "loss fit together?",
        ),
        "gold": (
            "does something that is trained on see gold?",
            "if proxy is not: over-optimisation; is the KL penalty there, is the judge good?",
        ),
        "kl": (
            "is the KL penalty missing or of the wrong sign, is the learning rate too high?",
            "does the policy learn at all, does the reference stay where it was?",
        ),
        "entropy": (
            "is there an entropy bonus, a wrong sign, or a temperature above 1?",
            "is the KL penalty missing, are samples drawn colder than they are scored?",
        ),
        "length": (
            "does a reply without end keep its score?",
            "does the score punish length, is the end of turn part of the response mask?",
        ),
        "no_end": (
            "is the end of turn in the response mask, does a reply without end lose its score?",
            "",
        ),
        "explained_variance": (
            "are the critic's targets its own values?",
            "are the returns A + V, before A is whitened; is the value that of the state before "
            "the token?",
        ),
        "value_loss": (
            "are rewards whitened or of another scale, is the critic's learning rate right?",
            "is the half squared error averaged over padding too?",
        ),
        "clipfrac": (
            "are old and new log-probabilities those of one function at one temperature, are "
            "advantages whitened?",
            "does the policy learn at all?",
        ),
        "policy_grad_norm": (
            "are advantages whitened over the mask, is the loss a mean and not a sum?",
            "are means taken over padding too?",
        ),
    },
    "dpo": {
        "loss": (
            "does the margin grow at all, are policy and reference given the same tokens?",
            "can the model see which side is which, other than by the reply?",
        ),
        "margin": (
            "is beta what it should be, are log-probabilities of prompts in the sums?",
            "are log-probabilities averaged instead of summed, is chosen minus rejected the right "
            "way round?",
        ),
        "accuracy": (
            "can the model see which side is which, other than by the reply?",
            "is chosen minus rejected the right way round, is the reference that of the same pair?",
        ),
        "chosen": (
            "is the reference's log-probability subtracted, is there an NLL term?",
            "does the learning rate or a small beta push both sides down?",
        ),
        "rejected": (
            "is the sum over tokens, is the sign right?",
            "does the learning rate or a small beta push both sides down?",
        ),
        "grad_norm": (
            "are log-probabilities of prompts in the sums, is the loss a mean over pairs?",
            "are log-probabilities averaged instead of summed?",
        ),
        "kl": (
            "is beta too small, is the learning rate too high?",
            "is beta too large, are log-probabilities averaged instead of summed?",
        ),
        "gold": (
            "does something that is trained on see gold?",
            "are chosen and rejected exchanged in the file, is beta too small?",
        ),
        "length": ("is SimPO's or DPO's sum paid by length, is beta too small?", ""),
        "no_end": ("is the end of turn part of the response mask?", ""),
    },
}


class Check:
    """Compares the log of a run with the bands of its stage, as it goes."""

    def __init__(self, stage: str, cfg):
        """Exits if the run is on other data, for which there are no bands."""
        if getattr(cfg, "data", ""):
            raise SystemExit("--check knows the curves of the town, not those of --data")
        self.stage, self.off = stage, []  # off: the columns of which it has spoken
        with open(FOLDER / f"{stage}.csv") as file:
            self.bands = list(csv.DictReader(file))
        defaults = asdict(type(cfg)())
        changed = {k: v for k, v in asdict(cfg).items() if k not in FREE and v != defaults[k]}
        for name, value in changed.items():
            print(f"check: the bands are of --{name} {defaults[name]!r}, not of {value!r}")

    def look(self, rows: list[dict], step: int) -> list[str]:
        """What is off in the windows that end with this step: a sentence per curve, once each."""
        said = []
        for band in self.bands:
            column, first, last = band["column"], int(band["first"]), int(band["last"])
            if last != step or column in self.off:
                continue
            value = window_mean(rows, column, first, last)
            low, high, width = (float(band[name]) for name in ("low", "high", "width"))
            beyond = max(value - high, low - value)
            if beyond > SLACK * width:  # and not where value is NaN, since nothing was measured
                self.off.append(column)
                above, below = CAUSES[self.stage][column]
                side, cause = ("above", above) if value > high else ("below", below)
                said.append(
                    f"check: {column} of steps {first} to {last} is {value:.3g}, that is "
                    f"{beyond:.2g} {side} the band ({low:.3g} to {high:.3g}): {cause}"
                )
        return said

    def summary(self) -> str:
        """One line for the end of the run."""
        columns = {band["column"] for band in self.bands}
        if self.off:
            return (
                f"check: {len(self.off)} of {len(columns)} curves were off: {', '.join(self.off)}"
            )
        return f"check: all {len(columns)} curves are within their bands"


def window_mean(rows: list[dict], column: str, first: int, last: int) -> float:
    """The mean of a column over steps first..last; NaN if none of them has it."""
    values = [row[column] for row in rows if first <= row["step"] <= last and column in row]
    return float(np.mean(values)) if values else float("nan")


def make_bands(stage: str, logs: list[list[dict]]) -> list[dict]:
    """Bands from the logs of several runs of the same length: one row per column and window.

    low and high are the range over the runs; width is that of the range, but at least the mean of
    the column's ranges and 0.01: five runs that happen to agree make no narrow band.
    """
    steps = int(logs[0][-1]["step"]) + 1
    ends = sorted({max(round(share * steps), 1) for share in ENDS})
    bands = []
    for column in CAUSES[stage]:
        mine = []
        for first, end in zip([0, *ends], ends):
            means = [window_mean(rows, column, first, end - 1) for rows in logs]
            if np.isfinite(means).all():
                low, high = min(means), max(means)
                row = {"column": column, "first": first, "last": end - 1, "low": low, "high": high}
                mine.append(row)
        typical = np.mean([row["high"] - row["low"] for row in mine])
        for row in mine:
            row["width"] = max(row["high"] - row["low"], typical, 0.01)
        bands += mine
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
    for stage in CAUSES:
        bands = make_bands(stage, [read_log(run / stage / "log.csv") for run in args.runs])
        with open(args.to / f"{stage}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, bands[0].keys())
            writer.writeheader()
            for row in bands:
                writer.writerow(
                    {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                )
        print(f"{args.to / stage}.csv: {len(bands)} windows of {len(CAUSES[stage])} curves")


if __name__ == "__main__":
    main()
