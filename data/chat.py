"""The chat format: messages -> token ids and loss mask, always made together; and batches of them.

    <|user|>What is 4-2?<|assistant|>4-2 is 2.<|end|>
    0       0  0  0 0   0            1 1 1 1 11          mask: what the assistant must learn to say

A conversation is a list of {"role": ..., "content": ...}: an optional "system" message, then "user"
and "assistant" in turns. Text is encoded as ordinary characters, so a message that spells out
"<|end|>" cannot end anything. The end-of-turn token is part of the reply: a model that is never
trained on it never learns to stop.
"""

from typing import NamedTuple

import numpy as np
import torch

from gpt import GPT, generate


def question(text: str) -> list[dict]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Ids of messages up to the point where the assistant speaks: [...][USER] text [ASSISTANT]."""
    ids, _ = encode_chat(tokenizer, messages)
    return ids + [tokenizer.assistant]


def encode_opening(tokenizer, text: str) -> list[int]:
    """Ids of text as the opening of a document: how to ask a base model, which knows no chat."""
    return [tokenizer.eot] + tokenizer.encode(text)


def encode_reply(tokenizer, text: str) -> list[int]:
    """Ids of a finished reply: text [END]."""
    return tokenizer.encode(text) + [tokenizer.end]


def encode_chat(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and its mask: 1 for every token that the assistant produces."""
    ids, mask = [], []

    def add(new, supervised):
        ids.extend(new)
        mask.extend([supervised] * len(new))

    system = ""
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "system":
            system = text + "\n\n"  # goes in front of the next user message
        elif role == "user":
            add([tokenizer.user] + tokenizer.encode(system + text), 0)
            system = ""
        else:
            add([tokenizer.assistant], 0)
            add(encode_reply(tokenizer, text), 1)
    return ids, mask


def pad(rows: list[list], value) -> torch.Tensor:
    """Lists of different length -> one tensor (B, longest), filled up with value on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def length_batches(
    lengths: list[int], batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch of batches (index arrays) whose rows have similar length, in random order.

    Rows are shuffled, sorted by length within pools of 50 batches, and cut; then the batches are
    shuffled. Padding a batch to its longest row then wastes little, and rows still meet different
    neighbours every epoch. An incomplete last batch is dropped, unless it is the only one.
    """
    order = rng.permutation(len(lengths))
    pool = 50 * batch_size
    lengths = np.asarray(lengths)
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return [batches[i] for i in rng.permutation(len(batches))]


class Reply(NamedTuple):
    """What a model said."""

    ids: list[int]  # token ids, the token that ended it included
    text: str
    ended: bool  # by itself, not for want of room


def sample_replies(
    model: GPT,
    tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
    temperature=1.0,
    stop: int | None = None,
    **how,
) -> list[Reply]:
    """Let a model answer encoded prompts; temperature 0 is greedy; more of `generate`'s in how.

    stop: the token that ends a reply, if not end-of-turn (a base model ends with end-of-text).
    Exits with a message if a prompt leaves no room in the context.
    """
    longest, context = max(map(len, prompts)), model.config.context
    if longest >= context:
        raise SystemExit(
            f"a prompt of {longest} tokens leaves no room for a reply in the context of "
            f"{context}; pretrain with a larger --context"
        )
    stop = tokenizer.end if stop is None else stop
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    replies, _ = generate(
        model,
        prompts,
        max_new_tokens,
        stop=stop,
        temperature=temperature,
        generator=generator,
        **how,
    )
    return [Reply(ids, tokenizer.decode(ids), ids[-1] == stop) for ids in replies]


def transcript(model: GPT, tokenizer, conversations, max_new_tokens: int, seed: int) -> str:
    """Sampled replies to conversations, for people to read; none is picked."""
    prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
    replies = sample_replies(model, tokenizer, prompts, max_new_tokens, seed)
    pairs = zip(conversations, replies)
    return "".join(f"> {messages[-1]['content']}\n{reply.text}\n\n" for messages, reply in pairs)
