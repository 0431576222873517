"""What is held out: no stage learns from it, and no two draws of the town are the same."""

from collections import Counter

import pytest
from tiny_runs import conversation

import train_pretrain
from data.evaluate import Prompts
from data.tokenizer import load_tokenizer
from data.town.tasks import SHOWN
from gpt import load_checkpoint

# What every stage draws to learn from, and what it measures itself on. Seeds of training follow
# --seed. Those of measurements do not: runs with different seeds are to be compared.
DRAWN = {
    "pretrain": {("documents 0", ""), ("documents validation", "")},
    "sft": {("tasks 0", "train"), ("tasks validation", "test")},
    "preferences": {("tasks preferences 0", "train"), ("tasks preferences 0", "test")},
    "rm": set(),  # learns from the preferences
    "ppo": {("tasks ppo 0", "train"), ("tasks ppo", "test")},
    "dpo": {("tasks dpo", "test")},
}


def splits_of(draw):
    return {split for split, _ in draw.tasks} or {""}


def prompts_of(draws, wanted):
    return {prompt for draw in draws for split, prompt in draw.tasks if split == wanted}


@pytest.mark.parametrize("stage", DRAWN)
def test_every_stage_draws_once_to_learn_and_once_to_be_measured(noted_chain, stage):
    _, draws, _ = noted_chain
    found = [(draw.seed, *splits_of(draw)) for draw in draws if draw.stage == stage]
    found = Counter(x for x in found if x[0].startswith(("tasks", "documents")))
    assert found == Counter(DRAWN[stage])  # each of them once


def test_no_two_draws_have_the_same_seed():
    """But those of preferences, which come from two splits."""
    drawn = [draw for draws in DRAWN.values() for draw in draws]
    assert len(set(drawn)) == len(drawn)


def learned_prompts(chain, learned, stage):
    """Of every row that a stage has read with gradients, the conversations in it that somebody
    answers: up to its last answer, and up to any earlier one."""
    tokenizer = load_tokenizer(load_checkpoint(chain / "sft" / "ckpt.pt")["tokenizer"])
    for ids in learned[stage]:
        answers = [i for i, token in enumerate(ids) if token == tokenizer.assistant]
        yield {tokenizer.decode(ids[:i]) for i in answers}


def test_pretraining_learns_from_whole_rows_and_never_from_a_document_of_validation(noted_chain):
    """Those are read one by one, as long as they are; what is learned from has no end."""
    assert {len(ids) for ids in noted_chain[2]["pretrain"]} == {train_pretrain.Config().context}


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_no_stage_learns_from_a_prompt_that_is_held_out_anywhere(noted_chain, stage):
    """Not even from one that another stage, or the evaluation, measures on; nor is it the first
    question of a longer conversation, whose answer would be learned."""
    chain, draws, learned = noted_chain
    trained, rows = prompts_of(draws, "train"), list(learned_prompts(chain, learned, stage))
    assert len(rows) > 20 and all(row & trained for row in rows)
    report = Prompts.draw(600, 0)
    groups = (report.seen, report.strangers, report.facts, report.safety, *report.new.values())
    asked = {conversation(task) for group in groups for task in group}
    assert not set.union(*rows) & (prompts_of(draws, "test") | asked | set(SHOWN))
