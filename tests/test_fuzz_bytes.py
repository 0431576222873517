"""Valid files with some bytes changed: rows, or a message that names the file. Nothing else."""

import gzip
import json
import random
import re

import pytest

from data.files import (
    held_out,
    read_conversations,
    read_preferences,
    read_prompts,
    read_texts,
)
from gpt import InputError

TURNS = [("user", "Who?"), ("assistant", "Zalo."), ("user", "Why\n?"), ("assistant", "So \u00e9.")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHAREGPT = [{"from": {"user": "human"}.get(role, "gpt"), "value": text} for role, text in TURNS]
DIALOGUE = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t}" for i, (_, t) in enumerate(TURNS))
ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "sums"},
    {"prompt": "Add.", "completion": "3", "label": False},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2], "label": True},
    {"system": "Be kind.", "history": [["a", "b"], ["c", "d"]], "prompt": "e", "response": "f"},
    {"messages": [*MESSAGES[:3], {**MESSAGES[3], "weight": 0}]},
    {"messages": MESSAGES, "id": 7, "score": 1.5e3},
    {"conversations": SHAREGPT, "source": None},
    {"prompt": "Hi", "chosen": "a", "rejected": "b", "kind": "k", "gold": [1.0, -2], "p": 0.9},
    {"chosen": MESSAGES, "rejected": [*MESSAGES[:3], {**MESSAGES[3], "content": ""}]},
    {"chosen": DIALOGUE, "rejected": DIALOGUE + "!"},
    {
        "prompt": DIALOGUE[: DIALOGUE.rindex(":") + 1],
        "response": "x",
        "chosen": "a",
        "rejected": "",
    },
    {"text": "One document.\n\nIts end."},
]
PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\ud83d",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
]
PIECES += [b"\0", b"\xff", b"\r\n", b"\xef\xbb\xbf", b"NaN", b"<|endoftext|>", b"\n\nHuman: "]
VALUES = [
    b"null",
    b"0",
    b"-1.5",
    b"NaN",
    b"true",
    b"false",
    b'""',
    b'" "',
    b'"\\ud83d"',
    b"[]",
    b"{}",
]
VALUES += [b"[[]]", b"[null]", b'["a", "b"]', b'{"role": "user", "content": "x"}', b'"\\u0000"']
VALUES += [b'"user"', b'"gpt"', b'"system"', b'"\\n\\nHuman: a\\n\\nAssistant:"', b'"x"']
NAMES = [b'"%s"' % name.encode() for row in ROWS for name in row]
READERS = [read_conversations, read_preferences, read_prompts, read_texts]


def changed_file(rng) -> bytes:
    """Some rows as JSON lines or as a list, changed; or gzipped, before or after the change."""
    rows = rng.sample(ROWS, rng.randint(1, 6))
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    text = rng.choice(["\n".join(lines), f"[{', '.join(lines)}]", json.dumps(rows, indent=1)])
    if rng.random() < 0.2:
        return change(gzip.compress(text.encode(), mtime=0), rng)
    content = change(text.encode(), rng)
    return gzip.compress(content, mtime=0) if rng.random() < 0.2 else content


def change(content: bytes, rng) -> bytes:
    """The bytes after one to three accidents: some hit JSON's values and names, some anything."""
    for _ in range(rng.randint(1, 3)):
        strings = list(re.finditer(rb'"[^"\\]*"', content))
        if strings and rng.random() < 0.7:
            a, b = rng.choice(strings).span()
            is_name = content[b : b + 1] == b":"
            content = content[:a] + rng.choice(NAMES if is_name else VALUES) + content[b:]
            continue
        a = rng.randint(0, len(content))
        b = min(a + rng.choice([1, 20, 1000]), len(content))
        before, middle, behind = content[:a], content[a:b], content[b:]
        content = rng.choice(
            [
                before + bytes([rng.randrange(256)]) + content[a + 1 :],
                before,
                before + behind,
                before + rng.choice(PIECES) + content[a:],
                before + middle * rng.randint(2, 5) + behind,
                behind + middle + before,
            ]
        )
    return content


def check(reader, path) -> bool:
    """Whether a reader finds rows in a file; if not, it says so, and of which file."""
    try:
        rows = reader(path)
    except InputError as error:
        assert str(path) in str(error), error
        return False
    assert rows
    for row in rows:
        texts = [row]
        if reader is not read_texts:
            roles = [message["role"] for message in row["messages"]]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == [("user", "assistant")[i % 2] for i in range(len(turns))]
            assert turns[-1] == ("assistant" if reader is read_conversations else "user")
            assert row["where"].startswith(f"{path}:")
            texts = [message["content"] for message in row["messages"]]
            assert all(text.strip() for text in texts)
            texts += [row[name] for name in ("chosen", "rejected", "answer") if name in row]
        assert all(text.encode() is not None for text in texts)
    if len(rows) > 1:
        try:
            held_out(rows)
        except InputError as error:
            assert "equal to those to test on" in str(error)
    return True


def fuzz(folder, cases):
    """How many of the changed files each reader could still use."""
    used = dict.fromkeys(READERS, 0)
    for case in cases:
        rng = random.Random(case)
        path = folder / rng.choice(["rows.jsonl", "rows.json", "rows.txt", "rows.jsonl.gz"])
        path.write_bytes(changed_file(rng))
        for reader in READERS:
            try:
                used[reader] += check(reader, path)
            except Exception as error:
                raise AssertionError(f"case {case}, {reader.__name__}: {error!r}") from error
    return used


def test_changed_bytes_are_read_or_named(tmp_path):
    """Some files are still of use to every reader, and some are not: neither way goes untested."""
    used = fuzz(tmp_path, range(60))
    assert all(0 < count < 60 for count in used.values()), used


@pytest.mark.thorough
def test_changed_bytes_are_read_or_named_in_two_thousand_cases(tmp_path):
    used = fuzz(tmp_path, range(1000, 3000))
    assert all(100 < count < 1900 for count in used.values()), used


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_of_use_to_some_reader_before_it_is_changed(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert any(check(reader, tmp_path / "rows.jsonl") for reader in READERS)
