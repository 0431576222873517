"""Evaluation: every model there is answers the same held-out prompts, and gold judges.

    python -m data.evaluate              reads out/*/ckpt.pt, writes out/report.md, its picture,
                                         report_details.md, and all numbers as report.json

    base            the pretrained model. It has never seen the chat format, so it gets the bare
                    prompt as the opening of a document, and its response is all it writes until
                    the document ends
    sft, ppo, dpo   and every variant that was trained with --name
    best_of_n       n samples of the SFT model, of which the reward model picks one

Gold is given in SD of the SFT model's samples, whose mean is 0 by definition. No prompt is of a
case that was trained on as a task; documents may have the same sum or fact. Some have something
else that training never has, and tell what generalises: a frame, a core, a cell, a whole kind
(data/town/tasks.py says what these are). Others are about strangers, of whom a model can only say
that it has never heard of them. Some follow another prompt and its answer in one conversation. The
base model is asked plainly, and in the form of its documents: what one had to do before there was
instruction tuning. Sampling at temperature 1 shows what a model is like, greedy decoding what it
knows.

A run that was trained from a model which is no longer there, say because SFT was repeated and PPO
was not, is named: its KL and its wins compare models that do not belong together.

The JSON's keys are explained where they are computed, in `describe` and `honesty`. Intervals are
95 %, from the normal approximation over prompts; they say nothing about the luck of a training run,
for which one runs several seeds.
"""

import itertools
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.chat import Reply, one_line, pad, question, sorted_batches
from data.gpt2 import is_gpt2
from data.metrics import interval, mean_or_none
from data.run import COLOURS, STAGES, run_script, start
from data.talk import Speaker, find_checkpoints
from data.town.demonstrations import is_short
from data.town.gold import declines, denies, exact_match, f1, gold, harms, made_up, split_reply
from data.town.tasks import KINDS, NEW, SHOWN, TRAIN_KINDS, Task, draw_tasks
from gpt import GPT, InputError, ScalarModel, fingerprint, load_checkpoint, load_model
from train_dpo import sequence_logprobs
from train_rm import score_sequences

REPORT = ("report.png", "report.md", "report_details.md", "report.json")
AFTER = "after another task"  # a group of prompts, beside those of NEW
# Kinds with held-out cells, but for `unknown`: its cell, new names, has numbers of its own.
WITH_CELLS = [name for name, k in KINDS.items() if k.held_out_cells and name != "unknown"]


@dataclass
class Config:
    prompts: int = 600  # held-out prompts
    n: int = 8  # samples of best_of_n
    max_new_tokens: int = 48  # longest response
    seed: int = 0  # of prompts and sampling
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    out: str = "out"  # folder of all runs; the report is written there

    def __post_init__(self):
        if self.prompts < 2 * len(TRAIN_KINDS):
            raise ValueError(
                f"--prompts must be at least {2 * len(TRAIN_KINDS)}, two of each kind of task: the "
                f"report has a line for each; not {self.prompts}"
            )


class BestOf(Speaker):
    """The SFT model and a reward model, which picks the best of n samples."""

    def __init__(self, sft: Path, reward_model: Path, n: int, device):
        super().__init__(sft, device)
        self.reward_model, checkpoint = load_model(reward_model, device, ScalarModel)
        if checkpoint["tokenizer"] != self.tokenizer.state:
            raise InputError(f"{reward_model} has another tokenizer than {sft}")
        self.report, self.n = checkpoint.get("report", {}), n

    def answer(self, conversations, max_new_tokens: int, seed: int, **how) -> list[Reply]:
        """Of n samples per prompt, at temperature 1 whatever is asked, the one that scores best."""
        asked = conversations * self.n
        replies = super().answer(asked, max_new_tokens, seed)
        sequences = [self.encode(messages) + r.ids for messages, r in zip(asked, replies)]
        scores = score_sequences(self.reward_model, sequences, self.tokenizer.pad)
        best = scores.reshape(self.n, len(conversations)).argmax(0)
        return [replies[row * len(conversations) + i] for i, row in enumerate(best)]


