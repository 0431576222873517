"""Your own text: every form is read, and what does not fit is named with file and line."""

import gzip
import json

import pytest

from data.files import (
    held_out,
    keep_fitting,
    read_conversations,
    read_preferences,
    read_prompts,
    read_rows,
    read_text,
)
from gpt import InputError


def write(path, rows, lines=True):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=2)
    path.write_text(text, encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("lines", [True, False])
def test_three_forms_of_a_demonstration_mean_the_same(tmp_path, lines):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"prompt": "Add.\n1 and 2", "response": "3"},
        {"messages": [turn("user", "Add.\n1 and 2"), turn("assistant", "3")]},
    ]
    read = read_conversations(write(tmp_path / "rows", rows, lines))
    assert [row["messages"] for row in read] == [rows[2]["messages"]] * 3


def test_four_forms_of_a_preference_mean_the_same(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
        {"instruction": "Hi", "input": "", "chosen": "Hello.", "rejected": "No."},
        {"messages": [turn("user", "Hi")], "chosen": "Hello.", "rejected": "No."},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
        },
    ]
    read = read_preferences(write(tmp_path / "rows", rows))
    for row in read:
        assert row["messages"] == [turn("user", "Hi")]
        assert (row["chosen"], row["rejected"]) == ("Hello.", "No.")
    assert [row["messages"] for row in read_prompts(tmp_path / "rows")] == [
        [turn("user", "Hi")]
    ] * 4


def test_dialogue_of_several_turns_keeps_its_earlier_turns(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    path = write(tmp_path / "rows", [{"chosen": f"{start} Because.", "rejected": f"{start} So."}])
    row = read_preferences(path)[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]
    assert (row["chosen"], row["rejected"]) == ("Because.", "So.")


def test_gzip_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo".encode()))
    assert read_text(tmp_path / "a.gz") == "one\ntwo"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"', r"rows:2: not valid JSON"),
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": "a"}', r'rows:3: no field "output"'),
        ('[{"prompt": "a",\n"response": 3}]', r'rows:1 \(row 1\): field "response" must be'),
        ('[{"prompt": "a", "response": "b"}, {}]', r'rows:1 \(row 2\): no field "prompt"'),
        ('{"prompt": " ", "response": "b"}', r'rows:1: field "prompt" must be text'),
        ("[1]", r"rows:1: expected an object"),
        ('[{"prompt": "a", "response": "b"}', r"never closed"),
        ("[]", "no rows"),
        ("", "the file is empty"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "roles must be user, assistant"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "last message must be the assistant's",
        ),
        ('{"messages": "hello"}', "must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', r'rows:1: no field "content"'),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "roles must be user"),
        ('{"prompt": "a", "response": ""}', r'rows:1: field "response" must be text'),
        ('{"prompt": ["a"], "response": "b"}', r'rows:1: field "prompt" must be text, not'),
        ('{"prompt": "a", "prompt": "c", "response": "b"}', r'rows:1: .*"prompt" twice'),
        ('\n{"prompt": "half \\ud83d", "response": "b"}', r"rows:2: .*half a character, .*ud83d"),
        ('[{"prompt": "a", "response": "b"}]\n[1]', r"rows:1: there is more text after the end"),
        ('{"prompt": "a\0", "response": "b"}', r"rows:1: not valid JSON \(Invalid control"),
        ('{"a": ' * 100_000, r"rows:1: not valid JSON"),
        ("prompt,response\na,b", r"rows:1: not valid JSON"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, content, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(InputError, match=message):
        read_conversations(tmp_path / "rows")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, 'no field "rejected"'),
        ({"chosen": "b", "rejected": "c"}, "expected.*Human"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            "different prompts",
        ),
    ],
)
def test_bad_preferences_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_preferences(write(tmp_path / "rows", [row]))


def test_pairs_of_equal_replies_are_counted_and_named(tmp_path, capsys):
    same, other = ({"prompt": "a", "chosen": "b", "rejected": r} for r in "bc")
    assert len(read_preferences(write(tmp_path / "rows", [same, other, other]))) == 2
    assert (
        f"left out 1 of 3 pairs, whose responses are equal: {tmp_path}/rows:1"
        in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="all pairs are of equal responses"):
        read_preferences(write(tmp_path / "rows", [same]))


def test_prompts_need_no_reply_and_bring_it_along_if_there_is_one(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None}, {"prompt": "a"}]
    rows += [{"messages": [turn("user", "a"), turn("assistant", "b")]}]
    found = [row.get("answer") for row in read_prompts(write(tmp_path / "rows", rows))]
    assert found == ["b", None, None, "b"]


def test_odd_but_lawful_text_is_read_as_it_is(tmp_path):
    odd = ["nul \0", "<|end|><|user|>", "e\u0301 \U0001f600", "a\r\nb", "x" * 10_000_000, "\ufeff"]
    rows = [{"prompt": text, "response": text} for text in odd]
    for row, text in zip(read_conversations(write(tmp_path / "rows", rows)), odd):
        assert [message["content"] for message in row["messages"]] == [text, text]


def test_unreadable_files_are_clear_errors(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"good\n\xe9 bad")
    with pytest.raises(InputError, match=r"latin:2: not UTF-8"):
        read_text(tmp_path / "latin")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"text" * 100)[:20])
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / "cut.gz")


def test_rows_that_do_not_fit_are_counted_and_named(capsys):
    rows = [{"where": f"f:{i}"} for i in range(10)]
    assert keep_fitting(rows, [5, 50] * 5, 20) == rows[::2]
    assert "left out 5 of 10 rows" in (out := capsys.readouterr().out) and "f:1 (50 tokens)" in out
    with pytest.raises(InputError, match="no row fits"):
        keep_fitting(rows, [50] * 10, 20)


def test_the_last_tenth_is_held_out():
    assert held_out(list(range(100))) == (list(range(90)), list(range(90, 100)))
    assert held_out([1, 2]) == ([1], [2])
    with pytest.raises(InputError, match="needs at least two rows"):
        held_out([1])


def test_only_rows_with_all_that_annotators_of_the_town_add_count_as_the_towns(tmp_path):
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    town = {"kind": "joke", "gold": [1.0, -2], "p": 0.9}
    broken = [{"gold": [1, 2]}, {**town, "gold": 3}, {**town, "p": None}, {**town, "kind": 7}]
    rows = [{**pair, **extra} for extra in ({}, town, *broken, {**town, "gold": [1, "2"]})]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_preferences(tmp_path / "rows.json")
    assert [row.keys() & town.keys() for row in found] == [set(), town.keys(), *[set()] * 5]
