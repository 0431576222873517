"""The five scripts with options so small that each takes a second or two."""

import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from data import preferences
from data.run import Run
from data.tokenizer import load_tokenizer
from data.town import tasks as town_tasks
from data.town.documents import documents
from gpt import GPT

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "pretrain": train_pretrain,
    "sft": train_sft,
    "rm": train_rm,
    "ppo": train_ppo,
    "dpo": train_dpo,
}
# The learning rate of SFT is such that half of the responses end within 12 tokens.
TINY = {
    "pretrain": dict(
        documents=300,
        vocab_size=700,
        n_layer=1,
        n_head=2,
        n_embd=32,
        batch_size=4,
        steps=6,
        save_every=2,
        eval_every=3,
    ),
    "sft": dict(demonstrations=120, batch_size=16, epochs=1, lr=0.03, warmup=0),
    "rm": dict(batch_size=16, epochs=1),
    "ppo": dict(
        iterations=4,
        target_kl=0.5,  # so that beta changes, and --resume has to bring it back
        rollouts=8,
        minibatch=4,
        microbatch=2,
    ),
    "dpo": dict(batch_size=16, epochs=1),
}
for stage in TINY:
    TINY[stage] |= dict(save_every=2, eval_every=3, device="cpu", bf16=False)
    TINY[stage] |= {} if stage == "pretrain" else dict(max_new_tokens=12)


def as_options(options):
    """A command line's words for options {name: value}."""
    switches = {True: "--{}", False: "--no-{}"}
    return [
        switches[value].format(name) if isinstance(value, bool) else f"--{name}={value}"
        for name, value in options.items()
    ]


def run(stage, out, **changes):
    """Run a stage, without what would take longer than all the rest: curve.png is empty, and
    pretraining is validated on 300 documents."""
    script = SCRIPTS[stage]
    with (
        mock.patch("data.run.plot", lambda rows, panels, path, unit: path.write_bytes(b"")),
        mock.patch("train_pretrain.documents", lambda n, seed: documents(min(n, 300), seed)),
    ):
        return script.main(script.Config(out=str(out), **{**TINY[stage], **changes}))


def interrupt(stage, out, monkeypatch, **changes):
    """Run a stage and press Ctrl-C in its third step, which is finished, saved, and the last."""
    log = Run.log

    def press_ctrl_c(self, step, **numbers):
        log(self, step, **numbers)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", press_ctrl_c)
        with pytest.raises(SystemExit) as stopped:
            run(stage, out, **changes)
    assert stopped.value.code == 130


class Draw(NamedTuple):
    """One call of a function of data/town that draws documents, tasks or demonstrations."""

    stage: str  # that has called it
    seed: str  # as it seeds the generator, such as "tasks ppo 0"
    tasks: list  # (split, text of the conversation that is to be answered) of each task


@dataclass
class SecondTurn(town_tasks.Task):
    """A task whose prompt comes after another question and its answer, as texts."""

    before: tuple[str, str]

    @property
    def messages(self):
        roles = ("user", "assistant", "user")
        return [{"role": r, "content": x} for r, x in zip(roles, (*self.before, self.prompt))]


def conversation(task):
    """What is said before the answer to a task: the texts of all turns, as ids are decoded."""
    return " ".join(message["content"] for message in task.messages)


def run_chain(out):
    """Run all five stages, and what stands between them, into a folder.

    Returns what they have drawn, a list of `Draw`, and what they have learned from: stage ->
    sequences of ids that a model has read with gradients.
    """
    draws, learned = [], {}
    draw, forward = town_tasks.draw, GPT.forward

    def noted_random(seed):
        draws.append(Draw(stage, seed, []))
        return random.Random(seed)

    def noted_draw(name, rng, split="train", new=""):
        task = draw(name, rng, split, new)
        draws[-1].tasks.append((split, conversation(task)))
        return task

    def noted_forward(self, idx, *rest):
        if torch.is_grad_enabled():
            learned.setdefault(stage, set()).update(map(tuple, idx.tolist()))
        return forward(self, idx, *rest)

    with (
        mock.patch("data.town.tasks.draw", noted_draw),
        mock.patch("data.town.tasks.random", mock.Mock(Random=noted_random)),
        mock.patch("data.town.documents.random", mock.Mock(Random=noted_random)),
        mock.patch("gpt.GPT.forward", noted_forward),
    ):
        for stage in ("pretrain", "sft", "preferences", "rm", "ppo", "dpo"):
            if stage == "preferences":
                pairs = dict(pairs=400, max_new_tokens=12, device="cpu")
                preferences.main(preferences.Config(out=str(out), **pairs))
            else:
                run(stage, out)
    return draws, learned


def prepare(chain, out, stage=""):
    """Copy into a folder what this stage needs (without one: everything up to the reward model)."""
    for name in ("pretrain", "sft", "rm"):
        if name != stage:
            shutil.copytree(chain / name, out / name)
    shutil.copy(chain / "preferences.jsonl", out)


def make_ends_likely(folder):
    """Change the model in a folder so that even more of its responses end."""
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    weights, end = checkpoint["model"], load_tokenizer(checkpoint["tokenizer"]).end
    weights["ln_f.bias"] += 4 * weights["wte.weight"][end] / weights["wte.weight"][end].norm() ** 2
    torch.save(checkpoint, folder / "ckpt.pt")


def same(a, b):
    """Two checkpoints hold the same numbers, bit for bit."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
