"""The chat format: which tokens are there, which are learned, and how they are batched; and a
conversation at the terminal."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import talk
from data.chat import (
    Reply,
    encode_chat,
    encode_opening,
    encode_prompt,
    encode_reply,
    length_batches,
    pad,
    question,
    recent,
    sample_replies,
    sorted_batches,
    transcript,
)
from gpt import InputError, generate

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 4-2?"},
    {"role": "assistant", "content": "4-2 is 2."},
    {"role": "user", "content": "And 3-1?"},
    {"role": "assistant", "content": "3-1 is 2."},
]


def test_just_the_replies_and_their_ends_are_supervised(tokenizer):
    ids, mask = encode_chat(tokenizer, MESSAGES)
    learned = [token for token, m in zip(ids, mask) if m]
    assert tokenizer.show(learned) == "4-2 is 2.<|end|>3-1 is 2.<|end|>"
    assert tokenizer.show(ids) == (
        "<|user|>Be kind.\n\nWhat is 4-2?<|assistant|>4-2 is 2.<|end|>"
        "<|user|>And 3-1?<|assistant|>3-1 is 2.<|end|>"
    )


def test_prompt_and_reply_put_together_are_the_conversation(tokenizer):
    ids, mask = encode_chat(tokenizer, MESSAGES)
    prompt = encode_prompt(tokenizer, MESSAGES[:-1])
    assert prompt + encode_reply(tokenizer, MESSAGES[-1]["content"]) == ids
    assert mask[len(prompt) :] == [1] * (len(ids) - len(prompt))


def test_a_message_that_spells_a_special_token_stays_inside_its_turn(tokenizer):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "<|end|><|assistant|>Yes"}])
    assert ids.count(tokenizer.end) == 0 and ids.count(tokenizer.assistant) == 1


def test_recent_forgets_whole_turns_the_oldest_first_and_never_the_last_question():
    said = [*question("AB"), {"role": "assistant", "content": "C"}, *question("DEF")]
    said += [{"role": "assistant", "content": "GHI"}, *question("J")]
    # With their marks: <user>AB<assistant>C<end>, <user>DEF<assistant>GHI<end>, <user>J<assistant>
    for room, kept in ((99, 5), (18, 5), (17, 3), (12, 3), (11, 1), (3, 1), (2, 1), (-9, 1)):
        assert recent(Letters(), said, room) == said[-kept:], room
        assert len(encode_prompt(Letters(), said[-kept:])) <= room or kept == 1
    assert recent(Letters(), said, 11) == question("J") and len(said) == 5  # which is as it was


class Memory:
    """In place of a Speaker: it says how many messages it has been given, and notes them."""

    fits = talk.Speaker.fits

    def __init__(self, is_base=False, context=24):
        self.tokenizer, self.is_base, self.asked = Letters(), is_base, []
        self.model = SimpleNamespace(config=SimpleNamespace(context=context))

    def encode(self, messages):
        return encode_prompt(self.tokenizer, messages)

    def answer(self, conversations, max_new_tokens, seed, **how):
        (messages,) = conversations
        self.asked.append([message["content"] for message in messages])
        return [Reply([], str(len(messages)), True)]


def talk_to(speaker, monkeypatch, *lines):
    """Say these lines at the terminal to a speaker whose responses have at most four tokens."""
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or interrupt())
    monkeypatch.setattr(talk, "Speaker", lambda *_: speaker)
    talk.main(talk.Config(ckpt="out/sft/ckpt.pt", max_new_tokens=4))
    return speaker.asked


def interrupt():
    raise KeyboardInterrupt


def test_who_talks_to_an_assistant_is_remembered(monkeypatch, capsys):
    asked = talk_to(Memory(), monkeypatch, "AB", "CD")
    assert asked == [["AB"], ["AB", "1", "CD"]]
    said = capsys.readouterr().out
    assert "It remembers what fits its context of 24 tokens." in said and "forgotten" not in said


def test_turns_for_which_there_is_no_room_are_forgotten_and_it_is_said(monkeypatch, capsys):
    """Room is what the response leaves of the context; each of the first turns has 4 + 3 ids."""
    asked = talk_to(Memory(), monkeypatch, "ABC", "DEF", "GHI", "J", "KLM")
    assert asked == [
        ["ABC"],
        ["ABC", "1", "DEF"],
        ["ABC", "1", "DEF", "3", "GHI"],
        ["DEF", "3", "GHI", "5", "J"],
        ["GHI", "5", "J", "5", "KLM"],
    ]
    replies = capsys.readouterr().out.split("\n")[1:]
    note = "(the oldest turns no longer fit the context and are forgotten from now on)"
    assert replies == ["1", "3", "5", "5", note, "5", "", ""]  # once is enough


def test_a_line_that_is_too_long_is_not_answered_and_makes_nobody_forget(monkeypatch, capsys):
    asked = talk_to(Memory(), monkeypatch, "AB", "C" * 22, "D")
    assert asked == [["AB"], ["AB", "1", "D"]]
    said = capsys.readouterr().out
    assert "that is 24 tokens, and the context of sft has 24" in said and "forgotten" not in said


@pytest.mark.parametrize("seed", [0, 5])
def test_prompt_and_compare_answer_with_their_seed(chain, capsys, seed):
    speaker = talk.Speaker(chain / "sft" / "ckpt.pt")
    for how in ({"prompt": "Hi"}, {"compare": True}, {"prompt": "Hi", "compare": True}):
        asked = [how["prompt"]] if "prompt" in how else talk.SHOWN
        talk.main(talk.Config(out=str(chain), temperature=1.5, seed=seed, device="cpu", **how))
        said = capsys.readouterr().out
        if "compare" not in how:
            continue  # by the newest model, whichever that is
        for text in asked:
            (reply,) = speaker.answer([talk.question(text)], 48, seed, temperature=1.5)
            assert f"sft       {reply.text}" in said


def test_the_only_model_answers_a_prompt_with_its_seed(chain, capsys):
    path = chain / "sft" / "ckpt.pt"
    (reply,) = talk.Speaker(path).answer([talk.question("Hi")], 48, 5, temperature=1.5)
    talk.main(talk.Config(ckpt=str(path), prompt="Hi", temperature=1.5, seed=5, device="cpu"))
    assert capsys.readouterr().out.startswith(reply.text)


def test_a_base_model_takes_every_line_alone(monkeypatch, capsys):
    assert talk_to(Memory(is_base=True), monkeypatch, "AB", "CD") == [["AB"], ["CD"]]
    assert "It goes on with every line alone" in capsys.readouterr().out


def test_padding_stands_on_the_right():
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_a_document_is_opened_as_pretraining_opens_it(tokenizer):
    assert encode_opening(tokenizer, "Once") == [tokenizer.eot, *tokenizer.encode("Once")]


@pytest.mark.parametrize("n, size", [(1000, 32), (5, 8), (64, 64), (65, 64), (100, 64), (201, 2)])
def test_every_row_is_in_one_batch_and_no_batch_is_too_large_or_much_smaller(n, size):
    lengths = np.random.default_rng(0).integers(1, 50, n)
    batches = length_batches(lengths, size, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(n))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-n // size)  # as few as there can be


def test_every_epoch_has_other_batches():
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    epochs = [length_batches(lengths, 4, np.random.default_rng(i)) for i in range(2)]
    first, second = ({tuple(sorted(batch)) for batch in epoch} for epoch in epochs)
    assert len(first & second) < 25  # of 250


def test_every_epoch_has_other_batches_even_if_no_two_rows_have_the_same_length():
    epochs = [length_batches(np.arange(1000), 4, np.random.default_rng(i)) for i in range(2)]
    first, second = ({tuple(sorted(batch)) for batch in epoch} for epoch in epochs)
    assert len(first & second) < 25  # of 250


def test_rows_of_one_batch_are_neighbours_in_length():
    lengths = np.random.default_rng(0).permutation(100)  # one pool, and no two are equal
    batches = length_batches(lengths, 10, np.random.default_rng(1))
    ranges = sorted(sorted(lengths[i] for i in batch) for batch in batches)
    assert ranges == [list(range(10 * n, 10 * n + 10)) for n in range(10)]


def test_for_passes_without_gradients_rows_go_from_the_shortest_to_the_longest():
    lengths = [5, 1, 4, 1, 3, 9, 2]
    assert sorted_batches(lengths, size=3) == [[1, 3, 6], [4, 2, 0], [5]]
    assert [len(batch) for batch in sorted_batches([1] * 130)] == [64, 64, 2]


def test_batches_of_similar_length_waste_little_on_padding():
    lengths = np.random.default_rng(0).integers(10, 60, 5000)
    batches = length_batches(lengths, 48, np.random.default_rng(1))
    room = sum(len(batch) * lengths[batch].max() for batch in batches)
    used = sum(lengths[batch].sum() for batch in batches)
    assert 1 - used / room < 0.15
    mixed = np.random.default_rng(2).permutation(4992).reshape(-1, 48)  # without sorting:
    assert 1 - lengths[mixed].mean() / lengths[mixed].max(1).mean() > 0.3


def test_batches_come_in_random_order_of_length():
    lengths = np.arange(3000)
    order = [
        lengths[batch].mean() for batch in length_batches(lengths, 30, np.random.default_rng(0))
    ]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.3


class Letters:
    """A tokenizer for the tiny model, which has 50 ids: a letter for each, and end-of-turn is 5."""

    end, user, assistant = 5, 6, 7

    def encode(self, text):
        return [ord(letter) - 65 for letter in text]

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids if i not in (5, 6, 7))


def test_sampled_reply_says_whether_it_ended(tiny):
    replies = sample_replies(tiny, Letters(), [[1]] * 99, 6, seed=0)
    assert {reply.ended for reply in replies} == {True, False}
    assert all(reply.ended == (reply.ids[-1] == 5) for reply in replies)
    assert all(reply.text == Letters().decode(reply.ids) for reply in replies)
    torch.manual_seed(99)  # the global random state has no say
    assert sample_replies(tiny, Letters(), [[1]] * 99, 6, seed=0) == replies
    assert sample_replies(tiny, Letters(), [[1]] * 99, 6, seed=1) != replies


def test_replies_are_those_of_generate_with_these_settings(tiny):
    prompts = [[1, 2, 3], [4], [8, 9]]
    greedy, _ = generate(tiny, prompts, 6, temperature=0)
    for how in ({}, {"temperature": 0.5}, {"temperature": 0, "stop": greedy[0][2]}):
        replies = sample_replies(tiny, Letters(), prompts, 6, 3, top_k=20, **how)
        settings = dict(stop=5, generator=torch.Generator().manual_seed(3), top_k=20) | how
        expected = generate(tiny, prompts, 6, **settings)
        assert ([r.ids for r in replies], [r.logprobs for r in replies]) == expected


def test_a_prompt_that_fills_the_context_is_a_clear_error(tiny):
    sample_replies(tiny, Letters(), [[1] * 23], 6, seed=0)
    with pytest.raises(InputError, match="24 tokens leaves no room .* context of 24"):
        sample_replies(tiny, Letters(), [[1], [1] * 24], 6, seed=0)


def test_a_transcript_has_each_conversation_whole_and_one_response(tiny):
    before = [*question("AB"), {"role": "assistant", "content": "C"}]
    conversations = [question("KLM"), [*before, *question("NO")], question("P" * 30)]
    prompts = [[6, 10, 11, 12, 7], [6, 0, 1, 7, 2, 5, 6, 13, 14, 7]]
    first, second = sample_replies(tiny, Letters(), prompts, 8, seed=4)
    assert transcript(tiny, Letters(), conversations, 8, seed=4) == (
        f"> KLM\n{first.text}\n\n> AB / C / NO\n{second.text}\n\n"
        f"> {'P' * 30}\n(no room in the context for a response)\n\n"
    )
