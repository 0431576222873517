"""Evaluation: every checkpoint there is answers the same held-out prompts, and gold judges.

    python -m data.evaluate                  reads out/*/ckpt.pt, writes out/report.md, .png, .json

    base        the pretrained model. It has never seen the chat format, so it gets the bare prompt
                as the beginning of a document, and its reply is all it writes until the document
                ends
    sft, ppo, dpo
    best_of_n   n samples of the SFT model, the one that the reward model scores highest

Gold is given in SD of this run's SFT samples, whose mean is 0 by definition. All prompts are of
cases held out of every training set; some also use wordings, or belong to kinds, never trained on.
Sampling at temperature 1 shows what a model is like, greedy decoding what it knows.

The JSON's keys are explained where they are computed, in `describe`. Intervals are 95 %, from the
normal approximation over prompts; they say nothing about the luck of a training run, for which one
runs several seeds.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from data.chat import Reply, encode_opening, encode_prompt, pad, question, sample_replies
from data.gold import declines, exact_match, f1, gold
from data.options import number
from data.tasks import KINDS, SHOWN, TRAIN_KINDS, Task, draw_tasks
from data.tokenizer import load_tokenizer
from gpt import GPT, ScalarModel, find_device, load_model
from train_dpo import sequence_logprobs
from train_rm import score_sequences

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = {"base": "pretrain", "sft": "sft", "best_of_n": "rm", "ppo": "ppo", "dpo": "dpo"}
SKILLS = ["one_sum", "two_sums", "to_spanish", "passage", "choice"]
COLOURS = ["#999999", "#0072B2", "#E69F00", "#D55E00", "#009E73"]  # Okabe and Ito, one per stage


class Stage:
    """A language model that answers prompts of the town, the base model in its own way."""

    def __init__(self, name: str, folder: Path, max_new_tokens: int, device="cpu"):
        self.name, self.max_new_tokens = name, max_new_tokens
        self.model, checkpoint = load_model(folder / STAGES[name] / "ckpt.pt", device)
        self.tokenizer = load_tokenizer(checkpoint["tokenizer"])
        self.stop = self.tokenizer.eot if name == "base" else self.tokenizer.end
        if max_new_tokens >= self.model.config.context:
            raise SystemExit(
                f"--max_new_tokens {max_new_tokens} does not fit the context of "
                f"{self.model.config.context}"
            )

    def encode(self, text: str) -> list[int]:
        """A prompt as this model is used to it."""
        if self.name == "base":
            return encode_opening(self.tokenizer, text)
        return encode_prompt(self.tokenizer, question(text))

    def answer(self, texts: list[str], temperature: float, seed: int) -> list[Reply]:
        """One reply to each prompt."""
        prompts = [self.encode(text) for text in texts]
        return sample_replies(
            self.model, self.tokenizer, prompts, self.max_new_tokens, seed, temperature, self.stop
        )


class BestOf(Stage):
    """The SFT model and a reward model, which picks the best of n samples."""

    def __init__(self, folder: Path, max_new_tokens: int, device, n: int):
        super().__init__("sft", folder, max_new_tokens, device)
        self.reward_model, checkpoint = load_model(folder / "rm" / "ckpt.pt", device, ScalarModel)
        self.report, self.n = checkpoint["report"], n

    def answer(self, texts: list[str], temperature: float, seed: int) -> list[Reply]:
        """Of n samples per prompt, at temperature 1 whatever is asked, the one that scores best."""
        replies = super().answer(texts * self.n, 1.0, seed)
        sequences = [self.encode(text) + r.ids for text, r in zip(texts * self.n, replies)]
        scores = score_sequences(self.reward_model, sequences, self.tokenizer.pad)
        best = scores.reshape(self.n, len(texts)).argmax(0)
        return [replies[row * len(texts) + i] for i, row in enumerate(best)]


@torch.no_grad()
def reply_logprobs(model: GPT, prompts: list[list[int]], replies: list[list[int]]) -> np.ndarray:
    """log p(reply | prompt) under the model, summed over the reply: (N,)."""
    sums, device = np.empty(len(prompts)), model.wte.weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(replies[i]))
    for start in range(0, len(order), 64):  # 64 of similar length at a time
        part = order[start : start + 64]
        tokens = pad([prompts[i] + replies[i] for i in part], 0)
        mask = pad([[0] * len(prompts[i]) + [1] * len(replies[i]) for i in part], 0).bool()
        sums[part] = sequence_logprobs(model, tokens.to(device), mask.to(device)).cpu()
    return sums


def golds(tasks: list[Task], replies: list[Reply]) -> np.ndarray:
    """The gold reward of every reply: (N,)."""
    return np.array([gold(task, reply.text, reply.ended) for task, reply in zip(tasks, replies)])


def interval(values) -> list[float]:
    """95 % interval of the mean, from the normal approximation."""
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def share(values) -> float | None:
    """Mean of 0s and 1s; None where there are none."""
    values = list(values)
    return float(np.mean(values)) if values else None


def describe(tasks, sampled, greedy, sft_gold, safety, safety_sampled) -> dict:
    """The numbers of one stage.

    tasks: the prompts; sampled, greedy: replies to them at temperature 1 and 0 (None for
    best_of_n, which has to sample; its skills are those of the samples). sft_gold (N,): gold of
    the SFT model's samples on the same prompts. safety: harmful requests and harmless ones of the
    same form, and the samples on them. Gold is in the units of `gold`; `evaluate` rescales it.
    """
    g, certain = golds(tasks, sampled), greedy or sampled
    wins = (g > sft_gold) + 0.5 * (g == sft_gold)
    exact = [exact_match(t, r.text) for t, r in zip(tasks, certain) if KINDS[t.kind].exact]
    declined = [(KINDS[t.kind].harmful, declines(r.text)) for t, r in zip(safety, safety_sampled)]
    by_task = {}
    for kind in TRAIN_KINDS:
        here = [i for i, task in enumerate(tasks) if task.kind == kind]
        by_task[kind] = {
            "prompts": len(here),
            "gold_mean": float(g[here].mean()),
            "exact_match": share(exact_match(tasks[i], certain[i].text) for i in here),
        }
    return {
        "gold_mean": float(g.mean()),
        "gold_ci95": interval(g),
        "greedy_gold_mean": float(golds(tasks, greedy).mean()) if greedy else None,
        "greedy_gold_ci95": interval(golds(tasks, greedy)) if greedy else None,
        "win_rate_vs_sft": float(wins.mean()),  # by gold, on samples; a tie is half a win
        "win_rate_ci95": interval(wins),
        "exact_match": share(exact),  # greedy, over the kinds that have one right answer
        "f1": share(f1(t, r.text) for t, r in zip(tasks, certain) if KINDS[t.kind].exact),
        "refusal_rate": share(no for harmful, no in declined if harmful),  # sampled
        "false_refusal_rate": share(no for harmful, no in declined if not harmful),  # sampled
        "response_tokens": share(len(reply.ids) for reply in sampled),
        "no_end_rate": share(not reply.ended for reply in sampled),
        "by_task": by_task,
    }


def evaluate(out="out", n_prompts=600, n=8, seed=0, max_new_tokens=48, device="cpu") -> dict:
    """Score all stages in a folder and write report.md, report.png and report.json there."""
    out = Path(out)
    there = [name for name, folder in STAGES.items() if (out / folder / "ckpt.pt").exists()]
    if "sft" not in there:
        raise SystemExit(
            f"there is no checkpoint {out}/sft/ckpt.pt: run `python train_sft.py` first; the "
            "other stages are compared with it"
        )
    missing = [name for name in STAGES if name not in there]
    if missing:
        print(f"not there, so not in the report: {', '.join(missing)}")

    # The same prompts for all stages: cases held out; then wordings and kinds held out as well.
    seen = draw_tasks(n_prompts, f"evaluate {seed}", split="test")
    safety = draw_tasks(400, f"safety {seed}", "advice,harmful", split="test")
    worded = draw_tasks(n_prompts // 2, f"wordings {seed}", split="test", unseen_wording=True)
    new_kinds = ",".join(name for name, kind in KINDS.items() if kind.held_out)
    new = draw_tasks(n_prompts // 4, f"kinds {seed}", new_kinds, split="test")
    prompts = SHOWN + [task.prompt for task in seen[:6]]  # whose answers people will read

    sft = Stage("sft", out, max_new_tokens, device)
    sft_replies = sft.answer([task.prompt for task in seen], 1.0, seed)
    sft_gold = golds(seen, sft_replies)
    stages, shown = {}, {}
    for name in there:
        print(f"{name} answers {n_prompts} prompts", flush=True)
        if name == "best_of_n":
            stage = best_of_n = BestOf(out, max_new_tokens, device, n)
        else:
            stage = sft if name == "sft" else Stage(name, out, max_new_tokens, device)

        def answer(tasks, temperature):
            return stage.answer([task.prompt for task in tasks], temperature, seed)

        sampled = sft_replies if name == "sft" else answer(seen, 1.0)
        greedy = None if name == "best_of_n" else answer(seen, 0.0)
        numbers = describe(seen, sampled, greedy, sft_gold, safety, answer(safety, 1.0))
        for group, tasks in (("unseen wording", worded), ("unseen kind", new)):
            replies = answer(tasks, 0.0)
            for kind in dict.fromkeys(task.kind for task in tasks):
                right = [exact_match(t, r.text) for t, r in zip(tasks, replies) if t.kind == kind]
                numbers["by_task"].setdefault(kind, {})[f"exact_match, {group}"] = share(right)
        if name == "base":
            numbers["kl_to_sft"] = None  # it answers another prompt: there is nothing to compare
        elif name == "best_of_n":
            numbers["kl_to_sft"] = math.log(n) - (n - 1) / n  # an upper bound (Beirami et al. 2024)
        else:
            asked, said = [stage.encode(task.prompt) for task in seen], [r.ids for r in sampled]
            difference = (reply_logprobs(model, asked, said) for model in (stage.model, sft.model))
            numbers["kl_to_sft"] = float(np.subtract(*difference).mean())
        cost = {"seconds": 0.0, "forward_equivalents": 0.0}  # best_of_n is paid for at every reply
        if name != "best_of_n":
            path = out / STAGES[name] / "cost.json"
            cost = json.loads(path.read_text()) if path.exists() else {}
        numbers["train_seconds"] = cost.get("seconds")
        numbers["forward_equivalents"] = cost.get("forward_equivalents")
        stages[name] = numbers
        shown[name] = [reply.text for reply in stage.answer(prompts, 1.0, seed)]

    # Units: the SFT model's samples have mean 0 and SD 1.
    mean, sd = sft_gold.mean(), sft_gold.std()
    for numbers in stages.values():
        for holder in (numbers, *numbers["by_task"].values()):
            for key in [key for key in holder if "gold" in key and holder[key] is not None]:
                holder[key] = ((np.array(holder[key]) - mean) / sd).tolist()
    report = {
        "seed": seed,
        "prompts": n_prompts,
        "temperature": 1.0,
        "best_of_n": n,
        "stages": stages,
    }
    if "best_of_n" in stages:
        report["rm"] = best_of_n.report
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report, prompts, shown), encoding="utf-8")
    draw_report(report, out / "report.png")
    return report


# ---------------------------------------------------------------------------------------------
# Presentation


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; floats with two digits, None as a dash."""

    def cell(x):
        return "–" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x)

    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell(x) for x in line) + " |\n" for line in lines) + "\n"


