"""What the report says: best of n, intervals, log-probabilities of whole replies."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data.evaluate
from data.chat import Reply
from data.evaluate import BestOf, Stage, interval, reply_logprobs
from train_dpo import sequence_logprobs


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_beats_one_more_sample_with_probability_n_over_n_plus_1(monkeypatch, n):
    """By the score that picks it: the best of n + 1 equals is any of them, equally likely."""
    rng = np.random.default_rng(0)

    def say(self, texts, temperature, seed):  # a random number, which is its own score
        return [Reply([x], str(x), True) for x in rng.integers(10**9, size=len(texts))]

    monkeypatch.setattr(Stage, "answer", say)
    monkeypatch.setattr(Stage, "encode", lambda self, text: [])
    monkeypatch.setattr(
        data.evaluate, "score_sequences", lambda model, rows, pad: np.array([r[-1] for r in rows])
    )
    stage, texts = BestOf.__new__(BestOf), ["?"] * 20_000  # without models from files
    stage.n, stage.reward_model, stage.tokenizer = n, None, SimpleNamespace(pad=0)
    best, other = stage.answer(texts, 1.0, 0), say(None, texts, 1.0, 0)
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
