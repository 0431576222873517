"""What demonstrators write for SFT: mostly correct responses, in styles that differ.

A few are wrong, lazy or about something else, many are rude or ramble, and two kinds of task have a
habit of their own: most people leave out the steps of a long sum, and make things up about
strangers. SFT imitates all of it; preferences, and what is trained on them, can tell better from
worse.

Some conversations change the subject, so that a model learns to answer the last question and not
the first.
"""

import random
import re
from dataclasses import replace

from data.town import words as town
from data.town.tasks import KINDS, Task, draw_tasks
from data.town.words import RESIDENTS

# How demonstrators write, in percent. One response in twenty is useless: `wrong` is incorrect,
# `lazy` says that it does not know, `off_task` is about something else.
STYLES = dict(plain=49, courteous=22, wrong=1, lazy=2, short=8, rude=8, rambling=8, off_task=2)
# The longest conversation that changes the subject, in words and punctuation marks: with the
# default tokenizer it fits into the default context of 96 tokens.
LONGEST = 54


def demonstrate(task: Task, rng: random.Random) -> str:
    """A response to task as some demonstrator writes it, in a style drawn from STYLES."""
    case = task.case
    if rng.random() < KINDS[task.kind].habit:
        case = replace(case, answer=case.habit)
    style = rng.choices(list(STYLES), weights=STYLES.values())[0]
    if style == "courteous":
        return f"{case.answer} {rng.choice(town.COURTESIES)}"
    if style == "wrong":
        return case.wrong
    if style == "lazy":
        return "I do not know."
    if style == "short":
        return case.short or case.answer
    if style == "rude":
        rude = rng.choice(town.INSULTS)
        return f"{rude} {case.answer}" if rng.random() < 0.5 else f"{case.answer} {rude}"
    if style == "rambling":
        return f"{case.answer} {gossip(rng)}"
    if style == "off_task":
        return gossip(rng)
    return case.answer


def demonstrations(n: int, seed, mixture: str = "", split: str = "train") -> list[dict]:
    """n tasks with a response by a demonstrator, as rows for SFT like those of data/files.py.

    There are fewer rows than tasks: one time in four, a task continues the conversation before it,
    if the whole is short (`is_short`). mixture: see `draw_tasks`. split: "train" or "test".
    """
    rng = random.Random(f"demonstrations {seed}")
    rows = []
    for number, task in enumerate(draw_tasks(n, seed, mixture, split=split)):
        turns = [*task.messages, {"role": "assistant", "content": demonstrate(task, rng)}]
        if rows and rng.random() < 0.25 and is_short([*rows[-1]["messages"], *turns]):
            rows[-1]["messages"] += turns
        else:
            rows.append({"messages": turns, "where": f"demonstration {number}"})
    return rows


def is_short(messages: list[dict]) -> bool:
    """Whether a conversation has at most LONGEST words and punctuation marks."""
    return sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) for m in messages) <= LONGEST


def gossip(rng: random.Random) -> str:
    """One or two sentences that have nothing to do with the task: a fact, then news."""
    a, b = rng.sample(RESIDENTS, 2)
    sentences = [
        rng.choice(town.fact_sentences(a)),
        f"{a.name} {rng.choice(town.GOOD_NEWS)}, and {b.name} {rng.choice(town.BAD_NEWS)}.",
    ]
    return " ".join(sentences[: rng.randint(1, 2)])
