"""Text to token ids and back: byte-level BPE trained here, single characters, or GPT-2's BPE.

Whatever the kind, five special tokens stand behind all others. They are five different ids, and
text can never produce one: `encode` takes "<|end|>" in a text as seven ordinary characters, so
nobody can close a turn from inside a message.

    python -m data.tokenizer       train a BPE on the town and show how it cuts a sentence

Reference: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909), algorithm 1, on bytes as in
Radford et al. 2019 (GPT-2).
"""

import re
from collections import Counter, defaultdict
from itertools import groupby

import tiktoken

# PAD fills up batches, EOT separates documents, USER and ASSISTANT open a turn, END closes a reply.
SPECIALS = ["<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]

# Merges never cross the borders of these pieces: a word with the space before it, up to three
# digits, punctuation, white space. Every character falls into exactly one piece.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"


class Tokenizer:
    """What all kinds have in common.

    encode(text) -> ids and decode(ids) -> text, which leaves out special tokens; pad, eot, user,
    assistant and end are the special ids; n_vocab counts all ids. `state` is a plain dict that goes
    into every checkpoint; `load_tokenizer(state)` makes the same tokenizer again.
    """

    def __init__(self, state: dict, n_ordinary: int):
        self.state = state
        self.n_vocab = n_ordinary + len(SPECIALS)
        self.pad, self.eot, self.user, self.assistant, self.end = range(n_ordinary, self.n_vocab)

    def show(self, ids: list[int]) -> str:
        """Text with the special tokens spelled out, for people to read; not for encoding again."""
        specials = (self.pad, self.eot, self.user, self.assistant, self.end)
        names = dict(zip(specials, SPECIALS))
        runs = groupby(ids, key=names.get)  # ordinary ids, whose name is None, are decoded together
        return "".join(
            self.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs
        )


class BPETokenizer(Tokenizer):
    """Byte-level BPE. A text is encoded as if a space stood before it (as SentencePiece does), so
    that a word is the same token at the start of a text and inside it; decode takes it off again.
    """

    def __init__(self, merges: list[list[int]]):
        """merges: pairs of ids in the order they were learned; the n-th (from 0) makes id 256+n."""
        super().__init__({"kind": "bpe", "merges": merges}, 256 + len(merges))
        pieces = [bytes([byte]) for byte in range(256)]
        for a, b in merges:
            pieces.append(pieces[a] + pieces[b])
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.pad]).removeprefix(" ")


class CharTokenizer(Tokenizer):
    """One token per character, for the characters of the text it was made from."""

    def __init__(self, characters: str):
        super().__init__({"kind": "char", "characters": characters}, len(characters))
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        """Exits with a message for a character that is not among those it knows."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise SystemExit(
                f"the character {error} is not among the {len(self.ids)} this tokenizer knows; "
                "a model pretrained with --tokenizer bpe reads any text"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids if i < self.pad)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE: 50257 ids, of which the last is end-of-text, and then the other special ones."""

    def __init__(self):
        super().__init__({"kind": "gpt2"}, 50256)
        self.eot, self.pad = 50256, 50257  # end-of-text keeps the id that GPT-2 was trained with
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken downloads the vocabulary at first use
            raise SystemExit(
                f"tiktoken cannot load GPT-2's vocabulary: {error}. It needs a network once, or "
                "the environment variable TIKTOKEN_CACHE_DIR set to a folder that has it. The "
                "tokenizers bpe and char need neither."
            )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < 50256])


def train_bpe(text: str, n_vocab: int) -> list[list[int]]:
    """Learn byte-pair merges from text, until there are n_vocab ids with bytes and special tokens.

    Again and again, find the pair of neighbours that occurs most often and make it a new symbol.
    Of equally frequent pairs the smaller one goes first, so the order of the text does not matter.
    """
    words = Counter(re.findall(PATTERN, text))
    spellings = [list(word.encode()) for word in words]  # every distinct word as a list of ids
    counts = list(words.values())

    pairs = Counter()  # pair -> how often it occurs in the text
    where = defaultdict(set)  # pair -> the words that have it, the only ones its merge can change
    for index, ids in enumerate(spellings):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += counts[index]
            where[pair].add(index)

    merges = []
    for new in range(256, n_vocab - len(SPECIALS)):
        most = max(pairs.values(), default=0)
        if most < 2:
            break  # nothing occurs twice any more: the vocabulary stays smaller than asked for
        best = min(pair for pair, count in pairs.items() if count == most)
        merges.append(list(best))
        for index in where.pop(best):
            old = spellings[index]
            merged, i = [], 0
            while i < len(old):
                if tuple(old[i : i + 2]) == best:
                    merged.append(new)
                    i += 2
                else:
                    merged.append(old[i])
                    i += 1
            for pair in zip(old, old[1:]):
                pairs[pair] -= counts[index]
            for pair in zip(merged, merged[1:]):
                pairs[pair] += counts[index]
                where[pair].add(index)
            spellings[index] = merged
        del pairs[best]
    return merges


def make_tokenizer(kind: str, texts: list[str], n_vocab: int) -> Tokenizer:
    """A tokenizer of the given kind ("bpe", "char" or "gpt2") for texts.

    n_vocab: how many ids a bpe tokenizer may have. Raises SystemExit for another kind, or for too
    few ids to hold the 256 bytes and the special tokens.
    """
    if kind == "bpe":
        if n_vocab < 256 + len(SPECIALS):
            raise SystemExit(f"--vocab_size {n_vocab}: a bpe tokenizer needs at least 261")
        text = (" " + " ".join(texts))[:50_000_000]  # more would cost memory and change little
        print(f"learning a tokenizer from {len(text) / 1e6:.1f} million characters", flush=True)
        return BPETokenizer(train_bpe(text, n_vocab))
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise SystemExit(f"--tokenizer {kind}: there are bpe, char and gpt2")


def load_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer whose `state` was saved in a checkpoint."""
    if state["kind"] == "bpe":
        return BPETokenizer(state["merges"])
    return CharTokenizer(state["characters"]) if state["kind"] == "char" else GPT2Tokenizer()


if __name__ == "__main__":
    from data.town import documents

    tokenizer = make_tokenizer("bpe", documents(5000, seed=0), 1152)
    for sentence in ("Otto the owl lost his lantern.", "12-5 is 7.", "Zürich, 2:30 p.m."):
        print(" | ".join(tokenizer.decode([i]) for i in tokenizer.encode(sentence)))
