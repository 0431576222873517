"""Public text to train on, fetched and put into the forms that the scripts read.

    python -m data.download --list             stage, size, licence, what it is good for
    python -m data.download oasst1             into downloads/oasst1/; says which command reads it
    python -m data.download tinystories --megabytes 50
    python -m data.download fineweb --megabytes 1000

A download that broke off goes on where it stopped. A file gets its name only when it is whole and
its sha256 is right: the one written here, or else the one that Hugging Face names. Nothing is
fetched unless you ask for it here (or with --init gpt2). Sizes and licences are those that the
sources stated when this list was written.
"""

import argparse
import gzip
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.options import number

HUB = "https://huggingface.co/datasets"
RAW = "https://raw.githubusercontent.com"
RASBT = f"{RAW}/rasbt/LLMs-from-scratch/main/ch07"
SHARD = HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
TIMEOUT = 30  # seconds without a byte until a download counts as broken off


class File(NamedTuple):
    """One file to fetch."""

    url: str
    sha256: str = ""  # the hash, or what is known of its beginning ("" = what the server says)


class Source(NamedTuple):
    """One name that `python -m data.download` knows: files, and how the scripts read them."""

    stage: str
    megabytes: float
    licence: str
    good_for: str
    files: list[File]
    convert: object  # function(paths, folder): writes what the scripts read
    command: str  # what reads it


class NoteHash(urllib.request.HTTPRedirectHandler):
    """Follows redirects, as always. Hugging Face, redirecting to its storage, names the sha256."""

    sha256 = ""

    def redirect_request(self, request, answer, code, message, headers, url):
        tag = headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64:  # of small files it is the hash of something else, and shorter
            self.sha256 = tag
        return super().redirect_request(request, answer, code, message, headers, url)


def fetch(file: File, path: Path, megabytes: float = 0.0):
    """Download a file to path, or its first megabytes; a part that is there already is kept.

    Exits with a message that names the URL if it cannot be had; the part stays for the next try.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    done = part.stat().st_size if part.exists() else 0
    last = int(megabytes * 1e6) - 1 if megabytes else ""
    by_hand = f"Try again, or fetch {file.url} by hand and save it as {path}"
    request = urllib.request.Request(file.url, headers={"User-Agent": "data.download"})
    if done or megabytes:
        request.add_header("Range", f"bytes={done}-{last}")
    redirects = NoteHash()
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:  # the server sends all of it, whatever we have
                done = 0
            left = answer.headers.get("Content-Length")
            total = done + int(left) if left else None
            bar = tqdm(desc=path.name, total=total, initial=done, unit="B", unit_scale=True)
            with open(part, "ab" if done else "wb") as out, bar:
                while block := answer.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
                    if megabytes and out.tell() > last:
                        out.truncate(last + 1)
                        total = last + 1
                        break
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: the part was whole
            raise SystemExit(f"cannot download {file.url}: {error}. {by_hand}")
        total = done
    except (OSError, http.client.HTTPException) as error:
        raise SystemExit(f"cannot download {file.url}: {error}. {by_hand}")
    if total is not None and part.stat().st_size < total:
        raise SystemExit(
            f"{file.url}: the connection ended after {part.stat().st_size:,} of {total:,} bytes. "
            f"{by_hand}; the same command goes on from there"
        )
    expected = file.sha256 or redirects.sha256
    if expected and not megabytes:
        digest = hashlib.sha256()
        with open(part, "rb") as whole:
            while block := whole.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if not found.startswith(expected):
            part.unlink()
            raise SystemExit(
                f"{file.url}: sha256 is {found}, not {expected}: it has changed, or was "
                "damaged on the way; it was deleted"
            )
    with open(part, "rb") as start:
        if start.read(20).startswith(b"version https://git-"):
            part.unlink()
            raise SystemExit(f"{file.url}: the server sent a pointer instead of the file")
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------
# From their forms to ours


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_lines(rows: list[dict], path: Path):
    """JSONL that data/files.py reads."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{len(rows):,} rows in {path}")


def as_they_are(paths, folder):
    """The scripts read these files directly."""


