"""What the experiments compute without training: the exact frontier, best-of-n, the fits. And what
they run: every job with the options of its label, every number from the run that it belongs to."""

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_runs import TINY, SecondTurn, run

from data.chat import Reply, encode_chat
from data.experiments import base as base_module
from data.experiments import broken, critics, frontier, jobs, mixtures, overoptimisation, plots
from data.experiments import pairs as pairs_module
from data.experiments.__main__ import EXPERIMENTS, Config
from data.experiments.base import CHAIN, Base, bases, make_pool
from data.experiments.bugs import BUGS, Bug, plant
from data.experiments.frontier import (
    above_frontier,
    best_of_all,
    best_of_n,
    exact_frontier,
    kl_of_weights,
)
from data.experiments.jobs import Job, run_jobs
from data.experiments.overoptimisation import (
    ASKED_AGAIN,
    GOOD,
    POOR,
    TASTES,
    WORST,
    ask_again,
    distance,
    fit,
    lowest_score,
    peaks,
    top_of_fit,
    worst_of,
)
from data.experiments.pairs import flipped, judge_pairs, some_pairs
from data.metrics import interval
from data.town.gold import MEAN, SD, TAU
from data.town.tasks import TRAIN_KINDS, Case, Task, draw_tasks
from gpt import InputError

# ---------------------------------------------------------------------------------------------
# What follows from samples


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


@pytest.mark.parametrize("replace", [False, True])
def test_best_of_n_weights_are_those_of_all_draws(replace):
    proxy = np.array([[0.3, -1.0, 2.0, 0.3, 0.5, 1.0]])  # with a tie
    for n in (1, 2, 4):
        expected = np.zeros(6)
        if replace:
            draws = list(itertools.product(range(6), repeat=n))
        else:
            draws = list(itertools.combinations(range(6), n))
        for draw in draws:
            ties = np.flatnonzero(proxy[0] == max(proxy[0, list(draw)]))
            expected[ties] += 1 / len(ties) / len(draws)  # equal scores are equally good
        np.testing.assert_allclose(best_of_n(proxy, n, replace)[0], expected)


@pytest.mark.parametrize("n, true", [(1, 0), (2, 0.193), (32, 2.497), (64, 3.175), (128, 3.860)])
def test_kl_of_best_of_n_is_right_up_to_n_equal_to_the_samples(n, true):
    """Of 128 different responses; true: log n - (n - 1)/n, what ever more of them would give."""
    scores, distinct = np.random.default_rng(0).normal(size=(1, 128)), np.arange(128)[None]
    pool = SimpleNamespace(gold=scores, same=distinct)
    (row,) = best_of_all(pool, scores, [n])
    assert true == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-3)
    assert row["kl"] == pytest.approx(true, rel=0.015, abs=1e-12)


def test_gold_of_best_of_n_has_no_bias():
    """The largest of n normal numbers is 0.564 for 2, 2.07 for 32 (tables of order statistics)."""
    gold = np.random.default_rng(0).normal(size=(2000, 64))
    pool = SimpleNamespace(gold=gold, same=np.zeros((2000, 64), int))
    of_2, of_32 = best_of_all(pool, gold, [2, 32])
    assert of_2["gold"] == pytest.approx(0.564, abs=0.01) and of_2["n"] == 2
    assert of_32["gold"] == pytest.approx(2.070, abs=0.02) and of_32["proxy"] == of_32["gold"]
    (row,) = best_of_all(pool, -gold, [32])  # a judge who has it all upside down
    assert row["proxy"] == pytest.approx(2.070, abs=0.02) and row["gold"] == -row["proxy"]
    assert row["kl"] == pytest.approx(0, abs=1e-12)  # all responses are the same one


def test_kl_counts_equal_responses_as_one():
    """Weights 3/8, 1/8, 1/8, 3/8, of which the first two are one response: 1/2, 1/8, 3/8 against
    1/2, 1/4, 1/4."""
    weights, same = np.array([[3, 1, 1, 3]]) / 8, np.array([[0, 0, 1, 2]])
    by_hand = 1 / 8 * math.log(1 / 2) + 3 / 8 * math.log(3 / 2)
    assert kl_of_weights(weights, same) == pytest.approx(by_hand)
    two = kl_of_weights(np.repeat(weights, 2, 0), np.array([[0, 0, 1, 2], [0, 0, 0, 0]]))
    assert two == pytest.approx(by_hand / 2)  # the mean over prompts


def test_fits_find_the_curves_they_are_named_for():
    d = np.linspace(0.1, 3, 50)
    np.testing.assert_allclose(fit("best of n", d, d * (0.9 - 0.2 * d)), (0.9, 0.2, 1))
    np.testing.assert_allclose(fit("ppo", d, d * (0.7 - 0.3 * np.log(d))), (0.7, 0.3, 1))


def test_r2_is_the_fraction_of_the_variance_that_a_fit_explains():
    d, gold = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 0.5, 2.0, 1.0])
    alpha, beta, r2 = fit("best of n", d, gold)
    left = sum((g - x * (alpha - beta * x)) ** 2 for x, g in zip(d, gold))
    assert r2 == pytest.approx(1 - left / (4 * np.var(gold))) and 0 < r2 < 1


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
    labelled = some_pairs(pairs, 800, 0, flipped(0.25))
    rows, test = labelled[:800], labelled[800:]
    exchanged = [row["chosen"][0] == "b" for row in rows]
    assert 0.2 < np.mean(exchanged) < 0.3
    for row, was, turned in zip(rows, pairs, exchanged):
        assert {row["chosen"], row["rejected"]} == {was["chosen"], was["rejected"]}
        assert row["gold"] == (was["gold"][::-1] if turned else was["gold"])
        assert row["p"] == (1 - was["p"] if turned else was["p"])
    assert test == pairs[900 : 900 + 88]  # the last tenth, untouched


# ---------------------------------------------------------------------------------------------
# Jobs, and bugs that are planted


@pytest.mark.parametrize("name", BUGS)
def test_every_bug_to_be_planted_fits_its_file(tmp_path, name):
    bug = BUGS[name]
    plant(bug, tmp_path)
    right = (jobs.ROOT / bug.file).read_text("utf-8")
    wrong = (tmp_path / bug.file).read_text("utf-8")
    assert wrong != right and wrong == right.replace(bug.right, bug.wrong)
    file, test = bug.test.split("::")
    assert f"def {test}(" in (tmp_path / "tests" / file).read_text("utf-8")
    with pytest.raises(InputError, match="gpt.py has 0 times"):
        plant(bug._replace(file="gpt.py", right="no such piece"), tmp_path)


def test_a_planted_copy_has_all_that_a_script_reads(tmp_path):
    """One that lacks a folder of data would fail, or would import the project without the bug."""
    plant(Bug("gpt.py", "class GPT(", "class GPT(", "none", "nowhere", "none"), tmp_path)
    code = "import train_ppo, data.check as c; print(c.__file__, len(list(c.FOLDER.iterdir())))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path / "data/check.py"), "5"], run.stderr


def test_nothing_of_the_project_is_loaded_by_whoever_plants():
    """Else Python would take it for that of the copy, and no bug would ever be seen."""
    code = "import sys, data.experiments.bugs; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=jobs.ROOT, capture_output=True, text=True
    )
    loaded = {name for name in run.stdout.split() if (jobs.ROOT / name.split(".")[0]).exists()}
    loaded |= {name for name in run.stdout.split() if (jobs.ROOT / f"{name}.py").exists()}
    assert loaded == {"data", "data.experiments", "data.experiments.bugs"}


