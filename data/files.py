"""Your own text: files in, rows out, and a message that names file and line for what does not fit.

    pretraining   any text file; "<|endoftext|>" may separate documents
    SFT           {"instruction": ..., "input": ..., "output": ...}
                  {"prompt": ..., "response": ...}
                  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
    RM, DPO       {"prompt": ..., "chosen": ..., "rejected": ...}, where instruction and input, or
                  messages, may stand for prompt
                  {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}          (HH-RLHF)
    PPO           any of the above; only the prompts are used

Rows come as JSON (one list) or JSONL (one object per line), gzipped or not. Whatever the form, a
reader returns dicts with "messages" (see data/chat.py), "where" (file and line, for messages) and
what its stage needs. A row that breaks the form ends the program: guessing would train on garbage.
"""

import gzip
import json
import re
from pathlib import Path


def read_text(path: str | Path) -> str:
    """The text of a file, gzipped or not, in UTF-8, with or without a mark. Exits if unreadable."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise SystemExit(f"cannot read {path}: {error}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 text (byte {data[error.start]:#04x})")
    if not text.strip():
        raise SystemExit(f"{path}: the file is empty")
    return text.replace("\r\n", "\n")


def read_rows(path: str | Path) -> list[dict]:
    """The objects of a JSON list or of JSON lines, each with its place under "where"."""
    text, rows = read_text(path), []
    decoder = json.JSONDecoder(object_pairs_hook=fields_once)
    is_list = text.lstrip().startswith("[")
    place = text.index("[") + 1 if is_list else 0
    line, counted = 1, 0  # `line` is right for the characters before `counted`
    while True:
        place = re.compile(r"[\s,]*" if is_list else r"\s*").match(text, place).end()
        line, counted = line + text.count("\n", counted, place), place
        if place == len(text) or (is_list and text[place] == "]"):
            if text[place + 1 :].strip():
                raise SystemExit(f"{path}:{line}: there is more text after the end of the list")
            break
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", counted))
            raise SystemExit(f"{path}:{line}: not valid JSON ({getattr(error, 'msg', error)})")
        if not isinstance(row, dict):
            raise SystemExit(
                f"{path}:{line}: expected an object like {{...}}, found {str(row)[:40]!r}"
            )
        number = f" (row {len(rows) + 1})" if is_list else ""  # a list may be all on one line
        rows.append({**row, "where": f"{path}:{line}{number}"})
    if is_list and place == len(text):
        raise SystemExit(f"{path}:{line}: the list is never closed; is the file cut short?")
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def fields_once(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Of a field that is there twice, json would quietly keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'field "{max(names, key=names.count)}" twice in one object')
    return row


def field(row: dict, name: str, may_be_blank=False) -> str:
    """The text in a field of a row. Exits if it is missing, no text, or blank."""
    if name not in row:
        found = ", ".join(sorted(row.keys() - {"where"}))
        raise SystemExit(f'{row["where"]}: no field "{name}" (found: {found or "nothing"})')
    if not isinstance(row[name], str) or not (may_be_blank or row[name].strip()):
        raise SystemExit(
            f'{row["where"]}: field "{name}" must be text, not {str(row[name])[:40]!r}'
        )
    try:
        row[name].encode()
    except UnicodeEncodeError as error:
        half = row[name][error.start].encode("unicode_escape").decode()
        raise SystemExit(f'{row["where"]}: field "{name}" has half a character, {half}')
    return row[name]


def check_messages(messages, where: str) -> list[dict]:
    """Messages whose roles and texts are in order: an optional system, then user and assistant."""
    roles = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict):
            raise SystemExit(f'{where}: "messages" must be a list of objects with role and content')
        roles.append(field({**message, "where": where}, "role"))
        field({**message, "where": where}, "content")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != wanted:
        raise SystemExit(
            f"{where}: roles must be user, assistant, user, ... but are {', '.join(roles)}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def prompt_messages(row: dict) -> list[dict]:
    """What a row asks, as messages that end with the user."""
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
    """Rows for SFT: {"messages", "where"}, the last message being the assistant's."""
    rows = []
    for row in read_rows(path):
        if "messages" in row:
            messages = check_messages(row["messages"], row["where"])
            if messages[-1]["role"] != "assistant":
                raise SystemExit(f"{row['where']}: the last message must be the assistant's")
        else:
            reply = next((name for name in ("output", "response") if name in row), "output")
            messages = prompt_messages(row) + [{"role": "assistant", "content": field(row, reply)}]
        rows.append({"messages": messages, "where": row["where"]})
    return rows


def read_preferences(path: str | Path) -> list[dict]:
    """Rows for RM and DPO: {"messages" (the prompt), "chosen", "rejected", "where"}.

    Rows of the town also carry "kind", "gold" and "p" (see data/preferences.py), for reports only.
    """
    rows, equal = [], []
    for row in read_rows(path):
        # A model may have said nothing at all, and that is a reply that people can reject.
        chosen, rejected = (field(row, name, may_be_blank=True) for name in ("chosen", "rejected"))
        if row.keys() & {"messages", "instruction", "prompt"}:
            messages = prompt_messages(row)
        else:
            messages, chosen = read_dialogue(chosen, row["where"])
            other, rejected = read_dialogue(rejected, row["where"])
            if messages != other:
                raise SystemExit(f"{row['where']}: chosen and rejected answer different prompts")
        if chosen == rejected:
            equal.append(row["where"])
            continue
        extra = {k: row[k] for k in ("kind", "gold", "p") if k in row}
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
        print(f"left out {len(equal)} pairs of equal replies: {', '.join(equal[:5])}{more}")
    if not rows:
        raise SystemExit(f"{path}: all pairs are of equal replies")
    return rows


def read_prompts(path: str | Path) -> list[dict]:
    """Rows for PPO: {"messages", "where"}, ending with the user; "answer" if there is a reply."""
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
        if isinstance(answer, str):  # otherwise the prompt is still of use
            rows[-1]["answer"] = answer
    return rows


def read_dialogue(text: str, where: str) -> tuple[list[dict], str]:
    """An HH-RLHF dialogue -> (messages up to the last reply, the last reply)."""
    parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])
    ]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SystemExit(f'{where}: expected "\\n\\nHuman: ...\\n\\nAssistant: ..." in this field')
    return check_messages(messages[:-1], where), field(
        {"reply": messages[-1]["content"], "where": where}, "reply"
    )


def held_out(rows: list) -> tuple[list, list]:
    """(rows to train on, rows to test on): the last tenth of a file is never trained on."""
    if len(rows) < 2:
        raise SystemExit("--data: two rows are needed at least, one to train on and one to test on")
    cut = len(rows) - max(len(rows) // 10, 1)
    return rows[:cut], rows[cut:]


def keep_fitting(rows: list[dict], lengths: list[int], room: int, what="the context") -> list[dict]:
    """Rows that fit into `room` tokens whole. The others are counted and named: nothing is cut.

    what: what the room is, for the messages. Exits if nothing is left.
    """
    out = [f"{row['where']} ({n} tokens)" for row, n in zip(rows, lengths) if n > room]
    if out:
        more = f" and {len(out) - 5} more" if len(out) > 5 else ""
        print(
            f"left out {len(out)} of {len(rows)} rows, longer than {what} of {room} tokens: "
            f"{', '.join(out[:5])}{more}"
        )
    if len(out) == len(rows):
        raise SystemExit(f"no row fits {what} of {room} tokens; pretrain with a larger --context")
    return [row for row, n in zip(rows, lengths) if n <= room]