def markdown(report: dict, prompts: list[str], shown: dict[str, list[str]]) -> str:
    """The report as Markdown; shown: per stage, its replies to the prompts."""
    stages = report["stages"]
    n = report["best_of_n"]

    def with_interval(mean, ci):
        return None if mean is None else f"{mean:.2f} [{ci[0]:.2f}, {ci[1]:.2f}]"

    rows = [
        ["gold, temperature 1"]
        + [with_interval(s["gold_mean"], s["gold_ci95"]) for s in stages.values()],
        ["gold, greedy"]
        + [with_interval(s["greedy_gold_mean"], s["greedy_gold_ci95"]) for s in stages.values()],
        ["wins against SFT"]
        + [with_interval(s["win_rate_vs_sft"], s["win_rate_ci95"]) for s in stages.values()],
    ]
    labels = {
        "exact_match": "exact match, greedy",
        "f1": "F1, greedy",
        "refusal_rate": "harmful requests declined",
        "false_refusal_rate": "harmless ones declined",
        "kl_to_sft": "KL to SFT, nats per reply",
        "response_tokens": "tokens per reply",
        "no_end_rate": "replies without end",
    }
    rows += [[label] + [s[key] for s in stages.values()] for key, label in labels.items()]
    rows += [
        ["training, seconds"]
        + [
            None if s["train_seconds"] is None else f"{s['train_seconds']:.0f}"
            for s in stages.values()
        ],
        ["training, million forward passes of a token"]
        + [
            None if s["forward_equivalents"] is None else f"{s['forward_equivalents'] / 1e6:.1f}"
            for s in stages.values()
        ],
    ]
    text = (
        f"# Evaluation\n\nGold in SD of the SFT model's samples, mean of {report['prompts']} "
        f"held-out prompts [95 % interval over prompts]. best_of_n takes the best of {n} samples "
        "by the reward model: it is not trained, its skills are those of its samples, its KL is "
        "the bound log n - (n - 1)/n. PPO also needs the reward model, whose cost is not in its "
        "column.\n\n"
    )
    text += table(["", *stages], rows)

    text += "## Exact match by kind of task\n\n"
    text += "Greedy. In brackets: with a wording never trained on.\n\n"
    rows = []
    for kind in stages["sft"]["by_task"]:
        row = [kind + (" (kind never trained on)" if KINDS[kind].held_out else "")]
        for s in stages.values():
            numbers = s["by_task"][kind]
            worded = numbers.get("exact_match, unseen wording")
            known = numbers.get("exact_match", numbers.get("exact_match, unseen kind"))
            row.append(f"{known:.2f}" + ("" if worded is None else f" ({worded:.2f})"))
        rows.append(row)
    text += table(["", *stages], rows)

    text += "## Gold by kind of task, temperature 1\n\n"
    text += table(
        ["", *stages],
        [
            [kind] + [s["by_task"][kind]["gold_mean"] for s in stages.values()]
            for kind in TRAIN_KINDS
        ],
    )

    if "rm" in report:
        text += reward_model_section(report["rm"])

    text += (
        "## What they say\n\nThe same prompts for all, sampled at temperature 1, none picked.\n\n"
    )
    for i, prompt in enumerate(prompts):
        text += f"**{prompt}**\n\n"
        text += table(
            ["stage", "reply"],
            [
                [name, replies[i].replace("\n", " ").replace("|", "\\|")]
                for name, replies in shown.items()
            ],
        )
    return text


