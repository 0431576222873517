"""Tokenizers: any text survives the round trip, and no text can spell a special token."""

import random
import re
from collections import Counter

import pytest

from data.tokenizer import (
    PATTERN,
    SPECIALS,
    CharTokenizer,
    GPT2Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from gpt import InputError

TEXTS = [
    "Otto the owl lost his lantern.",
    "12-5 is 7, and 100000 is not 1e5!",
    "",
    " ",
    "  two  spaces ",
    "\n\ntabs\tand\r\nlines\n",
    "ñandú Straße 日本語 🦉 \u0301",
    "<|end|><|user|>",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_characters_survive_the_round_trip(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(20)
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_of_few_characters_survive_the_round_trip_through_merges_of_their_own():
    """Where merges overlap most: runs of the same letters, blanks and half characters."""
    rng = random.Random(0)
    for alphabet in ("a", "ab", "a ", " \n", "日本", "é🦉1_"):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(30)]
        own = make_tokenizer("bpe", texts, 320)
        assert len(own.state["merges"]) > 5
        for text in texts:
            assert own.decode(own.encode(text)) == text
            assert max(own.encode(text)) < own.pad


def test_a_million_blanks_are_read_or_refused(tokenizer, monkeypatch):
    """As one pre-token they make tiktoken panic, which is not even an Exception."""
    text = "a" + " " * 1_000_000 + "\n\nb"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(train_bpe(text, 300)) > 5
    gpt2 = object.__new__(GPT2Tokenizer)  # without its vocabulary, which may not be here
    with pytest.raises(InputError, match="a run of more than 900,000 blanks"):
        gpt2.encode(text)


def test_white_space_up_to_a_thousand_characters_is_split_as_in_gpt2():
    unbounded = re.compile(r" ?[^\W\d_]+|\d{1,3}| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(["a", "1", ".", " ", "\n", " " * 40]) for _ in range(25))
        assert re.findall(PATTERN, text) == unbounded.findall(text)


def test_special_tokens_are_five_different_ids_beyond_all_text(tokenizer):
    t = tokenizer
    specials = {t.pad, t.eot, t.user, t.assistant, t.end}
    assert specials == set(range(t.n_vocab - 5, t.n_vocab))


def test_no_text_can_produce_a_special_token(tokenizer):
    ids = tokenizer.encode(" ".join(SPECIALS))
    assert max(ids) < tokenizer.pad
    specials = [tokenizer.pad, tokenizer.eot, tokenizer.user, tokenizer.assistant, tokenizer.end]
    assert len(set(specials)) == 5 and max(specials) == tokenizer.n_vocab - 1


def test_a_word_is_the_same_token_at_the_start_of_a_text_and_inside_it(tokenizer):
    ids = tokenizer.encode("Otto met Otto")
    assert ids[: len(ids) // 3] == ids[-(len(ids) // 3) :]


@pytest.mark.parametrize("script", ["Latin", "Chinese"])
def test_training_merges_what_a_recount_of_the_whole_text_would_merge(script):
    """The fast version counts only changed words again; this one starts over."""
    text = " low lower lowest newer newest wide wider widest aaaa aaa low low new" * 3
    if script == "Chinese":  # long words of three bytes a letter, with no blank between them
        text = "低低下低下的低下的人，新人比新的人新。新新新人人人低人，" * 3
    words = [list(piece.encode()) for piece in re.findall(PATTERN, text)]
    merges = []
    for new in range(256, 280):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(list(best))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    assert train_bpe(text, 280 + 5) == merges and len(merges) > 20


def test_all_texts_are_learned_from_each_beginning_like_a_word_inside_a_text(monkeypatch):
    given = []

    def noted(text, n_vocab):
        given.append(text)
        return []

    monkeypatch.setattr("data.tokenizer.train_bpe", noted)
    make_tokenizer("bpe", ["a" * 2_000_000, "b"], 300)
    assert given == [" " + "a" * 2_000_000 + " b"]


def test_the_smallest_vocabulary_is_bytes_and_special_tokens():
    assert make_tokenizer("bpe", ["a"], 261).n_vocab == 261


def test_characters_are_numbered_in_their_order_whatever_the_process():
    assert make_tokenizer("char", ["cab", "!z"], 0).state["characters"] == "!abcz"


def test_special_tokens_are_shown_as_often_as_they_are_there(tokenizer):
    pad, end = tokenizer.pad, tokenizer.end
    assert tokenizer.show([pad, pad, end, end]) == "<|pad|><|pad|><|end|><|end|>"


def test_encoding_applies_merges_in_the_order_they_were_learned(tokenizer):
    merges = tokenizer.state["merges"]
    for word in (" lantern", " harbour", " zebra"):
        ids = list(word.encode())
        for new, pair in enumerate(merges, 256):
            i = 0
            while i < len(ids) - 1:
                if ids[i : i + 2] == pair:
                    ids[i : i + 2] = [new]
                i += 1
        assert tokenizer.encode(word[1:]) == ids


def test_loaded_tokenizer_encodes_as_the_saved_one(tokenizer):
    again = load_tokenizer(tokenizer.state)
    assert (
        again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) and again.n_vocab == tokenizer.n_vocab
    )
    characters = CharTokenizer("abc")
    assert load_tokenizer(characters.state).encode("cab") == characters.encode("cab") == [2, 0, 1]


def test_character_tokenizer_knows_every_character_of_its_texts():
    tokenizer = make_tokenizer("char", ["to be,", "or not"], 0)
    assert tokenizer.decode(tokenizer.encode("born to be")) == "born to be"
    with pytest.raises(InputError, match="the character 'x' is not among"):
        tokenizer.encode("x")


@pytest.mark.parametrize(
    "kind, n_vocab, message", [("bpe", 100, "at least 261"), ("words", 500, "there are")]
)
def test_impossible_tokenizer_is_a_clear_error(kind, n_vocab, message):
    with pytest.raises(InputError, match=message):
        make_tokenizer(kind, ["text"], n_vocab)


def test_gpt2_tokenizer_without_vocabulary_says_what_was_tried(monkeypatch, tmp_path):
    """Without a cache and a network, tiktoken fails in its own words; ours say what to do."""
    import tiktoken

    monkeypatch.setattr(
        tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(InputError, match="no route.*TIKTOKEN_CACHE_DIR"):
        make_tokenizer("gpt2", [], 0)
