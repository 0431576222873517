"""Runs that are killed, stopped, crowded or meet a nan: nothing is lost, and --resume changes no
bit."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from tiny_runs import ROOT, SCRIPTS, TINY, as_options, interrupt, prepare, run, same

import data.evaluate
import data.preferences
import data.run
import gpt
import train_pretrain
from data.run import Run, acquire_lock, replace_folder, run_script
from data.town.tasks import TRAIN_KINDS
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


def contents(folder) -> dict:
    """What is in a folder: path -> bytes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {p.relative_to(folder): p.read_bytes() for p in files}


# ---------------------------------------------------------------------------------------------
# Killed


def killed_at_line(number, work) -> bool:
    """Do work in a child that is killed at this line of data/run.py or gpt.py; False if it ends
    before."""

    def count(frame, event, _):
        nonlocal number
        if frame.f_code.co_filename not in (data.run.__file__, gpt.__file__):
            return None
        if event == "line":
            number -= 1
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return count

    def traced():
        sys.settrace(count)
        work()

    _, status = os.waitpid(in_a_child(traced), 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_line_of_its_end_a_run_leaves_the_old_results_or_the_new_ones(
    chain, tmp_path, monkeypatch
):
    """At its very end all results change at once: no log of one run beside the model of another."""
    prepare(chain, tmp_path, "sft")
    run("sft", tmp_path, lr=0.0)
    (tmp_path / "sft" / "notes.txt").write_text("of the user")
    old, finish = contents(tmp_path / "sft"), Run.finish
    kinds = {"old": 0, "new": 0}

    def kill_at_every_line(self, *args, **extra):
        shutil.copytree(tmp_path, tmp_path.with_name("before"))
        for line in range(1, 1000):
            was_killed = killed_at_line(line, lambda: finish(self, *args, **extra))
            now = contents(tmp_path / "sft")
            now.pop(type(next(iter(now)))("resume.pt"), None)  # the last file to go
            if now != old:
                assert now.keys() == old.keys()
                assert all(now[p] != old[p] for p in now if p.name in ("ckpt.pt", "log.csv"))
                assert same(tmp_path / "sft", chain / "sft")
            elif line % 25 == 0:  # of these moments a few: it can be resumed
                assert same_after_resuming(tmp_path)
            kinds["old" if now == old else "new"] += 1
            shutil.rmtree(tmp_path)
            shutil.copytree(tmp_path.with_name("before"), tmp_path)
            if not was_killed:
                break

    def same_after_resuming(folder):
        with monkeypatch.context() as patch:
            patch.setattr(Run, "finish", finish)
            child = in_a_child(lambda: run("sft", folder, resume=True))
            assert os.waitpid(child, 0)[1] == 0
        return same(folder / "sft", chain / "sft")

    monkeypatch.setattr(Run, "finish", kill_at_every_line)
    run("sft", tmp_path)
    assert kinds["old"] > 20 and kinds["new"] > 2


@pytest.mark.thorough
@pytest.mark.parametrize("stage", SCRIPTS)
def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(chain, tmp_path, stage):
    """Six times each: three times at a random moment, three times in the middle of a save."""
    prepare(chain, tmp_path, stage)
    folder, rng = tmp_path / stage, random.Random(stage)
    resumable = tmp_path / "unfinished" / stage / "resume.pt"
    kills = 0

    def slow_save(checkpoint, file):  # half of the file is there for a while
        save(checkpoint, file)
        path = os.fspath(getattr(file, "name", file))
        size = os.path.getsize(path)
        whole = open(path, "rb").read()
        os.truncate(path, size // 2)
        (tmp_path / "saving").touch()
        time.sleep(0.2)
        (tmp_path / "saving").unlink()
        with open(path, "r+b") as half:
            half.write(whole)

    def work():
        if kills >= 3:
            torch.save = slow_save
        run(stage, tmp_path, save_every=1, resume=resumable.exists())

    save, started = torch.save, time.monotonic()
    run(stage, tmp_path, save_every=1)  # to know how long it takes, and to have an earlier result
    seconds = time.monotonic() - started
    while kills < 6:
        child = in_a_child(work)
        if kills < 3:
            time.sleep(rng.uniform(0, seconds))
        else:
            saves = rng.randint(1, 2)  # let some saves pass
            while saves and os.waitpid(child, os.WNOHANG) == (0, 0):
                if (tmp_path / "saving").exists():
                    saves -= 1
                    while saves and (tmp_path / "saving").exists():
                        time.sleep(0.01)
                time.sleep(0.01)
        try:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            status = 0
        kills += os.WIFSIGNALED(status)
        (tmp_path / "saving").unlink(missing_ok=True)
        if resumable.exists():
            gpt.load_checkpoint(resumable)
        assert same(folder, chain / stage)  # the earlier result, or already the new one
    run(stage, tmp_path, save_every=1, resume=resumable.exists())
    assert same(folder, chain / stage)
    for name in ("log.csv", "samples.txt"):
        assert (folder / name).read_bytes() == (chain / stage / name).read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["preferences", "evaluate"])
def test_killed_at_any_moment_each_file_of_preferences_and_report_is_whole(chain, tmp_path, what):
    """It is the old one or the new one. The files of a report take their places one by one."""
    out = shutil.copytree(chain, tmp_path / "out")
    module, names, options = {
        "preferences": (data.preferences, ["preferences.jsonl"], dict(pairs=60)),
        "evaluate": (
            data.evaluate,
            list(data.evaluate.REPORT),
            dict(prompts=2 * len(TRAIN_KINDS), n=2),
        ),
    }[what]

    def work(seed):
        module.main(module.Config(out=str(out), seed=seed, max_new_tokens=20, **options))

    def found():
        return [(out / name).read_bytes() for name in names]

    assert os.waitpid(in_a_child(lambda: work(1)), 0)[1] == 0
    new, started = found(), time.monotonic()
    assert os.waitpid(in_a_child(lambda: work(0)), 0)[1] == 0
    old, seconds = found(), time.monotonic() - started
    for kill in range(6):
        child = in_a_child(lambda: work(1))
        time.sleep(random.Random(kill).uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for name, here, *whole in zip(names, found(), old, new):
            assert here in whole, name


@pytest.fixture(params=["Linux", "elsewhere"])
def system(request, monkeypatch):
    """Linux can swap two folders at once; in other systems the C library has no renameat2."""
    if request.param == "elsewhere":
        monkeypatch.setattr(data.run.sys, "platform", "darwin")
    elif sys.platform != "linux":
        pytest.skip("this is not Linux")


def test_a_folder_takes_the_place_of_another_and_keeps_what_only_that_one_had(tmp_path, system):
    old, new = tmp_path / "run", tmp_path / "unfinished"
    for folder, files in ((old, "a b"), (new, "b c")):
        folder.mkdir()
        for name in files.split():
            (folder / name).write_text(f"{name} of {folder.name}")
    (old / "mine").mkdir()
    (old / "mine" / "d").write_text("d")
    (old / "link").symlink_to("nowhere")
    replace_folder(old, new)
    assert sorted(tmp_path.iterdir()) == [old]
    assert {str(path): text.decode() for path, text in contents(old).items()} == {
        "a": "a of run",
        "b": "b of unfinished",
        "c": "c of unfinished",
        "mine/d": "d",
    }
    assert os.readlink(old / "link") == "nowhere"


def test_killed_between_two_renames_the_old_results_are_back_in_the_next_run(chain, tmp_path):
    """Where two folders cannot be swapped at once. The next run of that name mends it."""
    prepare(chain, tmp_path, "")
    aside = tmp_path / "unfinished" / ".sft.old"
    aside.parent.mkdir()
    (tmp_path / "sft").rename(aside)
    with pytest.raises(InputError, match="no run to resume"):
        run("sft", tmp_path, resume=True)
    assert same(tmp_path / "sft", chain / "sft") and not aside.exists()


def test_a_run_in_a_linked_folder_stays_on_that_disk(chain, tmp_path):
    prepare(chain, tmp_path, "sft")
    (tmp_path / "large_disk" / "sft").mkdir(parents=True)
    (tmp_path / "sft").symlink_to(tmp_path / "large_disk" / "sft")
    run("sft", tmp_path)
    assert (tmp_path / "sft").is_symlink() and same(tmp_path / "large_disk" / "sft", chain / "sft")


def test_a_damaged_result_forbids_no_new_one(chain, tmp_path):
    prepare(chain, tmp_path)
    (tmp_path / "sft" / "ckpt.pt").write_bytes(b"half of a checkpoint")
    run("sft", tmp_path)
    assert same(tmp_path / "sft", chain / "sft")


# ---------------------------------------------------------------------------------------------
# Two at once


def test_the_second_of_two_runs_of_one_name_is_told_who_is_there(chain, tmp_path):
    prepare(chain, tmp_path, "sft")
    release = acquire_lock(tmp_path / "unfinished" / "sft")
    before = contents(tmp_path)

    def second():
        with pytest.raises(InputError, match=f"sft .process {os.getppid()} on .*, since "):
            run("sft", tmp_path)

    assert os.waitpid(in_a_child(second), 0)[1] == 0
    assert contents(tmp_path) == before
    assert os.waitpid(in_a_child(lambda: run("sft", tmp_path, name="mine")), 0)[1] == 0
    run("sft", tmp_path)  # in this very process, as in a notebook whose first try has failed
    release()
    assert os.waitpid(in_a_child(lambda: run("sft", tmp_path)), 0)[1] == 0
    assert not (tmp_path / "unfinished" / "sft").exists()


def test_a_process_that_was_killed_locks_nobody_out(tmp_path):
    def work():
        acquire_lock(tmp_path / "unfinished" / "sft")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_a_child(work), 0)
    acquire_lock(tmp_path / "unfinished" / "sft")()


# ---------------------------------------------------------------------------------------------
# What a run was made from


@pytest.mark.parametrize(
    "stage, what, message",
    [
        ("sft", "pretrain", "the checkpoint of --init"),
        ("rm", "sft", "the checkpoint of --init"),
        ("rm", "preferences.jsonl", "the data"),
        ("ppo", "sft", "the checkpoint of --init"),
        ("ppo", "rm", "the reward model"),
        ("dpo", "preferences.jsonl", "the data"),
    ],
)
def test_a_run_is_not_resumed_on_something_else_than_it_began_with(
    chain, tmp_path, monkeypatch, stage, what, message
):
    prepare(chain, tmp_path, "" if what == "rm" else stage)
    interrupt(stage, tmp_path, monkeypatch)
    if what.endswith(".jsonl"):
        lines = (tmp_path / what).read_text().splitlines()
        (tmp_path / what).write_text("\n".join(lines[:-1]) + "\n")
    else:  # another model, as if that stage had been trained again
        checkpoint = torch.load(tmp_path / what / "ckpt.pt", weights_only=True)
        next(iter(checkpoint["model"].values())).mul_(1.01)
        torch.save(checkpoint, tmp_path / what / "ckpt.pt")
    with pytest.raises(InputError, match=f"--resume: {message} has changed since the run began"):
        run(stage, tmp_path, resume=True)
    assert (tmp_path / "unfinished" / stage / "resume.pt").exists()  # nothing is lost


def test_pretraining_is_not_resumed_on_a_text_that_has_grown(tmp_path, monkeypatch):
    """Its tokenizer would be learned again, and mean other tokens by the old weights' numbers."""
    text = "".join(f"Line {i} of some book, and {i} more.\n" for i in range(800))
    book = tmp_path / "book.txt"
    book.write_text(text)
    interrupt("pretrain", tmp_path, monkeypatch, data=str(book), context=48)
    book.write_text(text + "One more zebra zone, zigzag zoo. " * 20)
    with pytest.raises(InputError, match="--resume: the data has changed"):
        run("pretrain", tmp_path, data=str(book), context=48, resume=True)
    book.write_text(text)
    run("pretrain", tmp_path, data=str(book), context=48, resume=True)


def test_ppo_names_a_reward_model_of_another_sft_model(chain, tmp_path, capsys):
    prepare(chain, tmp_path)
    run("ppo", tmp_path, iterations=1)
    assert "another model" not in capsys.readouterr().out
    run("sft", tmp_path, name="other", seed=1)
    capsys.readouterr()
    run("ppo", tmp_path, iterations=1, init=str(tmp_path / "other" / "ckpt.pt"))
    assert "rm/ckpt.pt was trained from another model than" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# A full disk


def on_a_small_disk(folder, size_kb, command):
    """Run a command of ours with a file system of this size at `folder`, filled by `before`."""
    script = (
        f"mount -t tmpfs -o size={size_kb}k none {folder} && cp -r {folder}.before/. {folder} && "
        f"{' '.join(map(str, command))}; code=$?; cp -r {folder}/. {folder}.after; exit $code"
    )
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True
    )