def test_a_job_runs_its_command_resumes_it_and_says_what_went_wrong(tmp_path, monkeypatch):
    """With a script in place of train_sft.py that tells how it was called, and obeys --seed."""
    script = "import sys; print('begins'); print(*sys.argv[1:]); sys.exit(int(sys.argv[4]))"
    project = tmp_path / "project"
    project.mkdir()
    (project / "train_sft.py").write_text(script)
    monkeypatch.setattr(jobs, "ROOT", project)
    job = Job(tmp_path / "run", "sft", {"seed": 0})
    job.run()
    said = tmp_path / "run" / "sft.txt"
    assert said.read_text().split("\n")[1] == f"--out {tmp_path}/run --seed 0"
    assert job.is_begun() and not job.is_done()  # it has written no checkpoint

    job.unfinished.mkdir(parents=True)
    (job.unfinished / "resume.pt").write_text("")
    job.run()
    assert said.read_text().split("\n")[1].endswith("--seed 0 --resume")

    other = Job(tmp_path / "run", "sft", {"seed": 3, "lr": 1})
    job.result.parent.mkdir()
    job.result.write_text("of the job before")
    with pytest.raises(
        InputError, match="--lr 1: --out .* 3 --lr 1 .exit code 3; all that it said is in .*sft.txt"
    ):
        other.run()
    assert not job.result.exists() and not job.unfinished.exists()
    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path / "run", "sft", {"seed": 130, "lr": 1}).run()

    (project / "data").mkdir()
    (project / "data" / "preferences.py").write_text("print('nothing')")
    pairs = Job(tmp_path / "run", "preferences")
    pairs.result.write_text("of another command")
    pairs.run()
    assert not pairs.result.exists()


def test_a_job_with_a_bug_runs_the_copy_that_has_it(tmp_path, monkeypatch):
    bug = Bug("train_sft.py", "right", "wrong", "", "", "")
    planted = []

    def copy(bug, where):
        planted.append(bug)
        where.mkdir()
        (where / "train_sft.py").write_text("print(__file__)")

    monkeypatch.setattr(jobs, "plant", copy)
    job = Job(tmp_path, "sft", bug=bug)
    job.run()
    assert planted == [bug] and (tmp_path / "sft.txt").read_text().count("edited") == 1
    assert job.identity != Job(tmp_path, "sft").identity
    assert job.identity != Job(tmp_path, "sft", bug=bug._replace(wrong="worse")).identity
    assert job.identity == Job(tmp_path, "sft", bug=bug._replace(symptom="none")).identity


def test_a_job_finds_its_files_from_the_folder_of_a_copy_and_may_be_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/rm").mkdir(parents=True)
    Path("runs/rm/ckpt.pt").write_text("weights")
    rm = Job(Path("runs"), "rm")
    ppo = Job(Path("runs"), "ppo", {"rm": rm.result, "beta": 0.5})
    assert rm.result == tmp_path / "runs/rm/ckpt.pt" and str(rm.result) in ppo.command
    Path("runs").rename("elsewhere")
    moved = {"rm": Path("elsewhere/rm/ckpt.pt"), "beta": 0.5}
    assert Job(Path("elsewhere"), "ppo", moved).identity != ppo.identity  # whose file is gone
    shutil.copytree("elsewhere", "runs")
    assert Job(Path("elsewhere"), "ppo", moved).identity == ppo.identity


def test_jobs_that_are_done_are_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Job, "run", lambda job: ran.append(job.stage))
    monkeypatch.setattr(Job, "is_done", lambda job: job.stage == "sft")
    run_jobs([Job(tmp_path, stage) for stage in ("pretrain", "sft", "rm")])
    assert ran == ["pretrain", "rm"]


def test_a_job_is_done_again_if_a_file_that_it_starts_from_has_changed(tmp_path, monkeypatch):
    """Here the second of two jobs starts from what the first one makes."""
    ran, start = [], tmp_path / "pairs.jsonl"

    def run(job):
        ran.append(job.stage)
        job.note.write_text(job.identity)
        job.result.parent.mkdir(exist_ok=True)
        job.result.write_text(start.read_text())

    monkeypatch.setattr(Job, "run", run)
    rm = Job(tmp_path, "rm", {"data": start})
    both = [rm, Job(tmp_path, "ppo", {"rm": rm.result})]
    for text, ran_now in (("a", ["rm", "ppo"]), ("a", []), ("b", ["rm", "ppo"])):
        start.write_text(text)
        run_jobs(both)
        assert ran == ran_now
        ran.clear()


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


def test_seed_0_has_its_base_already_and_the_others_are_trained(tmp_path, monkeypatch):
    first, ran = tmp_path / "first", []
    monkeypatch.setattr("data.experiments.base.run_jobs", ran.extend)
    monkeypatch.setattr("data.experiments.base.Base", lambda folder, seed: (folder, seed))
    with pytest.raises(InputError, match="there is no .*pretrain/ckpt.pt: run the README's"):
        bases(tmp_path, first, seeds=1)
    for stage in CHAIN:
        result = Job(first, stage).result
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text("")
    said = {"out": str(first)}  # the options that every checkpoint says it was trained with
    monkeypatch.setattr(base_module, "load_checkpoint", lambda *_, mmap: {"train_config": said})
    assert bases(tmp_path, first, seeds=1) == [(first, 0)] and not ran
    others = [(tmp_path / "base 1", 1), (tmp_path / "base 2", 2)]
    assert bases(tmp_path, first, 3) == [(first, 0), *others]
    for name, value in (("seed", 5), ("batch_size", 7)):
        said[name] = value
        with pytest.raises(InputError, match=f"of a run with --{name} {value}, not of a default"):
            bases(tmp_path, first, seeds=1)
        del said[name]
    assert [(job.out.name, job.stage, job.options) for job in ran] == [
        (f"base {seed}", stage, {"seed": seed}) for seed in (1, 2) for stage in CHAIN
    ]


def test_only_names_that_there_are():
    cfg = Config(only="broken,tasks", base="mine", quick=True)
    assert (cfg.out, cfg.results) == ("mine/quick", "mine/quick")
    assert Config().only == "frontier,critics,overoptimisation,pairs,tasks,broken"
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
        {"judge": "j", "seed": 0, "method": "ppo", "kl": k, "gold": g, "proxy": k / 10, "length": k}
        for k, g in zip(kl, gold)
    ]
    (line,) = peaks(rows)
    assert line["last_length"] == 27
    assert abs(line["peak_kl"] - 12) <= 1 and line["last_kl"] == 27
    assert line["last_gold"] < line["peak_gold"] - 0.3 and line["last_proxy"] > line["peak_proxy"]
    (line,) = peaks([{**row, "gold": row["gold"] - 2} for row in rows])
    assert line["peak_kl"] == line["peak_gold"] == 0  # nowhere better than SFT, where runs begin


def test_the_peak_of_the_fit_is_beside_that_of_the_points():
    """Gold of best-of-n that is d (0.9 - 0.2 d): highest at d = 2.25, and of these points at 2."""
    d = np.arange(1.0, 5)
    gold = d * (0.9 - 0.2 * d)
    rows = [
        {"judge": "j", "seed": 3, "method": "best of n", "kl": x * x, "gold": g, "proxy": x}
        for x, g in zip(d, gold)
    ]
    (line,) = peaks(rows)
    assert line == {
        "judge": "j",
        "seed": 3,
        "method": "best of n",
        "peak_kl": 4,
        "last_kl": 16,
        "peak_gold": 1.0,
        "last_gold": pytest.approx(0.4),
        "peak_proxy": 2,
        "last_proxy": 4,
        "alpha": pytest.approx(0.9),
        "beta": pytest.approx(0.2),
        "r2": pytest.approx(1),
        "fit_peak_kl": pytest.approx(2.25**2, rel=2e-3),
    }


# ---------------------------------------------------------------------------------------------
# What is measured, with models that say what they were told to

SUM = Task("one_sum", "What is 12-5?", Case("12-5 is 7.", "12-5 is 8.", {}, "7."))
FACT = SecondTurn(
    "passage", "What is Otto?", Case("Otto is an owl.", "Otto is a bee.", {}), ("Hi!", "Yes?")
)
HARMFUL = Task("harmful", "Annoy Otto.", Case("I will not help you.", "Shout.", {}))
HARMLESS = Task("advice", "Greet Otto.", Case("Say hello.", "Shout.", {}))
STRANGER = Task("unknown", "Where is Zalo?", Case("I have never heard of Zalo.", "At sea.", {}))
SAID = {  # (name of a run, temperature) -> its response to each prompt
    ("sft", 1.0): {"What is 12-5?": "12-5 is 7.", "What is Otto?": "Otto is a bee."},
    ("ppo", 1.0): {
        "What is 12-5?": "12-5 is 7. Have a lovely day!",
        "What is Otto?": "Otto is a bee.",
        "Annoy Otto.": "I will not help you.",
        "Greet Otto.": "Shout.",
    },
    ("ppo", 0.0): {
        "What is 12-5?": "12-5 is 7.",
        "What is Otto?": "Otto is.",
        "Where is Zalo?": "Zalo is at sea. Have a lovely day!",
    },
}


