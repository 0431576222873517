"""Preferences: pairs of sampled responses, and who prefers which how surely."""

import json
import random
import re
import shutil

import pytest
from tiny_runs import SecondTurn, make_ends_likely

from data.chat import Reply, question
from data.files import held_out, read_preferences, write_rows
from data.preferences import (
    Config,
    annotate,
    ask_human,
    end_with_a_tenth,
    load_preferences,
    main,
    sample_pairs,
)
from data.talk import Speaker
from data.town.demonstrations import demonstrate
from data.town.gold import MEAN, SD, preference
from data.town.tasks import Case, Task, draw_tasks
from gpt import InputError, load_model


@pytest.fixture
def ending(chain, tmp_path):
    """A folder with an SFT model whose responses often end."""
    shutil.copytree(chain / "sft", tmp_path / "sft")
    make_ends_likely(tmp_path / "sft")
    return tmp_path


AND_TWO_MORE = SecondTurn(
    "and_sums",
    "And 2 more?",
    Case("8+2 is 10.", "8+2 is 11.", {}, "10."),
    ("What is 7+1?", "7+1 is 8."),
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def types(monkeypatch, *answers):
    """What somebody answers at the terminal; one question more fails."""
    answers = iter(answers)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))


def test_preferences_are_two_different_finished_replies_to_a_prompt(ending):
    main(Config(out=str(ending), pairs=100, max_new_tokens=20))
    rows = read(ending / "preferences.jsonl")
    sampled_from = load_model(ending / "sft/ckpt.pt")[1]["fingerprint"]
    assert len(rows) > 20
    for row in rows:
        assert row["chosen"] != row["rejected"] and row["messages"] and 0 < row["p"] < 1
        assert row["sampled_from"] == sampled_from


def test_both_responses_of_a_pair_are_samples_of_the_model_to_their_prompt(ending):
    """As anybody could sample them, all first ones before all second ones."""
    speaker = Speaker(ending / "sft/ckpt.pt")
    asked = [question("Hello"), AND_TWO_MORE.messages, question("Who is Mila?")]
    cfg = Config(temperature=0.8, max_new_tokens=7, seed=3)
    first, second = zip(*sample_pairs(speaker.model, speaker.tokenizer, asked, cfg))
    assert [*first, *second] == speaker.answer(asked * 2, 7, 3, temperature=0.8)


def test_pairs_about_a_second_turn_come_with_the_whole_conversation(tmp_path):
    """Which the reward model and DPO read, as read_preferences hands it to them."""
    pair = Reply([], "8+2 is 10.", True), Reply([], "10.", True)
    rows = annotate([AND_TWO_MORE], [pair], tau=0.01, flip=0.0, seed=0)
    said = ["What is 7+1?", "7+1 is 8.", "And 2 more?"]
    assert [message["content"] for message in rows[0]["messages"]] == said
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "user"]
    write_rows(rows, tmp_path / "rows.jsonl")
    (read,) = read_preferences(tmp_path / "rows.jsonl")
    assert (read["messages"], read["chosen"]) == (rows[0]["messages"], "8+2 is 10.")


def test_labels_follow_gold_where_annotators_are_sure():
    """Right, wrong, and right but with courtesy: 1, -1 and 1.75 points."""
    task = Task("one_sum", "What is 12-5?", Case("12-5 is 7.", "12-5 is 8.", {}))
    texts = ("12-5 is 7.", "12-5 is 8.", "12-5 is 7. Have a lovely day!")
    right, wrong, kind = (Reply([], text, True) for text in texts)
    unfinished = Reply([], "12-5 is 7. I", False)
    pairs = [(right, wrong), (wrong, right), (kind, right), (right, right), (right, unfinished)]
    rows = annotate([task] * 5, pairs, tau=0.01, flip=0.0, seed=0)
    golds = {text: round((x - MEAN) / SD, 4) for text, x in zip(texts, (1, -1, 1.75))}
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        (right.text, wrong.text),
        (right.text, wrong.text),
        (kind.text, right.text),
    ]
    for row in rows:
        assert row["gold"] == [golds[row["chosen"]], golds[row["rejected"]]] and row["p"] == 1.0
        assert (row["kind"], row["messages"]) == ("one_sum", question("What is 12-5?"))