def reward_model_section(rm: dict) -> str:
    """What train_rm.py's `judge` found, as Markdown; gold's rows are there if the pairs had it."""
    text = f"## Reward model, on {rm['pairs']} held-out pairs\n\n"
    names = {
        "accuracy": "agrees with the label",
        "bayes_accuracy": "a judge who knows gold would, on average over labels (Bayes)",
        "gold_accuracy": "a judge who knows gold did, on these labels",
        "gold_order": "right about gold, where gold differs",
        "spearman_gold": "rank correlation with gold",
        "ece": "expected calibration error",
    }
    text += table(["", "all"], [[label, rm[key]] for key, label in names.items() if key in rm])
    if "by_task" in rm:
        keys = ["pairs", "accuracy", "bayes_accuracy", "gold_order"]
        text += table(
            ["kind", *keys], [[k] + [v[key] for key in keys] for k, v in rm["by_task"].items()]
        )
    return text


def draw_report(report: dict, path: Path):
    """Gold per stage, skills per stage, and what the gold costs in KL."""
    stages = report["stages"]
    colours = dict(zip(STAGES, COLOURS))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))

    def point(axis, x, mean, ci, name, marker="o", **style):
        """The mean of a stage and its interval."""
        style |= dict(color=colours[name], capsize=4)
        axis.errorbar(x, mean, [[mean - ci[0]], [ci[1] - mean]], fmt=marker, **style)

    for x, (name, s) in enumerate(stages.items()):
        point(left, x - 0.1, s["gold_mean"], s["gold_ci95"], name)
        if s["greedy_gold_mean"] is not None:
            greedy = s["greedy_gold_mean"], s["greedy_gold_ci95"]
            point(left, x + 0.1, *greedy, name, "s", mfc="white")
    left.plot([], [], "ko", label="temperature 1")
    left.plot([], [], "ks", mfc="white", label="greedy")
    left.set(
        xticks=range(len(stages)),
        xticklabels=list(stages),
        ylabel="gold, SD of SFT samples",
        title="Held-out gold, 95 % interval",
    )
    left.legend(loc="lower right")
    left.grid(alpha=0.3)

    width = 0.8 / len(stages)
    for i, (name, s) in enumerate(stages.items()):
        middle.bar(
            [x + (i - (len(stages) - 1) / 2) * width for x in range(len(SKILLS))],
            [s["by_task"][kind]["exact_match"] for kind in SKILLS],
            width,
            color=colours[name],
            label=name,
        )
    middle.set(
        xticks=range(len(SKILLS)),
        xticklabels=[k.replace("_", "\n") for k in SKILLS],
        ylim=(0, 1),
        ylabel="exact match",
        title="Skills, greedy decoding",
    )
    middle.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=5, frameon=False)
    middle.grid(alpha=0.3, axis="y")

    for name, s in stages.items():
        if s["kl_to_sft"] is not None:
            point(right, s["kl_to_sft"], s["gold_mean"], s["gold_ci95"], name, label=name)
    right.set(
        xlabel="KL to SFT, nats per reply",
        ylabel="gold, SD of SFT samples",
        xlim=(-0.1, None),
        title="What the gold costs in KL",
    )
    right.legend(loc="lower right")
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """The command line."""
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes "?"
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="out", help="folder of the runs (default: out)")
    two_of_each = number(int, 2 * len(TRAIN_KINDS))  # kinds; the report has a line for each
    parser.add_argument(
        "--prompts", type=two_of_each, default=600, help="held-out prompts (default: 600)"
    )
    parser.add_argument(
        "--n", type=number(int, 1), default=8, help="samples of best_of_n (default: 8)"
    )
    parser.add_argument(
        "--max_new_tokens", type=number(int, 1), default=48, help="longest reply (default: 48)"
    )
    parser.add_argument(
        "--seed", type=number(int), default=0, help="of prompts and sampling (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, mps"
    )
    args = parser.parse_args()
    device = find_device(args.device)
    report = evaluate(args.out, args.prompts, args.n, args.seed, args.max_new_tokens, device)
    text = (Path(args.out) / "report.md").read_text(encoding="utf-8")
    print(text[: text.index("## What they say")])
    print(f"samples of all {len(report['stages'])} stages are in {args.out}/report.md")


if __name__ == "__main__":
    main()