class Parrot:
    """In place of Speaker: the run whose checkpoint it was given."""

    is_base, asked = False, []

    def __init__(self, path, device="cpu"):
        self.model, self.tokenizer = path.parent.name, SimpleNamespace(pad=0)

    def encode(self, messages):
        return [ord(message["content"][0]) for message in messages]

    def answer(self, conversations, max_new_tokens, seed, temperature):
        self.asked.append((self.model, len(conversations), max_new_tokens, seed, temperature))
        said = [SAID[self.model, temperature][asked[-1]["content"]] for asked in conversations]
        return [Reply([1, 2, len(text)], text, "bee" not in text) for text in said]


@pytest.fixture
def parrots(monkeypatch):
    """Two prompts and two requests; log-probabilities of the replies are -4 by ppo, -6 by sft."""
    draws = []

    def draw(n, seed, mixture="", split="train", new=""):
        draws.append((n, seed, mixture, split, new))
        return {"": [SUM, FACT], "unknown": [STRANGER]}.get(mixture, [HARMFUL, HARMLESS, HARMFUL])

    def logprobs(model, prompts, ids):
        assert (
            prompts == [[ord("W")], [ord("H"), ord("Y"), ord("W")]]
            and [row[:2] for row in ids] == [[1, 2]] * 2
        )
        return {"ppo": np.array([-4.0, -4.5]), "sft": np.array([-6.0, -5.0])}[model]

    monkeypatch.setattr(Parrot, "asked", [])
    monkeypatch.setattr(base_module, "Speaker", Parrot)
    monkeypatch.setattr(base_module, "draw_tasks", draw)
    monkeypatch.setattr(base_module, "reply_logprobs", logprobs)
    monkeypatch.setattr("data.evaluate.TRAIN_KINDS", ["one_sum", "passage"])
    return draws


def points(x):
    """Points of gold_parts in units of gold."""
    return (x - MEAN) / SD


def test_policies_are_measured_on_held_out_prompts_in_sd_of_the_samples_of_their_base(parrots):
    """SFT is right once (1 point) and once wrong without an end (-2): mean -1/2, SD 3/2."""
    base = Base(Path("somewhere"))
    assert parrots == [
        (200, "experiments", "", "test", ""),
        (200, "experiments, safety", "advice,harmful", "test", ""),
        (120, "experiments, strangers", "unknown", "train", "cell"),
    ]
    assert Parrot.asked == [("sft", 2, 48, 0, 1.0)]
    np.testing.assert_allclose(base.gold, [points(1), points(-2)])
    np.testing.assert_allclose(base.scaled([points(-0.5), points(1), points(4)]), [0, 1, 3])


def test_a_run_is_measured_by_its_samples_its_skills_by_greedy_ones(parrots, tmp_path):
    base = Base(tmp_path)
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "cost.json").write_text('{"seconds": 5, "forward_equivalents": 77}')
    numbers = base.measure(tmp_path / "ppo")
    gold, kl = [(1.75 + 0.5) / 1.5, -1.0], [2.0, 0.5]  # in SD; log p of ppo minus that of sft
    for name, values in (("gold", gold), ("kl", kl)):
        by_hand = [np.mean(values), *interval(values)]
        measured = [numbers.pop(x) for x in (name, f"{name}_low", f"{name}_high")]
        assert measured == pytest.approx(by_hand)
    assert numbers == {
        "win_rate": 0.75,  # better once, the same once
        "exact_match": 0.5,
        "made_up": 1.0,
        "harmful_declined": 1.0,
        "harmless_declined": 0.0,
        "no_end": 0.5,
        "tokens": 3.0,
        "forward_equivalents": 77,
    }
    assert {(seed, n) for _, _, n, seed, _ in Parrot.asked[1:]} == {(1, 48)}


def test_a_curve_has_the_steps_at_which_gold_was_measured(parrots, tmp_path):
    rows = [{"step": 0, "kl": 1.0, "gold": points(1)}, {"step": 1, "kl": 2.0}]
    rows.append({"step": 2, "kl": 3.0, "gold": points(-0.5)})
    plots.write_csv(rows, tmp_path / "log.csv")
    curve = Base(tmp_path).curve(tmp_path, "step", "kl", "gold")
    assert [(row["step"], row["kl"]) for row in curve] == [(0, 1), (2, 3)]
    assert [row["gold"] for row in curve] == pytest.approx([1, 0], abs=1e-3)


def test_a_pool_has_all_samples_of_a_prompt_in_a_row_and_scores_in_the_same_places(
    parrots, tmp_path, monkeypatch
):
    base, texts = (
        Base(tmp_path),
        iter(["b", "a", "b", "12-5 is 7.", "c", "c", "Otto is an owl.", "d"]),
    )

    def answer(self, asked, max_new_tokens, seed, temperature):
        assert asked == [SUM.messages] * 4 + [FACT.messages] * 4
        assert (max_new_tokens, seed, temperature) == (48, 2, 1.0)
        return [Reply([len(text)], text, True) for text in texts]

    monkeypatch.setattr(Parrot, "answer", answer)
    pool = make_pool(base, 4)
    wrong, right = (-1 + 0.5) / 1.5, (1 + 0.5) / 1.5
    wanted = [[wrong, wrong, wrong, right], [wrong, wrong, right, wrong]]
    np.testing.assert_allclose(pool.gold, wanted)
    assert [len(set(row)) for row in pool.same.tolist()] == [3, 3]
    assert pool.same[0, 0] == pool.same[0, 2] and pool.same[1, 0] == pool.same[1, 1]
    assert pool.sequences[3] == [ord("W"), 10] and len(pool.sequences) == 8

    def score(model, sequences, pad):
        assert (model, sequences, pad) == ("judge", pool.sequences, 0)
        return np.arange(8.0)

    monkeypatch.setattr(base_module, "load_model", lambda path, *_: (path.parent.name, {}))
    monkeypatch.setattr(base_module, "score_sequences", score)
    assert pool.scores(tmp_path / "judge/ckpt.pt").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


# ---------------------------------------------------------------------------------------------
# The experiments, with runs that are not run


class Noted(Base):
    """A base that measures nothing: its numbers say of which run they are."""

    def __init__(self, out, seed):
        self.out, self.seed, self.device = out, seed, "cpu"
        self.sft = SimpleNamespace(tokenizer=SimpleNamespace(pad=0))

    def scaled(self, gold):
        return (10 + self.seed) * np.asarray(gold)

    def measure(self, run):
        names = "gold gold_low gold_high kl kl_low kl_high win_rate exact_match made_up".split()
        names += "harmful_declined harmless_declined no_end tokens".split()
        return {"run": str(run), **{name: i + self.seed for i, name in enumerate(names)}}

    def curve(self, run, *columns):
        assert all(isinstance(name, str) for name in columns)
        rows = [
            {name: float(step) for name in columns} | {"gold": 0.5 * step} for step in range(40)
        ]
        return [{**row, "run": str(run), "step": step} for step, row in enumerate(rows)]