def whole_stories(paths, folder):
    """The last story may be cut: it goes."""
    text = paths[0].read_bytes().decode("utf-8", errors="ignore")
    end = "<|endoftext|>"
    stories = text[: text.rfind(end)] if end in text else text
    (folder / "stories.txt").write_text(stories, encoding="utf-8")
    print(f"{stories.count(end) + 1:,} stories in {folder}/stories.txt")


def fineweb(paths, folder):
    """Shards of GPT-2's token ids -> train.bin of all but the first, val.bin of a million tokens.

    A shard starts with 256 numbers of 4 bytes, of which the third counts its tokens; these follow,
    2 bytes each. The shards stay, so that a larger --megabytes fetches only what is new.
    """
    for path in paths:
        header = np.fromfile(path, "<i4", count=256)
        if (
            len(header) < 256
            or header[0] != 20240520
            or path.stat().st_size != 1024 + 2 * header[2]
        ):
            raise SystemExit(f"{path}: no shard of tokens, or not all of it; delete it")
    np.fromfile(paths[0], "<u2", count=10**6, offset=1024).tofile(folder / "val.bin")
    with open(folder / "train.bin.part", "wb") as train:
        for path in paths[1:]:
            np.fromfile(path, "<u2", offset=1024).tofile(train)
    os.replace(folder / "train.bin.part", folder / "train.bin")
    tokens = (folder / "train.bin").stat().st_size // 2
    print(f"{tokens:,} tokens in {folder}/train.bin, 1,000,000 in {folder}/val.bin")


def dolly(paths, folder):
    """Instructions that people wrote and answered; a few answers are empty, and left out."""
    names = {"instruction": "instruction", "context": "input", "response": "output"}
    rows = [{ours: row[theirs] for theirs, ours in names.items()} for row in read_lines(paths[0])]
    write_lines([row for row in rows if row["output"].strip()], folder / "rows.jsonl")


def gsm8k(paths, folder):
    """Word problems; a solution ends in #### and the number that --reward exact looks for."""
    for path, name in zip(paths, ("train", "test")):
        rows = [{"prompt": r["question"], "response": r["answer"]} for r in read_lines(path)]
        write_lines(rows, folder / f"{name}.jsonl")


