"""--check: does this run look like a correct one? If not: which curve, from where, and why?

    python train_sft.py --check

The bands in experiments/expected/<stage>.csv come from five reference runs, each with another seed.
The steps are divided into about twelve windows, every curve is averaged over each, and a band is
the range of these means over the runs. A correct run with a sixth seed leaves such a range now and
then, so a curve counts as off only when it is outside by more than four times the width.

`python -m data.experiments.expected` makes the bands. The causes below are where to look first; a
curve may be off for other reasons.
"""

import csv
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gpt import InputError

FOLDER = Path(__file__).parent / "experiments" / "expected"
# How many widths beyond its band a curve must be to count as off. Each of the five runs was checked
# against the bands of the other four: with 3, 1 of 1,652 windows was off; with 4, none.
SLACK = 4.0
# Options that change what a run costs and hardly what it computes; others that change its curves no
# more than a new seed does.
COST_ONLY = ("microbatch", "recompute", "compile", "save_every")
FREE = ("seed", "out", "name", "device", "threads", "bf16", "resume", "check", *COST_ONLY)

# stage -> column of log.csv -> what to look at if it is above its band, and if it is below.
CAUSES = {
    "pretrain": {
        "loss": (
            "is the target the next token? Is the learning rate right? A correct model starts near "
            "ln(vocabulary) = 7.05, so more than that at the first steps is the initialisation",
            "does a position see the token that it predicts: is the causal mask missing?",
        ),
        "val_loss": (
            "if loss is not off: is the text so short that the model has learned it by heart?",
            "does the training text contain the validation text?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step? Is the initialisation right?",
            "do all parameters get a gradient? Is the loss divided by the same number twice?",
        ),
    },
    "sft": {
        "loss": (
            "is the loss mask shifted by a token? Does it include prompts? Did training start from "
            "the pretrained model?",
            "does the loss include padding, or other tokens that are easy to predict?",
        ),
        "val_loss": (
            "if loss is not off: are there too few demonstrations, or too many epochs?",
            "do the training demonstrations contain held-out cases?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step? Is the loss a mean, not a sum?",
            "is the loss averaged over prompts and padding as well?",
        ),
    },
    "rm": {
        "loss": (
            "is the score read at the last token, not at padding? Is the difference chosen minus "
            "rejected, not the reverse?",
            "can the model tell chosen from rejected by anything but the text of the response?",
        ),
        "accuracy": (
            "can the model tell chosen from rejected by anything but the text of the response?",
            "is the score read at the last token, not at padding? Is the difference chosen minus "
            "rejected, not the reverse?",
        ),
        "val_loss": (
            "if loss is not off: are there too many epochs, or too few pairs?",
            "do the training pairs contain prompts of the held-out pairs?",
        ),
        "val_accuracy": (
            "do the training pairs contain prompts of the held-out pairs?",
            "if accuracy is not off: are there too many epochs, or too few pairs?",
        ),
        "grad_norm": (
            "are gradients set to zero before every step? Does the new head start at zero?",
            "does the gradient reach the trunk, or only the head?",
        ),
    },
    "ppo": {
        "proxy": (
            "is the KL penalty missing? Are responses sampled at a lower temperature than that of "
            "their log-probabilities?",
            "is the score added at the last token of the response? Has the KL penalty the right "
            "sign? Do the signs of advantages and policy loss agree?",
        ),
        "gold": (
            "does anything in training read gold?",
            "if proxy is not off: over-optimisation. Is the KL penalty missing? Is the reward "
            "model any good?",
        ),
        "kl": (
            "is the KL penalty missing, or of the wrong sign? Is the learning rate too high?",
            "does the policy learn at all? Does the reference change with it?",
        ),
        "entropy": (
            "is there an entropy bonus, a wrong sign, or a temperature above 1?",
            "is the KL penalty missing? Are responses sampled at a lower temperature than that of "
            "their log-probabilities?",
        ),
        "length": (
            "does a response without an end keep its score?",
            "does the score punish length? Is the end-of-turn token in the response mask?",
        ),
        "no_end": (
            "is the end-of-turn token in the response mask? Does a response without an end keep "
            "its score?",
            "",
        ),
        "explained_variance": (
            "are the targets of the critic its own values?",
            "are the returns A + V, with A before it is whitened? Is the value that of the state "
            "before the token?",
        ),
        "value_loss": (
            "are rewards whitened or of another scale? Is the critic's learning rate right?",
            "is the half squared error averaged over padding as well?",
        ),
        "clipfrac": (
            "are old and new log-probabilities computed by the same function, at the same "
            "temperature? Are advantages whitened?",
            "does the policy learn at all?",
        ),
        "policy_grad_norm": (
            "are advantages whitened over the mask? Is the loss a mean, not a sum?",
            "is the loss averaged over padding as well?",
        ),
    },
    "dpo": {
        "loss": (
            "does the margin grow at all? Do policy and reference read the same tokens?",
            "can the model tell chosen from rejected by anything but the text of the response?",
        ),
        "margin": (
            "is beta or the learning rate too high? Do the same prompts precede both responses?",
            "are log-probabilities averaged instead of summed? Is the difference chosen minus "
            "rejected, not the reverse?",
        ),
        "accuracy": (
            "can the model tell chosen from rejected by anything but the text of the response?",
            "is the difference chosen minus rejected, not the reverse? Are the reference's "
            "log-probabilities those of the same pair?",
        ),
        "chosen": (
            "is there an NLL term? Are log-probabilities of prompts in the sums?",
            "is the reference's log-probability subtracted? Does a high learning rate or a small "
            "beta push both sides down?",
        ),
        "rejected": (
            "are log-probabilities summed over the response, not averaged? Is the sign right?",
            "is the reference's log-probability subtracted? Does a high learning rate or a small "
            "beta push both sides down?",
        ),
        "grad_norm": (
            "is the loss a mean over pairs, not a sum? Is beta too large?",
            "are log-probabilities averaged instead of summed?",
        ),
        "kl": (
            "is beta too small? Is the learning rate too high?",
            "is beta too large? Are log-probabilities averaged instead of summed?",
        ),
        "gold": (
            "does anything in training read gold?",
            "are chosen and rejected swapped in the file? Is beta too small?",
        ),
        "length": (
            "is beta too small? If chosen responses tend to be longer, DPO learns that as well",
            "are chosen responses shorter? Does end-of-turn count twice?",
        ),
        "no_end": ("is the end-of-turn token in the response mask?", ""),
    },
}


