"""The five scripts with options so small that each takes a second or two."""

import random
from pathlib import Path

import torch

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from data.chat import Reply
from data.preferences import annotate, write_rows
from data.tasks import demonstrate, draw_tasks

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


def run_chain(out):
    """Run all five stages into a folder."""
    for stage in SCRIPTS:
        if stage == "rm":  # the tiny model never ends a reply, so the crowd writes the pairs
            rng = random.Random(0)
            tasks = draw_tasks(250, "pairs")
            pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
            write_rows(annotate(tasks, pairs, tau=0.5, flip=0.0, seed=0), out / "preferences.jsonl")
        run(stage, out)


def same(a, b):
    """Two checkpoints hold the same numbers, bit for bit."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
