"""What the experiments compute without training: the exact frontier, best-of-n, the fits."""

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import TINY, run

from data.experiments import base as base_module
from data.experiments import broken, mixtures, overoptimisation
from data.experiments.__main__ import EXPERIMENTS, Config
from data.experiments.base import CHAIN, Base
from data.experiments.broken import BUGS
from data.experiments.frontier import (
    above_frontier,
    best_of_n,
    exact_frontier,
    kl_of_weights,
)
from data.experiments.jobs import Job, plant
from data.experiments.overoptimisation import fit, peaks, some_pairs, top_of_fit
from data.town.tasks import draw_tasks


def test_frontier_of_gaussian_gold_is_the_closed_form():
    """For gold ~ N(0, 1): E gold = 1 / beta and KL = 1 / (2 beta^2)."""
    gold = np.random.default_rng(0).normal(size=(20, 10_000))
    for row in exact_frontier(gold, [1.0, 2.0, 5.0]):
        assert row["gold"] == pytest.approx(1 / row["beta"], rel=0.03)
        assert row["kl"] == pytest.approx(1 / (2 * row["beta"] ** 2), rel=0.05)
        assert row["ess"] > 1000


def test_no_policy_lies_above_the_frontier():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(1, 200))
    frontier = exact_frontier(gold, np.geomspace(0.05, 100, 400))
    for scale in (0.1, 0.5, 1.0, 2.0):
        for noise in (0.0, 1.0):  # policies that know gold more or less well
            w = np.exp(scale * (gold + noise * rng.normal(size=gold.shape)))
            w /= w.sum()
            kl = (w * np.log(200 * w)).sum()
            best = max(row["gold"] for row in frontier if row["kl"] <= kl + 1e-6)
            assert (w * gold).sum() <= best + 0.01


def test_best_of_n_weights_are_those_of_all_subsets():
    proxy = np.array([[0.3, -1.0, 2.0, 0.3, 0.5, 1.0]])  # with a tie
    for n in (1, 2, 3, 6):
        expected = np.zeros(6)
        subsets = list(itertools.combinations(range(6), n))
        for subset in subsets:
            best = max(proxy[0, list(subset)])
            ties = [i for i in subset if proxy[0, i] == best]
            expected[ties] += 1 / len(ties) / len(subsets)
        np.testing.assert_allclose(best_of_n(proxy, n)[0], expected)


def test_kl_counts_equal_replies_as_one_and_stays_below_the_bound():
    proxy = np.random.default_rng(0).normal(size=(1, 128))
    distinct, pairs = np.arange(128)[None], np.arange(128)[None] // 2
    proxy_of_pairs = proxy[:, pairs[0]]
    for n in (2, 8, 32):
        bound = math.log(n) - (n - 1) / n
        exact = kl_of_weights(best_of_n(proxy, n), distinct)
        assert exact == pytest.approx(bound, abs=0.15)
        assert kl_of_weights(best_of_n(proxy_of_pairs, n), pairs) < exact + 1e-9
    assert kl_of_weights(best_of_n(proxy, 1), distinct) == pytest.approx(0, abs=1e-12)


def test_kl_of_best_of_n_is_too_large_by_what_its_docstring_says():
    """Without replacement, 128 samples are too few for the best of 64."""
    proxy = np.random.default_rng(0).normal(size=(1, 128))
    distinct = np.arange(128)[None]
    for n, measured, true in ((32, 2.63, 2.50), (64, 3.48, 3.17)):
        assert kl_of_weights(best_of_n(proxy, n), distinct) == pytest.approx(measured, abs=0.01)
        assert math.log(n) - (n - 1) / n == pytest.approx(true, abs=0.01)


def test_fits_find_the_curves_they_are_named_for():
    d = np.linspace(0.1, 3, 50)
    np.testing.assert_allclose(fit("best of n", d, d * (0.9 - 0.2 * d)), (0.9, 0.2, 1))
    np.testing.assert_allclose(fit("ppo", d, d * (0.7 - 0.3 * np.log(d))), (0.7, 0.3, 1))


def test_top_of_a_fit_is_where_its_derivative_is_0_or_at_an_end_of_the_run():
    for alpha, beta in ((0.9, 0.4), (0.4, 0.5)):
        top = top_of_fit("best of n", alpha, beta, 4.0)
        assert top == pytest.approx(alpha / (2 * beta), abs=0.002)
        assert top_of_fit("ppo", alpha, beta, 4.0) == pytest.approx(
            math.exp(alpha / beta - 1), abs=0.002
        )
    for method in ("best of n", "ppo"):
        assert top_of_fit(method, 0.9, 0.01, 4.0) == 4  # it only rises
        assert top_of_fit(method, -0.9, -0.01, 4.0) == 0  # it only falls


def test_flipped_pairs_differ_in_nothing_but_the_label():
    pairs = [
        {"messages": i, "chosen": f"a{i}", "rejected": f"b{i}", "gold": [i, -i], "p": 0.8}
        for i in range(1000)
    ]
    rows, test = some_pairs(pairs, 800, 0.25, 0)[:800], some_pairs(pairs, 800, 0.25, 0)[800:]
    flipped = [row["chosen"][0] == "b" for row in rows]
    assert 0.2 < np.mean(flipped) < 0.3
    for row, was, turned in zip(rows, pairs, flipped):
        assert {row["chosen"], row["rejected"]} == {was["chosen"], was["rejected"]}
        assert row["gold"] == (was["gold"][::-1] if turned else was["gold"])
    assert test == pairs[900 : 900 + 88]  # the last tenth, untouched


