"""Preferences: two responses of the SFT model to a prompt, and which of them somebody prefers.

    python -m data.preferences                          annotated by the simulated annotators
    python -m data.preferences --flip 0.25 --name noisy           into out/noisy.jsonl, for --data
    python -m data.preferences --human --pairs 50                 annotated by you
    python -m data.preferences --human --prompts my.jsonl         on prompts of your own

The simulated annotators know gold only roughly: they prefer a to b with probability
sigmoid((gold a - gold b) / tau), and now and then press the wrong button (--flip). Every row is
{"prompt", "chosen", "rejected"}; rows of simulated annotators add, for reports only, "kind", "gold"
(of chosen and of rejected) and "p", the exact probability of the preference.

The last tenth of the file is never trained on (see held_out in data/files.py): it holds the prompts
of the test split, and no others. Out of courtesy to annotators, pairs of equal responses, or with a
response that did not end, are left out.
"""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data.chat import encode_prompt, question, sample_replies
from data.files import read_preferences, read_prompts, write_rows
from data.gpt2 import load_init
from data.run import run_path, run_script, start
from data.tokenizer import load_tokenizer
from data.town.gold import TAU, bayes_accuracy, gold, preference
from data.town.tasks import draw_tasks
from gpt import InputError


@dataclass
class Config:
    init: str = ""  # model that responds ("" = out/sft/ckpt.pt)
    pairs: int = 16000  # prompts to sample two responses to
    temperature: float = 1.0  # of sampling
    max_new_tokens: int = 48  # longest response
    tau: float = TAU  # the annotators' noise, in SD of gold
    flip: float = 0.0  # fraction of labels that are flipped, at random
    human: bool = False  # you are the annotator
    prompts: str = ""  # JSON or JSONL with prompts of your own, for --human ("" = of the town)
    seed: int = 0  # everything random follows from it
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads; on a busy machine 1 is far faster (0 = PyTorch's choice)
    out: str = "out"  # folder of all runs
    name: str = ""  # writes out/<name>.jsonl ("" = preferences, or human_preferences)

    def __post_init__(self):
        if self.prompts and not self.human:
            raise ValueError("--prompts needs --human: only prompts of the town have a gold reward")
        if self.tau < 0.01:
            raise ValueError(f"--tau must be at least 0.01, not {self.tau}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"--flip is a fraction, from 0 to 1, not {self.flip}")

    def resolved(self) -> "Config":
        """The same with the paths that "" stands for."""
        return replace(self, init=self.init or f"{self.out}/sft/ckpt.pt")


def sample_pairs(model, tokenizer, conversations, cfg: Config):
    """Two responses to every conversation: a list of (Reply, Reply)."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations] * 2
    how = dict(temperature=cfg.temperature, progress="responses")
    replies = sample_replies(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed, **how)
    return list(zip(replies[: len(conversations)], replies[len(conversations) :]))


def annotate(tasks, pairs, tau: float, flip: float, seed: int) -> list[dict]:
    """Rows as the simulated annotators would fill them in."""
    rng, rows = random.Random(f"annotators {seed}"), []
    for task, (a, b) in zip(tasks, pairs):
        if a.text == b.text or not (a.ended and b.ended):
            continue
        gold_a, gold_b = gold(task, a.text), gold(task, b.text)
        p = preference(gold_a, gold_b, tau, flip)
        if rng.random() < p:
            chosen, rejected, golds = a, b, (gold_a, gold_b)
        else:
            chosen, rejected, golds, p = b, a, (gold_b, gold_a), 1 - p
        rows.append(
            {
                "prompt": task.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "kind": task.kind,
                "gold": [round(g, 4) for g in golds],
                "p": round(p, 4),
            }
        )
    return rows


def make_preferences(cfg: Config, out: Path, device):
    """Sample pairs from a checkpoint, have the simulated annotators label them, write them."""
    model, saved = load_init(cfg.init, device)
    tokenizer = load_tokenizer(saved["tokenizer"])
    n_test = max(cfg.pairs // 10, 1)
    tasks = draw_tasks(cfg.pairs - n_test, f"preferences {cfg.seed}")
    test_tasks = draw_tasks(n_test, f"preferences {cfg.seed}", split="test")
    tasks += test_tasks
    conversations = [question(task.prompt) for task in tasks]
    print(f"sampling two responses each to {cfg.pairs:,} prompts from {cfg.init}", flush=True)
    replies = sample_pairs(model, tokenizer, conversations, cfg)
    rows = annotate(tasks, replies, cfg.tau, cfg.flip, cfg.seed)
    rows = end_with_a_tenth(rows, {task.prompt for task in test_tasks})
    if not rows:
        raise InputError(
            f"{cfg.init}: no pair is left, since all responses are equal or never end; "
            "train the model longer, or raise --temperature or --max_new_tokens"
        )
    write_rows(rows, out)
    bayes = bayes_accuracy([row["gold"] for row in rows], cfg.tau, cfg.flip)
    print(
        f"{len(rows):,} pairs in {out} ({cfg.pairs - len(rows):,} left out: equal or unfinished "
        f"responses); an oracle judge would agree with {bayes:.1%} of the labels"
    )


def end_with_a_tenth(rows: list[dict], test_prompts: set[str]) -> list[dict]:
    """Rows with those of test prompts at their end, where they are just the tenth that `held_out`
    takes: a few rows too many of either kind are left out.

    Which pairs are left after annotation is chance. Without this, a prompt of the test split might
    be trained on.
    """
    train = [row for row in rows if row["prompt"] not in test_prompts]
    test = [row for row in rows if row["prompt"] in test_prompts]
    while test and max((len(train) + len(test)) // 10, 1) < len(test):
        test.pop()
    while train and max((len(train) + len(test)) // 10, 1) > len(test):
        train.pop()
    return train + test


def ask_human(conversations, pairs, out: str | Path):
    """Show pairs at the terminal and append every decision to out at once."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    print("Which reply is better? 1 or 2; s to skip, q to quit.")
    with open(out, "a", encoding="utf-8") as file:
        for number, (messages, (a, b)) in enumerate(zip(conversations, pairs), 1):
            if a.text == b.text:
                continue
            print(
                f"\n[{number}/{len(pairs)}] {messages[-1]['content']}\n  1: {a.text}\n  2: {b.text}"
            )
            answer = ""
            while answer not in ("1", "2", "s", "q"):
                try:
                    answer = input("1, 2, s or q? ").strip().lower()
                except (EOFError, KeyboardInterrupt):
                    answer = "q"
            if answer == "q":
                break
            if answer in "12":
                chosen, rejected = (a, b) if answer == "1" else (b, a)
                row = {"messages": messages, "chosen": chosen.text, "rejected": rejected.text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    print(f"your preferences are in {out}: python train_rm.py --data {out}")


def load_preferences(path: str | Path) -> list[dict]:
    """Rows of a file of preferences (see `read_preferences`). Raises InputError with the command
    that makes it if it is missing."""
    if not Path(path).exists():
        raise InputError(
            f"there is no {path}: run `python -m data.preferences` first, or name a file by --data"
        )
    return read_preferences(path)


def main(cfg: Config):
    """Write a file of preferences."""
    cfg = cfg.resolved()
    device = start(cfg)
    began = time.perf_counter()
    default = "human_preferences" if cfg.human else "preferences"
    out = run_path(cfg.out, f"{cfg.name or default}.jsonl")
    if not cfg.human:
        make_preferences(cfg, out, device)
        print(f"{time.perf_counter() - began:.0f} seconds")
        return
    model, saved = load_init(cfg.init, device)
    if cfg.prompts:
        conversations = [row["messages"] for row in read_prompts(cfg.prompts)][: cfg.pairs]
    else:
        tasks = draw_tasks(cfg.pairs, f"preferences {cfg.seed}")
        conversations = [question(task.prompt) for task in tasks]
    pairs = sample_pairs(model, load_tokenizer(saved["tokenizer"]), conversations, cfg)
    ask_human(conversations, pairs, out)


if __name__ == "__main__":
    run_script(main, Config)
