"""Whole runs, computed once more: every weight, every number of the log, every sample.

Each script runs for a few steps, with hardly an option at its default. Then the same run is
computed by hand: by a slow and obvious version in this file, which reads one response at a time,
without padding, microbatches, a cache or a fused head, and writes out every loss. Both in float64,
so that rounding excuses nothing. It is `main` that is on trial: what it hands to the functions,
which rows it learns from, what it reports. The functions have tests of their own.
"""

import csv
import json
import math
import os
import random
import socket
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranks import replies_without_chance
from tiny_runs import SCRIPTS

import data.run
import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from data.chat import Reply, length_batches, sample_replies
from data.files import write_rows
from data.metrics import judge
from data.preferences import annotate
from data.tokenizer import BPETokenizer, train_bpe
from data.town.demonstrations import demonstrate, demonstrations
from data.town.documents import documents
from data.town.gold import exact_match, gold
from data.town.tasks import SHOWN, draw_tasks
from gpt import GPT, GPTConfig, ScalarModel, fingerprint, generate, load_model, save_checkpoint

CONTEXT = 76  # a few of the town's prompts do not fit
# Hardly an option is at its default: see `test_hardly_an_option_is_at_its_default`.
OPTIONS = {
    "pretrain": dict(
        documents=40,
        vocab_size=300,
        context=20,
        n_layer=2,
        n_head=2,
        n_embd=16,
        batch_size=5,
        microbatch=2,
        steps=3,
        optimizer="adamw",
        muon_lr=0.03,
        lr=5e-3,
        weight_decay=0.2,
        warmup=2,
        grad_clip=0.5,
        seed=3,
        eval_every=2,
    ),
    "sft": dict(
        demonstrations=36,
        tasks="one_sum:2,and_facts,summary",
        batch_size=9,
        microbatch=4,
        epochs=3,
        lr=3e-3,
        warmup=2,
        grad_clip=0.7,
        max_new_tokens=7,
        seed=4,
        eval_every=3,
    ),
    "rm": dict(
        n_layer=1,
        batch_size=20,
        microbatch=8,
        epochs=3,
        lr=4e-3,
        warmup=3,
        grad_clip=0.1,
        max_new_tokens=9,
        seed=6,
        eval_every=4,
    ),
    "ppo": dict(
        tasks="one_sum:2,and_facts,summary",
        iterations=3,
        rollouts=10,
        temperature=0.8,
        max_new_tokens=12,
        no_end_score=-1.3,
        reward="gold",
        beta=0.3,
        target_kl=0.6,
        gamma=0.9,
        lam=0.7,
        epochs=3,
        minibatch=4,  # 4, 3 and 3
        microbatch=3,
        clip=0.04,
        value_clip=0.03,
        entropy_bonus=0.05,
        lr=2e-3,
        critic_lr=2e-2,
        warmup=1,
        grad_clip=0.2,
        seed=5,
        eval_every=2,
    ),
    "dpo": dict(
        loss="cdpo",
        beta=0.3,
        label_smoothing=0.2,
        nll=0.3,
        batch_size=20,
        microbatch=8,
        epochs=2,
        lr=4e-3,
        warmup=3,
        grad_clip=0.4,
        max_new_tokens=9,
        seed=6,
        eval_every=4,
    ),
}


@pytest.fixture(autouse=True)
def plots(monkeypatch):
    """Models are made, and losses computed, in float64; curve.png is not drawn, but noted here."""
    drawn = []
    monkeypatch.setattr("data.run.plot", lambda *args: drawn.append(args))
    for where, name in ((ScalarModel, "forward"), (train_ppo, "full_kl")):  # float32 by themselves
        function = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, f=function: f(*args).double())
    torch.set_default_dtype(torch.float64)
    yield drawn
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def models(tokenizer, tmp_path):
    """A folder with random models, none of whose weights is near 0.

    base.pt and sft.pt have two layers, rm.pt has one. Some of their responses end.
    """
    torch.manual_seed(5)
    shape = tokenizer.n_vocab, CONTEXT
    gpt, reward_model = (
        kind(GPTConfig(*shape, n, 2, 16)) for kind, n in ((GPT, 2), (ScalarModel, 1))
    )
    with torch.no_grad():
        for parameter in (*gpt.parameters(), *reward_model.parameters()):
            parameter += 0.2 * torch.randn_like(parameter)
        reward_model.reward_mean.fill_(0.3)
        reward_model.reward_sd.fill_(1.7)
        for token, logit in ((tokenizer.end, 6), (tokenizer.eot, 4)):
            direction = gpt.wte.weight[token]
            gpt.ln_f.bias += logit * direction / direction.norm() ** 2
    for name, stage, model in (
        ("base", "pretrain", gpt),
        ("sft", "sft", gpt),
        ("rm", "rm", reward_model),
    ):
        weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
        parts = {"model": weights, "model_config": asdict(model.config)}
        parts |= {"stage": stage, "tokenizer": tokenizer.state}
        save_checkpoint(tmp_path / f"{name}.pt", parts)
    return tmp_path


def config(stage, out, **changes):
    options = {"out": str(out), "name": "mine", "device": "cpu", "bf16": False, **OPTIONS[stage]}
    options |= changes
    if options.get("data"):
        options.pop("tasks", None)  # of the town
    return SCRIPTS[stage].Config(**options)


def write(rows, path):
    write_rows(rows, path)
    return str(path)


def few(monkeypatch, stage, name, n):
    """Let a script draw n things at most. Returns the list of what it has asked for."""
    draw, asked = getattr(SCRIPTS[stage], name), []

    def draw_few(number, seed, *args, **how):
        asked.append((number, seed, *args, *how.values()))
        return draw(min(number, n), seed, *args, **how)

    monkeypatch.setattr(SCRIPTS[stage], name, draw_few)
    return asked


# ---------------------------------------------------------------------------------------------
# What the stages have in common


def last_tenth(rows):
    cut = len(rows) - len(rows) // 10
    return rows[:cut], rows[cut:]


def encoded(tokenizer, turns, opened=False):
    """Ids of what user and assistant say in turn; opened: the assistant has the word next."""
    ids = []
    for i, text in enumerate(turns):
        if i % 2 == 0:
            ids += [tokenizer.user, *tokenizer.encode(text)]
        else:
            ids += [tokenizer.assistant, *tokenizer.encode(text), tokenizer.end]
    return ids + [tokenizer.assistant] * opened


def learned_of(tokenizer, ids):
    """Positions of the tokens that the assistant says, its end of turn included."""
    positions, speaks = [], False
    for i, token in enumerate(ids):
        if speaks:
            positions.append(i)
        speaks = token != tokenizer.end and (speaks or token == tokenizer.assistant)
    return positions


def turns_of(task):
    return [message["content"] for message in task.messages]


def as_messages(turns):
    return [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(turns)]


def log_p(model, ids, temperature=1.0):
    """(T - 1, V): log-probability of every token after each of ids (T,) but the last."""
    logits = model(torch.tensor([ids[:-1]]))[0] @ model.wte.weight[: model.config.vocab_size].T
    return (logits / temperature).log_softmax(-1)