class Check:
    """Compares the log of a run with the bands of its stage while it trains."""

    def __init__(self, stage: str, cfg):
        """cfg: the Config of the run. Prints which options differ from those of the reference runs.

        Raises InputError if the run trains on --data: the bands are those of the town.
        """
        changed = changed_options(cfg)
        if "data" in changed:
            raise InputError("--check knows the curves of the town, not those of --data")
        self.stage, self.off = stage, []  # off: the columns that were reported
        self.compared = set()  # the columns that had a value in some window
        with open(FOLDER / f"{stage}.csv") as file:
            self.bands = list(csv.DictReader(file))
        for name, (default, value) in changed.items():
            print(f"check: the bands are of --{name} {default!r}, not of {value!r}")

    def look(self, rows: list[dict], step: int) -> list[str]:
        """What is off in the windows that end with this step: one sentence per curve.

        rows: the log so far, {"step": ..., column: value} for every step. A curve is reported only
        once.
        """
        sentences = []
        for band in self.bands:
            column, first, last = band["column"], int(band["first"]), int(band["last"])
            if last != step or column in self.off:
                continue
            value = window_mean(rows, column, first, last)
            low, high, width = (float(band[name]) for name in ("low", "high", "width"))
            beyond = max(value - high, low - value)
            if np.isfinite(value):
                self.compared.add(column)
            if beyond > SLACK * width:  # False where value is NaN: nothing was measured
                self.off.append(column)
                above, below = CAUSES[self.stage][column]
                side, cause = ("above", above) if value > high else ("below", below)
                sentences.append(
                    f"check: {column} of steps {first} to {last} is {value:.3g}, that is "
                    f"{beyond:.2g} {side} the band ({low:.3g} to {high:.3g}): {cause}"
                )
        return sentences

    def summary(self) -> str:
        """One line for the end of the run: how many curves were off, and which."""
        columns = {band["column"] for band in self.bands}
        if self.off:
            return (
                f"check: {len(self.off)} of {len(columns)} curves were off: {', '.join(self.off)}"
            )
        if not self.compared:
            return "check: the run ended before there was a curve to compare"
        which = "all" if self.compared == columns else f"{len(self.compared)} of"
        return f"check: {which} {len(columns)} curves are within their bands"


def changed_options(cfg) -> dict[str, tuple]:
    """The options of a Config that are not the default, without those of FREE: name -> (default,
    value)."""
    default = type(cfg)(out=cfg.out)
    if hasattr(cfg, "resolved"):  # a default spelled out is the same file
        default, cfg = default.resolved(), cfg.resolved()
    defaults = asdict(default)
    return {
        name: (defaults[name], value)
        for name, value in asdict(cfg).items()
        if name not in FREE and not same(value, defaults[name])
    }


def same(value, default) -> bool:
    """Whether an option has this value; texts are equal if, taken as paths, they lead to one place.

    out/sft/ckpt.pt and ./out/sft/ckpt.pt are; rm and gold are not, wherever one is.
    """
    if isinstance(value, str):
        return os.path.realpath(value) == os.path.realpath(default)
    return value == default


def window_mean(rows: list[dict], column: str, first: int, last: int) -> float:
    """The mean of a column over the steps first to last, both included; NaN if none has it."""
    values = [row[column] for row in rows if first <= row["step"] <= last and column in row]
    return float(np.mean(values)) if values else float("nan")
