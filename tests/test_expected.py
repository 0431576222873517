"""--check: silent on correct runs, and it speaks when a bug is planted.

The bands are of default runs, minutes each, so only the beginning of pretraining is run here. With
a folder in which the README's commands have run with a seed of its own, all five stages are:

    python -m pytest --thorough tests/test_expected.py --chain out
"""

import csv
import math
import os
import subprocess
import sys

import pytest
from tiny_runs import ROOT, SCRIPTS, interrupt
from tiny_runs import run as run_tiny

import train_ppo
import train_pretrain
import train_rm
import train_sft
from data.check import CAUSES, FOLDER, Check, changed_options
from data.experiments import expected
from data.experiments.bugs import BUGS, plant
from data.experiments.expected import make_bands, read_log
from data.experiments.plots import write_csv
from data.town.demonstrations import demonstrations
from gpt import InputError

PLANTED = {  # stage: a bug, and the curves that may tell first
    "pretrain": ("a position sees what follows", ["loss"]),
    "sft": ("prompts in the loss of SFT", ["loss"]),
    "rm": ("the reward model prefers rejected responses", ["accuracy"]),
    "ppo": ("KL penalty with the wrong sign", ["proxy", "kl", "gold"]),
    "dpo": ("means instead of sums under DPO", ["grad_norm"]),
}


