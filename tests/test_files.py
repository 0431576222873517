"""Your own text: every form is read, and what cannot be used is counted and named."""

import gzip
import json
import random
import re
import tracemalloc

import pytest

import data.files
from data.chat import Reply
from data.files import (
    held_out,
    keep_fitting,
    read_conversations,
    read_preferences,
    read_prompts,
    read_rows,
    read_text,
    read_texts,
    replacing,
    write_rows,
)
from data.preferences import annotate, end_with_a_tenth
from data.town.demonstrations import demonstrate
from data.town.tasks import draw_tasks
from gpt import InputError


def write(path, rows, lines=True):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2)
    path.write_text(text, encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def said(role, value):
    return {"from": role, "value": value}


def dialogue(*texts):
    """In the form of HH-RLHF; a None is two turns of the assistant in a row."""
    speakers = ("Human", "Assistant")
    turns = [f"\n\n{speakers[i % 2]}: {text}" for i, text in enumerate(texts) if text is not None]
    return "".join(turns)


HI = [turn("user", "Hi")]
TALK = [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Why?")]


# ---------------------------------------------------------------------------------------------
# Forms of a demonstration, of a preference, of a prompt, of a document


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add.", "context": "1 and 2", "response": "3"},
        {"prompt": "Add.\n1 and 2", "response": "3"},
        {"prompt": "Add.\n1 and 2", "completion": "3", "label": True},
        {"prompt": "Add.\n1 and 2", "completion": "3", "messages": None},
        {"prompt": dialogue("Add.\n1 and 2 ", ""), "response": "3"},
        {"prompt": [turn("user", "Add.\n1 and 2")], "completion": [turn("assistant", "3")]},
        {"messages": [turn("user", "Add.\n1 and 2"), turn("assistant", "3")]},
        {"messages": [turn("user", "Add.\n1 and 2")], "output": "3"},
        {"conversations": [said("human", "Add.\n1 and 2"), said("gpt", "3")]},
    ],
)
def test_all_forms_of_a_demonstration_mean_the_same(tmp_path, capsys, row, lines):
    (read,) = read_conversations(write(tmp_path / "rows", [row], lines))
    assert read["messages"] == [turn("user", "Add.\n1 and 2"), turn("assistant", "3")]
    assert read_prompts(tmp_path / "rows")[0]["messages"] == [turn("user", "Add.\n1 and 2")]
    assert read_prompts(tmp_path / "rows")[0]["answer"] == "3"
    assert capsys.readouterr().out == ""  # nothing is left out, and no field is unused


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"prompt": dialogue("Hi ", ""), "chosen": "Hello.", "rejected": "No."},
        {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
        {"messages": HI, "chosen": "Hello.", "rejected": "No."},
        {"prompt": HI, "chosen": [turn("assistant", "Hello.")], "rejected": "No."},
        {
            "conversations": [said("human", "Hi")],
            "chosen": said("gpt", "Hello."),
            "rejected": said("gpt", "No."),
        },
        {
            "chosen": HI + [turn("assistant", "Hello.")],
            "rejected": HI + [turn("assistant", "No.")],
        },
        {"chosen": dialogue("Hi", "Hello."), "rejected": dialogue("Hi", "No.")},
    ],
)
def test_all_forms_of_a_preference_mean_the_same(tmp_path, capsys, row):
    (read,) = read_preferences(write(tmp_path / "rows", [row]))
    assert (read["messages"], read["chosen"], read["rejected"]) == (HI, "Hello.", "No.")
    assert [row["messages"] for row in read_prompts(tmp_path / "rows")] == [HI]
    assert capsys.readouterr().out == ""


def test_rows_of_ultrafeedback_are_the_conversations_in_chosen_and_rejected(tmp_path, capsys):
    """Their "messages" repeat the chosen conversation, their "prompt" its first message."""
    sides = {side: HI + [turn("assistant", side)] for side in ("chosen", "rejected")}
    row = {"prompt": "Hi", "prompt_id": "7", "messages": sides["chosen"], "score_chosen": 8.5}
    (read,) = read_preferences(write(tmp_path / "rows", [{**row, **sides}]))
    assert (read["messages"], read["chosen"], read["rejected"]) == (HI, "chosen", "rejected")
    said = capsys.readouterr().out
    assert said.endswith("fields that are not used: prompt, prompt_id, messages, score_chosen\n")
    assert read_conversations(tmp_path / "rows")[0]["messages"] == sides["chosen"]