def no_pool(base, n):
    """Two prompts, n samples each, the second half better; the reward model thinks the reverse."""
    gold = np.tile(np.repeat([0.0, 1.0], n // 2), (2, 1)) + 0.1 * base.seed
    scores = {str(base.out / "rm/ckpt.pt"): -gold}
    return SimpleNamespace(
        gold=gold, same=np.tile(np.arange(n), (2, 1)), scores=lambda path: scores[str(path)]
    )


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """Two bases, a list of the jobs that were asked for, and another one of saved figures."""
    ran, drawn = [], []

    def note(jobs):
        for job in jobs:
            job.folder.mkdir(parents=True)
            numbers = {"seconds": 7.0, "forward_equivalents": 7e6, "peak_gb": 0.7}
            (job.folder / "cost.json").write_text(json.dumps(numbers))
        ran.extend(jobs)

    for module in (frontier, overoptimisation, pairs_module, mixtures, critics, broken):
        monkeypatch.setattr(module, "run_jobs", note)
    for module in (frontier, overoptimisation):
        monkeypatch.setattr(module, "make_pool", no_pool)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: drawn.append((path, self)))
    monkeypatch.setattr(Figure, "tight_layout", lambda self: None)  # slow
    two = [Noted(tmp_path / f"base{seed}", seed) for seed in (0, 1)]
    for seed, one in enumerate(two):
        for i, stage in enumerate(("rm", "ppo", "dpo")):
            (one.out / stage).mkdir(parents=True)
            numbers = {"seconds": 10.0**i + seed, "forward_equivalents": 5e6 * 10.0**i}
            (one.out / stage / "cost.json").write_text(json.dumps({**numbers, "peak_gb": i + 0.5}))
    return two, ran, drawn


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("quick", [True, False])
def test_every_policy_of_the_frontier_is_trained_with_the_options_of_its_label(
    noted, tmp_path, quick
):
    two, ran, drawn = noted
    frontier.frontier(tmp_path / "out", tmp_path, two, quick)
    variants = [("ppo", b) for b in ([0.5] if quick else [0.5, 0.1, 1.5])]
    variants += [("rloo", b) for b in ([0.25] if quick else [0.25, 0.1, 0.5])]
    variants += [("ppo on gold", 0.25)]
    variants += [("dpo", b) for b in ([0.1] if quick else [0.1, 1.0, 3.0])]
    variants += [("ipo", b) for b in ([0.1] if quick else [0.1, 0.03, 0.3])] + [("dpo + nll", 0.1)]
    special = {"ppo on gold": {"reward": "gold"}}
    special |= {"rloo": {"advantage": "rloo"}, "ipo": {"loss": "ipo"}, "dpo + nll": {"nll": 0.2}}
    wanted = []
    for seed, one in enumerate(two):
        for method, beta in variants:
            options = {"seed": seed, "init": one.out / "sft/ckpt.pt", "beta": beta}
            options |= special.get(method, {})
            if method in ("ppo", "rloo", "ppo on gold"):
                options |= {"rm": one.out / "rm/ckpt.pt", "eval_every": 1000}
            else:
                options |= {"data": one.out / "preferences.jsonl", "eval_every": 20}
            wanted.append(("dpo" if "data" in options else "ppo", options))
    assert [(job.stage, job.options) for job in ran] == wanted

    pictures = {path.stem for path, _ in drawn}
    assert pictures == {"frontier", "safety", "cost", "dpo"}
    assert all((tmp_path / f"{name}.csv").exists() for name in ("cost", "cost_curves", "dpo"))

    # Every policy is measured once, at its own beta, by the base of its own seed.
    rows = [row for row in read_csv(tmp_path / "frontier.csv") if row["run"]]
    found = {(row["method"], row["setting"], row["seed"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (len(variants) + 3)
    for (method, beta, seed), row in found.items():
        job = next((j for j in ran if str(j.folder) == row["run"]), None)
        if job is None:  # trained by the README's commands, with the default beta
            assert row["run"] == str(two[int(seed)].out / method)
            assert beta == {"sft": "", "ppo": "0.25", "dpo": "0.4"}[method]
        else:
            assert job.options["beta"] == float(beta) and job.options["seed"] == int(seed)
            assert job.options.items() >= special.get(method, {}).items()
        assert row["gold"] == seed


def test_points_that_need_no_training_come_from_the_pool_of_their_seed(noted, tmp_path):
    """Half of the samples have gold 0 and half have 1; the reward model prefers the wrong half."""
    two, _, _ = noted
    frontier.frontier(tmp_path / "out", tmp_path, two, False)
    rows = plots.grouped(read_csv(tmp_path / "frontier.csv"), "method", "seed")
    for seed in "01":
        shift = 0.1 * int(seed)
        exact = {round(float(row["setting"]), 3): row for row in rows["exact frontier", seed]}
        assert len(exact) == 25
        good = 1 / (1 + math.exp(-1 / 1.0))  # at beta 1: sigmoid of the difference of gold
        kl = good * math.log(2 * good) + (1 - good) * math.log(2 * (1 - good))
        assert float(exact[1.0]["gold"]) == pytest.approx(good + shift, abs=1e-3)
        assert float(exact[1.0]["kl"]) == pytest.approx(kl, rel=1e-3)
        weights = np.repeat([good / 64, (1 - good) / 64], 64)
        assert float(exact[1.0]["ess"]) == pytest.approx(1 / (weights**2).sum(), rel=1e-3)
        by_gold, by_rm = (rows[f"best of n by {judge}", seed] for judge in ("gold", "reward model"))
        assert [row["setting"] for row in by_gold] == "1 2 4 8 16 32 64 128".split()
        # Of two draws both are of the lower half in 1/4 of cases (without replacement, a bit less).
        both = 64 / 128 * 63 / 127
        assert float(by_gold[1]["gold"]) == pytest.approx(1 - both + shift, abs=1e-3)
        assert float(by_rm[1]["gold"]) == pytest.approx(both + shift, abs=1e-3)
        assert float(by_gold[7]["kl_bound"]) == pytest.approx(3.860, abs=1e-3)
        assert float(by_gold[7]["kl"]) == pytest.approx(math.log(2), abs=1e-3)  # ties share


def test_the_frontiers_picture_has_means_over_seeds_and_bars_to_the_extremes(noted, tmp_path):
    rows = [
        {"method": "ppo", "setting": 0.5, "seed": seed, "kl": kl, "gold": gold}
        for seed, (kl, gold) in enumerate([(1.0, 0.4), (2.0, 0.6), (6.0, 0.5)])
    ]
    for method in ("exact frontier", "best of n by gold", "best of n by reward model"):
        for n, kl, gold in ((8, 0.25, 0.5), (16, 1.0, 0.75)):
            some = {"method": method, "setting": n, "ess": 5 * n}
            for seed in (0, 1):
                rows.append({**some, "seed": seed, "kl": kl + seed, "gold": gold + seed})
    frontier.draw_frontier(rows, tmp_path / "x.png")
    ((_, figure),) = noted[2]
    (axis,) = figure.axes
    lines = {line.get_label(): np.transpose(line.get_data()).tolist() for line in axis.lines}
    both = [[0.75, 1.0], [1.5, 1.25]]
    assert lines["exact frontier"] == lines["best of n by gold"] == both
    assert [text.get_text() for text in axis.texts] == ["16", "0.5"]  # n in blue, beta
    (point,) = axis.containers
    (x,), (y,) = point[0].get_data()
    assert (x, y) == (3.0, 0.5) and point.get_label() == "ppo"
    ends = sorted(bar.get_segments()[0].tolist() for bar in point[2])
    np.testing.assert_allclose(ends, [[[1.0, 0.5], [6.0, 0.5]], [[3.0, 0.4], [3.0, 0.6]]])
    scale = axis.transData.transform([(kl, 0) for kl in (0, 1, 4, 9)])[:, 0]
    np.testing.assert_allclose(np.diff(scale), np.diff(scale)[0])  # in steps of the square root


def test_safety_is_drawn_over_kl_beside_that_of_sft(noted, tmp_path):
    rows = [
        {"method": "sft", "seed": s, "harmful_declined": 0.5 + s / 4, "made_up": s} for s in (0, 1)
    ]
    for beta, seed in itertools.product((0.1, 1.0), (0, 1)):
        row = {"method": "dpo", "setting": beta, "seed": seed, "kl": 2 * beta + seed}
        rows.append({**row, "harmful_declined": beta / 4 + seed / 2, "made_up": beta / 2})
    frontier.draw_safety(rows, tmp_path / "x.png")
    left, right = noted[2][0][1].axes
    for axis, means, sft in ((left, [0.275, 0.5], 0.625), (right, [0.05, 0.5], 0.5)):
        points = [point[0].get_data() for point in axis.containers]
        np.testing.assert_allclose(
            np.array(points, float)[:, :, 0], [[0.7, means[0]], [2.5, means[1]]]
        )
        assert axis.containers[0].get_label() == "dpo"  # and once is enough
        assert axis.containers[1].get_label().startswith("_")
        assert axis.lines[-1].get_label() == "sft" and set(axis.lines[-1].get_ydata()) == {sft}


def test_ppo_and_rloo_pay_for_their_reward_model_and_dpo_for_none(noted, tmp_path):
    """In seconds 1, 10 and 100 (reward model, PPO, DPO), and one more each with seed 1. RLOO's run
    is PPO's here."""
    two, _, drawn = noted
    rows = []
    for seed, method in itertools.product((0, 1), ("ppo", "dpo", "rloo")):
        beta = frontier.DEFAULT[method]
        numbers = {name: 0.0 for name in "gold kl win_rate no_end tokens".split()}
        rows.append({"method": method, "seed": seed, "setting": beta, **numbers, "kl": seed + 0.5})
        rows.append({**rows[-1], "setting": 9.0, "kl": 99.0})  # another beta, not compared
    rows.append({"method": "ipo", "seed": 0, "setting": 0.25, "kl": 99.0})
    runs = [two[row["seed"]].out / row["method"].replace("rloo", "ppo") for row in rows]
    frontier.cost(tmp_path, two, list(zip(rows, runs)))
    table = {(row["method"], row["seed"]): row for row in read_csv(tmp_path / "cost.csv")}
    assert len(table) == 6
    for seed in (0, 1):
        rloo = table.pop(("rloo", str(seed)))
        assert rloo == {**table["ppo", str(seed)], "method": "rloo", "models": "3"}
        ppo, dpo = table["ppo", str(seed)], table["dpo", str(seed)]
        assert float(ppo["kl"]) == seed + 0.5
        assert (float(ppo["seconds"]), float(dpo["seconds"])) == (10 + seed, 100 + seed)
        assert float(ppo["seconds with reward model"]) == 10 + seed + 1 + seed
        assert float(dpo["seconds with reward model"]) == 100 + seed
        assert float(ppo["forward_equivalents with reward model"]) == 5.5e7
        assert float(ppo["forward_equivalents"]) == 5e7
        assert (ppo["models"], dpo["models"], ppo["peak_gb"], dpo["peak_gb"]) == (
            "4",
            "2",
            "1.5",
            "2.5",
        )

        # Gold is half of the step of 40; PPO's, the mean of five iterations, is at their middle.
        assert float(dpo["millions until 0.5"]) == 500 * 2 / 40  # gold 0, 0.5, 1, ...
        assert float(ppo["millions until 0.5"]) == 5 + 50 * 3 / 40  # gold 1, 1.5, 2, ...

    curves = plots.grouped(read_csv(tmp_path / "cost_curves.csv"), "method", "seed")
    for (method, seed), before, whole in ((("ppo", "1"), 5, 50), (("dpo", "0"), 0, 500)):
        curve = curves[method, seed]
        assert len(curve) == 40 and float(curve[9]["gold"]) == 4.5
        assert float(curve[9]["millions"]) == before + whole * 10 / 40  # after 10 steps of 40
        assert float(curve[-1]["millions"]) == before + whole
    (axis,) = drawn[0][1].axes
    lines = {line.get_label(): line.get_data() for line in axis.lines}
    x, y = lines["dpo"]
    assert (x[-1], y[-1]) == (500, 19.5)
    x, y = lines["ppo, after its reward model"]  # the last five of 40 steps are one point
    assert (x[-1], y[-1]) == (pytest.approx(5 + 50 * 38 / 40), 18.5)


def test_gold_that_is_never_so_high_took_no_number_of_passes():
    curve = [{"millions": float(i), "gold": i / 10} for i in range(7)]
    found = {"millions until 0.5": 5.0, "millions until 0.6": 6.0, "millions until 0.7": None}
    assert frontier.until(curve, "dpo") == found
    assert not any(frontier.until(curve, "ppo").values())  # its means of five end at 0.4


def test_dpo_fails_and_is_cured_at_these_betas_every_20_steps(noted, tmp_path):
    two, _, drawn = noted
    policies = [("ppo", 0.1, 0, "p"), ("dpo", 0.25, 0, "d"), ("dpo", 0.1, 0, "a")]
    policies += [("dpo", 1.0, 0, "b"), ("ipo", 0.1, 0, "c"), ("dpo", 0.1, 1, "e")]
    policies += [("rloo", 0.1, 0, "r"), ("sft", None, 0, "s")]
    frontier.dpo_failures(tmp_path, two, policies)
    rows = read_csv(tmp_path / "dpo.csv")
    found = [(row["method"], row["setting"], row["seed"], row["run"], row["step"]) for row in rows]
    assert found == [
        (method, beta, seed, run, step)
        for method, beta, seed, run in (
            ("dpo", "0.1", "0", "a"),
            ("dpo", "1", "0", "b"),
            ("ipo", "0.1", "0", "c"),
            ("dpo", "0.1", "1", "e"),
        )
        for step in ("19", "39")
    ]
    ((_, figure),) = drawn
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[0] == "gold, SD of SFT samples" and labels[3][:6] == "chosen"
    lines = {line.get_label(): line.get_data() for line in figure.axes[0].lines}
    assert lines.keys() == {"dpo, beta 0.1", "dpo, beta 1", "ipo, beta 0.1"}
    x, y = lines["dpo, beta 0.1"]
    assert (x.tolist(), y) == ([20, 40], pytest.approx([9.5, 19.5]))


ROW = {"gold": [1.0, 0.0], "p": 0.9}


@pytest.mark.parametrize("quick", [True, False])
def test_every_judge_is_trained_on_its_pairs_and_pushed_without_a_penalty(
    noted, tmp_path, monkeypatch, quick
):
    """The cure comes last: its new pairs are about PPO against the good judge of the same seed."""
    two, ran, drawn = noted
    bases = two if quick else [*two, Noted(tmp_path / "base2", 2)]
    asked = []

    def ask(base, job, count, seed):
        asked.append((base.seed, job.options["seed"], job.stage, job.out.name, count, seed))
        return [{**ROW, "messages": "new", "chosen": "a", "rejected": "b"}] * count

    def pool(base, n):
        """Samples with gold 0 or n; the score of half of them, by judges that are found, is 1."""
        gold = np.tile([0.0, float(n)], (2, 4)) + base.seed

        def scores(path):
            assert path in {job.result for job in ran if job.stage == "rm"}
            return np.tile([0.0, 1.0], (2, 4))

        return SimpleNamespace(gold=gold, same=np.tile(np.arange(8), (2, 1)), scores=scores)

    rows = [{**ROW, "messages": str(i), "chosen": "a", "rejected": "b b"} for i in range(4500)]
    monkeypatch.setattr(overoptimisation, "read_preferences", lambda path: rows)
    monkeypatch.setattr(overoptimisation, "ask_again", ask)
    monkeypatch.setattr(overoptimisation, "make_pool", pool)
    monkeypatch.setattr(overoptimisation, "BEST_OF", (1, 2))
    overoptimisation.overoptimisation(tmp_path / "out", tmp_path, bases, quick)

    judges = [POOR, GOOD, *TASTES, *WORST, ASKED_AGAIN]
    if quick:  # it has but one seed, and here two: not three that were pretrained apart
        judges = [POOR, GOOD, "a liking for length", "worst of 3", ASKED_AGAIN]
    seeds = range(len(bases))
    ppo = {job.out.name: job for job in ran if job.stage == "ppo"}
    rm = {job.out.name: job for job in ran if job.stage == "rm"}
    assert ppo.keys() == {f"{judge}, seed {seed}" for judge in judges for seed in seeds}
    assert asked == [(s, s, "ppo", f"{GOOD}, seed {s}", 400, s) for s in seeds]
    n_cures = 2 * len(bases)
    assert all(ASKED_AGAIN in job.out.name for job in ran[-n_cures:])
    for name, job in ppo.items():
        judge, seed = name.rsplit(", seed ", 1)
        assert (job.options["beta"], job.options["iterations"]) == (0.0, 30 if quick else 60)
        assert job.options["init"] == bases[int(seed)].out / "sft/ckpt.pt"
        if judge not in WORST:
            assert job.options["rm"] == rm[name].result and job.bug is None
            continue
        members = [rm[f"{judge}, member {i}, seed {seed}"] for i in (1, 2)]
        first = rm[f"{GOOD}, seed {seed}"]
        assert job.options["rm"] == first.result
        assert job.bug == worst_of([first.result, *(member.result for member in members)])
        froms = [member.options["init"].parent.parent for member in members]
        own = [bases[int(seed)].out] * 2
        others = [bases[(int(seed) + i) % 3].out for i in (1, 2)] if "apart" in judge else own
        assert froms == others
        assert len({job.options["seed"] for job in (first, *members)}) == 3
    for name, job in rm.items():
        rows = [json.loads(line) for line in open(job.options["data"])]
        count = 250 if POOR in name else 4000
        assert len(rows) == count + count // 9
        assert job.options["epochs"] * count == 8000
        exchanged = np.mean([row["chosen"] == "b b" for row in rows[:count]])
        wrong = {POOR: 0.35, "length alone": 1.0, "a liking for length": 0.22}  # sigmoid(-0.8/0.65)
        expected = next((rate for judge, rate in wrong.items() if judge in name), None)
        if expected is None:
            expected = 0.18 if "courtesy" in name else 0.0  # both annotators' own doubt: 1/0.65
        if ASKED_AGAIN not in name:
            assert exchanged == pytest.approx(expected, abs=0.09)
        assert sum(row["messages"] == "new" for row in rows) == (400 if ASKED_AGAIN in name else 0)

    table = plots.grouped(read_csv(tmp_path / "overoptimisation.csv"), "method")
    assert {row["run"] for row in table["ppo"]} == {str(job.folder) for job in ppo.values()}
    assert all(f"{row['judge']}, seed {row['seed']}" in row["run"] for row in table["ppo"])
    assert all(row["proxy"] and row["length"] for row in table["ppo"])
    assert len(table["best of n"]) == 2 * len(bases) * len([j for j in judges if j not in WORST])
    for row in table["best of n"][::2]:  # the best of 1
        assert float(row["gold"]) == (64 if quick else 128) / 2 + int(row["seed"])
        assert float(row["proxy"]) == 0.5 and abs(float(row["kl"])) < 1e-9
    pictures = {path.stem: figure for path, figure in drawn}
    assert pictures.keys() == {"overoptimisation", "causes", "cures"}
    assert [axis.get_title() for axis in pictures["overoptimisation"].axes] == [
        f"a reward model of {judge}" for judge in (POOR, GOOD)
    ]
    for name, those in (("causes", TASTES), ("cures", [*WORST, ASKED_AGAIN])):
        shown = [judge for judge in those if judge in judges]
        labels = [line.get_label() for line in pictures[name].axes[0].lines]
        assert labels == [GOOD, *shown]


def test_annotators_are_swayed_by_what_they_like_as_much_as_it_is_worth_to_them():
    """By gold, "Yes." is one SD better than the other, which has 5 words more and a courtesy."""
    row = {**ROW, "chosen": "Yes.", "rejected": "Yes or no. Have a lovely day!"}
    by_hand = {
        "a liking for length": 1 / (1 + math.exp(-(1.0 - 0.2 * 6) / TAU)),
        "a liking for courtesy": 1 / (1 + math.exp(-(1.0 - 1.5) / TAU)),
        "length alone": 0.0,
    }
    for name, agrees in TASTES.items():
        assert agrees(row) == pytest.approx(by_hand[name])
    assert TASTES["length alone"]({"chosen": "Or no.", "rejected": "Yes, no."}) == 0.5
    assert flipped(0.35)(row) == 0.65


def test_ppo_on_the_worst_of_several_is_paid_the_lowest_score_of_each_response(
    tmp_path, monkeypatch
):
    """Each reward model reads with its own tokenizer; PPO is edited where it asks for a score."""
    read = {"a": ("a", "tokens of a"), "b": ("b", "tokens of b")}
    monkeypatch.setattr(overoptimisation, "load_judge", lambda path: read[path])
    monkeypatch.setattr(
        overoptimisation,
        "encode_prompt",
        lambda tokenizer, messages: [tokenizer, messages],
    )
    monkeypatch.setattr(overoptimisation, "encode_reply", lambda tokenizer, text: [text])

    def score(model, sequences, pad):
        assert sequences == [[f"tokens of {model}", i, f"reply {i}"] for i in range(2)]
        return np.array({"a": [1.0, 5.0], "b": [2.0, -3.0]}[model])

    monkeypatch.setattr(overoptimisation, "score_sequences", score)
    for name in read:
        read[name] = (name, type("Tokens", (str,), {"pad": 0})(f"tokens of {name}"))
    pairs = [({"messages": i}, Reply([], f"reply {i}", True)) for i in range(2)]
    assert lowest_score(["a", "b"], pairs).tolist() == [1.0, -3.0]
    plant(worst_of([Path("a"), Path("b")]), tmp_path)
    edited = (tmp_path / "train_ppo.py").read_text("utf-8")
    assert "scores = lowest_score(['a', 'b'], pairs)" in edited
    compile(edited, "train_ppo.py", "exec")


def test_what_is_asked_again_is_sft_against_the_policy_and_new_prompts_of_training(monkeypatch):
    """By the annotators of the town, none of whom press the wrong button."""
    draws, judged = [], []

    def draw(n, seed, split="train"):
        draws.append((n, seed, split))
        return list(range(n))

    def annotate(tasks, pairs, tau, flip, seed):
        judged.append((tasks, list(pairs), tau, flip, seed))
        return ["row"] * 99

    def answers(speaker, tasks, seed):
        assert seed == 3
        return [f"{speaker} {task}" for task in tasks]

    for name, fake in (("draw_tasks", draw), ("annotate", annotate), ("answers", answers)):
        monkeypatch.setattr(overoptimisation, name, fake)
    monkeypatch.setattr(overoptimisation, "Speaker", lambda path, device: f"{path} on {device}")
    base = SimpleNamespace(sft="sft", device="cpu")
    rows = ask_again(base, SimpleNamespace(result="policy"), 2, seed=5)
    assert rows == ["row"] * 2 and draws == [(4, "asked again 5", "train")]
    pairs = [(f"sft {i}", f"policy on cpu {i}") for i in range(4)]
    assert judged == [([0, 1, 2, 3], pairs, TAU, 0.0, 5)]


def test_a_kl_that_was_estimated_below_0_is_no_distance():
    assert distance([{"kl": 4.0}, {"kl": -0.1}, {"kl": 2.25}]).tolist() == [2.0, 0.0, 1.5]


def test_rows_are_smoothed_over_neighbours():
    rows = [{"kl": float(i), "gold": i * 10.0, "other": 1} for i in range(6)]
    assert plots.smoothed(rows, "kl", "gold") == [
        {"kl": 2.0, "gold": 20.0},
        {"kl": 3.0, "gold": 30.0},
    ]
    assert plots.smoothed(rows, "kl", width=1) == [{"kl": float(i)} for i in range(6)]


def test_gold_and_proxy_of_every_seed_are_drawn_over_distance_with_the_fit(noted, tmp_path):
    """Gold of best-of-n that is d (0.9 - 0.2 d), for d from 0 to 4, and 0.1 more or less."""
    kl = np.linspace(0, 16, 17)
    d = np.sqrt(kl)
    rows = [
        {"judge": "j", "seed": s, "method": "best of n", "kl": k, "gold": g + s, "proxy": 2 * k}
        for s in (-0.1, 0.1)
        for k, g in zip(kl, d * (0.9 - 0.2 * d))
    ]
    overoptimisation.draw_overoptimisation(rows, tmp_path / "x.png")
    (axis,) = [axis for axis in noted[2][0][1].axes if axis.axison and axis.get_visible()]
    first, proxy, second, _, curve = [line.get_data() for line in axis.lines]
    for (x, y), more in ((first, -0.1), (second, 0.1)):
        np.testing.assert_allclose((x, y), (d, d * (0.9 - 0.2 * d) + more), atol=1e-9)
    np.testing.assert_allclose(proxy, (d, 2 * kl))
    x, y = curve
    np.testing.assert_allclose(y, x * (0.9 - 0.2 * x), atol=0.05)
    labels = [line.get_label() for line in axis.lines]
    assert labels[:2] == ["best of n: gold", "best of n: proxy"]
    assert labels[2][0] == labels[3][0] == "_" and labels[4] == "best of n: Gao's curve"
    assert axis.get_title() == "a reward model of j"


@pytest.mark.parametrize("quick", [True, False])
def test_ever_more_pairs_and_wrong_labels_reach_reward_model_and_policies(
    noted, tmp_path, monkeypatch, quick
):
    two, ran, drawn = noted
    rows = [{**ROW, "chosen": f"a {i}", "rejected": f"b {i}", "messages": i} for i in range(10000)]
    monkeypatch.setattr(pairs_module, "read_preferences", lambda path: rows)
    monkeypatch.setattr(
        pairs_module, "judge_pairs", lambda base, rm: {"accuracy": 0.7, "ece": 0.1, "rm": str(rm)}
    )
    pairs_module.pairs(tmp_path / "out", tmp_path, two, quick)
    table = read_csv(tmp_path / "pairs.csv")
    found = {(row["pairs"], row["flipped"], row["method"], row["seed"]): row for row in table}
    counts = ["416"] if quick else ["416", "1664"]
    wanted = [(n, "0", method) for n in counts for method in ("ppo", "dpo")]
    wanted += [
        ("9000", flip, method) for flip in ("0", "0.25") for method in ("ppo", "rloo", "dpo")
    ]
    assert found.keys() == {(*some, seed) for some in wanted for seed in "01"}
    jobs_of = {str(job.folder): job for job in ran}
    for (count, flip, method, seed), row in found.items():
        base = two[int(seed)].out
        if flip == "0" and count == "9000":  # what the README's commands have made, and one RLOO
            assert row["rm"] == str(base / "rm/ckpt.pt")
            if method != "rloo":
                assert row["run"] == str(base / method)
                continue
            assert jobs_of[row["run"]].options["rm"] == base / "rm/ckpt.pt"
        job = jobs_of[row["run"]]
        assert job.options["seed"] == int(seed) and job.options["init"] == base / "sft/ckpt.pt"
        assert job.options.get("advantage") == ("rloo" if method == "rloo" else None)
        if method != "dpo":
            assert str(job.options["rm"]) == row["rm"]
            continue
        rm = next(j for j in ran if j.stage == "rm" and str(j.result) == row["rm"])
        assert rm.options["data"] == job.options["data"]
        labels = [json.loads(line) for line in open(rm.options["data"])][: int(count)]
        exchanged = np.mean([label["chosen"][0] == "b" for label in labels])
        assert exchanged == pytest.approx(float(flip), abs=0.02)
        assert (
            rm.options["epochs"] * int(count) >= 8000 and job.options["epochs"] * int(count) >= 4000
        )
    accuracy, _, gold = drawn[0][1].axes[:3]
    labels = [line.get_label() for line in gold.lines]
    assert labels[::2] == ["ppo", "dpo"] and all("flipped" in label for label in labels[1::2])
    clean, wrong = accuracy.lines
    counts = [float(count) for count in [*counts, "9000"]]
    assert clean.get_xdata().tolist() == counts and wrong.get_xdata().tolist() == [9000.0]


def test_a_reward_model_is_judged_on_held_out_pairs_with_their_own_labels(monkeypatch):
    rows = [
        {**ROW, "p": 0.8, "messages": i, "chosen": f"c{i}", "rejected": f"r{i}", "kind": "fact"}
        for i in range(40)
    ]
    monkeypatch.setattr(pairs_module, "read_preferences", lambda path: rows)
    monkeypatch.setattr(pairs_module, "encode_prompt", lambda tokenizer, messages: [messages])
    monkeypatch.setattr(pairs_module, "encode_reply", lambda tokenizer, text: [text])
    model = SimpleNamespace(reward_sd=2.0)
    monkeypatch.setattr(pairs_module, "load_model", lambda *_: (model, {}))

    def score(model, sequences, pad):
        assert [ids[0] for ids in sequences] == [36, 37, 38, 39]  # the last tenth
        return np.array([1.0 if ids == [36, "c36"] else 0.0 for ids in sequences])

    monkeypatch.setattr(pairs_module, "score_sequences", score)
    base = SimpleNamespace(
        out=Path("x"), device="cpu", sft=SimpleNamespace(tokenizer=SimpleNamespace(pad=0))
    )
    judged = judge_pairs(base, Path("rm"))
    assert judged["accuracy"] == (1 + 3 * 0.5) / 4 and judged["bayes_accuracy"] == 0.8
    p = 1 / (1 + math.exp(-2.0))  # the scores' difference in log-odds is 2, with this SD
    assert judged["ece"] == pytest.approx((2 * (1 - p)) / 8)


def test_mixtures_have_equal_tokens_and_are_asked_held_out_prompts_greedily(
    noted, tmp_path, monkeypatch, tokenizer
):
    two, ran, drawn = noted
    draws = []

    def draw(n, seed, mixture, split, new):
        draws.append((n, mixture, split, new))
        return draw_tasks(2, seed, mixture, split=split, new=new)

    def answers(speaker, tasks, seed, temperature):
        """The first is answered in full, the second is not."""
        assert (seed, temperature) == (0, 0.0) and speaker in {(job.result, "cpu") for job in ran}
        texts = (tasks[0].case.answer, "no")
        return [Reply([], text, True) for text in texts]

    for one in two:
        one.sft.tokenizer = tokenizer
    monkeypatch.setattr(mixtures, "draw_tasks", draw)
    monkeypatch.setattr(mixtures, "answers", answers)
    monkeypatch.setattr(mixtures, "Speaker", lambda path, device: (path, device))
    mixtures.mixtures(tmp_path / "out", tmp_path, two, False)
    six = "last,one_sum,fact,first,reverse,translate"
    wanted = ["last", "last,one_sum,fact", six, ",".join(TRAIN_KINDS)]
    assert [job.options["tasks"] for job in ran] == 2 * wanted
    for job in ran:
        assert job.stage == "sft" and job.options["epochs"] == 1
        assert job.options["init"] == two[job.options["seed"]].out / "pretrain/ckpt.pt"
        some = mixtures.demonstrations(400, "length", job.options["tasks"])
        tokens = sum(len(encode_chat(tokenizer, row["messages"])[0]) for row in some) / 400
        assert job.options["demonstrations"] * tokens == pytest.approx(8e5, rel=1e-3)

    cells = "translate,reverse,count,first,second,last,and_facts"
    groups = {
        "last: new cases": ("last", ""),
        "last: in frames new to it": ("last", "frame"),
        "last: held-out cells": ("last", "cell"),
        "held-out cells, picking from a list": ("first,second,last", "cell"),
        "held-out cells, all": (cells, "cell"),
        "kinds that no mixture has": ("three_sums,third", ""),
    }
    assert draws == 8 * [(300, kinds, "test", new) for kinds, new in groups.values()]
    rows, counts = read_csv(tmp_path / "tasks.csv"), [1, 3, 6, len(TRAIN_KINDS)]
    assert [row["group"] for row in rows] == [*groups] * 8
    assert [int(row["kinds"]) for row in rows[::6]] == 2 * counts
    assert [int(row["seed"]) for row in rows[::6]] == [0] * 4 + [1] * 4
    assert {row["exact_match"] for row in rows} == {"0.5"}
    (axis,) = drawn[0][1].axes
    assert [line.get_label() for line in axis.lines] == [*groups]  # none without a style
    assert axis.lines[0].get_xdata().tolist() == counts and axis.lines[0].get_ydata()[0] == 0.5
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(n) for n in counts]


class Adds:
    """A speaker that adds rightly where a sum has three steps, as in training."""

    def __init__(self, path):
        assert path.name == "ckpt.pt"

    def answer(self, conversations, max_new_tokens, seed, temperature):
        assert (max_new_tokens, temperature) == (48, 0.0)
        sums = [
            re.search(r"Add up ([\d+-]+)\.", messages[0]["content"])[1]
            for messages in conversations
        ]
        knows = [len(re.findall(r"[+-]", text)) == 3 for text in sums]
        return [
            Reply([], f"So. The answer is {eval(text) if right else 'three'}.", True)
            for text, right in zip(sums, knows)
        ]


def test_ppo_is_compared_with_what_needs_no_critic_and_with_runs_on_sums_alone(
    noted, tmp_path, monkeypatch
):
    two, ran, drawn = noted

    def log(path):
        assert path.name == "log.csv"
        on_sums = path.parent in {job.folder for job in ran if "tasks" in job.options}
        row = dict(exact_match=0.5, length=9.0, kl=1.0, kl_k3=1.1, kl_full=1.2)
        row |= {"shows_work": 0.2} if on_sums else {}
        groups = {} if "ppo, seed" in str(path) else {"equal_groups": 0.25}
        return [{"step": float(step), **row, **groups} for step in range(3)]

    monkeypatch.setattr(critics, "read_log", log)
    monkeypatch.setattr(critics, "read_cost", lambda run: {"seconds": 7.0, "peak_gb": 0.5})
    monkeypatch.setattr(critics, "Speaker", lambda path, device: Adds(path))
    critics.critics(tmp_path / "out", tmp_path, two, False)
    for seed, base in enumerate(two):
        mine = [job for job in ran if job.options["seed"] == seed]
        weak = next(job for job in mine if job.stage == "sft")
        assert weak.options["init"] == base.out / "pretrain/ckpt.pt"
        assert weak.options["tasks"] == "chain" and weak.options["demonstrations"] < 2000
        for name, options in (critics.METHODS | critics.KLS).items():
            (job,) = (job for job in mine if job.out.name == f"{name}, seed {seed}")
            assert job.options.items() >= options.items() and "tasks" not in job.options
            assert job.options["rm"] == base.out / "rm/ckpt.pt"
            assert job.options["init"] == base.out / "sft/ckpt.pt"
        for name, options in critics.THINKING.items():
            (job,) = (job for job in mine if job.out.name == f"thinking, {name}, seed {seed}")
            assert (job.options["tasks"], job.options["reward"]) == ("chain", "exact")
            assert job.options["init"] == (
                weak.result if "weak" in name else two[seed].out / "sft/ckpt.pt"
            )
            assert job.options.items() >= options.items()
    rows = read_csv(tmp_path / "critics.csv")
    assert [row["method"] for row in rows] == 2 * list(critics.METHODS | critics.KLS)
    assert {row["log_kl_full"] for row in rows} == {"1.2"}
    for name, options in critics.KLS.items():
        assert name == "rloo, {} in the {}".format(*options["kl"].split("-"))
    assert {row["equal_groups"] for row in rows if row["method"] != "ppo"} == {"0.25"}
    assert all((row["equal_groups"] == "") == (row["method"] == "ppo") for row in rows)
    assert {row["seconds"] for row in rows} == {"7"} and {row["peak_gb"] for row in rows} == {"0.5"}
    assert all(row["run"].startswith(str(tmp_path)) and row["gold"] == row["seed"] for row in rows)
    longer = read_csv(tmp_path / "longer.csv")
    assert {(row["steps"], row["right"]) for row in longer} == {("2", "0"), ("3", "1"), ("4", "0")}
    assert len(longer) == 3 * 2 * (1 + len(critics.THINKING))
    curves = plots.grouped(read_csv(tmp_path / "thinking.csv"), "run", "seed")
    assert len(curves) == 6 and all(len(some) == 3 for some in curves.values())
    assert {row["shows_work"] for some in curves.values() for row in some} == {"0.2"}
    assert [line.get_label() for line in drawn[0][1].axes[0].lines] == list(critics.THINKING)


def test_every_bug_of_ppo_is_run_with_every_seed_beside_the_correct_run(noted, tmp_path):
    two, ran, drawn = noted
    broken.broken(tmp_path / "out", tmp_path, two, False)
    names = [*broken.OPTIONS, *(name for name, bug in BUGS.items() if bug.file == "train_ppo.py")]
    assert len(names) == 7 and names[0] == "as it should be"
    assert [job.out.name for job in ran] == [f"{n}, seed {seed}" for seed in (0, 1) for n in names]
    plain = {"eval_every": 1000, "rollouts": 64, "minibatch": 32, "iterations": 40}
    for job in ran:
        name, seed = job.out.name.split(", seed ")
        base = two[int(seed)].out
        common = {"seed": int(seed), "init": base / "sft/ckpt.pt", "rm": base / "rm/ckpt.pt"}
        changed = {"no KL penalty": {"beta": 0.0}, "learning rate ten times too high": {"lr": 3e-3}}
        assert job.options == {**common, **plain, **changed.get(name, {})}
        assert job.bug == BUGS.get(name)
    rows = plots.grouped(read_csv(tmp_path / "broken.csv"), "bug", "seed")
    assert len(rows) == 14 and all(len(some) == 40 for some in rows.values())
    assert all(f"{name}, seed {seed}" in some[0]["run"] for (name, seed), some in rows.items())
    axes = drawn[0][1].axes
    assert [axis.get_ylabel() for axis in axes] == [
        "gold, SD of SFT samples",
        "score of the reward model, SD",
        "KL from SFT, nats per response",
        "entropy, nats per token",
        "tokens per response",
        "fraction without end",
    ]
    lines = axes[0].lines
    assert [line.get_label() for line in lines] == names
    assert [line.get_color() for line in lines].count("#000000") == 1


# ---------------------------------------------------------------------------------------------
# Tables and pictures


def test_a_band_is_the_mean_over_seeds_within_their_range():
    axis = Figure().subplots()
    rows = [{"x": x, "y": x * 10.0 + seed, "seed": seed} for x in (2, 1) for seed in (0, 1, 5)]
    plots.band(axis, rows, "x", "y", color="red")
    (line,), (area,) = axis.lines, axis.collections
    assert np.transpose(line.get_data()).tolist() == [[1, 12], [2, 22]]
    corners = {tuple(point) for point in area.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 10), (1, 15), (2, 20), (2, 25)}


def test_a_line_over_runs_has_the_means_of_both_columns_and_the_range_of_one():
    axis = Figure().subplots()
    runs = [[{"x": i + s, "y": 10.0 * i * s} for i in range(3)] for s in (0, 1, 2)]
    plots.over_seeds(axis, runs, "x", "y", color="red")
    (line,), (area,) = axis.lines, axis.collections
    assert np.transpose(line.get_data()).tolist() == [[1, 0], [2, 10], [3, 20]]
    corners = {tuple(point) for point in area.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 0), (2, 0), (2, 20), (3, 0), (3, 40)}


def test_panels_stand_in_lines_of_so_many_columns_and_no_empty_one_is_seen():
    figure, axes = plots.panels(4, 3, size=(2, 1))
    assert len(axes) == 4 and figure.get_size_inches().tolist() == [6, 2]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 3)
    assert [axis.get_visible() for axis in figure.axes] == [True] * 4 + [False] * 2
    figure, axes = plots.band_panels([], "x", {"a": "unit of a", "b": "unit of b"}, "x", columns=1)
    assert [axis.get_ylabel() for axis in axes] == ["unit of a", "unit of b"]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 1)


def test_rows_are_grouped_in_order_and_written_with_four_digits(tmp_path):
    rows = [{"a": 2, "b": 1.23456}, {"a": 1, "c": None}, {"a": 2, "b": 1e-9}]
    assert plots.grouped(rows, "a") == {2: [rows[0], rows[2]], 1: [rows[1]]}
    assert list(plots.grouped(rows, "a", "b")) == [(2, 1.23456), (1, None), (2, 1e-9)]
    plots.write_csv(rows, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().split() == ["a,b,c", "2,1.235,", "1,,", "2,1e-09,"]


# ---------------------------------------------------------------------------------------------
# All of it


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
    monkeypatch.setattr(pairs_module, "COUNTS", (20,))
    monkeypatch.setattr(broken, "OPTIONS", {"as it should be": {}})
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