def logprobs_of(model, ids, positions):
    """log p of the tokens at some positions, each given all that stands before it."""
    rows = log_p(model, ids)
    return torch.stack([rows[i - 1, ids[i]] for i in positions])


def last(n, ids):
    return range(len(ids) - n, len(ids))


def score_of(model, ids):
    return model(torch.tensor([ids]))[0, -1]


def rate(step, steps, warmup, floor=0.0):
    """Linear up to 1 over the warmup, then linear down to the floor after the last step."""
    up, left = (step + 1) / warmup, (steps - step) / (steps - warmup)
    return min(up, floor + (1 - floor) * left, 1.0)


def clip(model, largest):
    """Shorten the gradient to its largest norm. Returns the norm that it had."""
    gradients = [p.grad for p in model.parameters()]
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
    for g in gradients:
        g *= min(1.0, largest / (norm + 1e-6))
    return norm


def take_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def adamw(model, eps=1e-8):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=eps, weight_decay=0.0)


def is_time(number, n_steps, cfg):
    """Whether there is an evaluation after this step."""
    return (number + 1) % cfg.eval_every == 0 or number + 1 == n_steps


def said(model, tokenizer, texts, cfg):
    """samples.txt: one response to each of these questions, or conversations that end with one."""
    conversations = [[text] if isinstance(text, str) else text for text in texts]
    prompts = [encoded(tokenizer, turns, opened=True) for turns in conversations]
    replies = sample_replies(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    pairs = zip(conversations, replies)
    return "".join(f"> {' / '.join(turns)}\n{reply.text}\n\n" for turns, reply in pairs)


def on_screen(log, cfg, unit, *columns):
    """What is printed after the first evaluation, up to the seconds."""
    row = log[cfg.eval_every - 1]
    numbers = "  ".join(f"{name.replace('_', ' ')} {row[name]:#.3g}" for name in columns)
    return f"{unit} {cfg.eval_every:5d}  {numbers}  "


def read_log(folder):
    """The rows of log.csv, without what is empty."""
    with open(folder / "log.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def assert_same_run(cfg, stage, plots, log, model, samples, cost, unit="step"):
    """What a run has left in its folder is what was computed by hand. Returns the last row."""
    folder = Path(cfg.out, "mine")
    rows = read_log(folder)
    for number, (row, expected) in enumerate(zip(rows, log, strict=True)):
        # float32 in some columns: the scores, and `kl_full`, a small difference of logarithms
        assert row == pytest.approx({"step": number, **expected}, rel=1e-5, abs=1e-9)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    assert checkpoint["model"].keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(checkpoint["model"][name], weight, rtol=0, atol=1e-8)
    assert checkpoint["stage"] == stage and checkpoint["model_config"] == asdict(model.config)
    assert checkpoint["train_config"] == asdict(cfg)
    said_there = (folder / "samples.txt").read_bytes().decode()  # "\r" would become "\n" as text
    assert said_there.replace(os.linesep, "\n") == samples
    measured = json.loads((folder / "cost.json").read_text())
    assert measured["forward_equivalents"] == pytest.approx(cost)
    drawn, panels, _, drawn_unit = plots[-1]
    assert (drawn, panels, drawn_unit) == (rows, SCRIPTS[stage].PANELS, unit)
    return rows[-1]


# ---------------------------------------------------------------------------------------------
# Pretraining


def pretraining_by_hand(cfg, model, tokenizer, texts, val_texts):
    """Train a model on these documents. Returns the log, and the number of tokens trained on."""
    ids, val = (
        [token for text in some for token in [tokenizer.eot, *tokenizer.encode(text)]]
        for some in (texts, val_texts)
    )

    def starts_of(ids):
        """Every document, and every `context` tokens inside it."""
        starts = []
        for i, token in enumerate(ids):
            if token == tokenizer.eot or i - starts[-1] == cfg.context:
                starts.append(i)
        return starts

    starts, val_starts = starts_of(ids), starts_of(val)
    starts = [i for i in starts if i + cfg.context < len(ids)]  # a whole row is left
    weights = dict(model.named_parameters())
    matrices = [p for name, p in weights.items() if name.startswith("h.") and p.ndim == 2]
    tables = [weights["wte.weight"], weights["wpe.weight"]]
    others = [p for p in weights.values() if p.ndim == 1]
    decay = dict(weight_decay=cfg.weight_decay)
    optimizers = [
        (torch.optim.AdamW(tables, betas=(0.9, 0.95), **decay), cfg.lr),
        (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), cfg.lr),
        (torch.optim.AdamW(matrices, betas=(0.9, 0.95), **decay), cfg.lr)
        if cfg.optimizer == "adamw"
        else (train_pretrain.Muon(matrices, lr=0.0, **decay), cfg.muon_lr),
    ]
    log = []
    for number in range(cfg.steps):
        rng = np.random.default_rng([cfg.seed, number])
        rows = [ids[i : i + cfg.context + 1] for i in rng.choice(starts, cfg.batch_size)]
        losses = torch.cat([-logprobs_of(model, row, range(1, len(row))) for row in rows])
        losses.mean().backward()
        log.append({"loss": losses.mean().item(), "grad_norm": clip(model, cfg.grad_clip)})
        for optimizer, lr in optimizers:
            take_step(optimizer, lr * rate(number, cfg.steps, cfg.warmup))
        if is_time(number, cfg.steps, cfg):
            total = 0.0
            for i, end in zip(val_starts, [*val_starts[1:], len(val)]):
                piece = val[i : end + 1]  # the token that opens the next document is predicted, too
                if len(piece) > 1:
                    total -= logprobs_of(model, piece, range(1, len(piece))).sum().item()
            n_bytes = sum(len(text.encode()) for text in val_texts)
            log[-1] |= {"val_loss": total / (len(val) - 1)}
            log[-1] |= {"bits_per_byte": total / math.log(2) / n_bytes}
    return log, len(ids)


@pytest.mark.parametrize("source", ["town", "documents", "one document", "other weights"])
def test_pretraining_is_what_it_is_by_hand(
    models, tokenizer, tmp_path, monkeypatch, capsys, plots, source
):
    cfg, drawn = config("pretrain", tmp_path), documents(44, 9)
    texts, val_texts = documents(40, 3), documents(60, "validation")
    openings = ["One morning, Mila", "Otto met Rosa at the lake.", "What is 4-2 and 3-1?"]
    if source == "documents":
        cfg.data, cfg.optimizer = str(tmp_path / "text.txt"), "muon"
        Path(cfg.data).write_text("<|endoftext|>".join(drawn), "utf-8")
        texts, val_texts = last_tenth(drawn)
        openings = [" ".join(text.split(" ")[:4]) for text in val_texts[:3]]
    elif source == "one document":
        cfg.data, text = str(tmp_path / "text.txt"), " ".join(drawn)
        Path(cfg.data).write_text(text, "utf-8")
        cut = len(text) * 9 // 10
        texts, val_texts = [text[:cut]], [text[cut:]]
        openings = [" ".join(val_texts[0].split(" ")[:4])]
    elif source == "other weights":
        cfg.init = f"{models}/base.pt"
    asked = few(monkeypatch, "pretrain", "documents", 60)
    result = train_pretrain.main(cfg)
    assert asked == ([] if cfg.data else [(40, 3), (1000, "validation")])
    if cfg.init:
        model, _ = load_model(cfg.init)
    else:
        tokenizer = BPETokenizer(train_bpe(" " + " ".join(texts), 300))
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(tokenizer.n_vocab, cfg.context, cfg.n_layer, cfg.n_head, cfg.n_embd))
    log, n_tokens = pretraining_by_hand(cfg, model, tokenizer, texts, val_texts)

    prompts = [[tokenizer.eot, *tokenizer.encode(text)][:10] for text in openings]
    how = dict(stop=tokenizer.eot, generator=torch.Generator().manual_seed(cfg.seed))
    replies, _ = generate(model, prompts, 60, **how)
    samples = [tokenizer.decode(prompt + reply) for prompt, reply in zip(prompts, replies)]
    samples = "\n\n".join(samples) + "\n"
    cost = 3 * cfg.steps * cfg.batch_size * cfg.context
    assert result == assert_same_run(cfg, "pretrain", plots, log, model, samples, cost)
    assert log[0]["grad_norm"] > cfg.grad_clip
    printed = capsys.readouterr().out
    assert on_screen(log, cfg, "step", "loss", "val_loss", "bits_per_byte") in printed
    n_weights = sum(p.numel() for p in model.parameters())
    assert (
        f"{n_weights:,} parameters, {tokenizer.n_vocab} tokens in the vocabulary, {n_tokens:,} in "
        f"the data, 100 a step, adamw{' and muon' * (cfg.optimizer == 'muon')}\n" in printed
    )