def test_dialogue_of_several_turns_keeps_its_earlier_turns(tmp_path):
    start = ("Hi", "Hello.", "Why?")
    path = write(
        tmp_path / "rows",
        [{"chosen": dialogue(*start, "Because."), "rejected": dialogue(*start, "So.")}],
    )
    row = read_preferences(path)[0]
    assert row["messages"] == TALK and (row["chosen"], row["rejected"]) == ("Because.", "So.")


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "Why?"},
        {"instruction": "Why?", "input": " "},
        {"messages": [turn("user", "Why?")]},
        {"conversations": [said("human", "Why?")]},
    ],
)
def test_system_and_history_stand_before_every_prompt(tmp_path, capsys, prompt):
    context = {"system": "Be kind.", "history": [["Hi", "Hello."]]}
    row = {**context, **prompt, "output": "So.", "chosen": "So.", "rejected": "No."}
    path, whole = write(tmp_path / "rows", [row]), [turn("system", "Be kind."), *TALK]
    assert read_conversations(path)[0]["messages"] == whole + [turn("assistant", "So.")]
    assert read_preferences(path)[0]["messages"] == read_prompts(path)[0]["messages"] == whole
    capsys.readouterr()
    for nothing in ({"system": " ", "history": []}, {"system": None, "history": None}):
        write(tmp_path / "rows", [{**row, **nothing}])
        assert read_prompts(path)[0]["messages"] == TALK[2:]
    assert capsys.readouterr().out == ""