def test_every_bug_to_be_planted_fits_its_file(tmp_path):
    for number, (_, edit) in enumerate(BUGS.values()):
        if edit:
            plant(edit, tmp_path / str(number))
            assert edit[2] in (tmp_path / str(number) / edit[0]).read_text()


def test_a_planted_copy_has_all_that_a_script_reads(tmp_path):
    """One that lacks a folder of data would fail, or would import the project without the bug."""
    plant(("gpt.py", "class GPT(", "class GPT("), tmp_path)
    code = (
        "import data.town.tasks, data.check as c; print(c.__file__, len(list(c.FOLDER.iterdir())))"
    )
    for words in (["train_sft.py", "-h"], ["-m", "data.preferences", "-h"], ["-c", code]):
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(tmp_path / "data/check.py"), "5"]


def test_a_job_is_a_command_and_is_done_again_only_if_the_command_changes(tmp_path):
    sft = Job(tmp_path, "sft", {"seed": 3, "init": Path("/a/ckpt.pt")})
    out = str(tmp_path.resolve())
    words = ["train_sft.py", "--out", out, "--seed", "3", "--init", "/a/ckpt.pt"]
    assert sft.command == words and sft.result == tmp_path / "sft/ckpt.pt"
    pairs = Job(tmp_path, "preferences", {"seed": 3})
    assert pairs.command == ["-m", "data.preferences", "--out", out, "--seed", "3"]
    assert pairs.result == tmp_path / "preferences.jsonl"
    for job in (sft, pairs):
        assert not job.is_done()
        job.result.parent.mkdir(exist_ok=True)
        job.result.write_text("")
        assert not job.is_done()  # of another command: nothing says what it is
        job.note.write_text(job.identity)
        assert job.is_done()
        assert not Job(tmp_path, job.stage, {"seed": 4}).is_done()


def test_pairs_are_sampled_between_sft_and_reward_model():
    assert list(CHAIN) == ["pretrain", "sft", "preferences", "rm", "ppo", "dpo"]


def test_only_names_that_there_are():
    cfg = Config(only="broken,tasks", base="mine", quick=True)
    assert (cfg.out, cfg.results) == ("mine/quick", "mine/quick")
    assert Config().only == "frontier,overoptimisation,tasks,broken"
    with pytest.raises(ValueError, match="not 'mixtures'"):
        Config(only="tasks,mixtures")


def test_a_policy_that_cannot_be_is_named():
    frontier = [
        {"method": "exact frontier", "seed": 0, "kl": kl, "gold": kl**0.5}
        for kl in np.arange(0, 4, 0.1)
    ]
    right = {"method": "ppo", "setting": 0.1, "seed": 0, "kl_high": 1.1, "gold_low": 0.95}
    wrong = {**right, "setting": 0.2, "gold_low": 1.2}
    assert above_frontier([*frontier, right]) == []
    assert above_frontier([*frontier, right, wrong]) == ["ppo 0.2 of seed 0"]


def test_a_peak_is_where_gold_is_highest_once_noise_is_averaged():
    kl = np.arange(30.0)
    gold = 1 - ((kl - 12) ** 2) / 100
    gold[25] += 1.0  # one lucky iteration
    rows = [
        {"judge": "j", "seed": 0, "method": "ppo", "kl": k, "gold": g, "proxy": k / 10}
        for k, g in zip(kl, gold)
    ]
    (line,) = peaks(rows)
    assert abs(line["peak_kl"] - 12) <= 1 and line["last_kl"] == 27
    assert line["last_gold"] < line["peak_gold"] - 0.3 and line["last_proxy"] > line["peak_proxy"]
    (line,) = peaks([{**row, "gold": row["gold"] - 2} for row in rows])
    assert line["peak_kl"] == line["peak_gold"] == 0  # nowhere better than SFT, where runs begin


@pytest.mark.thorough
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_draws_its_pictures(chain, tmp_path, monkeypatch, name):
    """With tiny runs in place of those of minutes; the numbers mean nothing."""

    long = {"minibatch", "iterations", "demonstrations", "warmup", "n_layer"}

    def tiny_run(job):
        small = TINY[job.stage].keys() - {"beta", "target_kl"} | long
        options = {"target_kl": 0.0} if job.stage == "ppo" else {}  # it needs a beta above 0
        for name, value in job.options.items():
            if name not in small:
                options[name] = str(value) if isinstance(value, Path) else value
        run(job.stage, job.out, **options)
        job.note.write_text(job.identity)

    def few_tasks(n, *args, **how):
        return draw_tasks(min(n, 8), *args, **how)

    monkeypatch.setattr(Job, "run", tiny_run)
    for module in (base_module, overoptimisation, mixtures):
        monkeypatch.setattr(module, "draw_tasks", few_tasks)
    monkeypatch.setattr(broken, "BUGS", dict(list(BUGS.items())[:3]))
    base = Base(chain)
    folder, results = tmp_path / "runs", tmp_path / "results"
    results.mkdir()
    EXPERIMENTS[name](folder, results, [base, base], True)
    pictures = sorted(results.glob("*.png"))
    assert results / f"{name}.png" in pictures
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    with open(results / f"{name}.csv") as file:
        assert len(list(csv.DictReader(file))) > 5
    if name == "tasks":  # the quickest: a second time, nothing is run again
        monkeypatch.setattr(Job, "run", lambda job: pytest.fail(f"{job} is run again"))
        EXPERIMENTS[name](folder, results, [base, base], True)
