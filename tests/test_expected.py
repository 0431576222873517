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
from tiny_runs import ROOT, SCRIPTS

import train_ppo
import train_pretrain
import train_sft
from data.check import CAUSES, FOLDER, SLACK, Check
from data.experiments.expected import make_bands, read_log
from data.experiments.jobs import plant
from gpt import InputError

BUGS = {  # stage: (file, right, wrong), and the curves that may tell first
    "pretrain": ("gpt.py", "is_causal=mask is None)", "is_causal=False)", ["loss"]),
    "sft": ("data/chat.py", "system + text), 0)", "system + text), 1)", ["loss"]),
    "rm": ("train_rm.py", "(chosen_scores - rejected", "(rejected_scores - chosen", ["accuracy"]),
    "ppo": ("train_ppo.py", "rewards = -beta *", "rewards = beta *", ["kl", "gold"]),
    "dpo": (
        "train_dpo.py",
        "view_as(target).sum(1)",
        "view_as(target).sum(1) / mask.sum(1)",
        ["grad_norm"],
    ),
}


def bands_of(stage):
    with open(FOLDER / f"{stage}.csv") as file:
        return list(csv.DictReader(file))


def a_log(stage, shift=0.0):
    """The log of a run that is in the middle of every band, plus a shift in units of width."""
    rows = {}
    for band in bands_of(stage):
        low, high, width = (float(band[name]) for name in ("low", "high", "width"))
        row = rows.setdefault(int(band["last"]), {"step": int(band["last"])})
        row[band["column"]] = (low + high) / 2 + shift * width
    return [rows[step] for step in sorted(rows)]


def look_at(check, rows):
    """All that check says while a log grows row by row."""
    said = []
    for i, row in enumerate(rows):
        said += check.look(rows[: i + 1], row["step"])
    return said


@pytest.mark.parametrize("stage", CAUSES)
def test_a_run_in_the_middle_of_every_band_is_correct(stage):
    check = Check(stage, train_pretrain.Config())
    assert look_at(check, a_log(stage)) == []
    assert "within their bands" in check.summary()


@pytest.mark.parametrize("stage", CAUSES)
@pytest.mark.parametrize("shift, side", [(SLACK + 1.1, 0), (-SLACK - 1.1, 1)])
def test_a_curve_beyond_its_band_is_named_once_with_its_cause(stage, shift, side):
    check = Check(stage, train_pretrain.Config())
    said = look_at(check, a_log(stage, shift))
    assert len(said) == len(check.off) == len(CAUSES[stage])
    for column, sentence in zip(check.off, said):
        assert f"check: {column} of steps" in sentence
        assert ("above" if side == 0 else "below") in sentence
        assert sentence.endswith(CAUSES[stage][column][side])


def test_a_curve_that_was_not_measured_is_not_off():
    rows = [{name: x for name, x in row.items() if name != "gold"} for row in a_log("ppo", 9)]
    check = Check("ppo", train_ppo.Config())
    look_at(check, rows)
    assert "gold" not in check.off and "kl" in check.off


def test_bands_are_the_range_over_runs_of_the_means_over_steps():
    logs = [[{"step": step, "loss": step + seed} for step in range(100)] for seed in (0, 1, 4)]
    logs = [[{**row, "val_loss": 0.0, "grad_norm": 0.0} for row in rows] for rows in logs]
    bands = make_bands("pretrain", logs)
    assert [b["first"] for b in bands[:3]] == [0, 1, 3] and bands[12]["last"] == 99
    for band in bands[:13]:
        middle = (band["first"] + band["last"]) / 2
        assert (band["low"], band["high"], band["width"]) == (middle, middle + 4, 4)
    assert all(band["width"] == 0.01 for band in bands[13:])


def test_the_bands_are_as_long_as_the_default_runs():
    """Whoever changes the number of steps has to make new bands."""
    assert max(int(b["last"]) for b in bands_of("pretrain")) == train_pretrain.Config().steps - 1
    assert max(int(b["last"]) for b in bands_of("ppo")) == train_ppo.Config().iterations - 1
    sft = train_sft.Config()
    steps = sft.epochs * math.ceil(sft.demonstrations / sft.batch_size)
    assert abs(max(int(b["last"]) for b in bands_of("sft")) - steps) < 0.02 * steps


def test_options_that_change_the_curves_are_named(capsys):
    Check("ppo", train_ppo.Config(seed=7, out="elsewhere", resume=True))
    assert capsys.readouterr().out == ""
    Check("ppo", train_ppo.Config(beta=0.0))
    assert capsys.readouterr().out == "check: the bands are of --beta 0.15, not of 0.0\n"


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


@pytest.mark.thorough
@pytest.mark.parametrize("stage", BUGS)
def test_check_speaks_on_a_planted_bug(stage, tmp_path, request):
    *edit, curves = BUGS[stage]
    plant(tuple(edit), tmp_path / "edited")
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
    check = Check(stage, train_pretrain.Config())
    assert look_at(check, read_log(chain / stage / "log.csv")) == []