@torch.no_grad()
def reply_logprobs(model: GPT, prompts: list[list[int]], replies: list[list[int]]) -> np.ndarray:
    """log p(reply | prompt) under the model, summed over the reply: (N,), in nats."""
    sums, device = np.empty(len(prompts)), model.wte.weight.device
    for batch in sorted_batches([len(p) + len(r) for p, r in zip(prompts, replies)]):
        tokens = pad([prompts[i] + replies[i] for i in batch], 0)
        mask = pad([[0] * len(prompts[i]) + [1] * len(replies[i]) for i in batch], 0).bool()
        sums[batch] = sequence_logprobs(model, tokens.to(device), mask.to(device)).cpu()
    return sums


def golds(tasks: list[Task], replies: list[Reply]) -> np.ndarray:
    """The gold reward of every reply: (N,)."""
    return np.array([gold(task, reply.text, reply.ended) for task, reply in zip(tasks, replies)])


def describe(tasks, sampled, greedy, sft_gold, safety, safety_sampled) -> dict:
    """The numbers of one model.

    tasks: the prompts; sampled, greedy: replies to them at temperature 1 and 0 (None for
    best_of_n, which has to sample; its skills are those of the samples). sft_gold (N,): gold of
    the SFT model's samples on the same prompts. safety: harmful requests and harmless ones in the
    same words; safety_sampled: replies to them. Gold is in the units of `gold`; see `in_sd`.
    """
    g, certain = golds(tasks, sampled), greedy or sampled
    wins = (g > sft_gold) + 0.5 * (g == sft_gold)
    exact = [exact_match(t, r.text) for t, r in zip(tasks, certain) if KINDS[t.kind].exact]
    declined = [
        (KINDS[t.kind].harmful, declines(r.text) and not harms(t, r.text))
        for t, r in zip(safety, safety_sampled)
    ]
    by_task = {}
    for kind in TRAIN_KINDS:
        of_kind = [i for i, task in enumerate(tasks) if task.kind == kind]
        by_task[kind] = {
            "prompts": len(of_kind),
            "gold_mean": float(g[of_kind].mean()),
            "exact_match": mean_or_none(exact_match(tasks[i], certain[i].text) for i in of_kind),
        }
    return {
        "gold_mean": float(g.mean()),
        "gold_ci95": interval(g),
        "greedy_gold_mean": float(golds(tasks, greedy).mean()) if greedy else None,
        "greedy_gold_ci95": interval(golds(tasks, greedy)) if greedy else None,
        "win_rate_vs_sft": float(wins.mean()),  # by gold, on samples; a tie is half a win
        "win_rate_ci95": interval(wins),
        "exact_match": mean_or_none(exact),  # greedy, over the kinds that have one right answer
        "f1": mean_or_none(f1(t, r.text) for t, r in zip(tasks, certain) if KINDS[t.kind].exact),
        "refusal_rate": mean_or_none(no for harmful, no in declined if harmful),  # sampled
        "false_refusal_rate": mean_or_none(
            no for harmful, no in declined if not harmful
        ),  # sampled
        "response_tokens": mean_or_none(len(reply.ids) for reply in sampled),
        "no_end_rate": mean_or_none(not reply.ended for reply in sampled),
        "by_task": by_task,
    }


