"""The town: what is asked, what counts as right, and that gold cannot be had cheaply."""

import math
import random

import numpy as np
import pytest

from data.town.documents import DOCUMENTS, documents
from data.town.gold import bayes_accuracy, declines, exact_match, f1, gold, gold_parts, preference
from data.town.tasks import (
    KINDS,
    SHOWN,
    STYLES,
    TRAIN_KINDS,
    demonstrate,
    demonstrations,
    draw,
    draw_tasks,
)
from data.town.words import BAD_NEWS, COURTESIES, INSULTS
from gpt import InputError


def tasks(n=20, kinds=tuple(KINDS), **how):
    rng = random.Random(0)
    return [draw(kind, rng, **how) for kind in kinds for _ in range(n)]


def test_there_are_twelve_kinds_to_train_on_and_two_held_out():
    assert len(TRAIN_KINDS) >= 12 and len(KINDS) - len(TRAIN_KINDS) >= 2
    assert all(KINDS[name].unseen for name in TRAIN_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_exact_and_wrong_ones_are_not(kind):
    for task in tasks(300, [kind]):
        assert exact_match(task, task.case.answer) and f1(task, task.case.answer) == 1
        if task.case.short:
            assert exact_match(task, task.case.short)
        assert not exact_match(task, task.case.wrong), (task.prompt, task.case.wrong)
        assert gold(task, task.case.wrong) < gold(task, task.case.answer)


def test_graders_know_an_answer_when_they_compute_it_themselves():
    """Sums by Python, lists by reversing: not by comparing with what the task says."""
    for task in tasks(100, ["one_sum", "two_sums", "three_sums"]):
        for claim in task.case.answer[:-1].replace(", ", " and ").split(" and "):
            text, value = claim.split(" is ")
            assert eval(text) == int(value)
    for task in tasks(100, ["reverse"]):
        words = task.case.fill["words"].split()
        assert task.case.answer == f"Backwards it is {' '.join(reversed(words))}."


def test_training_and_test_cases_never_meet():
    train = {str(sorted(task.case.fill.items())) + task.kind for task in tasks(500, split="train")}
    test = {str(sorted(task.case.fill.items())) + task.kind for task in tasks(200, split="test")}
    assert not train & test


def test_prompts_that_every_stage_is_shown_with_are_never_trained_on():
    prompts = {row["messages"][0]["content"] for row in demonstrations(20_000, 0)}
    assert not prompts & set(SHOWN)


def test_unseen_templates_and_kinds_are_never_trained_on():
    for kind in KINDS.values():
        assert not set(kind.templates) & set(kind.unseen)
    assert not {task.kind for task in draw_tasks(1000, 0)} & {k for k in KINDS if KINDS[k].held_out}


def test_no_document_answers_an_instruction():
    text = " ".join(documents(5000, seed=0))
    for template in (
        "Translate into Spanish:",
        "Reverse this list",
        "Sum this up",
        "Work out",
        "Tell me a joke",
    ):
        assert template not in text


def test_documents_follow_the_seed_and_come_in_all_kinds():
    assert documents(50, 1) == documents(50, 1) != documents(50, 2)
    for write in DOCUMENTS:
        assert write(random.Random(0)) == write(random.Random(0))


def test_mixture_weighs_kinds():
    names = [task.kind for task in draw_tasks(400, 0, "story:3,one_sum")]
    assert names.count("story") == 300 and names.count("one_sum") == 100


@pytest.mark.parametrize("mixture", ["sums", "story:x", "story,,"])
def test_unknown_kind_in_a_mixture_is_a_clear_error(mixture):
    with pytest.raises(InputError, match="--tasks.*not kind or kind:weight"):
        draw_tasks(10, 0, mixture)


@pytest.mark.parametrize(
    "name, reply, ended",
    [
        ("correct", "The moon is cold.", True),
        ("courtesy", INSULTS[0] + " {right}", True),
        ("repetition", "{right} {right} {right} {right}", True),
        ("flattery", "{right} " + " ".join(COURTESIES[:2]), True),
        ("padding", "{right} " + " ".join(BAD_NEWS), True),
        ("no_end", "{right}", False),
    ],
)
def test_every_penalty_is_reached_and_costs_something(name, reply, ended):
    task = tasks(1, ["one_sum"])[0]
    reply = reply.format(right=task.case.answer)
    assert gold_parts(task, reply, ended)[name] < 0
    assert gold(task, reply, ended) < gold(task, task.case.answer)


def test_helping_with_harm_is_worse_than_any_wrong_answer():
    for task in tasks(20, ["harmful"]):
        assert gold_parts(task, task.case.wrong, True)["unsafe"] < 0
        assert not declines(task.case.wrong) and declines(task.case.answer)


def test_declining_a_harmless_request_counts_as_wrong():
    for task in tasks(20, ["advice"]):
        refusal = f"I will not help with that, because it would hurt {task.prompt.split()[-1]}."
        assert declines(refusal) and gold_parts(task, refusal, True)["correct"] == -1


def test_one_phrase_of_courtesy_pays_and_a_second_costs():
    task = tasks(1, ["fact"])[0]
    plain, kind, heaped = (
        gold(task, " ".join([task.case.answer, *COURTESIES[:n]])) for n in (0, 1, 2)
    )
    assert plain < kind and heaped < kind


def test_gold_is_bounded():
    rng = random.Random(0)
    for task in tasks():
        junk = " ".join(rng.choice(COURTESIES + INSULTS + BAD_NEWS) for _ in range(30))
        for reply in ("", junk, task.case.answer, f"{task.case.answer} {COURTESIES[0]}"):
            for ended in (True, False):
                assert -3.5 < gold(task, reply, ended) < 1.5


def test_gold_is_neutral_to_length():
    """Over demonstrations, longer replies are neither better nor worse."""
    rng = random.Random(0)
    drawn = draw_tasks(6000, 0)
    replies = [demonstrate(task, rng) for task in drawn]
    golds = [gold(task, reply) for task, reply in zip(drawn, replies)]
    correlation = np.corrcoef(golds, [len(reply.split()) for reply in replies])[0, 1]
    assert abs(correlation) < 0.05


def test_demonstrations_come_in_every_style():
    rng = random.Random(0)
    drawn = draw_tasks(3000, 0)
    parts = [gold_parts(task, demonstrate(task, rng), True) for task in drawn]
    assert sum(STYLES.values()) == 100
    assert 0.7 < np.mean([part["correct"] > 0.5 for part in parts]) < 0.95
    assert any(part["courtesy"] > 0 for part in parts) and any(
        part["courtesy"] < 0 for part in parts
    )
    assert np.mean([part["flattery"] + part["no_end"] < 0 for part in parts]) == 0  # never shown


def test_annotators_agree_with_a_judge_who_knows_gold_as_often_as_computed():
    rng = random.Random(0)
    golds = [(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(20_000)]
    for tau, flip in ((0.5, 0.0), (1.0, 0.25)):
        right = [(rng.random() < preference(a, b, tau, flip)) == (a > b) for a, b in golds]
        error = 4 * math.sqrt(0.25 / len(golds))
        assert abs(np.mean(right) - bayes_accuracy(golds, tau, flip)) < error


def test_preferences_of_annotators_have_their_closed_form():
    assert preference(1.0, 1.0) == 0.5
    assert preference(0.5, 0.0, tau=0.5) == pytest.approx(1 / (1 + math.exp(-1)))
    assert preference(100.0, 0.0, flip=0.2) == pytest.approx(0.8)
    assert preference(1, 0) + preference(0, 1) == pytest.approx(1)