# ---------------------------------------------------------------------------------------------
# SFT


def sft_by_hand(cfg, rows, val_rows):
    """The model, the log, the batches and the cost of a run of SFT.

    rows: (ids, positions of the tokens that are learned) of every conversation.
    """
    model, _ = load_model(cfg.init)
    optimizer, log, cost, batches = adamw(model), [], 0, []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        batches += length_batches([len(ids) for ids, _ in rows], cfg.batch_size, rng)
    # Every token of every response counts the same, so all batches are divided by one number.
    n_tokens = cfg.epochs * sum(len(learned) for _, learned in rows) / len(batches)
    for number, batch in enumerate(batches):
        losses = torch.cat([-logprobs_of(model, *rows[i]) for i in batch])
        (losses.sum() / n_tokens).backward()
        log.append({"loss": losses.mean().item(), "grad_norm": clip(model, cfg.grad_clip)})
        take_step(optimizer, cfg.lr * rate(number, len(batches), cfg.warmup))
        cost += 3 * sum(len(rows[i][0]) for i in batch)
        if is_time(number, len(batches), cfg):
            with torch.no_grad():
                losses = torch.cat([-logprobs_of(model, *row) for row in val_rows])
            log[-1]["val_loss"] = losses.mean().item()
    return model, log, batches, cost


@pytest.mark.parametrize("source", ["town", "file"])
def test_sft_is_what_it_is_by_hand(models, tokenizer, monkeypatch, capsys, plots, source):
    cfg, shown = config("sft", models, init=f"{models}/base.pt"), SHOWN
    asked = few(monkeypatch, "sft", "demonstrations", 110)
    rows = demonstrations(36, cfg.seed, cfg.tasks)
    val_rows = demonstrations(110, "validation", cfg.tasks, split="test")
    talks, val_talks = (
        [[message["content"] for message in row["messages"]] for row in some]
        for some in (rows, val_rows)
    )
    if source == "file":  # where every third conversation has had an earlier turn
        talks = [["Hi!", "Hello."] * (i % 3 == 0) + turns for i, turns in enumerate(talks)]
        rows = [{"messages": as_messages(t)} for t in talks]
        cfg.data, cfg.tasks = write(rows, models / "rows.jsonl"), ""
    result = train_sft.main(cfg)
    town = [(36, cfg.seed, cfg.tasks), (500, "validation", cfg.tasks, "test")]
    assert asked == (town if source == "town" else [])

    def fitting(talks):
        pairs = [(encoded(tokenizer, turns), turns) for turns in talks]
        return [(ids, turns) for ids, turns in pairs if len(ids) <= CONTEXT]

    rows, val_rows = fitting(talks), fitting(val_talks)
    assert len(rows) < 30 and len(val_rows) > 64  # of which 64 are read at a time
    if source == "file":
        rows, val_rows = last_tenth(rows)
        shown = [turns[:-1] for _, turns in val_rows]
    rows, val_rows = (
        [(ids, learned_of(tokenizer, ids)) for ids, _ in some] for some in (rows, val_rows)
    )
    model, log, batches, cost = sft_by_hand(cfg, rows, val_rows)
    samples = said(model, tokenizer, shown, cfg)
    assert result == assert_same_run(cfg, "sft", plots, log, model, samples, cost)
    assert log[0]["grad_norm"] > cfg.grad_clip and len(log) > cfg.eval_every
    printed = capsys.readouterr().out
    assert on_screen(log, cfg, "step", "loss", "val_loss") in printed
    room = sum(len(batch) * max(len(rows[i][0]) for i in batch) for batch in batches)
    padding = 1 - cfg.epochs * sum(len(ids) for ids, _ in rows) / room
    said_first = (
        f"{len(rows)} conversations, {len(log)} steps of at most 9; {padding:.1%} of the batches"
    )
    assert f"{said_first} is padding. One, with [[what is learned]]:\n    " in printed
    shown = tokenizer.show(rows[0][0])
    shown = shown.replace("<|assistant|>", "<|assistant|>[[").replace("<|end|>", "<|end|>]]")
    assert f"\n    {shown}\n" in printed


# ---------------------------------------------------------------------------------------------
# Preferences: the reward model and DPO


def some_pairs(folder, with_gold=True):
    """A file of preferences between demonstrations; a few of them do not fit the context."""
    tasks = draw_tasks(90, "pairs", "one_sum:4,fact:2,and_facts:2,advice:2,harmful:2,summary")
    rng = random.Random(0)
    pairs = [tuple(Reply([], demonstrate(task, rng), True) for _ in "ab") for task in tasks]
    rows = annotate(tasks, pairs, tau=0.8, flip=0.0, seed=0)
    path = str(folder / "pairs.jsonl")
    write_rows(rows, path)
    for row in rows:
        row["turns"] = [message["content"] for message in row["messages"]]
    if with_gold:
        assert {len(row["turns"]) for row in rows} == {1, 3}
        return path, rows
    for row in rows:
        del row["gold"], row["p"], row["kind"]
    for row in rows[::3]:  # there has been an earlier turn
        row["turns"] = ["Hi!", "Hello.", *row["turns"]]
    messages = [as_messages(row["turns"]) for row in rows]
    sides = [{side: row[side] for side in ("chosen", "rejected")} for row in rows]
    return write([{"messages": m, **two} for m, two in zip(messages, sides)], path), rows


