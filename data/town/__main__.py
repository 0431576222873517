"""python -m data.town: see the world before a model does."""

import random
import textwrap

from data.chat import one_line
from data.run import run_script
from data.town.demonstrations import demonstrate
from data.town.documents import DOCUMENTS
from data.town.gold import gold
from data.town.tasks import KINDS, NEW, Task, draw

PROMPTS = """
PROMPTS: a core ("What is {sum}?") in a frame ("I wonder: {ask}"). All kinds of task share the
frames, but each is trained with some of them only. What evaluation asks, beside new cases:
"""
TASKS = """
TASKS: one of every kind, and what demonstrators write, from best to worst. Kinds and cells that are
held out are asked in evaluation only. The number is gold: how good a response is. 0 is the average
response of the model after SFT (train_sft.py), and 1 is one standard deviation better.
"""


def show(title: str, task: Task, responses: list[str]):
    """Print a conversation up to its prompt, and the responses with their gold, best first."""
    print(
        textwrap.fill(f"{title}: {one_line(task.messages)}", width=100, subsequent_indent=" " * 4)
    )
    for text in sorted(responses, key=lambda text: -gold(task, text)):
        habit = f"  ({KINDS[task.kind].habit:.0%} say this)" if text == task.case.habit else ""
        line = f"    {gold(task, text):+.2f}  {text}{habit}"
        print(textwrap.fill(line, width=100, subsequent_indent=" " * 11))
    print()


def main():
    """Print a document of every kind, a prompt with something new of every sort, and a task of
    every kind and of every held-out cell, with responses and their gold."""
    print("DOCUMENTS: one of every kind. A model is pretrained on 30,000 of them.\n")
    for write in DOCUMENTS:
        text = f"{write.__name__:11} {write(random.Random(2))}"
        print(textwrap.fill(text, width=100, subsequent_indent=" " * 12))

    rng = random.Random(0)
    print(PROMPTS)
    for new, what in {"": "nothing else is new", **NEW}.items():
        print(f"    {what:22}  {draw('second', rng, 'test', new).prompt}")

    print(TASKS)
    for name, kind in KINDS.items():
        task = draw(name, rng)
        case = task.case
        said = [text for text in (case.answer, case.short, case.habit, case.wrong) if text]
        said = list(dict.fromkeys(said))  # `wrong` can be the habit
        for text in (demonstrate(task, rng) for _ in range(12)):
            if gold(task, text) not in [gold(task, other) for other in said]:
                said.append(text)  # one of each value
        show(name + (" (kind held out)" if kind.held_out else ""), task, said)
        for cell in kind.held_out_cells:
            while (task := draw(name, rng, new="cell")).case.cell != cell:
                pass
            show(f"{name} (cell held out: {cell})", task, [task.case.answer, task.case.wrong])


if __name__ == "__main__":
    run_script(main)
