"""Alarms: a run that cannot learn says so, in one sentence, as soon as it can be seen.

RL that learns nothing looks like RL that learns slowly: the loss is small, the curves are noisy,
and nothing crashes. The signs below have no innocent explanation at the beginning of a run. (At its
end they may have one: where all responses are right, all have the same score.) `Run` looks for them
in every run. Whether its curves are those of a correct run is another question, which --check
answers.
"""

from collections.abc import Callable
from typing import NamedTuple


class Alarm(NamedTuple):
    """A sign in the log, and what it usually means."""

    sign: Callable[[dict], bool]  # a row of the log -> whether it shows the sign
    sentence: str  # what is wrong, and where to look first
    later: bool = False  # whether it may also ring after the first steps


def is_zero(column: str, below=1e-12):
    """A sign: this column of the log is 0, but for rounding."""
    return lambda row: column in row and abs(row[column]) < below


ALARMS = [
    Alarm(
        is_zero("grad_norm"),
        "the gradient is 0, so nothing is learned: is the loss mask empty, or is the loss that of "
        "another model?",
    ),
    Alarm(
        is_zero("policy_grad_norm"),
        "the policy's gradient is 0, so it learns nothing: are all advantages 0, or are the "
        "log-probabilities those of another model?",
    ),
    Alarm(
        is_zero("critic_grad_norm"),
        "the critic's gradient is 0: are the returns its own values, or are the values those of "
        "another model?",
    ),
    Alarm(
        is_zero("score_sd", below=1e-6),
        "all responses have the same score, so there is nothing to prefer: is the reward a "
        "constant, has no response an end, or is none ever right?",
    ),
    Alarm(
        lambda row: row.get("equal_groups") == 1,
        "within every group all responses have the same score: are the prompts too easy or too "
        "hard for the policy, or are its samples all alike (a seed per prompt, a low temperature)?",
    ),
    Alarm(
        is_zero("advantage_sd", below=1e-8),
        "all tokens have the same advantage, so none is to become likelier: do scores and values "
        "differ at all?",
    ),
    Alarm(
        lambda row: row.get("best_score", 1) <= 0,
        "no response scores above 0: is none ever right? RL can only reinforce what the policy "
        "already does now and then, say once in a hundred samples. Or does the check refuse what "
        "is right?",
    ),
    Alarm(
        lambda row: row.get("kl_full", 0) > 25,
        "the KL from the reference is above 25 nats per response: the policy says what the "
        "reference hardly ever would. Is beta too small, the learning rate too high, or does the "
        "penalty have the wrong sign?",
        later=True,
    ),
    Alarm(
        lambda row: "chosen" in row and max(abs(row["chosen"]), abs(row["rejected"])) < 1e-6,
        "chosen and rejected responses are exactly as likely as under the reference: is the "
        "learning rate 0, or is the reference the model itself?",
    ),
]


def checksum(model) -> float:
    """A number that changes with the weights, but for their signs and rare coincidences."""
    return sum(p.cpu().double().abs().sum().item() for p in model.parameters())


class Watch:
    """Looks at a model and at its log, row by row."""

    def __init__(self, model, patience: int):
        """patience: in how many consecutive rows a sign has to be seen."""
        self.model, self.before = model, checksum(model)
        self.patience, self.said = patience, set()

    def look(self, rows: list[dict]) -> list[str]:
        """The alarms that begin to ring with the last row of a log."""
        last = rows[-self.patience :]
        if len(last) < self.patience:
            return []
        at_start = len(rows) == self.patience
        ringing = [
            alarm.sentence
            for alarm in ALARMS
            if (at_start or alarm.later) and all(alarm.sign(row) for row in last)
        ]
        if at_start and checksum(self.model) == self.before:
            ringing.append(
                "no weight of the model has changed: is the learning rate 0, or does the optimizer "
                "hold the parameters of another model?"
            )
        new = [sentence for sentence in ringing if sentence not in self.said]
        self.said |= {*new}
        return [f"ALARM: {sentence}" for sentence in new]