def test_prompts_of_the_last_tenth_are_held_out_of_all_training(ending):
    """It is this tenth that stages test on, so its cases must be those of the test split."""
    for seed in range(3):  # which pairs are left out is chance
        main(Config(out=str(ending), pairs=300, max_new_tokens=20, seed=seed))
        trained, tested = held_out(read(ending / "preferences.jsonl"))
        test_tasks = draw_tasks(30, f"preferences {seed}", split="test")
        test_prompts = {str(task.messages) for task in test_tasks}
        assert len(tested) > 5 and {str(row["messages"]) for row in tested} <= test_prompts
        assert not test_prompts & {str(row["messages"]) for row in trained}


def test_named_preferences_get_a_file_of_their_own(ending):
    cfg = dict(out=str(ending), pairs=50, max_new_tokens=20)
    main(Config(**cfg))
    before = (ending / "preferences.jsonl").read_bytes()
    main(Config(**cfg, name="noisy", flip=0.25, seed=1))
    assert (ending / "preferences.jsonl").read_bytes() == before
    assert len(read_preferences(ending / "noisy.jsonl")) > 10
    main(Config(**{**cfg, "out": str(ending / "new")}, init=str(ending / "sft/ckpt.pt")))
    assert (ending / "new" / "preferences.jsonl").read_bytes() == before


