"""Text to token ids and back: byte-level BPE trained here, single characters, or GPT-2's BPE.

Every tokenizer has five special tokens, with five different ids, after its ordinary ones. No text
can produce them: `encode` reads "<|end|>" in a text as seven ordinary characters, so a message
cannot close its own turn.

    python -m data.tokenizer       train a BPE on the town and show how it splits some sentences

Reference: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909), algorithm 1, on bytes as in
Radford et al. 2019 (GPT-2). Differs from GPT-2 in: the pre-tokens, and a space before every text.
"""

import heapq
import re
from collections import Counter, defaultdict
from itertools import groupby

import tiktoken
from tqdm import tqdm

from gpt import InputError

# Padding of batches; end-of-text, which opens every document; user and assistant, which open a
# message; end-of-turn, which closes a response. One id for two of them would break a mask: if
# padding were end-of-turn, a loss that ignores padding would never teach a model to stop.
SPECIALS = ["<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]

# Text is first split into pre-tokens: a word with the space before it, one to three digits,
# punctuation, white space. Every character is in exactly one, and no merge crosses a boundary, so
# there is no token for "dog." besides the one for "dog". White space of more than 1000 characters
# is several pre-tokens, since matching a million at once overflows tiktoken's stack.
PATTERN = r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\w\s]|_)+|\s{1,1000}(?!\S)|\s"


class Tokenizer:
    """What all kinds of tokenizer have in common.

    encode(text) -> ids, and decode(ids) -> text, without special tokens. pad, eot, user, assistant
    and end are the special ids; n_vocab is the number of all ids. `state` is a plain dict, saved in
    every checkpoint, from which `load_tokenizer` makes the same tokenizer again.
    """

    def __init__(self, state: dict, n_ordinary: int):
        """n_ordinary: the number of ids that are not special, 0 to n_ordinary - 1."""
        self.state = state
        self.n_vocab = n_ordinary + len(SPECIALS)
        self.pad, self.eot, self.user, self.assistant, self.end = range(n_ordinary, self.n_vocab)

    def show(self, ids: list[int]) -> str:
        """Text with the special tokens spelled out, such as "4-2 is 2.<|end|>".

        For people to read: `encode` would not give the same ids again.
        """
        specials = (self.pad, self.eot, self.user, self.assistant, self.end)
        names = dict(zip(specials, SPECIALS))
        # Ordinary ids, whose name is None, are decoded together: a character may span several.
        runs = groupby(ids, key=names.get)
        return "".join(
            self.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs
        )


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any text can be encoded, and decode gives back exactly that text.

    A text is encoded with a space before it, as in SentencePiece, so that a word is the same token
    at the start of a text and inside it. decode removes that space.
    """

    def __init__(self, merges: list[list[int]]):
        """merges: pairs of ids in the order learned (see `train_bpe`); merge n makes id 256 + n.

        Raises InputError for merges that cannot be applied in this order.
        """
        super().__init__({"kind": "bpe", "merges": merges}, 256 + len(merges))
        ranks = {bytes([byte]): byte for byte in range(256)}  # the bytes of a token -> its id
        spellings = list(ranks)
        for new, pair in enumerate(merges, 256):
            ids = pair if isinstance(pair, list) and {*map(type, pair)} == {int} else []
            if len(ids) != 2 or min(ids) < 0 or max(ids) >= new:
                raise InputError(
                    f"tokenizer: merge {new - 256} is {pair!r}, not two ids below {new}"
                )
            spellings.append(spellings[ids[0]] + spellings[ids[1]])
            ranks[spellings[new]] = new
        if len(ranks) < len(spellings):
            raise InputError("tokenizer: two merges make the same token")
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(" " + text)

    def decode(self, ids: list[int]) -> str:
        # The special ids are the highest, and pad the lowest of them.
        return self.encoding.decode([i for i in ids if i < self.pad]).removeprefix(" ")


class CharTokenizer(Tokenizer):
    """One token per character, for the characters of the texts it was made from."""

    def __init__(self, characters: str):
        """characters: each once; its place is its id. Raises InputError if one is there twice."""
        if len(set(characters)) < len(characters):
            raise InputError("tokenizer: characters has one of them twice")
        super().__init__({"kind": "char", "characters": characters}, len(characters))
        self.characters = characters
        self.ids = {character: i for i, character in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        """Raises InputError if the text has a character that is not in the vocabulary."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise InputError(
                f"the character {error} is not among the {len(self.ids)} of this tokenizer; "
                "a model pretrained with --tokenizer bpe can read any text"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids if i < self.pad)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE: 50257 ids, the last of which is end-of-text, and four more special ones.

    Raises InputError if tiktoken has no copy of the vocabulary and cannot download one.
    """

    def __init__(self):
        super().__init__({"kind": "gpt2"}, 50256)
        self.eot, self.pad = 50256, 50257  # the weights of GPT-2 know end-of-text as 50256
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken downloads the vocabulary at its first use
            raise InputError(
                f"tiktoken cannot load GPT-2's vocabulary: {error}. It needs the network once, or "
                "the environment variable TIKTOKEN_CACHE_DIR set to a folder that has the "
                "vocabulary. The tokenizers bpe and char need neither."
            )

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a run of white space that overflows tiktoken's stack."""
        if len(text) > 900_000 and max(map(len, re.findall(r"\s+", text)), default=0) > 900_000:
            raise InputError("a run of more than 900,000 blanks: GPT-2's tokenizer cannot read it")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < 50256])