def bands_of(stage):
    with open(FOLDER / f"{stage}.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def bands(tmp_path, monkeypatch):
    """Hand-made bands of SFT: loss 2 to 3 in steps 0 and 1 (width 1), then 1 to 1.5 (0.5)."""
    lines = ["column,first,last,low,high,width", "loss,0,1,2.0,3.0,1.0", "loss,2,4,1.0,1.5,0.5"]
    lines += ["grad_norm,0,1,0.1,0.2,0.1", "val_loss,2,4,0.5,0.6,0.1"]
    (tmp_path / "sft.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("data.check.FOLDER", tmp_path)


def look(losses, **others):
    """What a check says of a run of SFT with these losses, step by step, and at its end."""
    check, rows, said = Check("sft", train_sft.Config()), [], []
    for step, loss in enumerate(losses):
        rows.append({"step": step, "loss": loss, **others})
        said += check.look(rows, step)
    return said, check.summary()


@pytest.mark.parametrize("last", [3.0 * 0.5 + 1.49, 1.01 - 3.0 * 0.5])
def test_a_curve_within_three_widths_of_its_band_is_correct(bands, last):
    """The mean over a window counts: 5.9 of steps 0 and 1, where 6.0 would just do."""
    assert look([4.9, 6.9, last - 0.5, last, last + 0.5], grad_norm=0.15, val_loss=0.55) == (
        [],
        "check: all 3 curves are within their bands",
    )


def test_a_curve_beyond_four_widths_is_named_once_with_its_side_and_a_cause(bands):
    above, below = CAUSES["sft"]["loss"]
    said, end = look([8.0, 6.2, 9.0, 9.0, 9.0], grad_norm=0.15)
    assert said == [
        f"check: loss of steps 0 to 1 is 7.1, that is 4.1 above the band (2 to 3): {above}"
    ]
    assert end == "check: 1 of 3 curves were off: loss"
    said, _ = look([2.0, 2.0, -1.1, -1.1, -1.1], grad_norm=0.15)
    assert said == [
        f"check: loss of steps 2 to 4 is -1.1, that is 2.1 below the band (1 to 1.5): {below}"
    ]
    assert above != below and look([2.5], grad_norm=0.1)[1] == (
        "check: the run ended before there was a curve to compare"
    )


def test_a_curve_that_was_not_measured_is_not_off(bands):
    assert look([2.5] * 2) == ([], "check: 1 of 3 curves are within their bands")
    said, end = look([2.5, 2.5, 1.2, 1.2, 1.2], grad_norm=9.0)
    assert len(said) == 1 and end == "check: 1 of 3 curves were off: grad_norm"


@pytest.mark.parametrize("stage", CAUSES)
def test_every_curve_with_a_cause_has_bands_that_follow_each_other_to_the_end(stage):
    bands = {}
    for band in bands_of(stage):
        bands.setdefault(band["column"], []).append(band)
        low, high, width = (float(band[name]) for name in ("low", "high", "width"))
        assert low <= high and width >= max(0.9 * (high - low), 0.01)
    assert bands.keys() == CAUSES[stage].keys()
    ends = {max(int(band["last"]) for band in some) for some in bands.values()}
    assert min(ends) > 0.85 * max(ends)  # runs have some steps more or less, so the last one varies
    for some in bands.values():
        for one, other in zip(some, some[1:]):
            assert int(one["first"]) <= int(one["last"]) < int(other["first"])


def test_bands_are_the_range_over_runs_of_the_means_over_steps():
    logs = [[{"step": step, "loss": step + seed} for step in range(100)] for seed in (0, 1, 4)]
    logs = [[{**row, "val_loss": 0.0, "grad_norm": 0.0} for row in rows] for rows in logs]
    bands = make_bands("pretrain", logs)
    assert [b["first"] for b in bands[:3]] == [0, 1, 3] and bands[12]["last"] == 99
    for band in bands[:13]:
        middle = (band["first"] + band["last"]) / 2
        assert (band["low"], band["high"], band["width"]) == (middle, middle + 4, 4)
    assert all(band["width"] == 0.01 for band in bands[13:])


def test_bands_of_every_stage_are_made_from_the_logs_of_finished_runs(tmp_path, monkeypatch):
    for run in (1, 5):
        for stage, causes in CAUSES.items():
            (tmp_path / f"run{run}" / stage).mkdir(parents=True)
            row = {name: run + i for i, name in enumerate(causes)}
            rows = [{"step": step, **row} for step in range(100)]
            write_csv(rows, tmp_path / f"run{run}" / stage / "log.csv")
    folders = [str(tmp_path / name) for name in ("run1", "run5", "bands")]
    monkeypatch.setattr(sys, "argv", ["expected", *folders[:2], "--to", folders[2]])
    expected.main()
    monkeypatch.setattr("data.check.FOLDER", tmp_path / "bands")
    for stage, causes in CAUSES.items():
        bands = Check(stage, SCRIPTS[stage].Config()).bands
        ends = [(band["column"], band["low"], band["high"], band["width"]) for band in bands[::13]]
        assert ends == [(name, f"{1 + i}", f"{5 + i}", "4") for i, name in enumerate(causes)]


def test_the_bands_are_as_long_as_the_default_runs():
    """Whoever changes the number of steps has to make new bands."""
    assert max(int(b["last"]) for b in bands_of("pretrain")) == train_pretrain.Config().steps - 1
    assert max(int(b["last"]) for b in bands_of("ppo")) == train_ppo.Config().iterations - 1
    sft = train_sft.Config()
    conversations = len(demonstrations(sft.demonstrations // 8, seed=0)) * 8
    steps = sft.epochs * math.ceil(conversations / sft.batch_size)
    assert abs(max(int(b["last"]) for b in bands_of("sft")) - steps) < 0.02 * steps


def test_options_that_change_the_curves_are_named(capsys):
    Check("ppo", train_ppo.Config(seed=7, out="elsewhere", resume=True))
    assert capsys.readouterr().out == ""
    Check("ppo", train_ppo.Config(beta=0.0))
    assert capsys.readouterr().out == "check: the bands are of --beta 0.25, not of 0.0\n"


def test_a_path_may_be_spelled_in_many_ways(tmp_path, monkeypatch, capsys):
    """And another path is another model, even if it ends alike."""
    monkeypatch.chdir(tmp_path)
    for init in ("", "out/sft/ckpt.pt", "./out//sft/ckpt.pt", f"{tmp_path}/out/sft/ckpt.pt"):
        Check("ppo", train_ppo.Config(init=init, out="./out/"))
    pairs = f"{tmp_path}/out/preferences.jsonl"
    Check("rm", train_rm.Config(data=pairs, out="out/"))
    assert capsys.readouterr().out == ""
    Check("ppo", train_ppo.Config(init="other/out/sft/ckpt.pt"))
    said = capsys.readouterr().out
    assert said == (
        "check: the bands are of --init 'out/sft/ckpt.pt', not of 'other/out/sft/ckpt.pt'\n"
    )
    with pytest.raises(InputError, match="not those of --data"):
        Check("rm", train_rm.Config(data="other/preferences.jsonl"))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_there_are_no_bands_for_data_of_ones_own(stage):
    with pytest.raises(InputError, match="not those of --data"):
        Check(stage, SCRIPTS[stage].Config(data="mine.jsonl"))


def first_words(stage, where, out, *options):
    """Run a stage with --check until it says that a curve is off; None if it never does."""
    command = [sys.executable, "-u", f"train_{stage}.py", "--check", "--seed", "77", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [*map(str, command), *map(str, options)],
        cwd=where,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if "check: " in line and " the band (" in line:
            process.kill()
            return line
    assert process.wait() == 0, "".join(said[-20:])
    return None


@pytest.mark.thorough
def test_check_is_silent_while_a_correct_run_begins(tmp_path):
    """Seed 77 is not one of those that made the bands; the steps are as in a default run."""
    code = f"""if True:
        import train_pretrain

        class Begun(train_pretrain.Run):
            def steps(self, *args, **parts):
                for step in super().steps(*args, **parts):
                    if step == 50:
                        raise SystemExit(self.check.summary())
                    yield step

        train_pretrain.Run = Begun
        train_pretrain.main(train_pretrain.Config(seed=77, check=True, out={str(tmp_path)!r}))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "check: 2 of 3 curves are within their bands" in run.stderr
    assert "check: " not in run.stdout


def test_a_run_with_check_looks_at_every_window_also_after_resume(tmp_path, capsys, monkeypatch):
    bands = "column,first,last,low,high,width\n"
    bands += "loss,0,0,-1,-1,0.01\nloss,1,4,0,99,1\ngrad_norm,5,5,-1,-1,0.01\n"
    (tmp_path / "pretrain.csv").write_text(bands)
    monkeypatch.setattr("data.check.FOLDER", tmp_path)
    monkeypatch.setitem(CAUSES, "pretrain", dict.fromkeys(("loss", "grad_norm"), ("a", "b")))
    interrupt("pretrain", tmp_path / "o", monkeypatch, check=True)
    said = capsys.readouterr().out
    assert "--check" not in said and "check: loss of steps 0 to 0" in said
    run_tiny("pretrain", tmp_path / "o", check=True, resume=True, microbatch=2)
    said = capsys.readouterr().out
    assert "--microbatch" not in said and "check: grad_norm of steps 5 to 5" in said
    assert "check: 2 of 2 curves were off: loss, grad_norm" in said


def test_options_that_change_the_curves_no_more_than_a_seed_does_are_no_difference(tmp_path):
    free = dict(seed=7, out=str(tmp_path), name="x", device="cpu", threads=1, bf16=True)
    free |= dict(check=True, resume=True, microbatch=4, recompute=True, compile=True, save_every=9)
    assert changed_options(train_sft.Config(**free)) == {}
    assert changed_options(train_sft.Config(lr=0.5, **free)) == {"lr": (train_sft.Config().lr, 0.5)}


@pytest.mark.thorough
@pytest.mark.parametrize("stage", PLANTED)
def test_check_speaks_on_a_planted_bug(stage, tmp_path, request):
    name, curves = PLANTED[stage]
    plant(BUGS[name], tmp_path / "edited")
    options = []
    if stage != "pretrain":
        chain = request.config.getoption("--chain")
        if chain is None:
            pytest.skip("runs with --chain FOLDER, in which the README's commands have run")
        before = "pretrain" if stage == "sft" else "sft"
        options = ["--init", chain / before / "ckpt.pt"]
        if stage == "ppo":
            options += ["--rm", chain / "rm/ckpt.pt"]
        (tmp_path / "preferences.jsonl").symlink_to(chain / "preferences.jsonl")
    sentence = first_words(stage, tmp_path / "edited", tmp_path, *options)
    print(sentence)
    assert sentence and any(f"check: {curve} " in sentence for curve in curves)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", CAUSES)
def test_check_is_silent_on_a_whole_correct_run(stage, request):
    chain = request.config.getoption("--chain")
    if chain is None:
        pytest.skip("runs with --chain FOLDER, in which the README's commands have run")
    check, rows = Check(stage, SCRIPTS[stage].Config()), read_log(chain / stage / "log.csv")
    assert [said for i in range(len(rows)) for said in check.look(rows[: i + 1], i)] == []
