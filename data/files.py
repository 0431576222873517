r"""Your own text: from files to rows, with messages that name file and line of what is wrong.

    documents     any text file, in which "<|endoftext|>" may separate documents;
                  {"text": ...}, one document per row of a .json or .jsonl file;
                  or a .bin file of GPT-2's token ids as uint16, with a val.bin beside it
    a prompt      {"prompt": ...}
                  {"instruction": ..., "input": ...}, or "context" for "input", or neither
                  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
                  {"conversations": [{"from": "human", "value": ...}, ...]}            (ShareGPT)
                  in front of it perhaps "system": ..., "history": [[question, answer], ...]
    a response    {"output": ...}, {"response": ...} or {"completion": ...}

    SFT           a prompt and a response, or messages that end with the assistant's
    RM, DPO       a prompt, {"chosen": ..., "rejected": ...}; or these two as whole conversations
    PPO           any of the above; it uses the prompts (and --reward exact the responses of SFT)

For a text there may be a list of messages, or a dialogue in the form of HH-RLHF, "\n\nHuman: ...
\n\nAssistant: ...", in "prompt", "chosen", "rejected" and responses. A null field counts as absent.

A file is JSON (one list of objects) or JSONL (one object per line), gzipped or not. Every reader
returns rows of one form: dicts with "messages" (see data/chat.py), "where" (file and line, for
messages) and what its stage needs. Rows in none of these forms are left out, counted and named:
to guess what they mean would be to train on garbage. Fields that nobody reads are named, too.
"""

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt import InputError

MAX_UNPACKED = 10**9  # bytes: a gzipped file that becomes larger than this is refused
PROMPT_FIELDS = (
    "messages",
    "conversations",
    "instruction",
    "prompt",
)  # the first one counts
RESPONSE_FIELDS = ("output", "response", "completion")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them