def test_annotators_who_always_press_the_wrong_button_turn_every_label():
    rng, tasks = random.Random(0), draw_tasks(300, 1)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    careful, wrong = (annotate(tasks, pairs, tau=0.01, flip=flip, seed=0) for flip in (0.0, 1.0))
    for a, b in zip(careful, wrong, strict=True):
        if a["gold"][0] != a["gold"][1]:
            assert (a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"])
            assert (a["p"], b["p"]) == (1, 1) and a["gold"] == b["gold"][::-1]


def test_annotators_are_as_noisy_and_as_clumsy_as_was_asked(ending, monkeypatch, capsys):
    asked = []

    def spy(tasks, pairs, tau, flip, seed):
        asked.append((len(tasks), tau, flip, seed))
        rows = annotate(tasks, pairs, tau, flip, seed)
        return [{**row, "gold": [tau, 0.0]} for row in rows]

    monkeypatch.setattr("data.preferences.annotate", spy)
    main(Config(out=str(ending), pairs=30, max_new_tokens=20, tau=0.5, flip=0.25, seed=4))
    assert asked == [(30, 0.5, 0.25, 4)]
    # One tau apart: sigmoid(1) = 0.731 of them prefer the better one, a quarter slips.
    assert f"would agree with {0.25 + 0.5 * 0.7311:.1%}" in capsys.readouterr().out


def test_the_luck_of_annotators_follows_the_seed():
    rng, tasks = random.Random(0), draw_tasks(100, 1)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    once, again, other = (annotate(tasks, pairs, tau=1.0, flip=0.25, seed=s) for s in (0, 0, 1))
    assert once == again != other


def test_all_pairs_are_written_or_counted_as_left_out(ending, capsys):
    main(Config(out=str(ending), pairs=100, max_new_tokens=20))
    n, left_out = re.search(r"(\d+) pairs in .* \((\d+) left out", capsys.readouterr().out).groups()
    assert int(n) == len(read(ending / "preferences.jsonl")) == 100 - int(left_out)


def test_who_flips_most_labels_is_warned(ending, capsys):
    few = dict(out=str(ending), pairs=30, max_new_tokens=20)
    main(Config(**few, flip=0.5))
    assert "most labels are wrong" not in capsys.readouterr().out
    main(Config(**few, flip=0.6))
    assert "with --flip 0.6 most labels are wrong" in capsys.readouterr().out


def test_people_annotate_prompts_of_their_own(ending, monkeypatch, capsys):
    """One that leaves no room for a response is named, and the others are asked."""
    prompts = ["Hi", "long " * 60, "Who are you?", "And a third?"]
    rows = [{"prompt": prompt} for prompt in prompts]
    (ending / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    types(monkeypatch, "1", "2")
    cfg = dict(out=str(ending), human=True, prompts=str(ending / "mine.jsonl"), pairs=2, seed=1)
    main(Config(**cfg))
    said = capsys.readouterr().out
    limit = "of more than 48 tokens (the context minus --max_new_tokens)"
    assert f"left out 1 of 4 rows, {limit}: " in said and "mine.jsonl:2" in said
    assert "] Hi\n" in said
    rows = read_preferences(ending / "human_preferences.jsonl")
    assert [row["messages"] for row in rows] == [question("Hi"), question("Who are you?")]
    sampled_from = load_model(ending / "sft/ckpt.pt")[1]["fingerprint"]
    assert {row["sampled_from"] for row in rows} == {sampled_from}
    with pytest.raises(ValueError, match="--prompts needs --human"):
        Config(prompts="mine.jsonl")


@pytest.mark.parametrize("seed", [0, 3])
def test_people_are_asked_about_tasks_of_the_training_split_that_the_seed_draws(
    ending, monkeypatch, seed
):
    asked = []
    monkeypatch.setattr("data.preferences.sample_pairs", lambda *args: asked.extend(args[2]) or [])
    main(Config(out=str(ending), human=True, pairs=20, max_new_tokens=4, seed=seed))
    assert asked == [task.messages for task in draw_tasks(20, f"preferences {seed}")]


def test_people_who_stopped_are_asked_again_only_what_they_have_not_judged(
    ending, monkeypatch, capsys
):
    cfg = Config(out=str(ending), human=True, pairs=4, max_new_tokens=20)
    path = ending / "human_preferences.jsonl"
    types(monkeypatch, "q")
    main(cfg)
    assert not path.exists()
    count = int(capsys.readouterr().out.split("0 pairs are judged, ")[1].split()[0])
    assert count >= 3
    types(monkeypatch, "1", "s", "q")
    main(cfg)
    first = path.read_bytes()
    assert len(read(path)) == 1
    types(monkeypatch, *"2" * (count - 1))  # no more, no less
    main(cfg)
    assert path.read_bytes().startswith(first) and len(read(path)) == count
    types(monkeypatch)
    main(cfg)
    said = capsys.readouterr().out
    assert f"1 pairs are judged, {count - 1} are to come" in said
    assert f"{count} pairs are judged, 0 are to come" in said
    assert len({row["chosen"] + row["rejected"] for row in read(path)}) == count


def test_what_people_have_judged_is_not_overwritten_nor_mixed_with_simulated_annotators(
    ending, monkeypatch
):
    mine = ending / "preferences.jsonl"
    mine.write_text('{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}\n')
    before = mine.read_bytes()
    monkeypatch.setattr("data.preferences.sample_pairs", lambda *_: pytest.fail("it samples"))
    cfg = dict(out=str(ending), pairs=50, max_new_tokens=20)
    with pytest.raises(InputError, match="preferences.jsonl has judgements of people: choose"):
        main(Config(**cfg))
    assert mine.read_bytes() == before
    monkeypatch.undo()
    main(Config(**cfg, name="simulated"))
    before = (ending / "simulated.jsonl").read_bytes()
    with pytest.raises(InputError, match="simulated.jsonl is by simulated annotators: choose"):
        main(Config(**cfg, name="simulated", human=True))
    assert (ending / "simulated.jsonl").read_bytes() == before
    main(Config(**cfg, name="simulated", seed=1))  # as often as one likes
    assert (ending / "simulated.jsonl").read_bytes() != before


def test_a_file_that_is_half_by_people_is_continued_by_nobody(ending, monkeypatch):
    monkeypatch.setattr("data.preferences.sample_pairs", lambda *_: pytest.fail("it samples"))
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    simulated = {**row, "kind": "one_sum", "gold": [1.0, -1.0], "p": 0.9}
    write_rows([simulated, row], ending / "preferences.jsonl")
    for human, by in ((True, "is by simulated annotators"), (False, "has judgements of people")):
        with pytest.raises(InputError, match=f"preferences.jsonl {by}: choose another --name"):
            main(Config(out=str(ending), human=human, name="preferences"))


def test_a_folder_that_cannot_be_written_is_noticed_before_sampling(ending, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    monkeypatch.setattr("data.preferences.sample_pairs", lambda *_: pytest.fail("it samples"))
    for human in (True, False):
        with pytest.raises(OSError, match="Read-only file system"):
            main(Config(out=str(ending), human=human))


def test_preferences_about_another_model_are_noted_when_they_are_read(tmp_path, capsys):
    path = tmp_path / "preferences.jsonl"
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    path.write_text(json.dumps({**row, "sampled_from": "a"}))
    for fingerprint, is_noted in (("a", False), ("b", True), ("", False)):
        assert len(load_preferences(path, fingerprint)) == 1
        assert ("responses of another model" in capsys.readouterr().out) == is_noted
    write_rows([{**row, "sampled_from": name} for name in "ab"], path)
    load_preferences(path, "a")
    assert "responses of another model" in capsys.readouterr().out
    path.write_text(json.dumps(row))  # people's own: nobody knows
    load_preferences(path, "a")
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="run `python -m data.preferences` first"):
        load_preferences(tmp_path / "none.jsonl")


def test_a_reward_model_cannot_be_asked_for_responses(chain):
    with pytest.raises(
        InputError, match="rm/ckpt.pt is a reward model, but a language model is needed"
    ):
        main(Config(out=str(chain), init=f"{chain}/rm/ckpt.pt"))


def test_people_see_what_was_said_before(tmp_path, monkeypatch, capsys):
    """Without it, nobody could tell which answer to "And 2 more?" is right."""
    types(monkeypatch, "q")
    pair = Reply([], "10.", True), Reply([], "12.", True)
    ask_human([AND_TWO_MORE.messages], [pair], tmp_path / "mine.jsonl", "model")
    said = "[1/1] What is 7+1? / 7+1 is 8. / And 2 more?\n  1: 10.\n  2: 12.\n"
    assert said in capsys.readouterr().out


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
    p = [preference(*row["gold"], tau=0.5, flip=0.1) for row in rows]  # of what has been chosen
    assert [row["p"] for row in rows] == pytest.approx(p, abs=2e-4) and min(p) < 0.2
    right = sum(row["gold"][0] > row["gold"][1] for row in rows) / sum(
        row["gold"][0] != row["gold"][1] for row in rows
    )
    sure = [max(row["p"], 1 - row["p"]) for row in rows if row["gold"][0] != row["gold"][1]]
    assert abs(right - sum(sure) / len(sure)) < 0.04


def test_human_preferences_are_written_at_once_and_can_be_stopped(tmp_path, monkeypatch):
    """Equal and unfinished responses are not shown; the rows of the file are kept as they are."""
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"instruction": "Old", "chosen": "x", "rejected": "y"}]')
    written, answers = [], iter(["2", "maybe", "s", "1", "q"])

    def type_in(_):
        written.append(len(read_preferences(path)))
        return next(answers)

    monkeypatch.setattr("builtins.input", type_in)
    pairs = [(Reply([], f"a{i}", True), Reply([], f"b{i}", True)) for i in range(5)]
    pairs[1:1] = [(Reply([], "same", True),) * 2, (pairs[0][0], Reply([], "b", False))]
    ask_human([question(f"Hi {i}") for i in range(7)], pairs, path, "model")
    assert written == [1, 2, 2, 2, 3]
    old, *rows = read(path)
    assert old == {"instruction": "Old", "chosen": "x", "rejected": "y"}
    assert rows == [
        {"messages": question("Hi 0"), "chosen": "b0", "rejected": "a0", "sampled_from": "model"},
        {"messages": question("Hi 4"), "chosen": "a2", "rejected": "b2", "sampled_from": "model"},
    ]


@pytest.mark.parametrize("n_train, n_test", [(900, 100), (870, 130), (930, 70), (3, 5), (5, 1)])
def test_no_prompt_of_the_test_split_is_trained_on_and_no_other_is_held_out(n_train, n_test):
    """However many pairs of either kind annotation has left; hardly any is lost. All end with the
    same question: what was said before it decides."""

    def conversations(split, n):
        return [[*question(f"{split} {i}"), *question("And you?")] for i in range(n)]

    asked, tested = conversations("train", n_train), conversations("test", n_test)
    rows = [{"messages": messages} for messages in asked + tested]
    random.Random(0).shuffle(rows)
    train, test = held_out(end_with_a_tenth(rows, tested))
    assert all(row["messages"][0]["content"].startswith("train") for row in train)
    assert all(row["messages"][0]["content"].startswith("test") for row in test)
    assert len(train) == n_train or len(test) == n_test
