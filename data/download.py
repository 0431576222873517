"""Public text to train on: downloaded by name, and converted to the forms that the scripts read.

    python -m data.download --list             stage, size, licence, what it is good for
    python -m data.download oasst1             into downloads/oasst1/; prints the command to use it
    python -m data.download tinystories --megabytes 50
    python -m data.download fineweb --megabytes 1000

The same command resumes an interrupted download. A file gets its name only once it is complete and
its sha256 matches: the hash listed below, or else the one that Hugging Face states. Nothing else
of the project downloads anything, but for --init gpt2 and --tokenizer gpt2, once. Sizes and
licences are what the sources stated when the list was written.

**Characters of Shakespeare**, with the shape of nanoGPT's recipe for a CPU:

    python train_pretrain.py --out shakespeare --data downloads/tinyshakespeare/input.txt
        --tokenizer char --n_layer 4 --context 64 --steps 560

ended with seeds 0, 1 and 2 at validation losses of 1.680, 1.680 and 1.669 nats per character, over
the whole validation part, after 113, 112 and 110 seconds on two cores (Intel Xeon, Ice Lake). In
turn with these, a loop that follows the recipe (2,000 steps of 12 rows, AdamW) took 123, 119 and
114 seconds to 1.91, estimated from 20 batches. Muon's work per step is the same for any batch, so
32 rows use it better than 12: --batch_size 12 --steps 2000 ends at 1.624, after 196 seconds.
"""

import argparse
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.files import read_rows, replacing, shard_header, write_rows
from data.run import acquire_lock, number, run_script
from gpt import InputError

HUB = "https://huggingface.co/datasets"
RAW = "https://raw.githubusercontent.com"
RASBT = f"{RAW}/rasbt/LLMs-from-scratch/main/ch07"
SHARD = HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
TIMEOUT = 30  # seconds without a byte after which a download counts as interrupted


class File(NamedTuple):
    """One file to download."""

    url: str
    sha256: str = ""  # in hexadecimal, all of it or its first digits ("" = what the server states)


class Source(NamedTuple):
    """A data set that `python -m data.download` knows by name."""

    stage: str  # the stages that can train on it
    megabytes: float  # size of the download
    licence: str
    good_for: str
    files: list[File]
    # convert(paths, folder) writes what the scripts can read, under names that no download has.
    convert: Callable[[list[Path], Path], None]
    command: str  # trains on it; {folder} stands for its folder


class NoteHash(urllib.request.HTTPRedirectHandler):
    """Follows redirects as usual, and remembers the sha256 that Hugging Face states in one."""

    sha256 = ""

    def redirect_request(self, request, answer, code, message, headers, url):
        tag = headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64:  # for small files it is Git's own hash, which is shorter
            self.sha256 = tag
        return super().redirect_request(request, answer, code, message, headers, url)


