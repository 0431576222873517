"""The five scripts with options so small that each takes a second or two."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from data.chat import Reply
from data.files import write_rows
from data.preferences import annotate
from data.run import Run
from data.tokenizer import load_tokenizer
from data.town.tasks import demonstrate, draw_tasks

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "pretrain": train_pretrain,
    "sft": train_sft,
    "rm": train_rm,
    "ppo": train_ppo,
    "dpo": train_dpo,
}
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
    "sft": dict(
        demonstrations=120, batch_size=16, epochs=1, save_every=2, eval_every=3, max_new_tokens=4
    ),
    "rm": dict(batch_size=32, epochs=1, save_every=2, eval_every=3, max_new_tokens=4),
    "ppo": dict(
        iterations=4,
        target_kl=0.5,  # so that beta changes, and --resume has to bring it back
        rollouts=8,
        minibatch=4,
        microbatch=2,
        save_every=2,
        eval_every=3,
        max_new_tokens=4,
    ),
    "dpo": dict(batch_size=32, epochs=1, save_every=2, eval_every=3, max_new_tokens=4),
}


def run(stage, out, **changes):
    script = SCRIPTS[stage]
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


def run_chain(out):
    """Run all five stages into a folder."""
    for stage in SCRIPTS:
        if stage == "rm":  # the tiny model never ends a response, so demonstrators write the pairs
            rng = random.Random(0)
            tasks = draw_tasks(250, "pairs")
            pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
            write_rows(annotate(tasks, pairs, tau=0.5, flip=0.0, seed=0), out / "preferences.jsonl")
        run(stage, out)


def prepare(chain, out, stage=""):
    """Copy into a folder what this stage needs (without one: everything up to the reward model)."""
    for name in ("pretrain", "sft", "rm"):
        if name != stage:
            shutil.copytree(chain / name, out / name)
    shutil.copy(chain / "preferences.jsonl", out)


def make_ends_likely(folder):
    """Change the model in a folder so that many of its responses end; the tiny one's never do."""
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    weights, end = checkpoint["model"], load_tokenizer(checkpoint["tokenizer"]).end
    weights["ln_f.bias"] += 4 * weights["wte.weight"][end] / weights["wte.weight"][end].norm() ** 2
    torch.save(checkpoint, folder / "ckpt.pt")


def same(a, b):
    """Two checkpoints hold the same numbers, bit for bit."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
