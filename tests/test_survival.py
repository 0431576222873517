"""Runs that are killed, stopped or meet a nan: nothing is lost, and --resume changes no bit."""

import os
import pickle
import random
import signal
import sys
import time

import pytest
import torch
from tiny_runs import SCRIPTS, interrupt, prepare, run, same

import gpt
import train_pretrain
from data.run import run_script
from gpt import InputError


def in_a_child(work) -> int:
    """The process id of a copy of this process that does some work and ends."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return child


@pytest.mark.thorough
@pytest.mark.parametrize("stage", SCRIPTS)
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(chain, tmp_path, stage):
    """Four times each: twice at a random moment, twice in the middle of a save."""
    prepare(chain, tmp_path, stage)
    folder, rng = tmp_path / stage, random.Random(stage)
    unfinished = folder / "unfinished" / "ckpt.pt"
    kills = 0

    def slow_save(checkpoint, path):  # half of the file is there for a while
        save(checkpoint, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        time.sleep(0.2)
        path.write_bytes(whole)

    def work():
        if kills >= 2:
            torch.save = slow_save
        run(stage, tmp_path, save_every=1, resume=unfinished.exists())

    save, started = torch.save, time.monotonic()
    run(stage, tmp_path, save_every=1)  # to know how long it takes, and to have an earlier result
    seconds = time.monotonic() - started
    while kills < 4:
        child = in_a_child(work)
        if kills < 2:
            time.sleep(rng.uniform(0, seconds))
        else:
            saves = rng.randint(1, 2)  # let some saves pass
            while saves and os.waitpid(child, os.WNOHANG) == (0, 0):
                if list(folder.glob("**/ckpt.pt.tmp")):
                    saves -= 1
                    while saves and list(folder.glob("**/ckpt.pt.tmp")):
                        time.sleep(0.01)
                time.sleep(0.01)
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            status = 0
        kills += os.WIFSIGNALED(status)
        if unfinished.exists():
            gpt.load_checkpoint(unfinished)
        assert same(folder, chain / stage)  # the earlier result, or already the new one
    run(stage, tmp_path, save_every=1, resume=unfinished.exists())
    assert same(folder, chain / stage)
    for name in ("log.csv", "samples.txt"):
        assert (folder / name).read_bytes() == (chain / stage / name).read_bytes()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_nan_in_a_gradient_stops_the_run_and_leaves_the_last_checkpoint(
    chain, tmp_path, monkeypatch, stage
):
    prepare(chain, tmp_path, stage)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, largest):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 9:  # in the second iteration of PPO, which has two steps for two models
            parameters[3].grad[0] = float("nan")
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    steps = {"pretrain": dict(steps=20), "ppo": dict(iterations=8)}.get(stage, dict(epochs=4))
    with pytest.raises(InputError, match=f"{stage}: .* is nan at step .* a lower learning rate"):
        run(stage, tmp_path, save_every=1 if stage == "ppo" else 4, **steps)
    checkpoint = gpt.load_checkpoint(tmp_path / stage / "unfinished" / "ckpt.pt")
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_run_whose_folder_has_moved_is_resumed_there(chain, tmp_path, monkeypatch):
    """Its options name files of the folder of all runs: they have moved as well."""
    prepare(chain, tmp_path / "before", "sft")
    interrupt("sft", tmp_path / "before", monkeypatch)
    (tmp_path / "before").rename(tmp_path / "after")
    elsewhere = str(chain / "pretrain" / "ckpt.pt")
    with pytest.raises(InputError, match="the run to resume had --init .*before/pretrain.*, not "):
        run("sft", tmp_path / "after", init=elsewhere, resume=True)
    run("sft", tmp_path / "after", resume=True)
    assert same(tmp_path / "after" / "sft", chain / "sft")


def test_nothing_to_resume_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="no run to resume in .*unfinished.*leave it out"):
        run("pretrain", tmp_path, resume=True)


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file where a folder should be")
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}/out", "--documents=300"])
    with pytest.raises(InputError, match="cannot read or write: .*out"):
        run_script(train_pretrain.main, train_pretrain.Config)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = {"stage": Trap(), "model": {}, "model_config": {}}
    torch.save(trap, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(trap))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(InputError, match=f"{name} is not a checkpoint of this project"):
            gpt.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
