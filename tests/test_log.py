"""What a run says of itself: log.csv, curve.png, cost.json, the lines on the screen."""

import csv
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_runs import SCRIPTS

import train_sft
from data.run import COLOURS, Run, plot, write_csv
from gpt import InputError


@pytest.fixture
def some_run(tmp_path):
    """A run whose progress bar keeps what it was told to show."""
    a_run = Run("sft", train_sft.Config(out=str(tmp_path)), {"loss": ["loss", "val_loss"]})

    class Bar:
        def set_postfix(self, numbers):
            a_run.shown = numbers

    a_run.bar = Bar()
    return a_run


def test_numbers_of_one_step_stand_in_one_row(some_run):
    some_run.log(0, loss=np.float32(1.5), grad_norm=2)
    some_run.log(1, loss=1.25)
    some_run.log(1, val_loss=1.75)
    assert some_run.rows == [
        {"step": 0, "loss": 1.5, "grad_norm": 2.0},
        {"step": 1, "loss": 1.25, "val_loss": 1.75},
    ]
    assert all(type(x) is float for name, x in some_run.rows[0].items() if name != "step")
    assert some_run.shown == {"loss": "1.25"}  # the first curve of every panel


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_any_number_that_is_not_finite_stops_the_run_before_it_is_in_the_log(some_run, value):
    with pytest.raises(InputError, match="sft: entropy is -?(nan|inf) at step 7, so training"):
        some_run.log(7, loss=1.0, entropy=value)
    assert some_run.rows == []


def test_a_report_is_the_last_row_of_the_columns_that_it_has(some_run, capsys):
    some_run.log(0, loss=9.0, no_end=0.75, kl=3.0)
    some_run.log(1, loss=1.23456, no_end=0.5)
    some_run.started -= 100.4  # it began earlier
    some_run.report(1, "loss", "kl", "no_end")
    assert capsys.readouterr().out == "step     2  loss 1.23  no end 0.500  100 s\n"


def test_cost_is_tokens_times_passes_and_seconds_go_on_where_a_run_is_resumed(some_run):
    some_run.count(10, passes=3)
    some_run.count(4, passes=0.5)
    assert some_run.forwards == 32
    some_run.seconds, some_run.started = 50.0, some_run.started - 7
    assert 57 <= some_run.elapsed() < 58


def test_a_csv_has_a_column_for_every_name_and_nothing_where_a_row_has_no_value(tmp_path):
    write_csv([{"step": 0, "a": 0.1}, {"step": 1, "b": 2.0}], tmp_path / "log.csv")
    with open(tmp_path / "log.csv") as file:
        assert list(csv.reader(file)) == [["step", "a", "b"], ["0", "0.1", ""], ["1", "", "2.0"]]


# ---------------------------------------------------------------------------------------------
# curve.png


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not written to a file."""
    drawn = []

    class Noted(Figure):
        def savefig(self, path, **how):
            drawn.append((self, path))

    monkeypatch.setattr("matplotlib.figure.Figure", Noted)
    return drawn


def curves(axis):
    """label -> (colour, x, y) of the curves in a panel that have a label."""
    return {
        line.get_label(): (line.get_color(), *(list(map(float, xy)) for xy in line.get_data()))
        for line in axis.lines
        if line.get_label()[0] != "_"
    }


def test_a_panel_has_a_curve_for_every_column_that_was_measured(figures, tmp_path):
    rows = [{"step": 0, "loss": 3.0, "val_loss": 4.0}, {"step": 5, "loss": 2.0, "kl": 1.0}]
    panels = {"nats": ["loss", "val_loss"], "never": ["gold"], "KL": ["gold", "kl"]}
    plot(rows, panels, tmp_path / "x.png", "iteration")
    ((figure, path),) = figures
    nats, kl = (axis for axis in figure.axes if axis.get_visible())
    assert (nats.get_ylabel(), nats.get_xlabel(), path) == ("nats", "iteration", tmp_path / "x.png")
    assert curves(nats) == {
        "loss": (COLOURS[0], [0, 5], [3, 2]),
        "val loss": (COLOURS[1], [0], [4]),
    }
    assert curves(kl) == {"kl": (COLOURS[1], [5], [1])} and kl.get_ylabel() == "KL"


def test_many_points_are_drawn_as_their_running_mean_without_the_first_steps(figures, tmp_path):
    values = [100.0, *(1.0 + i % 2 for i in range(119))]
    rows = [{"step": i, "loss": value} for i, value in enumerate(values)]
    plot(rows, {"loss": ["loss"]}, tmp_path / "x.png", "step")
    (axis,) = figures[0][0].axes
    _, x, y = curves(axis)["loss"]
    assert x == list(range(3, 120))  # the mean of 120 / 30 = 4 steps, at the last of them
    assert y == pytest.approx([sum(values[i - 3 : i + 1]) / 4 for i in range(3, 120)])
    assert axis.get_ylim() == (0.9, 2.0)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_column_that_tells_whether_a_run_goes_well_has_a_panel(chain, stage):
    with open(chain / stage / "log.csv") as file:
        columns = set(next(csv.reader(file)))
    panels = [name for names in SCRIPTS[stage].PANELS.values() for name in names]
    without = {
        "pretrain": "bits_per_byte",  # another unit of val_loss
        "sft": "",
        "rm": "accuracy",  # on pairs that it learns from
        "ppo": "score_sd best_score advantage_sd beta objective policy_loss value_loss "
        "first_ratio_error policy_grad_norm critic_grad_norm greedy_proxy greedy_gold "
        "greedy_exact_match",
        "dpo": "margin val_accuracy length grad_norm",
    }
    assert len(set(panels)) == len(panels)
    if stage == "ppo":  # of runs with other options
        panels = set(panels) - {"shows_work", "equal_groups"}
    assert columns - {"step"} == {*panels, *without[stage].split()}


def test_a_curve_is_a_picture(chain, tmp_path):
    with open(chain / "ppo" / "log.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    plot(rows, SCRIPTS["ppo"].PANELS, tmp_path / "curve.png", "iteration")
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 30_000


@pytest.mark.parametrize("stage", SCRIPTS)
def test_cost_json_has_seconds_passes_and_memory(chain, stage):
    measured = json.loads((chain / stage / "cost.json").read_text())
    assert measured.keys() == {"seconds", "forward_equivalents", "peak_gb"}
    assert 0 < measured["seconds"] < 600 and measured["forward_equivalents"] > 0
    assert 0.05 < measured["peak_gb"] < 50
