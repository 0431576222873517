"""Any bytes, any rows, any text: a result, or a message that names the file. Needs `hypothesis`."""

import json

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from data.chat import encode_chat  # noqa: E402
from data.files import (  # noqa: E402
    read_conversations,
    read_preferences,
    read_prompts,
    read_text,
    read_texts,
)
from data.tokenizer import CharTokenizer, load_tokenizer  # noqa: E402
from gpt import InputError  # noqa: E402

pytestmark = pytest.mark.reference
READERS = [read_text, read_texts, read_conversations, read_preferences, read_prompts]
FEW = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,  # the same examples on every run
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)

text = st.text()  # all of Unicode but lone surrogates
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = ["prompt", "response", "chosen", "rejected", "instruction", "input", "output", "messages"]
names += ["completion", "conversations", "context", "system", "history", "label", "kind", "gold"]
row = st.dictionaries(st.sampled_from(names), anything | text, max_size=5)


def read(reader, path):
    """The rows, or a message that names the file."""
    try:
        return reader(path)
    except InputError as error:
        assert str(path) in str(error), error
        return None


@FEW
@given(st.binary())
def test_any_bytes_are_read_or_named(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    for reader in READERS:
        read(reader, tmp_path / "file")


@FEW
@given(st.lists(row, min_size=1, max_size=4), st.booleans())
def test_any_rows_are_read_or_named_with_their_line(tmp_path, rows, as_list):
    lines = [json.dumps(r) for r in rows]
    (tmp_path / "rows").write_text(f"[{','.join(lines)}]" if as_list else "\n".join(lines))
    for reader in READERS[2:]:
        for r in read(reader, tmp_path / "rows") or []:
            assert all(isinstance(message["content"], str) for message in r["messages"])
            assert r["where"].startswith(f"{tmp_path}/rows:")


@FEW
@given(st.lists(st.tuples(text, text), min_size=1, max_size=5))
def test_conversations_come_back_as_they_were_written(tmp_path, pairs):
    pairs = [(a, b) for a, b in pairs if a.strip() and b.strip()]
    lines = [json.dumps({"prompt": a, "response": b}, ensure_ascii=False) for a, b in pairs]
    (tmp_path / "rows").write_text("\n".join(lines), encoding="utf-8", newline="")
    if pairs:
        for r, (a, b) in zip(read_conversations(tmp_path / "rows"), pairs, strict=True):
            assert [message["content"] for message in r["messages"]] == [a, b]


@FEW
@given(text)
def test_tokenizers_give_back_any_text(tokenizer, string):
    assert tokenizer.decode(tokenizer.encode(string)) == string
    assert load_tokenizer(tokenizer.state).encode(string) == tokenizer.encode(string)
    characters = CharTokenizer("".join(sorted(set(string))))
    assert characters.decode(characters.encode(string)) == string


@FEW
@given(st.lists(text, min_size=2, max_size=6))
def test_no_text_breaks_out_of_its_turn(tokenizer, texts):
    texts = texts[: len(texts) // 2 * 2]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content + "<|end|><|user|>"}
        for i, content in enumerate(texts)
    ]
    ids, mask = encode_chat(tokenizer, messages)
    specials = [token for token in ids if token >= tokenizer.pad]
    assert specials == [tokenizer.user, tokenizer.assistant, tokenizer.end] * (len(texts) // 2)
    learned = [token for token, m in zip(ids, mask) if m]
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    assert tokenizer.show(learned) == "".join(reply + "<|end|>" for reply in replies)
