"""Preferences: two replies of the SFT model to one prompt, and which of them somebody prefers.

    python -m data.preferences                          annotated by the simulated annotators
    python -m data.preferences --human --pairs 50       annotated by you
    python -m data.preferences --human --prompts my.jsonl --out my_preferences.jsonl

The simulated annotators know gold only roughly: they prefer a to b with probability
sigmoid((gold a - gold b) / tau), and now and then press the wrong button (--flip). Every row is
{"prompt", "chosen", "rejected"}; rows of simulated annotators add, for reports only, "kind", "gold"
(of chosen and of rejected) and "p", the exact probability of the preference.

The last tenth of the file is never trained on (see held_out in data/files.py); its prompts come
from the test split. Out of courtesy to annotators, pairs of equal replies, or with a reply that did
not end, are left out.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from data.chat import encode_prompt, question, sample_replies
from data.files import read_prompts
from data.gold import TAU, bayes_accuracy, gold, preference
from data.options import number
from data.tasks import draw_tasks
from data.tokenizer import load_tokenizer
from gpt import find_device, load_model


def sample_pairs(model, tokenizer, conversations, max_new_tokens, temperature, seed):
    """Two replies to every conversation: a list of (Reply, Reply)."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    replies = sample_replies(model, tokenizer, prompts * 2, max_new_tokens, seed, temperature)
    return list(zip(replies[: len(prompts)], replies[len(prompts) :]))


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


def make_preferences(
    checkpoint: str | Path,
    out: str | Path,
    pairs: int = 16000,
    tau: float = TAU,
    flip: float = 0.0,
    temperature: float = 1.0,
    max_new_tokens: int = 48,
    seed: int = 0,
    device: str = "cpu",
):
    """Sample pairs from a checkpoint, have the simulated annotators label them, write them."""
    model, saved = load_model(checkpoint, device)
    tokenizer = load_tokenizer(saved["tokenizer"])
    tasks = draw_tasks(pairs - pairs // 10, f"preferences {seed}")
    tasks += draw_tasks(pairs // 10, f"preferences {seed}", split="test")
    conversations = [question(task.prompt) for task in tasks]
    print(f"sampling two replies each to {pairs:,} prompts from {checkpoint}")
    replies = sample_pairs(model, tokenizer, conversations, max_new_tokens, temperature, seed)
    rows = annotate(tasks, replies, tau, flip, seed)
    if not rows:
        raise SystemExit(
            f"{checkpoint}: no pair is left, since all replies are equal or never end; "
            "train the model longer, or raise --temperature or --max_new_tokens"
        )
    write_rows(rows, out)
    bayes = bayes_accuracy([row["gold"] for row in rows], tau, flip)
    print(
        f"{len(rows):,} pairs in {out} ({pairs - len(rows)} left out: equal or unfinished "
        f"replies); a judge who knows gold would agree with {bayes:.1%} of the labels"
    )


def ensure_preferences(path: str, checkpoint: str, seed: int, max_new_tokens: int, device):
    """Make a file of preferences if it is missing or older than the checkpoint."""
    path, checkpoint = Path(path), Path(checkpoint)
    older = (
        checkpoint.exists() and path.exists() and path.stat().st_mtime < checkpoint.stat().st_mtime
    )
    if older or not path.exists():
        make_preferences(checkpoint, path, seed=seed, max_new_tokens=max_new_tokens, device=device)


def write_rows(rows: list[dict], out: str | Path):
    """Write JSON lines; readers see the old file or the new, never half."""
    out, partial = Path(out), Path(f"{out}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, out)


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


def main():
    """The command line."""
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes "?"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default="out/sft/ckpt.pt", help="model that replies")
    parser.add_argument(
        "--out",
        help="file to write (default: out/preferences.jsonl, or with "
        "--human out/human_preferences.jsonl)",
    )
    parser.add_argument(
        "--pairs", type=number(int, 1), default=16000, help="prompts to sample two replies to"
    )
    parser.add_argument(
        "--tau", type=number(float, 0.01), default=TAU, help="annotators' noise, in SD of gold"
    )
    parser.add_argument(
        "--flip", type=number(float, 0, 1), default=0.0, help="share of labels turned around"
    )
    parser.add_argument(
        "--temperature", type=number(float), default=1.0, help="sampling temperature"
    )
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=48, help="longest reply")
    parser.add_argument("--seed", type=number(int), default=0)
    parser.add_argument("--human", action="store_true", help="you are the annotator")
    parser.add_argument("--prompts", help="JSON or JSONL with prompts of your own, for --human")
    parser.add_argument(
        "--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, mps"
    )
    args = parser.parse_args()
    if args.prompts and not args.human:
        parser.error("--prompts needs --human: only prompts of the town have a gold reward")
    device = find_device(args.device)
    if not args.human:
        make_preferences(
            args.ckpt,
            args.out or "out/preferences.jsonl",
            args.pairs,
            args.tau,
            args.flip,
            args.temperature,
            args.max_new_tokens,
            args.seed,
            device,
        )
        return
    model, saved = load_model(args.ckpt, device)
    if args.prompts:
        conversations = [row["messages"] for row in read_prompts(args.prompts)][: args.pairs]
    else:
        tasks = draw_tasks(args.pairs, f"preferences {args.seed}")
        conversations = [question(task.prompt) for task in tasks]
    pairs = sample_pairs(
        model,
        load_tokenizer(saved["tokenizer"]),
        conversations,
        args.max_new_tokens,
        args.temperature,
        args.seed,
    )
    ask_human(conversations, pairs, args.out or "out/human_preferences.jsonl")


if __name__ == "__main__":
    main()