# ---------------------------------------------------------------------------------------------
# From a file to text, or to objects


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, gzipped or not.

    A byte order mark is removed, and Windows line ends become Unix ones. Raises InputError if
    the file cannot be read, unpacks to more than `MAX_UNPACKED` bytes, is not UTF-8, or is blank.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            packed, data = gzip.GzipFile(fileobj=io.BytesIO(data)), bytearray()
            while piece := packed.read(1 << 20):  # a few bytes may stand for gigabytes
                data += piece
                if len(data) > MAX_UNPACKED:
                    raise InputError(
                        f"{path}: unpacks to more than {MAX_UNPACKED / 1e6:,.0f} MB; if that is "
                        "meant, unpack it with gunzip first"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        data = error.object  # without a mark at the beginning
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {data[error.start]:#04x})")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{path}:{line}: not text (a zero byte): binary data, or UTF-16")
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return text.replace("\r\n", "\n")


def read_rows(path: str | Path) -> list[dict]:
    """The objects in a JSON list or in JSON lines, each with its file and line under "where".

    Raises InputError at the first place that is not valid JSON, or not an object.
    """
    text, rows = read_text(path), []
    decoder = json.JSONDecoder(object_pairs_hook=fields_once)
    is_list = text.lstrip().startswith("[")
    position = text.index("[") + 1 if is_list else 0
    line, counted = 1, 0  # `line` is the line of the character at `counted`
    while True:
        follows = is_list and rows  # on another row of the list
        between = re.compile(r"\s*,?\s*" if follows else r"\s*").match(text, position)
        position = between.end()
        line, counted = line + text.count("\n", counted, position), position
        ends = position == len(text) or (is_list and text[position] == "]")
        if follows and position < len(text) and ends == ("," in between[0]):
            raise InputError(f"{path}:{line}: not valid JSON (a comma belongs between two rows)")
        if ends:
            if text[position + 1 :].strip():
                raise InputError(f"{path}:{line}: there is more text after the end of the list")
            break
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", counted))
            raise InputError(f"{path}:{line}: not valid JSON ({getattr(error, 'msg', error)})")
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{line}: expected an object like {{...}}, not {type(row).__name__}"
            )
        number = f" (row {len(rows) + 1})" if is_list else ""  # a list may be on a single line
        rows.append({**row, "where": f"{path}:{line}{number}"})
    if is_list and position == len(text):
        raise InputError(f"{path}:{line}: the list is never closed; is the file truncated?")
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def fields_once(pairs: list[tuple]) -> dict:
    """A JSON object, given as (name, value) pairs, as a dict.

    Raises ValueError if a name occurs twice: json would silently keep the last one.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'field "{max(names, key=names.count)}" twice in one object')
    return row


# ---------------------------------------------------------------------------------------------
# From a file to what a stage needs


def read_texts(path: str | Path) -> list[str]:
    """Documents for pretraining. Raises InputError if there is none."""
    if re.search(r"\.jsonl?(\.gz)?$", str(path).lower()):
        return [row["text"] for row in read(path, lambda row: {"text": take_text(row, "text")})]
    texts = [text for text in read_text(path).split("<|endoftext|>") if text.strip()]
    if not texts:
        raise InputError(f"{path}: there is nothing but <|endoftext|>")
    return texts


def read_conversations(path: str | Path) -> list[dict]:
    """Rows for SFT: {"messages", "where"}, where the last message is the assistant's.

    Raises InputError if no row can be used.
    """
    return read(path, to_demonstration)


def read_preferences(path: str | Path) -> list[dict]:
    """Rows for RM and DPO: {"messages" (the prompt), "chosen", "rejected", "where"}.

    Rows of data/preferences.py keep its "sampled_from", and those of the town "kind", "gold" and
    "p", which are for reports only. Raises InputError if no row can be used.
    """
    return read(path, to_pair)


def read_prompts(path: str | Path) -> list[dict]:
    """Rows for PPO: {"messages" (the prompt), "where"}, and "answer" if the row has a response.

    Raises InputError if no row can be used.
    """
    return read(path, to_prompt)


def read(path: str | Path, convert: Callable[[dict], dict]) -> list[dict]:
    """The rows of a file as `convert` returns them, each with its "where".

    convert: takes out of a row what it uses, or raises InputError with the reason why the row
    cannot be used. Such rows are left out, counted and named, and so is what remains in the others.
    Raises InputError if no row can be used, and at the first one that is damaged (`read_rows`).
    """
    whole, rows, unused, left_out, first = read_rows(path), [], {}, {}, ""
    for row in whole:
        where, names = row.pop("where"), list(row)
        row = {name: value for name, value in row.items() if value is not None}
        try:
            rows.append({**convert(row), "where": where})
            unused.update(row)
        except InputError as reason:
            first = first or f"{where}: {reason} (its fields: {some_fields(names)})"
            left_out.setdefault(str(reason), []).append(where.removeprefix(f"{path}:"))
    if not rows:
        raise InputError(f"none of the {len(whole):,} rows of {path} can be used. {first}")
    for reason, lines in list(left_out.items())[:10]:
        many = f"{len(lines):,} of {len(whole):,} rows"
        print(f"{path}: left out {many}: {reason}: line{'s' * (len(lines) > 1)} {first_few(lines)}")
    if len(left_out) > 10:
        many = f"{len(whole) - len(rows):,} rows in all, for {len(left_out)} reasons"
        print(f"{path}: left out {many}")
    if unused:
        print(f"{path}: fields that are not used: {some_fields(unused)}")
    return rows


def first_few(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are: "a, b, c, d, e and 7 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def some_fields(names) -> str:
    """The same for names that a file has chosen: there may be many, and long ones."""
    return first_few([name[:40] for name in names], 20)


# ---------------------------------------------------------------------------------------------
# From a row to what a stage needs. These functions take out of a row what they use, so that what
# remains can be named, and raise InputError with the reason why it cannot be used.


def to_demonstration(row: dict) -> dict:
    """{"messages"}: a conversation that ends with the assistant."""
    if isinstance(row.get("label"), bool) and not row.pop("label"):
        raise InputError('"label" is false, so it is no demonstration')
    messages = take_context(row) + take_prompt(row)
    if messages[-1]["role"] == "user":
        name = next((name for name in RESPONSE_FIELDS if name in row), None)
        if name is None:
            raise InputError('no response in "output", "response", "completion" or a last message')
        messages += take_messages(row, name, "assistant")
    if 0 in row.pop("weight of a message", []):
        raise InputError('a message has "weight" 0, but every message of the assistant is learned')
    check_turns(messages, "assistant", "the conversation")
    return {"messages": messages}


def to_pair(row: dict) -> dict:
    """{"messages", "chosen", "rejected"}: a prompt and two different responses to it."""
    extra = ["kind", "gold", "p"] if is_of_town(row) else []
    extra += ["sampled_from"] if isinstance(row.get("sampled_from"), str) else []
    pair = {name: row.pop(name) for name in extra}
    context, sides = take_context(row), ("chosen", "rejected")
    # The end may be blank: a model can say nothing at all, and people can reject that.
    said = [take_messages(row, side, "assistant", may_end_blank=True) for side in sides]
    alone = [messages for messages in said if len(messages) == 1]  # no prompt in front of it
    prompt = up_to_the_question(take_prompt(row)) if alone else []
    for side, messages in zip(sides, said):
        whole = context + (prompt + messages if len(messages) == 1 else messages)
        check_turns(whole, "assistant", f'"{side}"')
        if pair.setdefault("messages", whole[:-1]) != whole[:-1]:
            raise InputError('"chosen" and "rejected" answer different prompts')
        pair[side] = whole[-1]["content"]
    if pair["chosen"] == pair["rejected"]:
        raise InputError('"chosen" and "rejected" are equal')
    return pair


def to_prompt(row: dict) -> dict:
    """{"messages"}: a conversation that ends with the user; and "answer", if one response follows.

    A row is used whatever comes after its prompt, since none of that is trained on.
    """
    context, wrong = take_context(row), row.get("label") is False
    name = next((name for name in RESPONSE_FIELDS if name in row), None)
    if "chosen" in row and not row.keys() & {*PROMPT_FIELDS}:
        said = take_messages(row, "chosen", "assistant", may_end_blank=True)
        messages = context + up_to_the_question(said)
    else:
        messages = context + take_prompt(row)
        if name and messages[-1]["role"] == "user":
            with contextlib.suppress(InputError):
                messages += take_messages(row, name, "assistant")
    prompt = up_to_the_question(messages)
    check_turns(prompt, "user", "the prompt")
    for other in ("chosen", "rejected", "label", "weight of a message", name):
        row.pop(other, None)
    answer = [message["content"] for message in messages[len(prompt) :]]
    return {"messages": prompt, **({"answer": answer[0]} if len(answer) == 1 and not wrong else {})}


def is_of_town(row: dict) -> bool:
    """Whether a row has what data/preferences.py adds, for reports: a kind, two golds, and p."""
    gold, p = row.get("gold"), row.get("p")
    numbers = [*gold, p] if isinstance(gold, list) and len(gold) == 2 else [None]
    # abs(x) < 1e6 is false for nan, and no integer is too large for it.
    numbers = all(type(x) in (int, float) and abs(x) < 1e6 for x in numbers)
    return isinstance(row.get("kind"), str) and numbers and 0 <= p <= 1


def take_context(row: dict) -> list[dict]:
    """What stands before the prompt: the messages of the fields "system" and "history"."""
    messages, history = [], row.pop("history", [])
    system = take_text(row, "system", may_be_blank=True) if "system" in row else ""
    if system.strip():
        messages.append({"role": "system", "content": system})
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError('field "history" is not a list of [question, answer]')
        for role, text in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": take_text({"history": text}, "history")})
    return messages


def take_prompt(row: dict) -> list[dict]:
    """The messages of the prompt; with "messages" and "conversations" what follows it, too."""
    name = next((name for name in PROMPT_FIELDS if name in row), None)
    if name is None:
        raise InputError(f"no prompt: none of {', '.join(PROMPT_FIELDS)}")
    if name == "instruction":
        text = take_text(row, name)
        for more in ("input", "context"):
            extra = take_text(row, more, may_be_blank=True) if more in row else ""
            text += "\n" + extra if extra.strip() else ""
        return [{"role": "user", "content": text}]
    if name != "prompt":
        return take_messages(row, name)
    messages = take_messages(row, name, "user", may_end_blank=True)
    if len(messages) > 1 and not messages[-1]["content"].strip():
        messages.pop()  # "\n\nAssistant:", where the response is to be put
    return messages


def take_messages(row: dict, name: str, role="", may_end_blank=False) -> list[dict]:
    """The messages in a field, with "role" and "content" only.

    role: of a text that is one message (without it, there must be a list of messages).
    may_end_blank: whether the assistant may say nothing in the last one. The names of what else a
    message has stay in the row.
    """
    if isinstance(row.get(name), str) and role:
        text = take_text(row, name, may_be_blank=True)
        messages = split_dialogue(text) or [{"role": role, "content": text}]
    elif name in row:
        value, messages = row.pop(name), []
        for message in value if isinstance(value, list) else [value]:
            if not isinstance(message, dict):
                kinds = "text or a list of messages" if role else "a list of messages"
                raise InputError(f'field "{name}" is not {kinds}')
            names = ("from", "value") if "from" in message else ("role", "content")
            who, text = (take_text(message, n, may_be_blank=True) for n in names)
            messages.append({"role": ROLES.get(who, who), "content": text})
            for other in message:
                row.setdefault(f"{other} of a message", []).append(message[other])
    else:
        raise InputError(f'no field "{name}"')
    if not messages:
        raise InputError(f'no message in field "{name}"')
    for message in messages:
        is_end = may_end_blank and message is messages[-1] and message["role"] == "assistant"
        if not message["content"].strip() and not is_end:
            raise InputError(f'blank text in field "{name}"')
    return messages


def take_text(row: dict, name: str, may_be_blank=False) -> str:
    """The text in a field."""
    if name not in row:
        raise InputError(f'no field "{name}"')
    text = row.pop(name)
    if not isinstance(text, str):
        raise InputError(f'field "{name}" is not text')
    if not (may_be_blank or text.strip()):
        raise InputError(f'blank text in field "{name}"')
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f'field "{name}" has half a character (a lone surrogate)')
    return text


def split_dialogue(text: str) -> list[dict]:
    r"""The messages of a dialogue in the form of HH-RLHF; none if it is another text.

    "\n\nHuman: Hi\n\nAssistant: Hello." -> [{"role": "user", "content": "Hi"}, {"role": ...}]
    """
    if not re.match(r"\s*Human:.*\n\nAssistant:", text, re.S):
        return []
    speakers_and_texts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(speakers_and_texts[::2], speakers_and_texts[1::2])
    ]


def up_to_the_question(messages: list[dict]) -> list[dict]:
    """The messages up to the user's last one. Raises InputError if there is none."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise InputError("no prompt: no message is the user's")
    return messages[: asked[-1] + 1]


def check_turns(messages: list[dict], last: str, what: str):
    """Raises InputError unless, after an optional system message, user and assistant speak in turn,
    from the user to the `last` of them. what: the name of the messages."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for role in roles:
        if role not in ("system", "user", "assistant"):
            raise InputError(f'the role "{role[:20]}": there are system, user and assistant')
    if turns[-1:] != [last] or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise InputError(f"the turns of {what} are not user, assistant, ..., {last}")


# ---------------------------------------------------------------------------------------------
# Which rows to train on, and which to test on


def held_out(rows: list) -> tuple[list, list]:
    """(rows to train on, rows to test on): the last tenth, at least one row, is for testing.

    rows: texts, or dicts with "messages" and perhaps "chosen" and "rejected". Rows to train on that
    equal one to test on are left out and counted: it would be no test. Raises InputError if there
    are fewer than two rows, or if none is left to train on.
    """
    if len(rows) < 2:
        raise InputError("--data needs at least two rows: one to train on and one to test on")
    cut = len(rows) - max(len(rows) // 10, 1)
    test = rows[cut:]
    tested = {content_key(row) for row in test}
    train = [row for row in rows[:cut] if content_key(row) not in tested]
    if len(train) < cut:
        print(f"left out {cut - len(train):,} of {cut:,} training rows: equal to held-out ones")
    if not train:
        raise InputError("--data: all rows to train on are equal to those to test on")
    return train, test


def content_key(row: str | dict) -> str:
    """What makes two rows equal: their text, or their messages and both responses, in either
    order."""
    if isinstance(row, str):
        return row
    responses = sorted(row[side] for side in ("chosen", "rejected") if side in row)
    return json.dumps([row.get("messages", row.get("prompt")), responses])


def keep_fitting(
    rows: list[dict], lengths: list[int], limit: int, what: str = "the context"
) -> list[dict]:
    """The rows of at most `limit` tokens. Longer ones are left out, counted and named.

    No row is truncated: a response without its end would teach a model not to stop. lengths: in
    tokens, one per row. what: the name of the limit in the messages. Raises InputError if no row
    is left.
    """
    too_long = [f"{row['where']} ({n} tokens)" for row, n in zip(rows, lengths) if n > limit]
    if too_long:
        print(
            f"left out {len(too_long):,} of {len(rows):,} rows, of more than {limit} tokens "
            f"({what}): {first_few(too_long)}"
        )
    if len(too_long) == len(rows):
        raise InputError(
            f"no row fits into {limit} tokens ({what}); pretrain with a larger --context"
        )
    return [row for row, n in zip(rows, lengths) if n <= limit]


# ---------------------------------------------------------------------------------------------
# Files that are written: rows, and token ids


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends.

    Whoever reads `path`, or has it mapped into memory, sees the old file or the new one, whole.
    If the block fails, the old file stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # each process has its own
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_rows(rows: list[dict], out: str | Path):
    """Write rows as JSON lines. A reader sees the old file or the new one, never half of one."""
    with replacing(out) as partial:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        partial.write_text("".join(lines), encoding="utf-8")


def write_tokens(texts: list[str], tokenizer, path: str | Path):
    """Encode documents into one file of ids, each after an end-of-text token."""
    with replacing(path) as partial, open(partial, "wb") as file:
        for text in texts:
            ids = [tokenizer.eot] + tokenizer.encode(text)
            file.write(np.array(ids, dtype=token_dtype(tokenizer)))


def read_tokens(tokenizer, path: str | Path) -> np.memmap:
    """The ids in a file of `write_tokens`, or in a shard (see `shard_header`): (N,), integers.

    They are memory-mapped: there may be more than the memory holds. Raises InputError if there are
    none, or if one is not among the ids of the tokenizer.
    """
    header = shard_header(path)
    dtype = np.uint16 if header else token_dtype(tokenizer)
    try:
        tokens = np.memmap(path, dtype, mode="r", offset=header)
    except (OSError, ValueError) as error:  # empty, or half a token at the end
        raise InputError(f"cannot read {path} as token ids: {error}")
    if not len(tokens):
        raise InputError(f"{path}: a header, and no tokens")
    if tokens.max() >= tokenizer.n_vocab:
        place = int(np.argmax(tokens >= tokenizer.n_vocab))
        raise InputError(
            f"{path}: token {place:,} is {tokens[place]}, but this tokenizer has the ids 0 to "
            f"{tokenizer.n_vocab - 1}; was the file written with another one?"
        )
    return tokens


def token_dtype(tokenizer):
    """Two bytes per token where they suffice."""
    return np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32


def shard_header(path: str | Path) -> int:
    """How many bytes of a file of token ids stand before the ids: 1024 in a shard, else 0.

    A shard, as llm.c has them, is 256 int32 (a magic number, the version, the number of tokens,
    zeros), and then that many uint16. Raises InputError if it is truncated, or cannot be read.
    """
    try:
        header, size = np.fromfile(path, "<i4", count=256), os.path.getsize(path)
    except OSError as error:
        raise InputError(f"cannot read {path} as token ids: {error}")
    if header[:1].tolist() != [20240520]:
        return 0
    if len(header) < 256 or size != 1024 + 2 * int(header[2]):
        raise InputError(f"{path}: not as long as its header says; is it truncated?")
    return 1024