def small_disks_can_be_made() -> bool:
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not small_disks_can_be_made(), reason="needs Linux's user namespaces")
@pytest.mark.parametrize(
    "program",
    ["sft", pytest.param("preferences", marks=pytest.mark.thorough)]
    + [pytest.param(x, marks=pytest.mark.thorough) for x in ("rm", "ppo", "evaluate", "export")],
)
def test_a_full_disk_says_so_and_leaves_the_earlier_results(chain, tmp_path, program):
    """A real one, and the real torch, which speaks of inline_container.cc."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shutil.copytree(chain, tmp_path / "disk.before" / "out")
    (tmp_path / "disk.after").mkdir()
    before = contents(tmp_path / "disk.before")
    out = f"--out={disk}/out"
    command = {
        "preferences": ["-m", "data.preferences", out, "--pairs=3000", "--max_new_tokens=20"],
        "evaluate": ["-m", "data.evaluate", out, "--prompts=46", "--n=2", "--max_new_tokens=4"],
        "export": ["gpt.py", out, f"--export={disk}/exported"],
    }.get(program)
    if command is None:
        command = [f"train_{program}.py", out, *as_options(TINY[program])]
    used = sum(-(-len(data) // 4096) * 4 for data in before.values())  # in pages of 4 KiB
    room = {"preferences": 60, "evaluate": 60, "export": 80}.get(program, 200)
    result = on_a_small_disk(disk, used + room, [sys.executable, *command])
    assert result.returncode == 1
    assert "No space left on device" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    after = contents(tmp_path / "disk.after")
    assert {path: after[path] for path in before} == before


# ---------------------------------------------------------------------------------------------
# Stopped, moved, damaged


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
    checkpoint = gpt.load_checkpoint(tmp_path / "unfinished" / stage / "resume.pt")
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_time_before_an_interruption_counts(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path, "sft")
    init = Run.__init__

    def begun_long_ago(self, *args, **options):
        init(self, *args, **options)
        self.started -= 1000

    monkeypatch.setattr(Run, "__init__", begun_long_ago)
    interrupt("sft", tmp_path, monkeypatch)
    run("sft", tmp_path, resume=True)
    assert json.loads((tmp_path / "sft/cost.json").read_text())["seconds"] > 2000


def test_a_new_run_forgets_the_one_that_was_interrupted(chain, tmp_path, monkeypatch, capsys):
    prepare(chain, tmp_path, "sft")
    interrupt("sft", tmp_path, monkeypatch)
    assert re.search(r"stopped after step 3\.", capsys.readouterr().out)
    assert (tmp_path / "unfinished/sft/resume.pt").exists()
    with mock.patch.object(Run, "log", side_effect=KeyError), pytest.raises(KeyError):
        run("sft", tmp_path)
    assert not (tmp_path / "unfinished/sft/resume.pt").exists()


def test_a_run_from_before_an_option_existed_is_resumed_with_its_default(
    chain, tmp_path, monkeypatch
):
    prepare(chain, tmp_path, "sft")
    interrupt("sft", tmp_path, monkeypatch)
    path = tmp_path / "unfinished/sft/resume.pt"
    checkpoint = gpt.load_checkpoint(path)
    del checkpoint["train_config"]["grad_clip"]
    gpt.save_checkpoint(path, checkpoint)
    run("sft", tmp_path, resume=True)
    assert same(tmp_path / "sft", chain / "sft")


def test_ctrl_c_saves_the_step_even_if_nobody_can_be_told(chain, tmp_path, monkeypatch):
    prepare(chain, tmp_path, "sft")
    write = os.write

    def closed(file, text):
        if file == 2:
            raise OSError("Bad file descriptor")
        return write(file, text)

    monkeypatch.setattr(os, "write", closed)
    interrupt("sft", tmp_path, monkeypatch)
    assert (tmp_path / "unfinished/sft/resume.pt").exists()


def test_after_a_run_signals_do_what_they_did_before(chain, tmp_path):
    prepare(chain, tmp_path, "sft")
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        handlers = [signal.getsignal(s) for s in before]
        run("sft", tmp_path)
        assert [signal.getsignal(s) for s in before] == handlers
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_a_run_whose_folder_has_moved_is_resumed_there(chain, tmp_path, monkeypatch):
    """Where a file lies does not matter, only what is in it."""
    prepare(chain, tmp_path / "before", "sft")
    interrupt("sft", tmp_path / "before", monkeypatch)
    (tmp_path / "before").rename(tmp_path / "after")
    elsewhere = str(chain / "pretrain" / "ckpt.pt")
    run("sft", tmp_path / "after", init=elsewhere, resume=True)
    assert same(tmp_path / "after" / "sft", chain / "sft")


def test_nothing_to_resume_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="no run to resume in .*unfinished.*without --resume"):
        run("pretrain", tmp_path, resume=True)


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file where a folder should be")
    monkeypatch.setattr(sys, "argv", ["x", f"--out={tmp_path}/out", "--documents=300"])
    with pytest.raises(SystemExit, match="cannot read or write: .*out"):
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