@dataclass
class Prompts:
    """What every model is asked. No case is trained on as a task."""

    seen: list[Task]  # of kinds, cells, cores and frames that were trained on
    new: dict[str, list[Task]]  # a value of NEW -> tasks in which that is new; "new kind" likewise
    strangers: list[Task]  # questions about people nobody has written about
    facts: list[Task]  # the same questions about residents
    safety: list[Task]  # harmful requests, and harmless ones in the same words

    @classmethod
    def draw(cls, n: int, seed: int) -> "Prompts":
        """n prompts of what was seen, and fewer of the rest."""

        def drawn(count, what, kinds=TRAIN_KINDS, new="", split="test"):
            return draw_tasks(count, f"{what} {seed}", ",".join(kinds), split=split, new=new)

        new_kinds = [name for name, kind in KINDS.items() if kind.held_out]
        new = {
            group: drawn(n // 2, group, WITH_CELLS if how == "cell" else TRAIN_KINDS, how)
            for how, group in NEW.items()
        }
        return cls(
            drawn(n, "evaluate"),
            new | {"new kind": drawn(n // 8, "new kind", new_kinds)},
            # These names are in no training set at all, so there is no need to hold out cases.
            drawn(120, "strangers", ["unknown"], "cell", split="train"),
            drawn(120, "facts", ["fact"]),  # only a few facts, asked in many ways
            drawn(400, "safety", ["advice", "harmful"]),
        )


def honesty(prompts: Prompts, to_strangers: list[Reply], to_facts: list[Reply]) -> dict:
    """Whether a model says what it knows about people, and of others that it does not know them."""
    about_strangers, about_residents = (
        [(task, split_reply(reply.text)[0]) for task, reply in zip(tasks, replies)]
        for tasks, replies in ((prompts.strangers, to_strangers), (prompts.facts, to_facts))
    )
    return {
        "made_up_about_strangers": mean_or_none(made_up(*pair) for pair in about_strangers),
        "known_facts_right": mean_or_none(exact_match(*pair) for pair in about_residents),
        "known_facts_denied": mean_or_none(denies(text) for _, text in about_residents),
    }


def by_kind(tasks: list[Task], right: list[bool]) -> dict[str, float]:
    """kind of task -> the fraction of its tasks that are right."""
    found = {}
    for task, is_right in zip(tasks, right):
        found.setdefault(task.kind, []).append(is_right)
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def after_another(tasks: list[Task], speaker: Speaker) -> tuple[list[Task], list[list[dict]]]:
    """Tasks with one right answer, and conversations in which each follows the task before it and
    the correct answer to that; only where the whole is short, and the speaker has room for it."""
    pairs = [
        (task, [*before.answered, *task.messages])
        for before, task in zip(tasks, tasks[1:])
        if KINDS[task.kind].exact and is_short([*before.answered, *task.answered])
    ]
    pairs = [(task, conversation) for task, conversation in pairs if speaker.fits(conversation)]
    return [task for task, _ in pairs], [conversation for _, conversation in pairs]


def as_document(task: Task) -> str:
    """The opening of a document that asks the same: "Otto's sums: 3+4 is 7, 9-4 is 5, 12-5 is"."""
    return KINDS[task.kind].document.format(**task.case.fill)


def goes_on_with_the_answer(task: Task, text: str) -> bool:
    """Whether what follows such an opening begins with the curt answer, or else with the full one.

    " 7. Mila" is right for 12-5, " 72" and " 7 8" are not; capital letters do not count.
    """
    answer = (task.case.short or task.case.answer).rstrip(".")
    item = task.case.fill.get("item", "")  # "5 animals" is right for 5
    end = rf"( {item}s)?([.,!]|$| and\b)"
    return re.match(rf"\s*{re.escape(answer)}{end}", text, re.IGNORECASE) is not None


def measure(speaker: Speaker, sft: Speaker, prompts: Prompts, sft_gold, cfg: Config) -> dict:
    """Ask a model everything: the numbers of `describe` and `honesty`, KL to the SFT model, and in
    "by_task" exact match where something is new, where the task comes after another one, or where a
    base model is asked in documents."""

    def answer(tasks, temperature):
        return reply_to([task.messages for task in tasks], temperature)

    def reply_to(conversations, temperature):
        return speaker.answer(conversations, cfg.max_new_tokens, cfg.seed, temperature=temperature)

    picks = isinstance(speaker, BestOf)  # it has to sample
    sampled, greedy = answer(prompts.seen, 1.0), None if picks else answer(prompts.seen, 0.0)
    safe = answer(prompts.safety, 1.0)
    numbers = describe(prompts.seen, sampled, greedy, sft_gold, prompts.safety, safe)
    numbers |= honesty(prompts, answer(prompts.strangers, 0.0), answer(prompts.facts, 0.0))
    exact = {}  # group -> (tasks, which of the greedy replies to them are right)
    if speaker.is_base:
        tasks = [t for t in prompts.seen + prompts.new["new kind"] if KINDS[t.kind].document]
        # Documents translate sentences, and words in another form.
        tasks = [t for t in tasks if not t.case.cell.endswith((" word", " phrase"))]
        replies = reply_to([question(as_document(task)) for task in tasks], 0.0)
        right = [goes_on_with_the_answer(t, r.text) for t, r in zip(tasks, replies)]
        exact["as a document"] = tasks, right
    elif not picks:  # best_of_n would need most of the time for this
        for group, tasks in prompts.new.items():
            right = [exact_match(t, r.text) for t, r in zip(tasks, answer(tasks, 0.0))]
            exact[group] = tasks, right
        tasks, conversations = after_another(prompts.seen, speaker)
        replies = reply_to(conversations, 0.0)
        exact[AFTER] = tasks, [exact_match(t, r.text) for t, r in zip(tasks, replies)]
    for group, (tasks, right) in exact.items():
        for kind, fraction in by_kind(tasks, right).items():
            numbers["by_task"].setdefault(kind, {})[f"exact_match, {group}"] = fraction
    if picks:  # an upper bound (Beirami et al. 2024)
        numbers["kl_to_sft"] = math.log(speaker.n) - (speaker.n - 1) / speaker.n
    elif speaker.is_base or speaker.tokenizer.state != sft.tokenizer.state:
        numbers["kl_to_sft"] = None  # the two read different tokens: there is nothing to compare
    else:
        asked = [speaker.encode(task.messages) for task in prompts.seen]
        ids = [reply.ids for reply in sampled]
        both = (reply_logprobs(model, asked, ids) for model in (speaker.model, sft.model))
        numbers["kl_to_sft"] = float(np.subtract(*both).mean())
    return numbers


def stale_runs(found: dict[str, tuple[str, Path]]) -> list[str]:
    """A sentence for every run that was trained from a model which is no longer there.

    found: what `find_checkpoints` has found. Models are compared by their fingerprints, so copies
    are as good as originals. Of a run that does not know what it was made from, nothing is said.
    """
    runs = {name: load_checkpoint(path, mmap=True) for name, (_, path) in found.items()}
    here = {fingerprint(run["model"], run["tokenizer"]) for run in runs.values()}
    sentences = []
    for name, (stage, _) in found.items():
        made_from, options = (runs[name].get(key, {}) for key in ("made_from", "train_config"))
        usual = {"init": "pretrain" if stage in ("pretrain", "sft") else "sft", "rm": "rm"}
        for option, source in usual.items():
            path = options.get(option, "")
            is_here = made_from.get(option) in {None, *here} or is_gpt2(path)
            if source in found and not is_here:
                path = path or f"its --{option}"
                sentences.append(
                    f"{name} was trained from another model than there is now ({path}): train it "
                    "again, or read its KL and wins with care"
                )
    return sentences


def in_sd(numbers: dict, mean: float, sd: float):
    """Rescale all gold of a model, in place: mean becomes 0 and sd becomes 1."""
    for holder in (numbers, *numbers["by_task"].values()):
        for key in ("gold_mean", "gold_ci95", "greedy_gold_mean", "greedy_gold_ci95"):
            if holder.get(key) is not None:
                holder[key] = ((np.array(holder[key]) - mean) / sd).tolist()


def evaluate(cfg: Config) -> dict:
    """Score all models in a folder and write the files of REPORT there."""
    device, out = start(cfg), Path(cfg.out)
    found = find_checkpoints(out)
    if "sft" not in found:
        raise InputError(
            f"there is no checkpoint {out}/sft/ckpt.pt: run `python train_sft.py` first; the "
            "other stages are compared with it"
        )
    missing = [stage for stage in STAGES if stage not in found]
    if missing:
        print(f"not there, so not in the report: {', '.join(missing)}")
    stale = stale_runs(found)
    for sentence in stale:
        print(sentence)
    # Fails if the report could not be written either: now, not after all models have answered.
    tempfile.TemporaryFile(dir=out).close()

    prompts = Prompts.draw(cfg.prompts, cfg.seed)
    seen = [task.messages for task in prompts.seen]
    shown_prompts = [question(text) for text in SHOWN] + seen[:6]  # people read these replies
    sft_path = out / "sft" / "ckpt.pt"
    sft = Speaker(sft_path, device)
    sft_gold = golds(prompts.seen, sft.answer(seen, cfg.max_new_tokens, cfg.seed))
    unit = sft_gold.std()  # an SD of the SFT model's samples
    if unit == 0:
        print("all responses of sft have the same gold: here its unit is that of data/town/gold.py")
        unit = 1.0
    report = {"seed": cfg.seed, "prompts": cfg.prompts, "temperature": 1.0, "best_of_n": cfg.n}
    report |= {"stale": stale, "stages": {}, "reward_models": {}}
    shown = {}
    for name, (stage, path) in found.items():
        label = {"pretrain": "base", "rm": "best_of_n"}.get(name, name)
        print(f"{label} answers {cfg.prompts} prompts", flush=True)
        try:
            if stage == "rm":
                speaker = BestOf(sft_path, path, cfg.n, device)
            else:
                speaker = Speaker(path, device)
            numbers = measure(speaker, sft, prompts, sft_gold, cfg)
        except InputError as error:
            if name == "sft":  # the others are compared with it
                raise
            # Say, its context is too short: no reason to lose the others.
            print(f"{label} is left out: {error}")
            continue
        if stage == "rm":
            report["reward_models"][name] = speaker.report
        in_sd(numbers, sft_gold.mean(), unit)
        cost = {"seconds": 0.0, "forward_equivalents": 0.0}  # best_of_n pays at every response
        if stage != "rm":
            try:
                cost = dict(json.loads(path.with_name("cost.json").read_text()))
            except (OSError, ValueError, TypeError):  # not there, or damaged: a dash in the report
                cost = {}
        numbers["train_seconds"] = cost.get("seconds")
        numbers["forward_equivalents"] = cost.get("forward_equivalents")
        report["stages"][label] = numbers
        replies = speaker.answer(shown_prompts, cfg.max_new_tokens, cfg.seed, temperature=1.0)
        shown[label] = [reply.text for reply in replies]
    write_report(report, shown_prompts, shown, out)
    return report


def write_report(report: dict, prompts: list[list[dict]], shown: dict[str, list[str]], out: Path):
    """Write the files of REPORT, which take their places when all of them are whole.

    shown: what each model says to each of the prompts; the page has those of SHOWN, which come
    first, the details have the others.
    """
    n = len(SHOWN)
    first, others = ({k: v[some] for k, v in shown.items()} for some in (slice(n), slice(n, None)))
    with tempfile.TemporaryDirectory(dir=out, prefix="report.") as folder:
        new = Path(folder)
        (new / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (new / "report.md").write_text(page(report, prompts[:n], first), encoding="utf-8")
        text = details(report, prompts[n:], others)
        (new / "report_details.md").write_text(text, encoding="utf-8")
        draw_report(report, new / "report.png")
        for name in REPORT:
            os.replace(new / name, out / name)


# ---------------------------------------------------------------------------------------------
# Presentation


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; floats with two digits, None as a dash."""

    def cell(x):
        return "–" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x)

    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell(x) for x in line) + " |\n" for line in lines) + "\n"


def page(report: dict, prompts: list[list[dict]], shown: dict[str, list[str]]) -> str:
    """report.md, the page to read first. shown: the replies of each model to the prompts."""
    stages = report["stages"]
    columns = {  # label of a row -> how a stage's cell is made
        "gold, temperature 1": lambda s: with_interval(s["gold_mean"], s["gold_ci95"]),
        "gold, greedy": lambda s: with_interval(s["greedy_gold_mean"], s["greedy_gold_ci95"]),
        "wins against SFT": lambda s: with_interval(s["win_rate_vs_sft"], s["win_rate_ci95"]),
        "exact match, greedy": lambda s: s["exact_match"],
        "F1, greedy": lambda s: s["f1"],
        "harmful requests declined": lambda s: s["refusal_rate"],
        "harmless ones declined": lambda s: s["false_refusal_rate"],
        "made up about strangers, greedy": lambda s: s["made_up_about_strangers"],
        "known facts right, greedy": lambda s: s["known_facts_right"],
        "known facts denied, greedy": lambda s: s["known_facts_denied"],
        "KL to SFT, nats per response": lambda s: s["kl_to_sft"],
        "tokens per response": lambda s: s["response_tokens"],
        "responses without an end": lambda s: s["no_end_rate"],
        "training, seconds": lambda s: scaled(s["train_seconds"], 1, 0),
        "training, million forward passes of a token": lambda s: scaled(
            s["forward_equivalents"], 1e-6, 1
        ),
    }
    text = (
        "# Evaluation\n\n**Gold** is the true reward of a response: it is right, complete, "
        "courteous and safe, or it is not (`data/town/gold.py`). No training loss sees it. Its "
        "unit is the standard deviation of the SFT model's samples, whose mean is 0. Numbers are "
        f"means over {report['prompts']} held-out prompts, the same for all [95 % interval over "
        "prompts]; greedy is decoding without chance. **best_of_n** is not trained: of "
        f"{report['best_of_n']} SFT samples it takes the one that the reward model likes best. So "
        "it has no greedy gold, its skills are those of samples, and its KL is the bound log n - "
        "(n - 1)/n. The base model is asked outside the chat format, so its KL means nothing. PPO "
        "also needs the reward model, whose cost is not in its column. What is not known is a "
        "dash. By kind of task: [report_details.md](report_details.md).\n\n"
    )
    text += "".join(f"**{sentence}.**\n\n" for sentence in report["stale"])
    rows = [[label, *map(cell, stages.values())] for label, cell in columns.items()]
    text += table(["", *stages], rows)
    text += what_generalises(stages)
    text += instructions_and_documents(stages)
    for name, judged in report["reward_models"].items():
        text += reward_model_section(name, judged)
    return text + what_they_say("What they say", prompts, shown)


def details(report: dict, prompts: list[list[dict]], shown: dict[str, list[str]]) -> str:
    """report_details.md: kind by kind, and replies to prompts that nobody has picked."""
    stages = report["stages"]
    text = "# Evaluation, kind by kind\n\n"
    for key, title in {
        "exact_match": "Exact match by kind of task, greedy, on held-out cases",
        "gold_mean": "Gold by kind of task, temperature 1",
    }.items():
        rows = [[kind, *(s["by_task"][kind][key] for s in stages.values())] for kind in TRAIN_KINDS]
        text += f"## {title}\n\n{table(['', *stages], rows)}"
    rows = [
        [kind, *(numbers.get(key) for key in WHAT_IS_NEW.values())]
        for kind, numbers in stages["sft"]["by_task"].items()
    ]
    text += (
        "## Exact match of SFT by what is new about the prompt, greedy\n\nA dash: only some kinds "
        "have cells, only short tasks come after another, and kinds that are new have no old "
        f"prompts.\n\n{table(['', *WHAT_IS_NEW], rows)}"
    )
    for name, judged in report["reward_models"].items():
        if "by_task" in judged:
            keys = ["pairs", "accuracy", "bayes_accuracy", "gold_order"]
            rows = [[kind, *map(some.get, keys)] for kind, some in judged["by_task"].items()]
            text += f"## Reward model {name} by kind of task\n\n{table(['kind', *keys], rows)}"
    return text + what_they_say("What they say to six held-out prompts", prompts, shown)


# What is new about a prompt, beside its case -> its key in "by_task".
WHAT_IS_NEW = {"nothing": "exact_match"}
WHAT_IS_NEW |= {group: f"exact_match, {group}" for group in [*NEW.values(), "new kind", AFTER]}


def with_interval(mean: float | None, ci: list[float]) -> str | None:
    """ "0.50 [0.40, 0.60]"; None without a mean."""
    return None if mean is None else f"{mean:.2f} [{ci[0]:.2f}, {ci[1]:.2f}]"


def scaled(value: float | None, factor: float, digits: int) -> str | None:
    """factor * value with so many digits; None without a value."""
    return None if value is None else f"{factor * value:.{digits}f}"


def what_they_say(title: str, prompts: list[list[dict]], shown: dict[str, list[str]]) -> str:
    """The replies of all models to each prompt, as Markdown."""
    text = f"## {title}\n\nThe same prompts for all, sampled at temperature 1, none picked.\n\n"
    for i, messages in enumerate(prompts):
        rows = [
            [name, replies[i].replace("\n", " ").replace("|", "\\|")]
            for name, replies in shown.items()
        ]
        text += f"**{one_line(messages)}**\n\n{table(['stage', 'response'], rows)}"
    return text


def means_by_novelty(stages: dict) -> dict[str, list]:
    """Name -> exact match for each column of WHAT_IS_NEW, means over kinds with one right answer.

    Base models and best_of_n were asked none of these, and are left out.
    """
    means = {}
    for name, numbers in stages.items():
        kinds = [some for kind, some in numbers["by_task"].items() if KINDS[kind].exact]
        means[name] = [
            mean_or_none(some[key] for some in kinds if key in some) for key in WHAT_IS_NEW.values()
        ]
    return {name: row for name, row in means.items() if any(x is not None for x in row[1:])}


def what_generalises(stages: dict) -> str:
    """Exact match where something is new about the prompt."""
    rows = [[name, *row] for name, row in means_by_novelty(stages).items()]
    return (
        "## What generalises\n\nExact match, greedy: means over kinds of task, without `joke` and "
        "`story`, which are open-ended, and `chain` and `unknown`, where most demonstrators have "
        "a habit. In the last column nothing is new, but the conversation changes the "
        "subject. Not every column has every kind. Beside the case, new is:\n\n"
        f"{table(['', *WHAT_IS_NEW], rows)}"
    )


def instructions_and_documents(stages: dict) -> str:
    """The base model, asked plainly and in the form of its documents, beside the SFT model."""
    if "base" not in stages:
        return ""
    base, sft = (stages[name]["by_task"] for name in ("base", "sft"))
    rows = [
        [
            kind,
            numbers.get("exact_match"),
            numbers["exact_match, as a document"],
            sft[kind].get("exact_match", sft[kind].get("exact_match, new kind")),
        ]
        for kind, numbers in base.items()
        if "exact_match, as a document" in numbers
    ]
    trained = [row[1:] for row in rows if not KINDS[row[0]].held_out]
    rows.append(["mean of the kinds trained on", *np.mean(trained, 0).tolist()])
    example = KINDS["one_sum"].document.format(sum="12-5")
    return (
        "## Instructions instead of prompt engineering\n\nGreedy. The base model can do much of "
        f'it, but only if it is asked in the form of its documents, such as "{example}". It was '
        "not asked plainly for a kind that SFT has never seen.\n\n"
    ) + table(["", "base, asked plainly", "base, as a document", "SFT, asked plainly"], rows)


def reward_model_section(name: str, rm: dict) -> str:
    """What `judge` found about a reward model, as Markdown; with gold, if the pairs had it."""
    which = "" if name == "rm" else f" {name}"
    text = f"## Reward model{which}, on {rm['pairs']} held-out pairs\n\n"
    names = {
        "accuracy": "agrees with the label (held-out accuracy)",
        "bayes_accuracy": "an oracle judge, who knows gold, would on average (Bayes accuracy)",
        "gold_accuracy": "an oracle judge does on these labels",
        "gold_order": "has gold's order, where gold differs",
        "spearman_gold": "rank correlation with gold",
        "ece": "expected calibration error",
    }
    return text + table(
        ["", "all"], [[label, rm[key]] for key, label in names.items() if key in rm]
    )


def draw_report(report: dict, path: Path):
    """Gold per stage, what generalises, and what the gold costs in KL."""
    stages = report["stages"]
    colours = dict(zip(stages, itertools.cycle(COLOURS)))
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    figure = Figure(figsize=(14, 4))
    left, middle, right = figure.subplots(1, 3)

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

    means, places = means_by_novelty(stages), np.arange(len(WHAT_IS_NEW))
    width = 0.8 / max(len(means), 1)
    for i, (name, row) in enumerate(means.items()):
        heights = [np.nan if x is None else x for x in row]
        left_end = places + (i - (len(means) - 1) / 2) * width
        middle.bar(left_end, heights, width, color=colours[name], label=name)
    middle.set(
        xticks=places,
        xticklabels=[group.replace(" ", "\n") for group in WHAT_IS_NEW],
        ylim=(0, 1),
        ylabel="exact match, greedy",
        title="What is new about the prompt",
    )
    middle.tick_params(axis="x", labelsize=7)
    middle.grid(alpha=0.3, axis="y")

    for name, s in stages.items():
        if s["kl_to_sft"] is not None:
            point(right, s["kl_to_sft"], s["gold_mean"], s["gold_ci95"], name, label=name)
    right.set(
        xlabel="KL to SFT, nats per response",
        ylabel="gold, SD of SFT samples",
        xlim=(-0.1, None),
        title="What the gold costs in KL",
    )
    right.legend(loc="lower right")
    right.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(cfg: Config):
    """Write the report, and print its tables."""
    evaluate(cfg)
    text = (Path(cfg.out) / "report.md").read_text(encoding="utf-8")
    print(text[: text.index("## What they say")])
    print(f"what all of them say is in {cfg.out}/report.md, every kind in report_details.md")


if __name__ == "__main__":
    run_script(main, Config)
