"""Preferences: two responses from the SFT model to a prompt, and which of them is preferred.

    python -m data.preferences                          annotated by the simulated annotators
    python -m data.preferences --flip 0.25 --name noisy           into out/noisy.jsonl, for --data
    python -m data.preferences --human --pairs 50                 annotated by you
    python -m data.preferences --human --prompts my.jsonl         on prompts of your own

The simulated annotators know gold only roughly: they prefer a to b with probability
sigmoid((gold a - gold b) / tau), and now and then press the wrong button (--flip). Every row has
"messages", the conversation, of one turn or two, that both responses continue; "chosen" and
"rejected"; and "sampled_from", the fingerprint of the model that responded. Rows of simulated
annotators add, for reports only, "kind", "gold" (of chosen and of rejected) and "p", the exact
probability of the preference.

The last tenth of the file is never trained on (see held_out in data/files.py): with prompts of the
town and simulated annotators it holds those of the test split, and no others. Out of courtesy to
annotators, pairs of equal responses, or with a response that did not end, are left out.

Human judgements are never overwritten. Run again with the same options, the program continues where
it stopped.
"""

import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data.chat import encode_prompt, one_line, sample_replies
from data.files import keep_fitting, read_preferences, read_prompts, read_rows, write_rows
from data.gpt2 import load_init
from data.run import run_path, run_script, start
from data.tokenizer import load_tokenizer
from data.town.gold import TAU, bayes_accuracy, gold, preference
from data.town.tasks import draw_tasks, task_rows
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
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
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


def is_worth_asking(a, b) -> bool:
    """Whether two replies differ, and both have ended."""
    return a.text != b.text and a.ended and b.ended


def annotate(tasks, pairs, tau: float, flip: float, seed: int) -> list[dict]:
    """Rows as the simulated annotators would fill them in."""
    rng, rows = random.Random(f"annotators {seed}"), []
    for task, (a, b) in zip(tasks, pairs):
        if not is_worth_asking(a, b):
            continue
        gold_a, gold_b = gold(task, a.text), gold(task, b.text)
        p = preference(gold_a, gold_b, tau, flip)
        if rng.random() < p:
            chosen, rejected, golds = a, b, (gold_a, gold_b)
        else:
            chosen, rejected, golds, p = b, a, (gold_b, gold_a), 1 - p
        rows.append(
            {
                "messages": task.messages,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "kind": task.kind,
                "gold": [round(g, 4) for g in golds],
                "p": round(p, 4),
            }
        )
    return rows