def fetch(file: File, path: Path, megabytes: float = 0.0):
    """Download a file to path, unless it is there; if megabytes > 0, only its first megabytes.

    Until it is complete it is path.part, from which the next call resumes, as it does from a path
    with fewer megabytes. The sha256 is checked, except for a first part. Raises InputError that
    names the URL if the download fails, or if a web page comes in place of the file.
    """
    partial = Path(f"{path}.part")
    last = int(megabytes * 1e6) - 1 if megabytes else ""  # of the bytes to ask for
    if path.exists():
        with open(path, "rb") as there:
            refuse_pages(there.read(1000), f"{path} is", "Delete it")
        if not megabytes or path.stat().st_size > last:
            return
        os.replace(path, partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = partial.stat().st_size if partial.exists() else 0
    if megabytes and done > last:
        os.replace(partial, path)
        return
    by_hand = f"Try again, or fetch {file.url} by hand and save it as {path}"
    request = urllib.request.Request(file.url, headers={"User-Agent": "data.download"})
    if done or megabytes:
        request.add_header("Range", f"bytes={done}-{last}")
    redirects = NoteHash()
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as response:
            if response.status != 206:  # not "Partial Content": it is sent from the beginning
                done = 0
            remaining = response.headers.get("Content-Length")
            total = done + int(remaining) if remaining else None
            block = response.read(1 << 16)
            if not done:  # before it takes the place of what is there of the file
                refuse_pages(block, f"{file.url}: the server sent", by_hand)
            units = dict(unit="B", unit_scale=True)
            bar = tqdm(desc=path.name, total=total, initial=done, disable=None, **units)
            with open(partial, "ab" if done else "wb") as out, bar:
                while block:
                    out.write(block)
                    bar.update(len(block))
                    if megabytes and out.tell() > last:
                        out.truncate(last + 1)
                        total = last + 1
                        break
                    block = response.read(1 << 16)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "Range Not Satisfiable": no byte is missing from the partial file
            raise InputError(f"cannot download {file.url}: {error}. {by_hand}")
        total = done
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"cannot download {file.url}: {error}. {by_hand}")
    if total is not None and partial.stat().st_size < total:
        raise InputError(
            f"{file.url}: the connection ended after {partial.stat().st_size:,} of {total:,} "
            f"bytes. {by_hand}; the same command resumes the download"
        )
    expected = file.sha256 or redirects.sha256
    if expected and not megabytes:
        digest = hashlib.sha256()
        with open(partial, "rb") as complete:
            while block := complete.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if not found.startswith(expected):
            partial.unlink()
            raise InputError(
                f"{file.url}: sha256 is {found}, not {expected}: it has changed at the source or "
                "was damaged on the way, so it was deleted"
            )
    os.replace(partial, path)


def refuse_pages(start: bytes, it_is: str, remedy: str):
    """Raises InputError if a file with this start is what servers send in place of a file.

    A page to log in, say, which comes with status 200, as if all were well.
    """
    for pattern, what in (
        (rb"\s*(\xef\xbb\xbf)?\s*<[a-zA-Z!?]", "a web page"),  # and not "<|endoftext|>"
        (rb"version https://git-", "a Git LFS pointer"),
        (rb"\Z", "an empty page"),
    ):
        if re.match(pattern, start):
            raise InputError(f"{it_is} {what} instead of the file. {remedy}")


# ---------------------------------------------------------------------------------------------
# From the forms of the sources to those of data/files.py


def write_lines(rows: list[dict], path: Path):
    """Write rows as JSONL, which data/files.py reads, and say where."""
    write_rows(rows, path)
    print(f"{len(rows):,} rows in {path}")


def as_they_are(paths, folder):
    """Nothing to convert: the scripts read these files directly."""


def whole_stories(paths, folder):
    """stories.txt, without the last story, which --megabytes may have truncated."""
    text = paths[0].read_bytes().decode("utf-8", errors="ignore")
    end = "<|endoftext|>"
    stories = text[: text.rfind(end)] if end in text else text
    with replacing(folder / "stories.txt") as partial:
        partial.write_text(stories, encoding="utf-8")
    print(f"{stories.count(end) + 1:,} stories, {len(text) / 1e6:.1f} MB, in {folder}/stories.txt")


def fineweb(paths, folder):
    """Shards of GPT-2's token ids -> train.bin, val.bin: files of nothing but uint16 ids.

    The first shard gives a million tokens for validation, the others are for training. They are
    kept, so that a larger --megabytes later downloads only new ones. Raises InputError if one is
    damaged.
    """
    for path in paths:
        if not shard_header(path):
            raise InputError(f"{path} is not a shard of tokens")
    tokens = [np.memmap(path, np.uint16, mode="r", offset=1024) for path in paths]
    tokens[0] = tokens[0][: 10**6]
    for name, parts in (("val.bin", tokens[:1]), ("train.bin", tokens[1:])):
        with replacing(folder / name) as partial, open(partial, "wb") as file:
            for part in parts:
                file.write(part)
        print(f"{sum(map(len, parts)):,} tokens in {folder}/{name}")


def gsm8k(paths, folder):
    """Word problems. A solution ends with "#### 42", which `train_ppo.py --reward exact` reads."""
    for path, name in zip(paths, ("rows.jsonl", "test_rows.jsonl")):
        rows = [{"prompt": r["question"], "response": r["answer"]} for r in read_rows(path)]
        write_lines(rows, folder / name)