def test_prompts_need_no_reply_and_bring_it_along_if_there_is_one(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}, {"prompt": "a"}]
    rows += [{"messages": [turn("user", "a"), turn("assistant", "b")]}]
    rows += [{"prompt": "a", "response": 3}, {"prompt": "a", "response": "b", "label": False}]
    rows += [{"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}]
    rows += [{"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]}]
    found = [row.get("answer") for row in read_prompts(write(tmp_path / "rows", rows))]
    assert found == ["b", None, None, "b", None, None, None, None]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "ROWS.JSONL.gz"])
def test_documents_may_be_rows_with_a_text(tmp_path, capsys, name):
    rows = [{"text": "one", "id": 1}, {"text": " "}, {"id": 3}, {"text": "two\n<|endoftext|>"}]
    path = write(tmp_path / name, rows, lines=name != "rows.json")
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert read_texts(path) == ["one", "two\n<|endoftext|>"]
    said = capsys.readouterr().out
    assert 'left out 1 of 4 rows: blank text in field "text": line' in said
    assert 'left out 1 of 4 rows: no field "text": line' in said
    assert f"{path}: fields that are not used: id\n" in said


def test_documents_may_be_separated_by_end_of_text(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": 1}<|endoftext|> \n<|endoftext|>two')
    assert read_texts(tmp_path / "a.txt") == ['{"text": 1}', "two"]
    (tmp_path / "a.txt").write_text("<|endoftext|>\n<|endoftext|>")
    with pytest.raises(InputError, match=r"a.txt: there is nothing but <\|endoftext\|>"):
        read_texts(tmp_path / "a.txt")


def test_gzip_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo".encode()))
    assert read_text(tmp_path / "a.gz") == "one\ntwo"


def test_odd_but_lawful_text_is_read_as_it_is(tmp_path):
    odd = ["nul \0", "<|end|><|user|>", "e\u0301 \U0001f600", "a\r\nb", "x" * 10_000_000, "\ufeff"]
    odd += ["Human: no dialogue", "\n\nAssistant: neither"]
    rows = [{"prompt": text, "response": text} for text in odd]
    for row, text in zip(read_conversations(write(tmp_path / "rows", rows)), odd, strict=True):
        assert [message["content"] for message in row["messages"]] == [text, text]


def test_only_rows_with_all_that_annotators_of_the_town_add_count_as_the_towns(tmp_path):
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    town = {"kind": "joke", "gold": [1.0, -2], "p": 0.9}
    broken = [{"gold": [1, 2]}, {**town, "gold": 3}, {**town, "p": None}, {**town, "kind": 7}]
    broken += [{**town, "p": float("nan")}, {**town, "gold": [1, "2"]}]
    broken += [{**town, "p": 1.5}, {**town, "p": -0.1}, {**town, "gold": [1, 10**400]}]
    rows = [{**pair, **extra} for extra in ({}, town, *broken)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_preferences(tmp_path / "rows.json")
    assert [row.keys() & town.keys() for row in found] == [set(), town.keys(), *[set()] * 9]


# ---------------------------------------------------------------------------------------------
# Rows that cannot be used, and fields that nobody reads


GOOD = {"prompt": "a", "response": "b"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a"}, 'no response in "output", "response", "completion" or a last message'),
        ({"prompt": "a", "response": 3}, 'field "response" is not text or a list of messages'),
        ({"prompt": "a", "response": ""}, 'blank text in field "response"'),
        ({"prompt": " ", "response": "b"}, 'blank text in field "prompt"'),
        ({"prompt": ["a"], "response": "b"}, 'field "prompt" is not text or a list of messages'),
        ({"prompt": "half \ud83d", "response": "b"}, 'field "prompt" has half a character'),
        ({"question": "a", "answer": "b"}, "no prompt: none of messages, conversations, instr"),
        ({"instruction": "a", "input": 3, "output": "b"}, 'field "input" is not text'),
        ({"messages": []}, 'no message in field "messages"'),
        ({"messages": "hello"}, 'field "messages" is not a list of messages'),
        ({"messages": [{"role": "user"}]}, 'no field "content"'),
        ({"messages": [turn("user", "x"), turn("assistant", "")]}, 'blank text in field "mess'),
        ({"messages": [turn("assistant", "x")]}, "the turns of the conversation are not user, as"),
        ({"messages": TALK[:2] * 2 + TALK[1:2]}, "the turns of the conversation are not user, as"),
        ({"messages": [turn("user", "x")]}, 'no response in "output", "response", "completion" or'),
        ({"messages": [turn("system", "x")], "output": "b"}, "the turns of the conversation are"),
        ({"messages": [turn("tool", "x"), turn("assistant", "y")]}, 'the role "tool": there are'),
        ({"conversations": [said("gpt", "x")]}, "the turns of the conversation are not user"),
        ({"system": "x", "messages": [turn("system", "x"), *TALK[:2]]}, "the turns of the conv"),
        ({"history": [["a"]], **GOOD}, r'field "history" is not a list of \[question, answer\]'),
        ({"history": "a", **GOOD}, r'field "history" is not a list of \[question, answer\]'),
        ({"history": [["a", None]], **GOOD}, 'field "history" is not text'),
        ({**GOOD, "label": False}, '"label" is false, so it is no demonstration'),
        (
            {"messages": [TALK[0], {**TALK[1], "weight": 0}]},
            'a message has "weight" 0, but every message of the assistant is learned',
        ),
    ],
)
def test_demonstrations_that_cannot_be_used_are_left_out_and_named(tmp_path, capsys, row, reason):
    path = write(tmp_path / "rows", [GOOD, row, row, GOOD])
    rows = read_conversations(path)
    assert [row["where"] for row in rows] == [f"{path}:1", f"{path}:4"]
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{path}: left out 2 of 4 rows: ({reason}).*: lines 2, 3", line)
    assert pytest.raises(InputError, read_conversations, write(path, [row])).match(
        f"none of the 1 rows of {path} can be used. {path}:1: ({reason}).* .its fields: "
    )


EMPTY = {"chosen": dialogue("a", ""), "rejected": dialogue("a", "b")}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "chosen": "b"}, 'no field "rejected"'),
        (
            {"prompt": "a", "chosen": "b", "rejected": 3},
            'field "rejected" is not text or a list of messages',
        ),
        (
            {"chosen": "b", "rejected": "c"},
            "no prompt: none of messages, conversations, instruction, prompt",
        ),
        (
            {"chosen": dialogue("a", "b"), "rejected": dialogue("x", "b")},
            '"chosen" and "rejected" answer different prompts',
        ),
        (
            {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b", None, "c")},
            'the turns of "rejected" are not user, assistant, ..., assistant',
        ),
        (
            {"chosen": dialogue("a", "b", "c"), "rejected": dialogue("a", "b")},
            'the turns of "chosen" are not user, assistant, ..., assistant',
        ),
        (
            {"chosen": dialogue("a", " ", "b", "c"), "rejected": dialogue("a", "d", "b", "c")},
            'blank text in field "chosen"',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are equal'),
    ],
)
def test_preferences_that_cannot_be_used_are_left_out_and_named(tmp_path, capsys, row, reason):
    path = write(tmp_path / "rows", [row, EMPTY])
    assert [row["where"] for row in read_preferences(path)] == [f"{path}:2"]
    assert capsys.readouterr().out == f"{path}: left out 1 of 2 rows: {reason}: line 1\n"
    with pytest.raises(InputError, match=f"none of the 1 rows of {path} can be used. {path}:1: "):
        read_preferences(write(tmp_path / "rows", [row]))


def test_somebody_may_prefer_silence_but_nobody_demonstrates_it(tmp_path):
    path = write(tmp_path / "rows", [EMPTY, {"prompt": "a", "chosen": "b", "rejected": ""}])
    found = [(row["chosen"], row["rejected"]) for row in read_preferences(path)]
    assert found == [("", "b"), ("b", "")]


def test_hh_rlhf_as_it_was_published_is_read(tmp_path, capsys):
    """harmless-base/test has 13 rows in 2,312 that are not a prompt and two responses."""
    good = [
        {"chosen": dialogue(f"Say {i}.", "No."), "rejected": dialogue(f"Say {i}.", f"{i}!")}
        for i in range(20)
    ]
    twice = {"chosen": dialogue("a", "b", None, "c"), "rejected": dialogue("a", "d")}
    other = {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "x", "c", "d")}
    odd = [EMPTY] * 4 + [twice] * 4 + [other] * 5
    path = write(tmp_path / "test.jsonl", random.Random(0).sample(good + odd, 33))
    assert len(read_preferences(path)) == 24
    first, second = sorted(capsys.readouterr().out.splitlines())
    assert 'left out 4 of 33 rows: the turns of "chosen" are not user, assistant' in first
    assert 'left out 5 of 33 rows: "chosen" and "rejected" answer different prompts' in second

    assert len(read_prompts(path)) == 33  # of which only the prompts count
    assert capsys.readouterr().out == ""
    assert [row["messages"] for row in read_prompts(write(path, [twice, other]))] == [
        [turn("user", "a")],
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    ]