def make_preferences(cfg: Config, out: Path, model, checkpoint: dict):
    """Sample pairs from a model, have the simulated annotators label them, write them.

    checkpoint: what it has beside the model. Raises InputError if no pair is left.
    """
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    n_test = max(cfg.pairs // 10, 1)
    tasks = draw_tasks(cfg.pairs - n_test, f"preferences {cfg.seed}")
    test_tasks = draw_tasks(n_test, f"preferences {cfg.seed}", split="test")
    tasks += test_tasks
    conversations = [task.messages for task in tasks]
    if cfg.flip > 0.5:
        print(
            f"note: with --flip {cfg.flip} most labels are wrong: what learns from them is misled"
        )
    print(f"sampling two responses each to {cfg.pairs:,} prompts from {cfg.init}", flush=True)
    replies = sample_pairs(model, tokenizer, conversations, cfg)
    rows = annotate(tasks, replies, cfg.tau, cfg.flip, cfg.seed)
    rows = end_with_a_tenth(rows, [task.messages for task in test_tasks])
    if not rows:
        raise InputError(
            f"{cfg.init}: no pair is left, since all responses are equal or never end; "
            "train the model longer, or raise --temperature or --max_new_tokens"
        )
    write_rows([{**row, "sampled_from": checkpoint["fingerprint"]} for row in rows], out)
    bayes = bayes_accuracy([row["gold"] for row in rows], cfg.tau, cfg.flip)
    print(
        f"{len(rows):,} pairs in {out} ({cfg.pairs - len(rows):,} left out: equal or unfinished "
        f"responses); an oracle judge would agree with {bayes:.1%} of the labels"
    )


def end_with_a_tenth(rows: list[dict], test_conversations: list[list[dict]]) -> list[dict]:
    """Rows with those of test conversations at the end, where they are exactly the tenth that
    `held_out` takes: a few surplus rows of either kind are dropped.

    Which pairs are left after annotation is chance. Without this, a prompt of the test split might
    be trained on.
    """
    held_out = {str(messages) for messages in test_conversations}
    train = [row for row in rows if str(row["messages"]) not in held_out]
    test = [row for row in rows if str(row["messages"]) in held_out]
    while test and max((len(train) + len(test)) // 10, 1) < len(test):
        test.pop()
    while train and max((len(train) + len(test)) // 10, 1) > len(test):
        train.pop()
    return train + test


def read_judged(path: Path) -> list[dict]:
    """`read_preferences` of a file that need not be there yet."""
    return read_preferences(path) if path.exists() and path.stat().st_size else []


def ask_human(conversations, pairs, out: Path, sampled_from: str):
    """Show pairs at the terminal, and write every decision to out at once, after what is there.

    Pairs that are there already are not shown again. sampled_from: the fingerprint of the model
    that responded.
    """
    judged = [(r["messages"], {r["chosen"], r["rejected"]}) for r in read_judged(out)]
    rows = read_rows(out) if judged else []
    for row in rows:
        del row["where"]
    asked = [(messages, a, b) for messages, (a, b) in zip(conversations, pairs)]
    asked = [(m, a, b) for m, a, b in asked if is_worth_asking(a, b)]
    asked = [(m, a, b) for m, a, b in asked if (m, {a.text, b.text}) not in judged]
    print(
        f"{len(rows)} pairs are judged, {len(asked)} are to come (equal or unfinished responses "
        "are left out). Which response is better? 1 or 2; s to skip, q to quit."
    )
    for number, (messages, a, b) in enumerate(asked, 1):
        said = one_line(messages)
        print(f"\n[{number}/{len(asked)}] {said}\n  1: {a.text}\n  2: {b.text}")
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
            rows.append({**row, "sampled_from": sampled_from})
            write_rows(rows, out)
    if rows:
        print(f"your preferences are in {out}: python train_rm.py --data {out}")


def load_preferences(path: str | Path, model_fingerprint: str = "") -> list[dict]:
    """Rows of a file of preferences (see `read_preferences`), for a model with this fingerprint.

    Prints a note if another model sampled the responses. If the file is missing, raises InputError
    with the command that makes it.
    """
    if not Path(path).exists():
        raise InputError(
            f"there is no {path}: run `python -m data.preferences` first, or name one with --data"
        )
    rows = read_preferences(path)
    sampled_from = {row["sampled_from"] for row in rows if row.get("sampled_from")}
    if model_fingerprint and sampled_from - {model_fingerprint}:
        print(
            f"note: {path} has responses of another model than the one that begins here. Reward "
            "model and DPO can learn from them, but about mistakes that this one may not make; "
            "`python -m data.preferences` samples its own"
        )
    return rows


def main(cfg: Config):
    """Write a file of preferences."""
    cfg = cfg.resolved()
    device = start(cfg)
    began = time.perf_counter()
    default = "human_preferences" if cfg.human else "preferences"
    out = run_path(cfg.out, f"{cfg.name or default}.jsonl")
    by_hand = ["gold" not in row for row in read_judged(out)]
    if not cfg.human and any(by_hand):
        raise InputError(f"{out} has judgements of people: choose another --name, or move it away")
    if cfg.human and not all(by_hand):
        raise InputError(f"{out} is by simulated annotators: choose another --name for your own")
    model, checkpoint = load_init(cfg.init, device)
    # If the file cannot be written, fail now and not after the sampling.
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()
    if not cfg.human:
        make_preferences(cfg, out, model, checkpoint)
        print(f"{time.perf_counter() - began:.0f} seconds")
        return
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    rows = read_prompts(cfg.prompts) if cfg.prompts else []
    rows = rows or task_rows(draw_tasks(cfg.pairs, f"preferences {cfg.seed}"))
    lengths = [len(encode_prompt(tokenizer, row["messages"])) for row in rows]
    longest = model.config.context - cfg.max_new_tokens
    rows = keep_fitting(rows, lengths, longest, "the context minus --max_new_tokens")[: cfg.pairs]
    conversations = [row["messages"] for row in rows]
    pairs = sample_pairs(model, tokenizer, conversations, cfg)
    ask_human(conversations, pairs, out, checkpoint["fingerprint"])


if __name__ == "__main__":
    run_script(main, Config)
