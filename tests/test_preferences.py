"""Preferences: pairs of sampled responses, and who prefers which how surely."""

import json
import random
import shutil

import pytest
from tiny_runs import make_ends_likely

from data.chat import Reply, question
from data.files import held_out, read_preferences
from data.preferences import Config, annotate, ask_human, end_with_a_tenth, main
from data.town.tasks import demonstrate, draw_tasks
from gpt import InputError


@pytest.fixture
def ending(chain, tmp_path):
    """A folder with an SFT model whose responses often end."""
    shutil.copytree(chain / "sft", tmp_path / "sft")
    make_ends_likely(tmp_path / "sft")
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_preferences_are_two_different_finished_replies_to_a_prompt(ending):
    main(Config(out=str(ending), pairs=100, max_new_tokens=20))
    rows = read(ending / "preferences.jsonl")
    assert len(rows) > 20
    for row in rows:
        assert row["chosen"] != row["rejected"] and row["prompt"] and 0 < row["p"] < 1


def test_prompts_of_the_last_tenth_are_held_out_of_all_training(ending):
    """It is this tenth that stages test on, so its cases must be those of the test split."""
    main(Config(out=str(ending), pairs=300, max_new_tokens=20))
    trained, tested = held_out(read(ending / "preferences.jsonl"))
    train_prompts = {task.prompt for task in draw_tasks(20_000, 0)}
    test_prompts = {task.prompt for task in draw_tasks(30, "preferences 0", split="test")}
    assert len(tested) > 5 and not train_prompts & {row["prompt"] for row in tested}
    assert not test_prompts & {row["prompt"] for row in trained}


def test_named_preferences_get_a_file_of_their_own(ending):
    cfg = dict(out=str(ending), pairs=50, max_new_tokens=20)
    main(Config(**cfg))
    before = (ending / "preferences.jsonl").read_bytes()
    main(Config(**cfg, name="noisy", flip=0.25, seed=1))
    assert (ending / "preferences.jsonl").read_bytes() == before
    assert len(read_preferences(ending / "noisy.jsonl")) > 10


def test_annotators_who_always_press_the_wrong_button_turn_every_label():
    rng, tasks = random.Random(0), draw_tasks(300, 1)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    careful, wrong = (annotate(tasks, pairs, tau=0.01, flip=flip, seed=0) for flip in (0.0, 1.0))
    for a, b in zip(careful, wrong, strict=True):
        if a["gold"][0] != a["gold"][1]:
            assert (a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"])
            assert (a["p"], b["p"]) == (1, 1) and a["gold"] == b["gold"][::-1]


def test_people_annotate_prompts_of_their_own_and_a_reward_model_cannot_answer(
    ending, monkeypatch, capsys
):
    (ending / "mine.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Who are you?"}\n')
    answers = iter("12")
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    cfg = dict(out=str(ending), human=True, prompts=str(ending / "mine.jsonl"))
    main(Config(**cfg))
    assert "] Hi\n" in capsys.readouterr().out
    rows = read_preferences(ending / "human_preferences.jsonl")
    assert [row["messages"] for row in rows] == [question("Hi"), question("Who are you?")]
    with pytest.raises(ValueError, match="--prompts needs --human"):
        Config(prompts="mine.jsonl")


def test_a_reward_model_cannot_be_asked_for_responses(chain):
    with pytest.raises(InputError, match="rm/ckpt.pt is a reward model: another checkpoint"):
        main(Config(out=str(chain), init=f"{chain}/rm/ckpt.pt"))


def test_preferences_without_a_usable_pair_say_so(chain):
    with pytest.raises(InputError, match="no pair is left"):
        main(Config(out=str(chain), name="few", pairs=10, max_new_tokens=2))
    assert not (chain / "few.jsonl").exists()


def test_annotated_rows_say_how_likely_their_label_was():
    rng = random.Random(0)
    tasks = draw_tasks(2000, 1)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    rows = annotate(tasks, pairs, tau=0.5, flip=0.1, seed=0)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    right = sum(row["gold"][0] > row["gold"][1] for row in rows) / sum(
        row["gold"][0] != row["gold"][1] for row in rows
    )
    sure = [max(row["p"], 1 - row["p"]) for row in rows if row["gold"][0] != row["gold"][1]]
    assert abs(right - sum(sure) / len(sure)) < 0.04


def test_human_preferences_are_written_at_once_and_can_be_stopped(tmp_path, monkeypatch, capsys):
    answers = iter(["2", "maybe", "s", "1", "q"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    pairs = [(Reply([], f"a{i}", True), Reply([], f"b{i}", True)) for i in range(5)]
    ask_human([question("Hi")] * 5, pairs, tmp_path / "mine.jsonl")
    rows = read(tmp_path / "mine.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b0", "a0"), ("a2", "b2")]


@pytest.mark.parametrize("n_train, n_test", [(900, 100), (870, 130), (930, 70), (3, 5), (5, 1)])
def test_no_prompt_of_the_test_split_is_trained_on_and_no_other_is_held_out(n_train, n_test):
    """However many pairs of either kind annotation has left; hardly any is lost."""
    prompts = [f"train {i}" for i in range(n_train)] + [f"test {i}" for i in range(n_test)]
    rows = [{"prompt": prompt} for prompt in prompts]
    rows = end_with_a_tenth(rows, {f"test {i}" for i in range(n_test)})
    train, test = held_out(rows)
    assert all(row["prompt"].startswith("train") for row in train)
    assert all(row["prompt"].startswith("test") for row in test)
    assert len(train) == n_train or len(test) == n_test