def helpsteer2(paths, folder):
    """Two responses, and how much better the second is, from -3 to 3; 0, a tie, is left out."""
    rows = []
    for row in read_rows(paths[0]):
        one, two, strength = row["response_1"], row["response_2"], row["preference_strength"]
        if strength:
            chosen, rejected = (two, one) if strength > 0 else (one, two)
            rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write_lines(rows, folder / "pairs.jsonl")


def oasst1(paths, folder):
    """Trees of conversations in English, which passed review -> rows.jsonl and pairs.jsonl.

    A message may have several replies. Those to a user's message are ranked by people, 0 the best.
    The best one is a demonstration; every two neighbours in rank are a pair.
    """
    demonstrations, pairs = [], []

    def walk(message, messages):
        """Collect from a message and all that follow from it; messages: the ones before it."""
        role = {"prompter": "user", "assistant": "assistant"}[message["role"]]
        messages = messages + [{"role": role, "content": message["text"]}]
        replies = [r for r in message.get("replies", []) if not r.get("deleted")]
        if role == "user":
            ranked = sorted((r for r in replies if r.get("rank") is not None), key=rank)
            if ranked:
                best = [{"role": "assistant", "content": ranked[0]["text"]}]
                demonstrations.append({"messages": messages + best})
            for better, worse in zip(ranked, ranked[1:]):
                both = {"chosen": better["text"], "rejected": worse["text"]}
                pairs.append({"messages": messages, **both})
        for reply in replies:
            walk(reply, messages)

    def rank(reply):
        return reply["rank"]

    for tree in read_rows(paths[0]):
        if tree["prompt"].get("lang") == "en":
            walk(tree["prompt"], [])
    write_lines(demonstrations, folder / "rows.jsonl")
    write_lines(pairs, folder / "pairs.jsonl")