def encode_pairs(tokenizer, rows):
    """(rows to train on, rows held out), each with the ids of both sides, (chosen, rejected)."""
    for row in rows:
        talks = ([*row["turns"], row[side]] for side in ("chosen", "rejected"))
        row["sides"] = [encoded(tokenizer, turns) for turns in talks]
        row["n"] = [len(tokenizer.encode(row[side])) + 1 for side in ("chosen", "rejected")]
        row["longer"] = max(map(len, row["sides"]))
    fitting = [row for row in rows if row["longer"] <= CONTEXT]
    assert len(fitting) < len(rows)
    return last_tenth(fitting)


def batches_of(rows, cfg):
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        yield from length_batches([row["longer"] for row in rows], cfg.batch_size, rng)


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def share_right(margins):
    """How often a margin is above 0; a tie is half right."""
    return ((margins > 0).sum() + 0.5 * (margins == 0).sum()).item() / len(margins)


def reward_model_by_hand(cfg, tokenizer, rows, test_rows):
    """The reward model, its log, its cost and, in the end, its scores of held-out pairs."""
    sft, _ = load_model(cfg.init)
    model = ScalarModel.from_gpt(sft, cfg.n_layer)
    optimizer, log, cost = adamw(model), [], 0

    def scores_of(rows):
        """(2, N): of chosen and of rejected responses."""
        pairs = [torch.stack([score_of(model, ids) for ids in row["sides"]]) for row in rows]
        return torch.stack(pairs, 1)

    def describe(chosen, rejected):
        losses = -log_sigmoid(chosen - rejected)
        half_for_ties = 0.5 + 0.5 * (chosen - rejected).sign()
        return losses.mean(), half_for_ties.mean().item()

    batches = list(batches_of(rows, cfg))
    for number, batch in enumerate(batches):
        loss, accuracy = describe(*scores_of([rows[i] for i in batch]))
        loss.backward()
        norm = clip(model, cfg.grad_clip)
        log.append({"loss": loss.item(), "accuracy": accuracy, "grad_norm": norm})
        take_step(optimizer, cfg.lr * rate(number, len(batches), cfg.warmup))
        # Forward and backward passes of a model with half of the layers.
        cost += 3 / 2 * sum(len(ids) for i in batch for ids in rows[i]["sides"])
        if is_time(number, len(batches), cfg):
            with torch.no_grad():
                loss, log[-1]["val_accuracy"] = describe(*scores_of(test_rows))
                log[-1]["val_loss"] = loss.item()

    # Mean 0 and SD 1 on samples of the SFT model that have an end.
    prompts = [encoded(tokenizer, row["turns"], opened=True) for row in rows]
    replies = sample_replies(sft, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    ended = [prompt + reply.ids for prompt, reply in zip(prompts, replies) if reply.ended]
    assert 0 < len(ended) < len(prompts)
    with torch.no_grad():
        raw = torch.stack([score_of(model, ids) for ids in ended])
        model.reward_mean.fill_(raw.mean())
        model.reward_sd.fill_(raw.std(correction=0))
        return model, log, cost, scores_of(test_rows).numpy()


def flat(report, path=""):
    """A report with all its tables in one: {"by_task/fact/pairs": 3, ...}; None counts as 99."""
    numbers = {}
    for name, value in report.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{path}{name}/")
        else:
            numbers[path + name] = 99 if value is None else value
    return numbers


@pytest.mark.parametrize("with_gold", [True, False])
def test_the_reward_model_is_what_it_is_by_hand(
    models, tokenizer, monkeypatch, capsys, plots, with_gold
):
    path, rows = some_pairs(models, with_gold)
    cfg = config("rm", models, init=f"{models}/sft.pt", data=path)
    tables = []
    monkeypatch.setattr(train_rm, "plot_reliability", lambda *args: tables.append(args))
    result = train_rm.main(cfg)
    rows, test_rows = encode_pairs(tokenizer, rows)
    model, log, cost, (chosen, rejected) = reward_model_by_hand(cfg, tokenizer, rows, test_rows)
    report, table = judge(chosen, rejected, test_rows, model.reward_sd.item())
    samples = ""
    for row, c, r in zip(test_rows, chosen, rejected):
        samples += f"> {' / '.join(row['turns'])}\n{c:+.2f} chosen    {row['chosen']}\n"
        samples += f"{r:+.2f} rejected  {row['rejected']}\n\n"
    assert_same_run(cfg, "rm", plots, log, model, samples, cost)
    assert log[0]["grad_norm"] > cfg.grad_clip and len(log) % cfg.eval_every
    saved = torch.load(models / "mine" / "ckpt.pt", weights_only=True)["report"]
    for found in (result, saved, json.loads((models / "mine" / "report.json").read_text())):
        assert flat(found) == pytest.approx(flat(report), rel=1e-6)
    assert np.array(tables[0][0]) == pytest.approx(np.array(table), rel=1e-6)
    assert tables[0][1].name == "reliability.png"
    printed = capsys.readouterr().out
    assert on_screen(log, cfg, "step", "loss", "val_loss", "val_accuracy") in printed
    n, n_test = len(rows), len(test_rows)
    assert f"{n} pairs to train on, {n_test} held out, {len(log)} steps of at most 20\n" in printed
    numbers = "  ".join(f"{k} {v:.3f}" for k, v in report.items() if isinstance(v, float))
    assert f"{n_test} held-out pairs: {numbers}\n" in printed


def dpo_by_hand(cfg, tokenizer, rows, test_rows, prompts, tasks):
    """The model, the log and the cost of a run of DPO, which samples on these prompts.

    tasks: those of the prompts, if they are of the town.
    """
    (model, _), (ref, _) = load_model(cfg.init), load_model(cfg.init)
    optimizer, log = adamw(model), []
    cost = sum(len(ids) for row in rows + test_rows for ids in row["sides"])

    def both(row, model):
        """log p of the chosen and of the rejected response."""
        sides = zip(row["sides"], row["n"])
        return [logprobs_of(model, ids, last(n, ids)).sum() for ids, n in sides]

    def describe(row):
        """(4,): the loss of a pair, its margin, and the log-ratios of both sides."""
        chosen, rejected = both(row, model)
        with torch.no_grad():
            ref_chosen, ref_rejected = both(row, ref)
        if cfg.loss == "simpo":
            margin = cfg.beta * (chosen / row["n"][0] - rejected / row["n"][1])
            loss = -log_sigmoid(margin - cfg.simpo_margin)
        else:
            eps = cfg.label_smoothing
            margin = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
            loss = -(1 - eps) * log_sigmoid(margin) - eps * log_sigmoid(-margin)
        loss = loss - cfg.nll * chosen / row["n"][0]
        return torch.stack([loss, margin, chosen - ref_chosen, rejected - ref_rejected])

    batches = list(batches_of(rows, cfg))
    for number, batch in enumerate(batches):
        pairs = torch.stack([describe(rows[i]) for i in batch])  # (B, 4)
        pairs[:, 0].mean().backward()
        log.append(dict(zip(("loss", "margin", "chosen", "rejected"), pairs.mean(0).tolist())))
        log[-1]["accuracy"] = share_right(pairs[:, 1])
        log[-1]["grad_norm"] = clip(model, cfg.grad_clip)
        take_step(optimizer, cfg.lr * rate(number, len(batches), cfg.warmup))
        cost += 3 * sum(len(ids) for i in batch for ids in rows[i]["sides"])
        if is_time(number, len(batches), cfg):
            with torch.no_grad():
                pairs = torch.stack([describe(row) for row in test_rows])
                asked = [encoded(tokenizer, turns, opened=True) for turns in prompts]
                replies = sample_replies(model, tokenizer, asked, cfg.max_new_tokens, cfg.seed)
                kl = 0.0  # log pi - log pi_ref of what pi says
                for prompt, reply in zip(asked, replies):
                    where = prompt + reply.ids, last(len(reply.ids), prompt + reply.ids)
                    kl += (logprobs_of(model, *where) - logprobs_of(ref, *where)).sum().item()
            log[-1] |= dict(
                val_loss=pairs[:, 0].mean().item(),
                val_accuracy=share_right(pairs[:, 1]),
                kl=kl / len(prompts),
                length=np.mean([len(reply.ids) for reply in replies]),
                no_end=np.mean([not reply.ended for reply in replies]),
            )
            if tasks:
                golds = [gold(t, r.text, r.ended) for t, r in zip(tasks, replies)]
                log[-1]["gold"] = np.mean(golds)
    return model, log, cost


@pytest.mark.parametrize("loss, with_gold", [("cdpo", True), ("simpo", False)])
def test_dpo_is_what_it_is_by_hand(models, tokenizer, monkeypatch, capsys, plots, loss, with_gold):
    path, rows = some_pairs(models, with_gold)
    paths = dict(init=f"{models}/sft.pt", data=path)
    cfg = config("dpo", models, **paths, loss=loss, simpo_margin=0.3)
    asked = few(monkeypatch, "dpo", "draw_tasks", 24)
    result = train_dpo.main(cfg)
    assert asked == ([(150, "dpo", "test")] if with_gold else [])
    rows, test_rows = encode_pairs(tokenizer, rows)
    tasks = draw_tasks(24, "dpo", split="test") if with_gold else []
    prompts = [turns_of(task) for task in tasks] or [row["turns"] for row in test_rows]
    model, log, cost = dpo_by_hand(cfg, tokenizer, rows, test_rows, prompts, tasks)
    samples = said(model, tokenizer, SHOWN if with_gold else prompts[:8], cfg)
    if loss != "simpo":  # at step 0 all margins are 0 but for rounding: any accuracy will do
        log[0]["accuracy"] = plots[-1][0][0]["accuracy"]
    assert result == assert_same_run(cfg, "dpo", plots, log, model, samples, cost)
    assert log[0]["grad_norm"] > cfg.grad_clip and len(log) % cfg.eval_every
    assert (
        0 < log[3]["no_end"] < 1
        and log[-1]["kl"] > 0.01
        and any(0 < row["accuracy"] < 1 for row in log)
    )
    printed = capsys.readouterr().out
    columns = ["loss", "val_loss", "val_accuracy", "kl", "length", "no_end", *["gold"] * with_gold]
    assert on_screen(log, cfg, "step", *columns) in printed
    n, n_test = len(rows), len(test_rows)
    assert f"{n} pairs to train on, {n_test} held out, {len(log)} steps of at most 20\n" in printed


# ---------------------------------------------------------------------------------------------
# PPO


def ppo_by_hand(cfg, tokenizer, rows, test_rows, reward):
    """The policy, the log, the cost and what is shown of the greedy responses.

    rows: (prompt, ids, task or answer); reward: (ids, reply, task or answer) -> a number.
    """
    with_critic, group = cfg.advantage == "gae", cfg.group if cfg.advantage != "gae" else 1
    k, place = cfg.kl.split("-")
    estimate = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: (-x).exp() - 1 + x}[k]
    policy, ref = load_model(cfg.init)[0], load_model(cfg.init)[0]
    critic = ScalarModel.from_gpt(policy)
    if cfg.reward == "rm":
        critic, _ = load_model(cfg.rm, kind=ScalarModel)
    optimizers = [
        (policy, adamw(policy, 1e-5), cfg.lr),
        (critic, adamw(critic, 1e-5), cfg.critic_lr),
    ]
    log, cost, beta = [], 0, cfg.beta

    def score(ids, reply, about):
        number = reward(ids, reply, about) if reply.ended else cfg.no_end_score
        return float(np.float32(number))  # as main keeps it

    def golds(replies, abouts):
        if cfg.data:
            return {}
        pairs = list(zip(abouts, replies))
        return {
            "gold": np.mean([gold(task, reply.text, reply.ended) for task, reply in pairs]),
            "exact_match": np.mean([exact_match(task, reply.text) for task, reply in pairs]),
        }

    for iteration in range(cfg.iterations):
        # Roll out, and read what was said. The shortest come first.
        rng = np.random.default_rng([cfg.seed, iteration])
        prompts = rng.choice(len(rows), cfg.rollouts // group, replace=False)
        drawn = [rows[i] for i in prompts for _ in range(group)]
        how = cfg.max_new_tokens, int(rng.integers(2**31)), cfg.temperature
        replies = sample_replies(policy, tokenizer, [ids for _, ids, _ in drawn], *how)
        rollouts = []
        for number, ((_, prompt, about), reply) in enumerate(zip(drawn, replies)):
            ids, n = prompt + reply.ids, len(reply.ids)
            with torch.no_grad():
                p, q = (log_p(model, ids, cfg.temperature)[-n:] for model in (policy, ref))
                old, kept = (logp[torch.arange(n), torch.tensor(reply.ids)] for logp in (p, q))
                values = critic(torch.tensor([ids[:-1]]))[0, -n:]
            k1, r = old - kept, score(ids, reply, about)
            rewards = -beta * estimate(k1) if place == "reward" else torch.zeros(n)
            rewards[-1] += r
            # delta_t = R_t + gamma V_(t+1) - V_t; A_t is the sum of those from t on, discounted
            delta = rewards + cfg.gamma * torch.cat([values[1:], torch.zeros(1)]) - values
            discounts = (cfg.gamma * cfg.lam) ** torch.arange(n)
            advantages = torch.stack([(discounts[: n - t] * delta[t:]).sum() for t in range(n)])
            rollouts.append(
                dict(
                    ids=ids, n=n, reply=reply, about=about, score=r, group=number // group,
                    in_all=rewards.sum().item(), old=old, kept=kept, k1=k1,
                    entropy=-(p.exp() * p).sum(-1),
                    full=(p.exp() * (p - q)).sum().item(),
                    values=values, advantages=advantages, returns=advantages + values,
                )
            )  # fmt: skip
        rollouts.sort(key=lambda rollout: len(rollout["ids"]))

        def all_tokens(name, rollouts=rollouts):
            return torch.cat([rollout[name] for rollout in rollouts])

        mean, sd = all_tokens("advantages").mean(), all_tokens("advantages").std(correction=0)
        equal = 0
        for one in rollouts:
            one["whitened"] = (one["advantages"] - mean) / (sd**2 + 1e-8).sqrt()
            if not with_critic:  # in its place: how much better it is than others to its prompt
                others = [other for other in rollouts if other["group"] == one["group"]]
                earned = [other["in_all"] for other in others]
                if cfg.advantage == "rloo":
                    better = one["in_all"] - (sum(earned) - one["in_all"]) / (group - 1)
                else:
                    better = one["in_all"] - np.mean(earned)
                if cfg.advantage == "grpo":
                    better /= np.std(earned) + 1e-4
                one["whitened"] = torch.full((one["n"],), better)
                equal += len({other["score"] for other in others}) == 1

        # Update.
        measured = []
        for _ in range(cfg.epochs):
            order = rng.permutation(cfg.rollouts)
            # Minibatches of at most --minibatch, and as equal as can be.
            for some in np.array_split(order, math.ceil(cfg.rollouts / cfg.minibatch)):
                minibatch = [rollouts[i] for i in some]
                n_tokens = sum(rollout["n"] for rollout in minibatch)
                sums = np.zeros(4)
                for r in minibatch:
                    n = r["n"]
                    logp = log_p(policy, r["ids"], cfg.temperature)[-n:]
                    new = logp[torch.arange(n), torch.tensor(r["reply"].ids)]
                    ratio = (new - r["old"]).exp()
                    clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
                    policy_loss = torch.maximum(-r["whitened"] * ratio, -r["whitened"] * clipped)
                    policy_loss = policy_loss + cfg.entropy_bonus * (logp.exp() * logp).sum(-1)
                    if place == "loss":
                        policy_loss = policy_loss + beta * estimate(new - r["kept"])
                    values = critic(torch.tensor([r["ids"][:-1]]))[0, -n:]
                    moved = (values - r["values"]).clamp(-cfg.value_clip, cfg.value_clip)
                    errors = values - r["returns"], r["values"] + moved - r["returns"]
                    value_loss = torch.maximum(*(error**2 for error in errors)) / 2
                    total = policy_loss.sum() + (value_loss.sum() if with_critic else 0)
                    (total / n_tokens).backward()
                    k3 = (new - r["old"]).exp() - 1 - (new - r["old"])
                    outside = (ratio - 1).abs() > cfg.clip
                    parts = policy_loss, value_loss, k3, outside
                    sums += [part.sum().item() / n_tokens for part in parts]
                optimizers = optimizers if with_critic else optimizers[:1]
                norms = [clip(model, cfg.grad_clip) for model, *_ in optimizers]
                norms += [] if with_critic else [0.0]
                for _, optimizer, lr in optimizers:
                    take_step(
                        optimizer, lr * rate(iteration, cfg.iterations, cfg.warmup, floor=0.1)
                    )
                measured.append([*sums, *norms])

        # Report.
        returns, k1 = all_tokens("returns"), all_tokens("k1")
        left = returns - all_tokens("values")
        scores = np.array([rollout["score"] for rollout in rollouts])
        kls = np.array([rollout["k1"].sum() for rollout in rollouts])
        names = (
            "policy_loss value_loss approx_kl clipfrac policy_grad_norm critic_grad_norm".split()
        )
        log.append(
            dict(
                proxy=scores.mean(),
                score_sd=scores.std(),
                best_score=scores.max(),
                advantage_sd=all_tokens("whitened").std(correction=0).item(),
                **golds([r["reply"] for r in rollouts], [r["about"] for r in rollouts]),
                kl=kls.mean(),
                kl_k3=(torch.exp(-k1) - 1 + k1).sum().item() / cfg.rollouts,
                kl_full=np.mean([rollout["full"] for rollout in rollouts]),
                beta=beta,
                objective=(scores - beta * kls).mean(),
                entropy=all_tokens("entropy").mean().item(),
                length=np.mean([rollout["n"] for rollout in rollouts]),
                no_end=np.mean([not rollout["reply"].ended for rollout in rollouts]),
                **dict(zip(names, np.mean(measured, 0))),
                explained_variance=1 - (left.var(correction=0) / returns.var(correction=0)).item(),
                first_ratio_error=0.0,
            )
        )
        if not with_critic:
            log[-1]["equal_groups"] = equal / cfg.rollouts
            for name in ("value_loss", "critic_grad_norm", "explained_variance"):
                del log[-1][name]
        if cfg.target_kl:
            beta *= 1 + 0.1 * max(-0.2, min(kls.mean() / cfg.target_kl - 1, 0.2))
        # Sampling, old log-probabilities and updates of the policy; the reference; values and
        # updates of the critic; scores. The reward model, and a critic made of it, have one layer.
        passes = 1 + 1 + 3 * cfg.epochs + 1
        passes += (1 + 3 * cfg.epochs) + 1 if cfg.reward == "rm" else 2 * (1 + 3 * cfg.epochs)
        passes -= ((1 + 3 * cfg.epochs) + 1) / 2 if cfg.reward == "rm" else 1 + 3 * cfg.epochs
        if not with_critic:
            passes = 1 + 1 + 3 * cfg.epochs + 1 + (0.5 if cfg.reward == "rm" else 0)
        cost += passes * sum(len(rollout["ids"]) for rollout in rollouts)
        if is_time(iteration, cfg.iterations, cfg):
            prompts, abouts = [ids for _, ids, _ in test_rows], [about for *_, about in test_rows]
            replies = sample_replies(policy, tokenizer, prompts, cfg.max_new_tokens, 0, 0.0)
            parts = zip(prompts, replies, abouts)
            scores = [score(ids + reply.ids, reply, about) for ids, reply, about in parts]
            log[-1]["greedy_proxy"] = np.mean(scores)
            log[-1] |= {f"greedy_{k}": v for k, v in golds(replies, abouts).items()}
            shown = f"    > {test_rows[0][0]}\n    {replies[0].text}\n"
    return policy, log, cost, shown


@pytest.mark.parametrize(
    "reward, advantage, kl",
    [
        ("rm", "gae", "k1-reward"),
        ("gold", "gae", "k3-reward"),
        ("exact", "gae", "k2-loss"),
        ("rm", "rloo", "k1-reward"),
        ("gold", "grpo", "k3-loss"),
        ("gold", "dr_grpo", "k1-loss"),
    ],
    ids=["rm", "gold", "exact", "rloo", "grpo", "dr_grpo"],
)
def test_ppo_is_what_it_is_by_hand(
    models, tokenizer, monkeypatch, capsys, plots, reward, advantage, kl
):
    path = str(models / "rows.jsonl") if reward == "exact" else ""
    paths = dict(init=f"{models}/sft.pt", rm=f"{models}/rm.pt", data=path)
    group = 2 if advantage == "rloo" else 5
    cfg = config("ppo", models, **paths, reward=reward, advantage=advantage, kl=kl, group=group)
    cfg.target_kl = 0.0 if reward == "gold" else cfg.target_kl
    asked = few(monkeypatch, "ppo", "draw_tasks", 30)
    # Random models are never right: here an answer is right if it is as long as it should be.
    monkeypatch.setattr(train_ppo, "final_answer", lambda text: len(text) % 3)

    def encode(conversations, abouts):
        rows = [
            (turns[-1], encoded(tokenizer, turns, opened=True), about)
            for turns, about in zip(conversations, abouts)
        ]
        fitting = [row for row in rows if len(row[1]) <= CONTEXT - cfg.max_new_tokens]
        assert len(fitting) < len(rows)
        return fitting

    if reward == "exact":
        tasks = draw_tasks(34, "file", "summary,one_sum,fact,count")
        rows = [{"prompt": task.prompt, "response": task.case.answer} for task in tasks]
        write_rows(rows, path)
        rows = encode([[task.prompt] for task in tasks], [task.case.answer for task in tasks])
        rows, test_rows = last_tenth(rows)
        shown, town = [prompt for prompt, *_ in test_rows[:8]], []
    else:
        tasks = draw_tasks(30, f"ppo {cfg.seed}", cfg.tasks)
        tasks = tasks, draw_tasks(30, "ppo", cfg.tasks, split="test")
        rows, test_rows = (encode([turns_of(task) for task in some], some) for some in tasks)
        town = [(3 * 10, f"ppo {cfg.seed}", cfg.tasks), (150, "ppo", cfg.tasks, "test")]
        shown = SHOWN
    judge, _ = load_model(cfg.rm, kind=ScalarModel)
    rewards = {
        "rm": lambda ids, reply, task: score_of(judge, ids).item(),
        "gold": lambda ids, reply, task: gold(task, reply.text),
        "exact": lambda ids, reply, answer: float(len(reply.text) % 3 == len(answer) % 3),
    }
    result = train_ppo.main(cfg)
    assert asked == town
    by_hand = ppo_by_hand(cfg, tokenizer, rows, test_rows, rewards[reward])
    policy, log, cost, greedy = by_hand
    sft, _ = load_model(cfg.init)
    samples = said(policy, tokenizer, shown, cfg) + "BEFORE, the model that this one was trained "
    samples += "from:\n\n" + said(sft, tokenizer, shown, cfg)
    last = assert_same_run(cfg, "ppo", plots, log, policy, samples, cost, "iteration")
    assert result == last
    for row in log[1:]:  # all that could be zero, or the same everywhere, is not
        assert 0 < row["clipfrac"] < 1 and row["kl_full"] > 1e-3
    assert any(0 < row["no_end"] < 1 for row in log[1:])
    assert log[0]["policy_grad_norm"] > cfg.grad_clip  # clipped
    assert log[0].get("critic_grad_norm", 1) > cfg.grad_clip
    first, second, third = (row["beta"] for row in log)
    if (reward, advantage) == ("rm", "gae"):  # first by as much as is allowed, then by less
        assert second == pytest.approx(0.98 * first) and 0 < abs(third / second - 1) < 0.019
        assert log[1]["greedy_proxy"] != log[2]["greedy_proxy"]  # greedy replies change, too
    if reward == "gold":
        assert first == second == third == cfg.beta
    printed = capsys.readouterr().out
    columns = "proxy gold kl length no_end greedy_proxy greedy_gold".split()
    columns = [name for name in columns if name in log[1]]
    assert on_screen(log, cfg, "iteration", *columns) in printed and greedy in printed


# ---------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_an_epoch_of_steps_asks_for_what_one_step_over_all_rows_would(
    models, tokenizer, monkeypatch, stage
):
    """A token of a response, or a pair, counts the same in whatever batch it is: with a model that
    stays where it is, the gradients of an epoch have the same mean, whatever the batches."""
    if stage == "sft":
        tasks = draw_tasks(40, "rows", "one_sum,fact,passage")  # short and long ones
        rows = [{"prompt": task.prompt, "response": task.case.answer} for task in tasks]
    else:  # of pairs, all batches have to be equal: 24 are left to learn from
        rows = encode_pairs(tokenizer, some_pairs(models)[1])[0][:26]
        rows = [{name: row[name] for name in ("messages", "chosen", "rejected")} for row in rows]
    path = write(rows, models / "rows.jsonl")
    cfg = config(stage, models, init=f"{models}/sft.pt", data=path, lr=0.0, grad_clip=0.0)
    cfg.epochs, cfg.eval_every, cfg.max_new_tokens = 1, 99, 1
    gradients = []

    def noted(optimizers, _):
        parts = [p for group in optimizers[0].param_groups for p in group["params"]]
        gradients.append([0 * p if p.grad is None else p.grad.clone() for p in parts])
        optimizers[0].zero_grad()

    monkeypatch.setattr(SCRIPTS[stage], "step_optimizers", noted)
    means = []
    for cfg.batch_size, cfg.microbatch in ((24, 0), (8, 3), (4, 0)):
        gradients.clear()
        SCRIPTS[stage].main(cfg)
        means.append([torch.stack(parts).mean(0) for parts in zip(*gradients)])
    for mean in means[1:]:
        for part, expected in zip(mean, means[0], strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# Two processes


def on_two_processes(stage, cfg):
    """Run a stage on two copies of this process, as torchrun would on two of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os.environ |= {**where, "RANK": str(rank), "WORLD_SIZE": "2"}
                for module in (data.run, *SCRIPTS.values()):
                    for name, value in {"RANK": rank, "WORLD": 2}.items():
                        if hasattr(module, name):
                            setattr(module, name, value)
                SCRIPTS[stage].main(cfg)
                torch.distributed.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0, "see what it has printed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_learn_and_log_what_one_does(models, monkeypatch, stage):
    """With microbatches, and with batches that cannot be shared equally."""
    drawn = {"pretrain": "documents", "sft": "demonstrations", "ppo": "draw_tasks"}.get(stage)
    if drawn:
        few(monkeypatch, stage, drawn, 30)
    paths = dict(init=f"{models}/base.pt") if stage == "sft" else {}
    if stage in ("rm", "dpo"):
        paths = dict(init=f"{models}/sft.pt", data=some_pairs(models, with_gold=False)[0])
    if stage == "ppo":
        paths = dict(init=f"{models}/sft.pt", rm=f"{models}/rm.pt", reward="rm", rollouts=9)
        # Two processes would sample other responses than one does.
        monkeypatch.setattr(train_ppo, "sample_replies", replies_without_chance)
    cfg = config(stage, models, **paths)
    SCRIPTS[stage].main(cfg)
    os.rename(models / "mine", models / "one")
    on_two_processes(stage, cfg)
    one, two = (torch.load(models / x / "ckpt.pt", weights_only=True) for x in ("one", "mine"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=0, atol=1e-7)
    one, two = (read_log(models / x) for x in ("one", "mine"))
    if stage == "dpo":  # at step 0 all margins are 0 but for rounding: any accuracy will do
        one[0]["accuracy"] = two[0]["accuracy"]
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)
    costs = [(models / x / "cost.json").read_text() for x in ("one", "mine")]
    assert len({json.loads(cost)["forward_equivalents"] for cost in costs}) == 1


# ---------------------------------------------------------------------------------------------
# Options


def test_hardly_an_option_is_at_its_default():
    """For those that are, a constant in place of cfg.x would be noticed by other tests only."""
    everywhere = {"threads", "recompute", "compile", "save_every", "resume", "check"}
    named = {
        "pretrain": {"init", "data", "tokenizer", "bf16"},
        "sft": {"init", "data"},
        "rm": {"init", "data"},
        # the test by hand sets the last three
        "ppo": {"init", "data", "rm", "bf16", "kl", "advantage", "group"},
        "dpo": {"init", "data", "simpo_margin"},
    }
    for stage, script in SCRIPTS.items():
        default, cfg = asdict(script.Config()), asdict(config(stage, "here"))
        same = {name for name in default if cfg[name] == default[name]}
        assert same == everywhere | named[stage], stage


DEFAULTS = {
    "pretrain": dict(
        documents=30000, tokenizer="bpe", vocab_size=1152, context=96, n_layer=3, n_head=4,
        n_embd=128, batch_size=32, steps=750, optimizer="muon", muon_lr=0.04, lr=8e-3,
        weight_decay=0.1, warmup=20, grad_clip=1.0, eval_every=100, save_every=100,
    ),
    "sft": dict(
        demonstrations=32000, batch_size=48, epochs=2, lr=2e-3, warmup=20, grad_clip=1.0,
        max_new_tokens=48, eval_every=200, save_every=200,
    ),
    "rm": dict(
        batch_size=64, epochs=2, lr=5e-4, warmup=20, grad_clip=1.0, max_new_tokens=48,
        eval_every=50, save_every=100,
    ),
    "ppo": dict(
        iterations=26, rollouts=128, temperature=1.0, max_new_tokens=48, no_end_score=-2.0,
        reward="rm", beta=0.25, kl="k1-reward", advantage="gae", group=8, gamma=1.0, lam=0.95,
        epochs=2, minibatch=64, microbatch=16,
        clip=0.2, value_clip=0.2, lr=3e-4, critic_lr=1e-3, warmup=2, grad_clip=1.0,
        eval_every=10, save_every=10,
    ),
    "dpo": dict(
        loss="dpo", beta=0.4, label_smoothing=0.1, simpo_margin=0.5, batch_size=64, epochs=1,
        lr=1.5e-4, warmup=10, grad_clip=1.0, max_new_tokens=48, eval_every=50, save_every=200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", SCRIPTS)
def test_defaults_are_those_that_all_published_numbers_were_measured_with(stage):
    """Tables, pictures and the bands of --check: whoever changes a default makes them again."""
    defaults = asdict(SCRIPTS[stage].Config())
    numbers = {name: value for name, value in defaults.items() if value}
    assert numbers == {"device": "auto", "out": "out", **DEFAULTS[stage]}


class Enough(Exception):
    """Nothing after this matters to the test."""


def begin(stage, cfg, monkeypatch):
    """Run a stage up to its first step. Returns what that would train, and from what."""
    given = []

    def steps(self, total, model, tokenizer, made_from, **others):
        given.append((total, made_from, others))
        raise Enough

    monkeypatch.setattr("data.run.Run.steps", steps)
    with pytest.raises(Enough):
        SCRIPTS[stage].main(cfg)
    return given[0]


def test_a_fingerprint_is_of_names_types_shapes_and_numbers_but_not_of_their_order():
    x, y = torch.arange(6, dtype=torch.float32).view(2, 3), torch.ones(2)
    same = [{"x": x, "y": y}, {"y": y, "x": x}]
    other = [{"x": y, "y": x}, {"x": x.view(3, 2), "y": y}, {"x": x.view(torch.int32), "y": y}]
    other += [{"x": x + torch.tensor([0, 0, 1e-6]), "y": y}, {"x": x}, {"x": x, "z": y}]
    assert len({fingerprint(thing) for thing in same}) == 1
    assert len({fingerprint(thing) for thing in same + other}) == 1 + len(other)
    a = np.arange(6, dtype=np.uint16)
    assert len({fingerprint(b) for b in (a, a.copy(), a.reshape(2, 3), a.astype(np.uint32))}) == 3
    assert fingerprint(a, a) != fingerprint(a) != fingerprint(a[::-1])
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint("a")


FIELDS = {  # of the rows that a stage reads
    "pretrain": ["text"],
    "sft": ["prompt", "response"],
    "rm": ["prompt", "chosen", "rejected"],
    "ppo": ["prompt", "response"],
    "dpo": ["prompt", "chosen", "rejected"],
}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_run_knows_every_row_that_it_was_made_from(models, monkeypatch, stage):
    """To learn from or to be measured on: --resume compares, and without that could not notice."""
    paths = dict(init=f"{models}/sft.pt", data=f"{models}/rows.jsonl")
    paths |= dict(rm=f"{models}/rm.pt", reward="rm") if stage == "ppo" else {}
    rows = [{name: f"{name} number {i}" for name in FIELDS[stage]} for i in range(20)]

    def made_from(rows):
        write_rows(rows, paths["data"])
        return begin(stage, config(stage, models, **paths), monkeypatch)[1]

    before = made_from(rows)
    assert before == made_from(rows)
    assert before["init"] == load_model(paths["init"])[1]["fingerprint"]
    if stage == "ppo":
        assert before["rm"] == load_model(paths["rm"], kind=ScalarModel)[1]["fingerprint"]
    for changed in (3, -1):  # one to learn from, one that is held out
        for name in FIELDS[stage]:
            others = [dict(row) for row in rows]
            others[changed][name] += "!"
            assert made_from(others) == {**before, "data": made_from(others)["data"]}
            assert made_from(others)["data"] != before["data"], (changed, name)


@pytest.mark.parametrize(
    "stage, expected",
    [
        ("pretrain", ["GPT learns"]),
        ("sft", ["GPT learns"]),
        ("rm", ["GPT learns", "ScalarModel learns"]),  # the SFT model only speaks, after training
        ("ppo", ["GPT frozen", "GPT learns", "ScalarModel frozen", "ScalarModel learns"]),
        ("dpo", ["GPT learns", "GPT learns"]),  # the reference speaks without gradients
    ],
)
def test_every_model_of_a_stage_obeys_the_options_of_speed(models, monkeypatch, stage, expected):
    paths = dict(init=f"{models}/base.pt") if stage in ("pretrain", "sft") else {}
    if stage in ("rm", "ppo", "dpo"):
        paths = dict(init=f"{models}/sft.pt", data=some_pairs(models)[0])
    paths |= dict(rm=f"{models}/rm.pt", reward="rm") if stage == "ppo" else {}
    cfg, started, found = config(stage, models, **paths), [], []

    def set_speed(given, *models):
        assert given == cfg
        for model in models:
            learns = all(p.requires_grad for p in model.parameters())
            found.append(f"{type(model).__name__} {'learns' if learns else 'frozen'}")

    start = SCRIPTS[stage].start
    monkeypatch.setattr(SCRIPTS[stage], "start", lambda cfg: started.append(cfg) or start(cfg))
    monkeypatch.setattr(SCRIPTS[stage], "set_speed", set_speed)
    begin(stage, cfg, monkeypatch)
    assert sorted(found) == expected and started == [cfg]