def train_bpe(text: str, n_vocab: int) -> list[list[int]]:
    """Learn the merges of a byte-level BPE from a text.

    Start with the 256 bytes as ids. Repeatedly find the pair of adjacent ids that occurs most often
    in the text, and replace it with a new id. Of equally frequent pairs the smallest is taken, so
    the order of the words in the text does not matter.

        train_bpe(" low lower lowest", n_vocab=256 + 3 + 5)
        -> [[32, 108], [111, 119], [256, 257]]
        id 256 is " l" (bytes 32 and 108), id 257 is "ow", id 258 is " low"

    n_vocab: the number of ids, including 256 bytes and five special tokens; there are fewer once no
    pair occurs twice. Returns the pairs in the order learned; merge n makes id 256 + n.
    """
    found = Counter(re.findall(PATTERN, text))  # every distinct pre-token, and how often it occurs
    counts = list(found.values())
    # Each of them as a string with one character per id, so that str.replace can merge a pair.
    words = [word.encode().decode("latin-1") for word in found]

    pairs = Counter()  # pair -> how often it occurs in the text
    words_with = defaultdict(set)  # pair -> the words that contain it: its merge changes only these
    for index, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            pairs[left + right] += counts[index]
            words_with[left + right].add(index)

    # The most frequent pair is on top of a heap, and of equally frequent ones the smallest. A pair
    # whose count changes is pushed again; its outdated entries are dropped when they reach the top.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    # disable=None: no bar where the output is not a terminal
    for new in map(chr, tqdm(range(256, n_vocab - len(SPECIALS)), "tokenizer", disable=None)):
        while heap and -heap[0][0] != pairs[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or -heap[0][0] < 2:
            break
        best = heap[0][1]
        merges.append([*map(ord, best)])
        changed = set()
        # Counting again only the words that change makes this fast enough for Python.
        for index in words_with.pop(best):
            before = words[index]
            after = words[index] = before.replace(best, new)
            for left, right in zip(before, before[1:]):
                pairs[left + right] -= counts[index]
                changed.add(left + right)
            for left, right in zip(after, after[1:]):
                pairs[left + right] += counts[index]
                words_with[left + right].add(index)
                changed.add(left + right)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def make_tokenizer(kind: str, texts: list[str], n_vocab: int) -> Tokenizer:
    """A tokenizer of the given kind ("bpe", "char" or "gpt2") for texts.

    n_vocab: the number of ids, for bpe only. Raises InputError for any other kind, and if
    n_vocab is less than 261, the 256 bytes and five special tokens.
    """
    if kind == "bpe":
        if n_vocab < 256 + len(SPECIALS):
            raise InputError(f"--vocab_size {n_vocab}: a bpe tokenizer needs at least 261")
        # 50 million characters suffice: more would cost memory and change few merges.
        text = (" " + " ".join(texts))[:50_000_000]
        print(f"learning a tokenizer from {len(text) / 1e6:.1f} million characters", flush=True)
        return BPETokenizer(train_bpe(text, n_vocab))
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))))
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise InputError(f"--tokenizer {kind}: there are bpe, char and gpt2")


def load_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer whose `state` was saved in a checkpoint, under "tokenizer".

    Raises InputError naming what is wrong in a damaged state.
    """
    kind, merges, characters = (state.get(name) for name in ("kind", "merges", "characters"))
    if kind == "bpe" and isinstance(merges, list):
        return BPETokenizer(merges)
    if kind == "char" and isinstance(characters, str):
        return CharTokenizer(characters)
    if kind == "gpt2":
        return GPT2Tokenizer()
    raise InputError(f"tokenizer: its kind is {kind!r}, or its merges or characters are missing")


if __name__ == "__main__":
    from data.town.documents import documents

    tokenizer = make_tokenizer("bpe", documents(5000, seed=0), 1152)
    for sentence in ("Otto the owl lost his lantern.", "12-5 is 7.", "Zürich, 2:30 p.m."):
        # The encoding's own decode, since ours would remove the space before every word.
        print("|".join(tokenizer.encoding.decode([i]) for i in tokenizer.encode(sentence)))
