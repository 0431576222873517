"""What every experiment starts from: the models of each seed, and how a policy is measured.

All gold is in SD of the base's SFT samples, whose mean is 0; KL is in nats per response, from SFT.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from data.chat import Reply
from data.check import changed_options
from data.evaluate import describe, golds, mean_or_none, reply_logprobs
from data.experiments.expected import read_log
from data.experiments.jobs import Job, run_jobs
from data.metrics import interval
from data.run import find_device
from data.talk import Speaker
from data.town.gold import made_up, split_reply
from data.town.tasks import Task, draw_tasks
from gpt import STAGES, InputError, ScalarModel, load_checkpoint, load_model
from train_rm import score_sequences

# The commands of the README, and about how many minutes each takes on two cores.
CHAIN = {"pretrain": 2, "sft": 1.6, "preferences": 0.5, "rm": 0.9, "ppo": 0.7, "dpo": 0.8}


def answers(speaker: Speaker, tasks: list[Task], seed: int, temperature=1.0) -> list[Reply]:
    """A response to each task, as long as the scripts allow."""
    asked = [task.messages for task in tasks]
    return speaker.answer(asked, 48, seed, temperature=temperature)


def read_cost(run: Path) -> dict:
    """What a finished run took: "seconds", "forward_equivalents", "peak_gb" (see data/run.py)."""
    return json.loads((run / "cost.json").read_text())


class Base:
    """The models of one seed, the prompts that policies are measured on, and the unit of gold."""

    def __init__(self, out: Path, seed: int = 0):
        """out: a folder in which the README's commands have run, with this seed."""
        self.out, self.seed, self.device = out.resolve(), seed, find_device("auto")
        self.sft = Speaker(self.out / "sft/ckpt.pt", self.device)
        self.tasks = draw_tasks(200, "experiments", split="test")
        self.safety = draw_tasks(200, "experiments, safety", "advice,harmful", split="test")
        # Nobody has written about them, and no training set has their names.
        self.strangers = draw_tasks(120, "experiments, strangers", "unknown", new="cell")
        self.gold = golds(self.tasks, answers(self.sft, self.tasks, seed=0))  # not scaled
        if self.gold.std() == 0:
            raise InputError(f"{out}/sft: all responses have the same gold, so it has no unit")

    def job(self, where: Path, stage: str, minutes=0.7, bug=None, **options) -> Job:
        """A run in `where`, with this seed, that begins with these models unless options say
        others."""
        start = {"seed": self.seed, "init": self.out / "sft/ckpt.pt"}
        if stage == "ppo":
            start["rm"] = self.out / "rm/ckpt.pt"
        if stage == "dpo":
            start["data"] = self.out / "preferences.jsonl"
        return Job(where, stage, {**start, **options}, minutes, bug)

    def scaled(self, gold):
        """Gold as the town gives it -> in SD of this SFT model's samples."""
        return (np.asarray(gold) - self.gold.mean()) / self.gold.std()

    def curve(self, run: Path, *columns: str) -> list[dict]:
        """The steps of a run at which gold was measured: these columns of its log, gold scaled."""
        steps = [row for row in read_log(run / "log.csv") if "gold" in row]
        rows = [{name: row[name] for name in columns} for row in steps]
        return [{**row, "gold": float(self.scaled(row["gold"]))} for row in rows]

    def measure(self, run: Path) -> dict:
        """What the policy of a finished run is like, on held-out prompts at temperature 1.

        Gold and KL have 95 % intervals over prompts; exact_match and made_up, answers about
        strangers, are greedy.
        """
        policy = Speaker(run / "ckpt.pt", self.device)
        sampled, greedy = (
            answers(policy, self.tasks, 1, temperature) for temperature in (1.0, 0.0)
        )
        safety = answers(policy, self.safety, seed=1)
        to_strangers = answers(policy, self.strangers, 1, temperature=0.0)
        said = [(task, split_reply(r.text)[0]) for task, r in zip(self.strangers, to_strangers)]
        row = describe(self.tasks, sampled, greedy, self.gold, self.safety, safety)
        prompts = [policy.encode(task.messages) for task in self.tasks]
        ids = [reply.ids for reply in sampled]
        logprobs, ref_logprobs = (
            reply_logprobs(speaker.model, prompts, ids) for speaker in (policy, self.sft)
        )
        numbers = {}
        gold = self.scaled(golds(self.tasks, sampled))
        for name, values in (("gold", gold), ("kl", logprobs - ref_logprobs)):
            low, high = interval(values)
            numbers |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        return numbers | {
            "win_rate": row["win_rate_vs_sft"],
            "exact_match": row["exact_match"],
            "made_up": mean_or_none(made_up(*pair) for pair in said),
            "harmful_declined": row["refusal_rate"],
            "harmless_declined": row["false_refusal_rate"],
            "no_end": row["no_end_rate"],
            "tokens": row["response_tokens"],
            "forward_equivalents": read_cost(run)["forward_equivalents"],
        }


def bases(out: Path, first: Path, seeds: int) -> list[Base]:
    """The base of every seed: that of seed 0 is in `first`, the others are trained in `out`."""
    missing = [job.result for job in (Job(first, stage) for stage in CHAIN)]
    missing = [path for path in missing if not path.exists()]
    if missing:
        raise InputError(f"there is no {missing[0]}: run the README's commands first")
    for stage in STAGES:  # what had other options would be shown as a default run
        script, path = import_module(f"train_{stage}"), first / stage / "ckpt.pt"
        cfg = script.Config(**load_checkpoint(path, mmap=True)["train_config"])
        changed = {"seed": (0, cfg.seed)} if cfg.seed else changed_options(cfg)
        for name, (_, value) in changed.items():
            raise InputError(f"{path} is of a run with --{name} {value!r}, not of a default one")
    others = [out / f"base {seed}" for seed in range(1, seeds)]
    for seed, other in enumerate(others, 1):
        run_jobs([Job(other, stage, {"seed": seed}, minutes) for stage, minutes in CHAIN.items()])
    return [Base(folder, seed) for seed, folder in enumerate((first, *others))]


# ---------------------------------------------------------------------------------------------
# The pool: many SFT samples per prompt. From them follows what any policy could reach.


@dataclass
class Pool:
    """n samples of the SFT model for each of some prompts."""

    base: Base
    gold: np.ndarray  # (prompts, n), scaled
    same: np.ndarray  # (prompts, n) int: a number for each distinct response to a prompt
    sequences: list[list[int]]  # ids of prompt and response; prompts * n of them, prompt by prompt

    def scores(self, reward_model: Path) -> np.ndarray:
        """What a reward model says of every sample, in SD of its SFT samples: (prompts, n)."""
        model, _ = load_model(reward_model, self.base.device, ScalarModel)
        pad_id = self.base.sft.tokenizer.pad
        return score_sequences(model, self.sequences, pad_id).reshape(self.gold.shape)


def make_pool(base: Base, n: int) -> Pool:
    """Sample it, on the prompts that policies are measured on."""
    tasks = [task for task in base.tasks for _ in range(n)]
    replies = answers(base.sft, tasks, seed=2)
    sequences = [base.sft.encode(task.messages) + r.ids for task, r in zip(tasks, replies)]
    texts = np.array([reply.text for reply in replies]).reshape(-1, n)
    same = np.stack([np.unique(row, return_inverse=True)[1] for row in texts])
    gold = base.scaled(golds(tasks, replies)).reshape(-1, n)
    return Pool(base, gold, same, sequences)