def lambada(paths, folder):
    """Passages whose last word follows from all that came before."""
    texts = [row["text"] for row in read_lines(paths[0])]
    (folder / "passages.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    print(f"{len(texts):,} passages in {folder}/passages.txt")


def helpsteer2(paths, folder):
    """Two replies and by how much the second is better, from -3 to 3; ties are no preference."""
    rows = []
    for row in read_lines(paths[0]):
        one, two, strength = row["response_1"], row["response_2"], row["preference_strength"]
        if strength:
            chosen, rejected = (two, one) if strength > 0 else (one, two)
            rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    write_lines(rows, folder / "pairs.jsonl")


def oasst1(paths, folder):
    """Trees of conversations -> the best reply to every prompt, and pairs of better and worse ones.

    Replies to the same message are ranked by people, 0 the best. English, what passed review only.
    """
    demonstrations, pairs = [], []

    def walk(message, messages):
        """Collect from a message and all below it; messages: what was said before."""
        here = {"prompter": "user", "assistant": "assistant"}[message["role"]]
        messages = messages + [{"role": here, "content": message["text"]}]
        replies = [r for r in message.get("replies", []) if not r.get("deleted")]
        if here == "user":
            ranked = sorted((r for r in replies if r.get("rank") is not None), key=ranks)
            if ranked:
                best = [{"role": "assistant", "content": ranked[0]["text"]}]
                demonstrations.append({"messages": messages + best})
            for better, worse in zip(ranked, ranked[1:]):
                both = {"chosen": better["text"], "rejected": worse["text"]}
                pairs.append({"messages": messages, **both})
        for reply in replies:
            walk(reply, messages)

    def ranks(reply):
        return reply["rank"]

    for tree in read_lines(paths[0]):
        if tree["prompt"].get("lang") == "en":
            walk(tree["prompt"], [])
    write_lines(demonstrations, folder / "rows.jsonl")
    write_lines(pairs, folder / "pairs.jsonl")


SOURCES = {
    "tinyshakespeare": Source(
        "pretrain",
        1.1,
        "public domain",
        "characters in minutes on a CPU",
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
        "short stories that a small model can learn to write; with --megabytes the large file",
        [File(f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt")],
        whole_stories,
        "python train_pretrain.py --data {folder}/stories.txt --context 256 --vocab_size 4096",
    ),
    "fineweb": Source(
        "pretrain",
        400.0,
        "ODC-By 1.0",
        "the web, cleaned, as GPT-2's tokens: 100 million, or more with --megabytes (200 each)",
        [File(SHARD.format("val", 0)), File(SHARD.format("train", 1))],
        fineweb,
        "python train_pretrain.py --data {folder}/train.bin --tokenizer gpt2 --context 1024 "
        "--n_layer 12 --n_head 12 --n_embd 768",
    ),
    "instructions": Source(
        "sft, rm, ppo, dpo",
        0.6,
        "Apache-2.0",
        "1,100 short tasks, each with a friendly and an unfriendly reply: minutes on a CPU",
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
        "15,000 instructions and replies by people",
        [File(f"{HUB}/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl")],
        dolly,
        "python train_sft.py --init gpt2 --data {folder}/rows.jsonl",
    ),
    "oasst1": Source(
        "sft, rm, ppo, dpo",
        34.1,
        "Apache-2.0",
        "conversations with ranked replies: demonstrations, pairs and prompts in one",
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
        "44,000 pairs of helpful and less helpful replies, by people",
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
        "pairs with the strength of the preference, carefully made",
        [File(f"{HUB}/nvidia/HelpSteer2/resolve/main/preference/preference.jsonl.gz")],
        helpsteer2,
        "python train_rm.py --data {folder}/pairs.jsonl",
    ),
    "gsm8k": Source(
        "sft, ppo",
        4.9,
        "MIT",
        "word problems whose answer can be checked",
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
        "python train_sft.py --init gpt2 --data {folder}/train.jsonl",
    ),
    "lambada": Source(
        "pretrain",
        1.8,
        "MIT",
        "passages whose last word needs all that stands before it: a test of a language model",
        [
            File(
                "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
                "4aa8d02c",
            )
        ],
        lambada,
        "python train_pretrain.py --init gpt2 --data {folder}/passages.txt",
    ),
}
ALL_STORIES = File(f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt")


def get(name: str, out: Path, megabytes: float = 0.0):
    """Fetch and convert one source into out/name/."""
    if name not in SOURCES:
        raise SystemExit(f"there is no {name!r}; there are {', '.join(SOURCES)}")
    source, folder = SOURCES[name], out / name
    files = source.files
    if megabytes:
        if name not in ("tinystories", "fineweb"):
            raise SystemExit("--megabytes is for tinystories and fineweb, which are large")
        files = [ALL_STORIES]
        if name == "fineweb":  # whole shards of 200 MB, of which the source has 103
            shards = min(max(round(megabytes / 200), 1), 103)
            files = source.files[:1] + [File(SHARD.format("train", 1 + i)) for i in range(shards)]
            megabytes = 0.0
    paths = [folder / file.url.split("/")[-1] for file in files]
    for file, path in zip(files, paths):
        fetch(file, path, megabytes)
    source.convert(paths, folder)
    print(f"{name} ({source.licence}) is in {folder}/\n    {source.command.format(folder=folder)}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="what to fetch")
    parser.add_argument("--list", action="store_true", help="show what there is")
    parser.add_argument(
        "--megabytes", type=number(float), default=0.0, help="tinystories, fineweb: how much of it"
    )
    parser.add_argument("--out", default="downloads", help="folder (default: downloads)")
    args = parser.parse_args()
    if args.list or not args.name:
        for name, s in SOURCES.items():
            print(f"{name:16} {s.stage:18} {s.megabytes:5.1f} MB  {s.licence:17} {s.good_for}")
        return
    get(args.name, Path(args.out), args.megabytes)


if __name__ == "__main__":
    main()