def test_a_prompt_counts_whatever_follows_it(tmp_path, capsys):
    tool = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]}
    rows = [tool, {"prompt": "a", "response": ""}, {"prompt": "a", "chosen": 1}]
    rows += [{"prompt": "a", "label": False, "completion": [turn("tool", "x")]}]
    read = read_prompts(write(tmp_path / "rows", rows))
    assert [row["messages"] for row in read] == [[turn("user", "a")]] * 4
    assert capsys.readouterr().out == ""
    bad = [{"messages": [turn("assistant", "b")]}, {"chosen": "b"}, {"prompt": ""}, {}]
    bad += [{"messages": TALK[:1] * 2}]
    assert len(read_prompts(write(tmp_path / "rows", rows + bad))) == 4
    reasons = [line.split(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert reasons == [
        "no prompt",
        'blank text in field "prompt"',
        "no prompt",
        "the turns of the prompt are not user, assistant, ..., user",
    ]


def test_a_message_with_another_weight_than_0_is_learned(tmp_path, capsys):
    row = {"messages": [TALK[0], {**TALK[1], "weight": 1}]}
    assert read_conversations(write(tmp_path / "rows", [row]))[0]["messages"] == TALK[:2]
    assert capsys.readouterr().out == ""


def test_at_most_five_rows_and_ten_reasons_are_named(tmp_path, capsys):
    roles = [f"speaker {i // 7}" for i in range(84)]
    rows = [{"messages": [turn(role, "x")]} for role in roles] + [GOOD]
    path = write(tmp_path / "rows", rows)
    assert len(read_conversations(path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'left out 7 of 85 rows: the role "speaker 0": there are system, user' in lines[0]
    assert lines[0].endswith(": lines 1, 2, 3, 4, 5 and 2 more")
    assert len(lines) == 11 and lines[10] == f"{path}: left out 84 rows in all, for 12 reasons"


def test_fields_that_nobody_reads_are_named_once(tmp_path, capsys):
    rows = [{**GOOD, "score": 3, "id": i, "empty": None} for i in range(3)]
    rows += [{"messages": [{**message, "name": "x"} for message in TALK[:2]], "id": 4}]
    path = write(tmp_path / "rows", rows)
    read_conversations(path)
    expected = f"{path}: fields that are not used: score, id, name of a message\n"
    assert capsys.readouterr().out == expected


def test_a_file_cannot_flood_the_screen_with_its_fields(tmp_path, capsys):
    row = {f"{i} {'x' * 1000}": i for i in range(1000)}
    path = write(tmp_path / "rows", [{**row, **GOOD}])
    read_conversations(path)
    assert len(capsys.readouterr().out) < 2000
    with pytest.raises(InputError) as error:
        read_preferences(path)
    assert len(str(error.value)) < 2000


def test_a_label_that_is_not_a_verdict_is_a_field_that_is_not_used(tmp_path, capsys):
    path = write(tmp_path / "rows", [{**GOOD, "label": 0}])
    assert len(read_conversations(path)) == 1
    assert capsys.readouterr().out == f"{path}: fields that are not used: label\n"


def test_nothing_is_said_about_preferences_of_the_town(tmp_path, capsys):
    rng = random.Random(0)
    test_tasks = draw_tasks(50, "preferences 0", split="test")
    tasks = draw_tasks(450, "preferences 0") + test_tasks
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    rows = annotate(tasks, pairs, tau=0.5, flip=0.0, seed=0)
    rows = end_with_a_tenth(rows, [task.messages for task in test_tasks])
    rows = [{**row, "sampled_from": "a model"} for row in rows]
    read = read_preferences(write(tmp_path / "preferences.jsonl", rows))
    assert len(read) > 300 and all(row["sampled_from"] and "gold" in row for row in read)
    train, test = held_out(read)
    assert train + test == read and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------
# Damaged files


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"', r"rows:2: not valid JSON"),
        ("[1]", r"rows:1: expected an object like {...}, not int"),
        (
            '{"prompt": "a", "response": "b"}\n\n[2]',
            r"rows:3: expected an object like {...}, not l",
        ),
        ('[{"prompt": "a", "response": "b"}', r"never closed"),
        ('[{"prompt": "a", "response": "b"},', r"never closed"),
        ('[{"prompt": "a", "response": "b"}\n{"prompt": "c"}]', r"rows:2: .*comma belongs between"),
        ('[{"prompt": "a", "response": "b"},\n]', r"rows:2: .*comma belongs between"),
        ('[{"prompt": "a", "response": "b"},,{"prompt": "c"}]', r"rows:1: not valid JSON"),
        ('[,{"prompt": "a", "response": "b"}]', r"rows:1: not valid JSON"),
        ("[]", "no rows"),
        ("", "the file is empty"),
        ('{"prompt": "a", "prompt": "c", "response": "b"}', r'rows:1: .*"prompt" twice'),
        ('[{"prompt": "a", "response": "b"}]\n[1]', r"rows:1: there is more text after the end"),
        ('{"prompt": "a\t", "response": "b"}', r"rows:1: not valid JSON \(Invalid control"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a\0"}', r"rows:2: not text \(a zero byte"),
        ('{"a": ' * 100_000, r"rows:1: not valid JSON"),
        ("prompt,response\na,b", r"rows:1: not valid JSON"),
    ],
)
def test_damage_is_named_with_file_and_line_and_ends_the_reading(tmp_path, content, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(InputError, match=message):
        read_conversations(tmp_path / "rows")


def test_list_on_a_single_line_names_the_row(tmp_path):
    (tmp_path / "rows").write_text('[{"prompt": "a", "response": 3}, {}]')
    with pytest.raises(InputError, match=r"rows:1 \(row 1\): field .response. is not text"):
        read_conversations(tmp_path / "rows")


def test_unreadable_files_are_clear_errors(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        read_rows(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot read .*[Dd]irectory|cannot read .*denied"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes(b"good\n\xe9 bad")
    with pytest.raises(InputError, match=r"latin:2: not UTF-8"):
        read_text(tmp_path / "latin")
    (tmp_path / "marked").write_bytes("\ufeffa\nb".encode() + b"\xe9\n")
    with pytest.raises(InputError, match=r"marked:2: not UTF-8 text \(byte 0xe9\)"):
        read_text(tmp_path / "marked")
    (tmp_path / "wide").write_bytes("good\nbad".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"wide:1: not text \(a zero byte\)"):
        read_text(tmp_path / "wide")


def test_damaged_gzip_is_a_clear_error_wherever_it_is_damaged(tmp_path):
    text = random.Random(0).randbytes(60).hex()
    whole = gzip.compress(text.encode())
    for place in range(2, len(whole)):  # the first two bytes say that it is gzip
        flipped = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        for damaged in (whole[:place], flipped):
            (tmp_path / "a.gz").write_bytes(damaged)
            if damaged is flipped and 4 <= place < 10:  # the time, the system: not the content
                assert read_text(tmp_path / "a.gz") == text
                continue
            with pytest.raises(InputError, match="cannot read .*a.gz: "):
                read_text(tmp_path / "a.gz")


def test_small_gzip_of_a_large_file_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data.files, "MAX_UNPACKED", 5_000_000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * 50_000_000))
    tracemalloc.start()
    with pytest.raises(InputError, match="bomb.gz: unpacks to more than 5 MB; if .* with gunzip"):
        read_text(tmp_path / "bomb.gz")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    (tmp_path / "fits.gz").write_bytes(gzip.compress(b"a" * 5_000_000))
    assert len(read_text(tmp_path / "fits.gz")) == 5_000_000


# ---------------------------------------------------------------------------------------------
# Which rows to train on


def test_rows_that_do_not_fit_are_counted_and_named(capsys):
    rows = [{"where": f"f:{i}"} for i in range(10)]
    assert keep_fitting(rows, [20, 21] * 5, 20) == rows[::2]
    assert "left out 5 of 10 rows" in (out := capsys.readouterr().out) and "f:1 (21 tokens)" in out
    with pytest.raises(InputError, match="no row fits"):
        keep_fitting(rows, [50] * 10, 20)


def test_the_last_tenth_is_held_out(capsys):
    texts = [str(i) for i in range(100)]
    assert held_out(texts) == (texts[:90], texts[90:])
    assert held_out(["a", "b"]) == (["a"], ["b"])
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="needs at least two rows"):
        held_out(["a"])


def test_no_row_stands_on_both_sides_of_the_border(capsys):
    """Every pair is there twice or more, once turned: a judge of memory would be right on all."""
    rng = random.Random(0)
    rows = []
    for i in range(200):
        row = {"messages": [turn("user", f"{rng.randrange(60)}?")], "where": f"f:{i}", "ids": [i]}
        sides = rng.sample(["a", "b"], 2)
        rows.append({**row, "chosen": sides[0], "rejected": sides[1]})
    train, test = held_out(rows)
    assert test == rows[180:]
    slow = [row for row in rows[:180] if row["messages"] not in [t["messages"] for t in test]]
    assert train == slow and 0 < len(train) < 180
    said = capsys.readouterr().out
    assert said == (f"left out {180 - len(train)} of 180 training rows: equal to held-out ones\n")


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ("one", "one", True),
        ("one", "one ", False),
        ({"messages": TALK}, {"messages": TALK, "where": "f:3", "answer": "x"}, True),
        ({"messages": TALK}, {"messages": TALK[:2]}, False),
        ({"messages": [turn("user", "x")]}, {"messages": [turn("assistant", "x")]}, False),
        (
            {"messages": HI, "chosen": "a", "rejected": "b"},
            {"messages": HI, "chosen": "b", "rejected": "a", "gold": [1, 2]},
            True,
        ),
        (
            {"messages": HI, "chosen": "a", "rejected": "b"},
            {"messages": HI, "chosen": "a", "rejected": "c"},
            False,
        ),
    ],
)
def test_rows_are_equal_if_they_say_the_same(a, b, equal):
    other = {"messages": [turn("user", "another")]} if isinstance(a, dict) else "another"
    train, test = held_out([other, a, b])
    assert train == ([other] if equal else [other, a]) and test == [b]


def test_a_file_of_one_row_again_and_again_leaves_nothing_to_train_on():
    with pytest.raises(InputError, match="all rows to train on are equal to those to test on"):
        held_out(["same"] * 50)


# ---------------------------------------------------------------------------------------------
# Files that are written


def test_a_file_is_replaced_when_it_is_complete_and_not_before(tmp_path):
    write_rows([{"a": "é"}], tmp_path / "deep" / "rows")
    path = tmp_path / "deep" / "rows"
    assert path.read_text("utf-8") == '{"a": "é"}\n'
    with open(path, "rb") as reader:
        with pytest.raises(ZeroDivisionError), replacing(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError
        assert path.read_text("utf-8") == '{"a": "é"}\n'
        with replacing(path) as partial:
            partial.write_text("new")
            with replacing(path) as another:
                assert another != partial  # two processes do not share it
                another.write_text("old")
            assert path.read_text("utf-8") == "old"
        assert path.read_text() == "new" and reader.read() == '{"a": "é"}\n'.encode()
    assert list(path.parent.iterdir()) == [path]
