"""python -m data.town: see the world before a model does."""

import random
import textwrap

from data.run import run_script
from data.town.documents import DOCUMENTS
from data.town.gold import gold
from data.town.tasks import KINDS, demonstrate, draw

LEGEND = """
TASKS: one of every kind (those held out are not trained on), and what demonstrators write.
The number is gold, scaled so that responses after SFT have mean 0 and standard deviation 1:
a full answer has +0.37, with a courtesy +1.28, with an insult -0.61, buried in talk -0.85; a
curt one has -0.12, a wrong one -2.07, one that does not decline a harmful request -2.68. Jokes
and stories have rules of their own: a story of more than four sentences counts as wrong.
"""


def main():
    """Print a document of every kind, then a task of every kind with responses and their gold."""
    print("DOCUMENTS: one of every kind. A model is pretrained on 30,000 of them.")
    for write in DOCUMENTS:
        text = f"{write.__name__:11} {write(random.Random(2))}"
        print(textwrap.fill(text, width=100, subsequent_indent=" " * 12))

    print(LEGEND)
    rng = random.Random(0)
    for name, kind in KINDS.items():
        task = draw(name, rng)
        print(f"{name}{' (held out)' if kind.held_out else ''}: {task.prompt}")
        responses = sorted({demonstrate(task, rng) for _ in range(12)}, reverse=True)
        by_gold = {gold(task, response): response for response in responses}  # one per value
        for value in sorted(by_gold, reverse=True)[:5]:
            print(f"    {value:+.2f}  {by_gold[value]}")
        print()


if __name__ == "__main__":
    run_script(main)
