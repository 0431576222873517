r"""Your own text: from files to rows, with messages that name file and line of what is wrong.

    pretraining   any text file; "<|endoftext|>" may separate documents
    SFT           {"instruction": ..., "input": ..., "output": ...}
                  {"prompt": ..., "response": ...}
                  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
    RM, DPO       {"prompt": ..., "chosen": ..., "rejected": ...}, where "instruction" and "input",
                  or "messages", may take the place of "prompt"
                  {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}       (HH-RLHF)
    PPO           any of the above; it uses the prompts (and --reward exact the responses of SFT)

A file is JSON (one list of objects) or JSONL (one object per line), gzipped or not. Every reader
returns rows of one form: dicts with "messages" (see data/chat.py), "where" (file and line, for
error messages) and what its stage needs. A row in none of these forms ends the program, since to
guess what it means would be to train on garbage.
"""

import gzip
import json
import os
import re
from pathlib import Path

from gpt import InputError


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, gzipped or not.

    A byte order mark is removed, and Windows line ends become Unix ones. Raises InputError if
    the file cannot be read, is not UTF-8, or is blank.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {data[error.start]:#04x})")
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
        position = re.compile(r"[\s,]*" if is_list else r"\s*").match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text) or (is_list and text[position] == "]"):
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
                f"{path}:{line}: expected an object like {{...}}, found {str(row)[:40]!r}"
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


def field(row: dict, name: str, may_be_blank=False) -> str:
    """The text in a field of a row. Raises InputError if it is missing, not text, or blank."""
    if name not in row:
        found = ", ".join(sorted(row.keys() - {"where"}))
        raise InputError(f'{row["where"]}: no field "{name}" (found: {found or "nothing"})')
    if not isinstance(row[name], str) or not (may_be_blank or row[name].strip()):
        raise InputError(
            f'{row["where"]}: field "{name}" must be text, not {str(row[name])[:40]!r}'
        )
    try:
        row[name].encode()
    except UnicodeEncodeError as error:
        half = row[name][error.start].encode("unicode_escape").decode()  # such as \ud83d
        raise InputError(
            f'{row["where"]}: field "{name}" has half a character, the lone surrogate {half}'
        )
    return row[name]


