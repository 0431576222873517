"""The chat format: messages -> token ids and loss mask, always made together; and batches of them.

    <|user|> What is 4 - 2 ? <|assistant|> 4 - 2 is 2 . <|end|>
    0        0    0  0 0 0 0 0             1 1 1 1  1 1 1         mask: 1 = the assistant says it

(The picture leaves out the tokens that are a single space.)

A conversation is a list of {"role": ..., "content": ...}: an optional "system" message, then "user"
and "assistant" in turn. Text is encoded as ordinary characters, so a message that spells out
"<|end|>" ends nothing. The end-of-turn token is part of the response: a model that is never trained
on it never learns to stop.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from gpt import GPT, InputError, generate


def question(text: str) -> list[dict]:
    """The conversation that consists of one question: text -> [{"role": "user", ...}]."""
    return [{"role": "user", "content": text}]


def one_line(messages: list[dict]) -> str:
    """A conversation as people read it: "What is 7+1? / 7+1 is 8. / And 2 more?"."""
    return " / ".join(message["content"] for message in messages)


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a conversation up to where the assistant speaks: ... <|user|> text <|assistant|>."""
    ids, _ = encode_chat(tokenizer, messages)
    return ids + [tokenizer.assistant]


def recent(tokenizer, messages: list[dict], room: int) -> list[dict]:
    """The end of a conversation, its prompt at most room tokens long: whole turns, each a question
    and its answer, are dropped, oldest first. The last question stays, however long it is.

    messages: from user and assistant in turn, the first and the last from the user.
    """
    while len(messages) > 2 and len(encode_prompt(tokenizer, messages)) > room:
        messages = messages[2:]
    return messages


def encode_opening(tokenizer, text: str) -> list[int]:
    """Ids of the opening of a document: <|endoftext|> text.

    This is how to prompt a base model, which has never seen the chat format.
    """
    return [tokenizer.eot] + tokenizer.encode(text)


def encode_reply(tokenizer, text: str) -> list[int]:
    """Ids of a finished response: text <|end|>."""
    return tokenizer.encode(text) + [tokenizer.end]


def encode_chat(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its loss mask, both of length T.

    The mask is 1 for every token that the assistant produces, the end of its turn included. It is
    built along with the ids: a mask found afterwards by searching for markers goes wrong as soon as
    a text contains one.
    """
    ids, mask = [], []

    def add(new_ids, supervised):
        ids.extend(new_ids)
        mask.extend([supervised] * len(new_ids))

    system = ""
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "system":
            system = text + "\n\n"  # there is no system token: it opens the next user message
        elif role == "user":
            add([tokenizer.user] + tokenizer.encode(system + text), 0)
            system = ""
        else:
            add([tokenizer.assistant], 0)
            add(encode_reply(tokenizer, text), 1)
    return ids, mask


def pad(rows: list[list], value) -> torch.Tensor:
    """B lists of numbers -> a tensor (B, length of the longest), padded with value on the right.

    pad([[1, 2, 3], [4]], 9) -> [[1, 2, 3], [4, 9, 9]]. int64 from ints, float32 from floats.
    """
    longest = max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def length_batches(
    lengths: list[int], batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch of batches of rows of similar length, for training: arrays of row numbers.

    Padding a batch to its longest row wastes little if all its rows are about equally long. But if
    all rows were sorted, every epoch would have the same batches. So rows are shuffled, sorted by
    length within pools of 50 batches, and divided into batches, which are shuffled in turn. Every
    row is in one batch, and no batch is much smaller than the others: 100 rows in batches of at
    most 64 make two of 50.
    """
    order = rng.permutation(len(lengths))
    pool_size = 50 * batch_size
    lengths = np.asarray(lengths)
    pools = [order[i : i + pool_size] for i in range(0, len(order), pool_size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: list[int], size: int = 64) -> list[list[int]]:
    """All rows in batches of similar length, shortest first: lists of row numbers.

    For passes without gradients, where the order of rows does not matter: this one needs the least
    padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[first : first + size] for first in range(0, len(order), size)]


class Reply(NamedTuple):
    """A response that was sampled from a model."""

    ids: list[int]  # its tokens, including the one that ended it
    text: str  # without special tokens
    ended: bool  # False if it was cut off at max_new_tokens or at the end of the context
    logprobs: list[float] | tuple = ()  # of the ids, as the sampler had them


def sample_replies(
    model: GPT,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
    temperature=1.0,
    stop: int | None = None,
    **options,
) -> list[Reply]:
    """One response of a model to each encoded prompt, in the order of the prompts.

    seed: of the sampling, which leaves PyTorch's global generator alone. temperature: 0 is greedy.
    stop: the token that ends a response (None = end-of-turn; a base model stops at end-of-text).
    options: the other ones of `generate`. Raises InputError if a prompt fills the context.
    """
    longest, context = max(map(len, prompts), default=0), model.config.context
    if longest >= context:
        raise InputError(
            f"a prompt of {longest} tokens leaves no room for a response in a context of "
            f"{context}; pretrain with a larger --context"
        )
    stop = tokenizer.end if stop is None else stop
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    replies, logprobs = generate(
        model,
        prompts,
        max_new_tokens,
        stop=stop,
        temperature=temperature,
        generator=generator,
        **options,
    )
    return [
        Reply(ids, tokenizer.decode(ids), ids[-1] == stop, ids_logprobs)
        for ids, ids_logprobs in zip(replies, logprobs)
    ]


def transcript(model: GPT, tokenizer, conversations, max_new_tokens: int, seed: int) -> str:
    """One sampled response to each conversation, for samples.txt: none is cherry-picked.

    Each entry is the conversation, as in "> What is 4-2?", followed by the response. A conversation
    that fills the context gets none: after a training run that is no reason to fail.
    """
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    fits = [len(prompt) < model.config.context for prompt in prompts]
    fitting = [prompt for prompt, fit in zip(prompts, fits) if fit]
    replies = iter(sample_replies(model, tokenizer, fitting, max_new_tokens, seed))
    text = ""
    for messages, fit in zip(conversations, fits):
        response = next(replies).text if fit else "(no room in the context for a response)"
        text += f"> {one_line(messages)}\n{response}\n\n"
    return text
