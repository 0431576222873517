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


# The more a sentence says about the cause, the earlier it comes.
ALARMS = [
    Alarm(
        is_zero("score_sd", below=1e-6),
        "all responses have the same score, so there is nothing to prefer: is the reward a "
        "constant, has no response an end, or is none ever right?",
    ),
    Alarm(
        lambda row: row.get("best_score", 1) <= 0,
        "no response scores above 0: is none ever right? RL can only reinforce what the policy "
        "already does now and then, say once in a hundred samples. Or does the check refuse what "
        "is right?",
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
        is_zero("margin", below=1e-9),
        "chosen and rejected are exactly as likely, at every step: are they the same responses, or "
        "is the learning rate 0?",
    ),
    Alarm(
        # Of a loss that says nothing, such as that of equal responses, rounding is left: 5e-7.
        is_zero("grad_norm", below=5e-6),
        "the gradient is 0, so nothing is learned: is the loss mask empty, are chosen and rejected "
        "the same, or is the loss that of another model?",
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
        lambda row: row.get("kl_full", 0) > 25,
        "the KL from the reference is above 25 nats per response: the policy says what the "
        "reference hardly ever would. Is beta too small, the learning rate too high, or does the "
        "penalty have the wrong sign?",
        later=True,
    ),
]


def checksum(model) -> dict[str, float]:
    """A number for every weight tensor of a model, which changes with it."""
    weights = model.state_dict().items()
    return {name: w.detach().cpu().double().abs().sum().item() for name, w in weights}


class Watch:
    """Looks at models that are trained, and at the log, row by row."""

    def __init__(self, models: dict, patience: int):
        """models: those that learn, by name. patience: in how many consecutive rows a sign has to
        be seen."""
        self.models = models
        self.before = {name: checksum(model) for name, model in models.items()}
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
        ringing += self.what_stands_still() if at_start else []
        new = [sentence for sentence in ringing if sentence not in self.said]
        self.said |= {*new}
        return [f"ALARM: {sentence}" for sentence in new]

    def what_stands_still(self) -> list[str]:
        """A sentence for every model of which most weight matrices are as they were."""
        sentences = []
        for name, model in self.models.items():
            matrices = [key for key, weight in model.named_parameters() if weight.dim() > 1]
            now = checksum(model)
            still = [key for key in matrices if now[key] == self.before[name][key]]
            if len(still) > len(matrices) / 2:
                sentences.append(
                    f"{len(still)} of {len(matrices)} weight matrices of the {name}, such as "
                    f"{still[-1]}, have not changed: is the learning rate 0, does the optimizer "
                    "hold other weights, or is the graph cut (detach, no_grad)?"
                )
        return sentences