def check_messages(messages, where: str) -> list[dict]:
    """The messages of a conversation, with "role" and "content" only.

    Raises InputError unless each has both, and the roles are an optional system, then user and
    assistant in turn, beginning with user.
    """
    roles = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict):
            raise InputError(f'{where}: "messages" must be a list of objects with role and content')
        roles.append(field({**message, "where": where}, "role"))
        field({**message, "where": where}, "content")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != wanted:
        raise InputError(
            f"{where}: roles must be user, assistant, user, ... but are {', '.join(roles)}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prompt_messages(row: dict) -> list[dict]:
    """The prompt of a row: messages of which the last is the user's."""
    if "messages" in row:
        messages = check_messages(row["messages"], row["where"])
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if "instruction" in row:
        text = field(row, "instruction")
        if row.get("input"):
            text += "\n" + field(row, "input")
    else:
        text = field(row, "prompt")
    return [{"role": "user", "content": text}]


def read_conversations(path: str | Path) -> list[dict]:
    """Rows for SFT: {"messages", "where"}, where the last message is the assistant's.

    Raises InputError that names the first row in another form.
    """
    rows = []
    for row in read_rows(path):
        if "messages" in row:
            messages = check_messages(row["messages"], row["where"])
            if messages[-1]["role"] != "assistant":
                raise InputError(f"{row['where']}: the last message must be the assistant's")
        else:
            name = next((name for name in ("output", "response") if name in row), "output")
            messages = prompt_messages(row) + [{"role": "assistant", "content": field(row, name)}]
        rows.append({"messages": messages, "where": row["where"]})
    return rows


def read_preferences(path: str | Path) -> list[dict]:
    """Rows for RM and DPO: {"messages" (the prompt), "chosen", "rejected", "where"}.

    Rows of the town also have "kind", "gold" and "p" (see data/preferences.py), for reports only.
    Pairs of equal responses teach nothing: they are left out, counted and named. Raises
    InputError that names the first row in another form, and if no pair is left.
    """
    rows, equal = [], []
    for row in read_rows(path):
        # May be blank: a model can say nothing at all, and people can reject that.
        chosen, rejected = (field(row, name, may_be_blank=True) for name in ("chosen", "rejected"))
        if row.keys() & {"messages", "instruction", "prompt"}:
            messages = prompt_messages(row)
        else:
            messages, chosen = read_dialogue(chosen, row["where"])
            rejected_messages, rejected = read_dialogue(rejected, row["where"])
            if messages != rejected_messages:
                raise InputError(f"{row['where']}: chosen and rejected answer different prompts")
        if chosen == rejected:
            equal.append(row["where"])
            continue
        extra = {name: row[name] for name in ("kind", "gold", "p") if is_of_town(row)}
        rows.append(
            {
                "messages": messages,
                "chosen": chosen,
                "rejected": rejected,
                "where": row["where"],
                **extra,
            }
        )
    if equal:
        more = f" and {len(equal) - 5} more" if len(equal) > 5 else ""
        print(
            f"left out {len(equal)} of {len(equal) + len(rows)} pairs, whose responses are equal: "
            f"{', '.join(equal[:5])}{more}"
        )
    if not rows:
        raise InputError(f"{path}: all pairs are of equal responses")
    return rows


def is_of_town(row: dict) -> bool:
    """Whether a row has what data/preferences.py adds, for reports: a kind, two golds, and p."""
    gold, p = row.get("gold"), row.get("p")
    numbers = [*gold, p] if isinstance(gold, list) and len(gold) == 2 else [None]
    return isinstance(row.get("kind"), str) and all(type(x) in (int, float) for x in numbers)


def read_prompts(path: str | Path) -> list[dict]:
    """Rows for PPO: {"messages" (the prompt), "where"}, and "answer" if the row has a response.

    Raises InputError that names the first row in another form.
    """
    rows = []
    for row in read_rows(path):
        if "chosen" in row and not row.keys() & {"messages", "instruction", "prompt"}:
            messages, _ = read_dialogue(field(row, "chosen"), row["where"])
        else:
            messages = prompt_messages(row)
        answer = row.get("output", row.get("response"))
        if "messages" in row and row["messages"][-1]["role"] == "assistant":
            answer = row["messages"][-1]["content"]
        rows.append({"messages": messages, "where": row["where"]})
        if isinstance(answer, str):  # if not, the prompt is still useful
            rows[-1]["answer"] = answer
    return rows


def read_dialogue(text: str, where: str) -> tuple[list[dict], str]:
    r"""A dialogue in the form of HH-RLHF -> (messages before the last response, that response).

    "\n\nHuman: Hi\n\nAssistant: Hello." -> ([{"role": "user", "content": "Hi"}], "Hello.")
    """
    speakers_and_texts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(speakers_and_texts[::2], speakers_and_texts[1::2])
    ]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(f'{where}: expected "\\n\\nHuman: ...\\n\\nAssistant: ..." in this field')
    return check_messages(messages[:-1], where), field(
        {"reply": messages[-1]["content"], "where": where}, "reply"
    )


def held_out(rows: list) -> tuple[list, list]:
    """(rows to train on, rows to test on): the last tenth, at least one row, is for testing.

    Raises InputError if there are fewer than two rows.
    """
    if len(rows) < 2:
        raise InputError("--data needs at least two rows: one to train on and one to test on")
    cut = len(rows) - max(len(rows) // 10, 1)
    return rows[:cut], rows[cut:]


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
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        print(
            f"left out {len(too_long)} of {len(rows)} rows, longer than {what} of {limit} tokens: "
            f"{', '.join(too_long[:5])}{more}"
        )
    if len(too_long) == len(rows):
        raise InputError(f"no row fits {what} of {limit} tokens; pretrain with a larger --context")
    return [row for row, n in zip(rows, lengths) if n <= limit]


def write_rows(rows: list[dict], out: str | Path):
    """Write rows as JSON lines. A reader sees the old file or the new one, never half of one."""
    out, partial = Path(out), Path(f"{out}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, out)