SOURCES = {
    "tinyshakespeare": Source(
        "pretrain",
        1.1,
        "public domain",
        "for a model of characters, in minutes on a CPU",
        [
            File(
                f"{RAW}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            )
        ],
        as_they_are,
        "python train_pretrain.py --data {folder}/input.txt --tokenizer char",
    ),
    "tinystories": Source(
        "pretrain",
        22.5,
        "CDLA-Sharing-1.0",
        "short stories that a small model can learn to write; more of them with --megabytes",
        [File(f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt")],
        whole_stories,
        "python train_pretrain.py --data {folder}/stories.txt --context 256 --vocab_size 4096",
    ),
    "fineweb": Source(
        "pretrain",
        400.0,
        "ODC-By 1.0",
        "cleaned web text as GPT-2's tokens: 100 million; 2 MB per million with --megabytes",
        [File(SHARD.format("val", 0)), File(SHARD.format("train", 1))],
        fineweb,
        "python train_pretrain.py --data {folder}/train.bin --tokenizer gpt2 --context 1024 "
        "--n_layer 12 --n_head 12 --n_embd 768",
    ),
    "instructions": Source(
        "sft, rm, ppo, dpo",
        0.6,
        "Apache-2.0",
        "1,100 short tasks, each with a friendly and an unfriendly response: minutes on a CPU",
        [
            File(
                f"{RASBT}/01_main-chapter-code/instruction-data.json",
                "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
            ),
            File(
                f"{RASBT}/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
                "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
            ),
        ],
        as_they_are,
        "python train_sft.py --data {folder}/instruction-data.json; then train_rm.py, train_ppo.py "
        "and train_dpo.py with --data {folder}/instruction-data-with-preference.json",
    ),
    "dolly": Source(
        "sft",
        13.1,
        "CC BY-SA 3.0",
        "15,000 instructions with responses, written by people",
        [File(f"{HUB}/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl")],
        as_they_are,
        "python train_sft.py --init gpt2 --data {folder}/databricks-dolly-15k.jsonl",
    ),
    "oasst1": Source(
        "sft, rm, ppo, dpo",
        34.1,
        "Apache-2.0",
        "conversations with ranked responses: demonstrations, pairs and prompts in one",
        [
            File(
                f"{HUB}/OpenAssistant/oasst1/resolve/main/2023-04-12_oasst_ready.trees.jsonl.gz",
                "2a9a8fd3",
            )
        ],
        oasst1,
        "python train_sft.py --init gpt2 --data {folder}/rows.jsonl; "
        "then train_rm.py, train_ppo.py and train_dpo.py with --data {folder}/pairs.jsonl",
    ),
    "hh-rlhf": Source(
        "rm, ppo, dpo",
        17.1,
        "MIT",
        "44,000 pairs of responses, of which people chose the more helpful one",
        [
            File(f"{HUB}/Anthropic/hh-rlhf/resolve/main/helpful-base/train.jsonl.gz", "518a5bf2"),
            File(f"{HUB}/Anthropic/hh-rlhf/resolve/main/helpful-base/test.jsonl.gz", "8be3fc1a"),
        ],
        as_they_are,
        "python train_rm.py --data {folder}/train.jsonl.gz",
    ),
    "helpsteer2": Source(
        "rm, ppo, dpo",
        15.3,
        "CC BY 4.0",
        "carefully annotated pairs of responses, with the strength of the preference",
        [File(f"{HUB}/nvidia/HelpSteer2/resolve/main/preference/preference.jsonl.gz")],
        helpsteer2,
        "python train_rm.py --data {folder}/pairs.jsonl",
    ),
    "gsm8k": Source(
        "sft, ppo",
        4.9,
        "MIT",
        "word problems whose answers can be checked",
        [
            File(
                f"{RAW}/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            File(
                f"{RAW}/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            ),
        ],
        gsm8k,
        "python train_sft.py --init gpt2 --data {folder}/rows.jsonl",
    ),
    "lambada": Source(
        "pretrain",
        1.8,
        "MIT",
        "passages whose last word needs the whole passage: a test of language models",
        [
            File(
                "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
                "4aa8d02c",
            )
        ],
        as_they_are,
        "python train_pretrain.py --init gpt2 --data {folder}/lambada_test.jsonl",
    ),
}
ALL_STORIES = File(f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt")


def get(name: str, out: Path, megabytes: float = 0.0):
    """Download a source into out/name/ and convert it. megabytes: how much of a large one.

    Raises InputError if there is no source of that name, if megabytes are given for a source that
    is not large, or if the files are not what they should be.
    """
    if name not in SOURCES:
        raise InputError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")
    source, folder = SOURCES[name], out / name
    files = source.files
    if megabytes:
        if name not in ("tinystories", "fineweb"):
            raise InputError("--megabytes is for tinystories and fineweb: all others are small")
        files = [ALL_STORIES]
        if name == "fineweb":  # it comes in 103 shards of 200 MB
            shards = min(max(round(megabytes / 200), 1), 103)
            files = source.files[:1] + [File(SHARD.format("train", 1 + i)) for i in range(shards)]
            megabytes = 0.0
    paths = [folder / file.url.split("/")[-1] for file in files]
    release = acquire_lock(folder)  # two downloads would write into the same unfinished files
    try:
        for file, path in zip(files, paths):
            fetch(file, path, megabytes)
        try:
            source.convert(paths, folder)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a field is missing
            names = " and ".join(map(str, paths))
            raise InputError(
                f"{name}: not what it should be ({error}). Delete {names}, and try again"
            )
    finally:
        release()
    print(f"{name} ({source.licence}) is in {folder}/. To train on it:")
    print(f"    {source.command.format(folder=folder)}")


def main():
    """Read the command line, then list the sources or download one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="the source to download")
    parser.add_argument("--list", action="store_true", help="list the sources")
    parser.add_argument(
        "--megabytes",
        type=number(float, 0),
        default=0.0,
        help="how much of tinystories or fineweb",
    )
    parser.add_argument(
        "--out", default="downloads", help="folder for all sources (default: downloads)"
    )
    args = parser.parse_args()
    if args.list or not args.name:
        for name, s in SOURCES.items():
            print(f"{name:16} {s.stage:18} {s.megabytes:5.1f} MB  {s.licence:17} {s.good_for}")
        return
    get(args.name, Path(args.out), args.megabytes)


if __name__ == "__main__":
    run_script(main)
