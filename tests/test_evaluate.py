"""The report: what it says of every run, best of n, intervals, whole responses' probabilities."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.evaluate
from data.chat import Reply
from data.evaluate import BestOf, Config, evaluate, reply_logprobs
from data.metrics import interval
from data.talk import Speaker
from data.town.tasks import SHOWN, TRAIN_KINDS
from gpt import InputError
from train_dpo import sequence_logprobs


def test_evaluation_reports_every_stage(chain):
    prompts = 2 * len(TRAIN_KINDS)
    evaluate(Config(out=str(chain), prompts=prompts, n=2, max_new_tokens=6))
    report = json.loads((chain / "report.json").read_text())
    assert list(report["stages"]) == ["base", "sft", "best_of_n", "ppo", "dpo"]
    keys = {
        "gold_mean",
        "gold_ci95",
        "greedy_gold_mean",
        "win_rate_vs_sft",
        "win_rate_ci95",
        "exact_match",
        "f1",
        "refusal_rate",
        "false_refusal_rate",
        "kl_to_sft",
        "response_tokens",
        "no_end_rate",
        "train_seconds",
        "forward_equivalents",
        "by_task",
    }
    for numbers in report["stages"].values():
        assert keys <= numbers.keys()
        low, high = numbers["gold_ci95"]
        assert low <= numbers["gold_mean"] <= high
    sft = report["stages"]["sft"]
    assert sft["gold_mean"] == pytest.approx(0, abs=1e-9) and sft["win_rate_vs_sft"] == 0.5
    assert sft["kl_to_sft"] == 0
    assert {"accuracy", "bayes_accuracy", "ece", "spearman_gold"} <= report["reward_models"][
        "rm"
    ].keys()
    assert (report["prompts"], report["seed"], report["temperature"]) == (prompts, 0, 1.0)
    text = (chain / "report.md").read_text()
    assert "What is 4-2 and 3-1?" in text and (chain / "report.png").stat().st_size > 10_000


def test_evaluation_reports_what_there_is(chain, tmp_path):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    cfg = Config(out=str(tmp_path), prompts=2 * len(TRAIN_KINDS), n=2, max_new_tokens=4)
    report = evaluate(cfg)
    assert list(report["stages"]) == ["sft"] and not report["reward_models"]
    shutil.rmtree(tmp_path / "sft")
    with pytest.raises(InputError, match="run `python train_sft.py` first"):
        evaluate(cfg)


def test_best_of_n_is_the_sample_that_the_reward_model_scores_highest(chain):
    speaker = BestOf(chain / "sft" / "ckpt.pt", chain / "rm" / "ckpt.pt", 4, "cpu")
    texts = SHOWN[:3]
    samples = Speaker.answer(speaker, texts * 4, 6, seed=0)
    for i, best in enumerate(speaker.answer(texts, 6, seed=0)):
        ids = [speaker.encode(texts[i]) + sample.ids for sample in samples[i::3]]
        scores = [speaker.reward_model(torch.tensor([row]))[0, -1].item() for row in ids]
        assert best == samples[i::3][scores.index(max(scores))]


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_beats_one_more_sample_with_probability_n_over_n_plus_1(monkeypatch, n):
    """By the score that picks it: the best of n + 1 equals is any of them, equally likely."""
    rng = np.random.default_rng(0)

    def say(self, texts, max_new_tokens, seed):  # a random number, which is its own score
        return [Reply([x], str(x), True) for x in rng.integers(10**9, size=len(texts))]

    monkeypatch.setattr(Speaker, "answer", say)
    monkeypatch.setattr(Speaker, "encode", lambda self, text: [])
    monkeypatch.setattr(
        data.evaluate, "score_sequences", lambda model, rows, pad: np.array([r[-1] for r in rows])
    )
    speaker, texts = BestOf.__new__(BestOf), ["?"] * 20_000  # without models from files
    speaker.n, speaker.reward_model, speaker.tokenizer = n, None, SimpleNamespace(pad=0)
    best, other = speaker.answer(texts, 48, seed=0), say(None, texts, 48, 0)
    wins = np.mean([a.ids > b.ids for a, b in zip(best, other)])
    assert wins == pytest.approx(n / (n + 1), abs=0.01)


def test_interval_holds_the_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(4000):
        low, high = interval(rng.normal(3.0, 2.0, size=200))
        hits += low <= 3.0 <= high
    assert hits / 4000 == pytest.approx(0.95, abs=0.01)


def test_log_probability_of_a_reply_is_that_of_training(tiny):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    replies = [[9, 10], [11, 12, 13, 14], [15]]
    for prompt, reply, ours in zip(prompts, replies, reply_logprobs(tiny, prompts, replies)):
        mask = torch.tensor([[False] * len(prompt) + [True] * len(reply)])
        theirs = sequence_logprobs(tiny, torch.tensor([prompt + reply]), mask).item()
        assert ours == pytest.approx(theirs, rel=1e-5)
