"""Stage 2 of 5: supervised fine-tuning (SFT). The model learns to answer, many tasks at once.

    loss = - mean over the tokens of all responses of log p(token | conversation so far)

    trained  the pretrained GPT                              frozen  nothing
    reads    out/pretrain/ckpt.pt, demonstrations of the town (or --data rows.jsonl)
    writes   out/sft/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_sft.py
    expect   1.5 minutes on two cores; validation loss 0.27 nats per token of a response

The loss covers only the response, end-of-turn included: the prompt is the user's business, and a
model that never sees an end never stops. Demonstrators are mostly good, but some of what they write
is wrong, rude or rambling, and SFT imitates it all. Telling good from bad is left to later stages.

References: Wei et al. 2021 (FLAN: many tasks as instructions), Ouyang et al. 2022 (InstructGPT,
section 3.5). Differs from them in: size, data, loss averaged over tokens rather than responses.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from data.chat import encode_chat, length_batches, pad, question, transcript
from data.files import held_out, keep_fitting, read_conversations
from data.gpt2 import load_init
from data.run import (
    WORLD,
    Run,
    average_gradients,
    lr_at,
    mean_over_ranks,
    microbatches,
    run_script,
    set_speed,
    shard,
    start,
    step_optimizers,
)
from data.tokenizer import load_tokenizer
from data.town.demonstrations import demonstrations
from data.town.tasks import SHOWN
from gpt import fingerprint
from kernels import linear_cross_entropy


@dataclass
class Config:
    # data
    init: str = ""  # checkpoint to start from ("" = out/pretrain/ckpt.pt)
    data: str = ""  # JSON or JSONL with conversations ("" = demonstrations of the town)
    demonstrations: int = 32000  # how many responses demonstrators of the town write
    tasks: str = ""  # mixture of kinds, like story:3,one_sum ("" = all, equally)
    # optimisation
    batch_size: int = 48  # conversations per step
    microbatch: int = 0  # conversations per forward pass; gradients add up to the batch (0 = all)
    epochs: int = 2  # passes over the data
    lr: float = 2e-3  # peak learning rate (AdamW)
    warmup: int = 20  # steps until the peak (0 = none)
    grad_clip: float = 1.0  # largest norm of the gradient (0 = off)
    # run
    max_new_tokens: int = 48  # longest response among the samples
    seed: int = 0  # everything random follows from it
    eval_every: int = 200  # steps between validations
    save_every: int = 200  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    bf16: bool | None = None  # multiply in bfloat16; weights stay float32 (None = where it is fast)
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs
    name: str = ""  # of this run, which writes to out/<name> ("" = sft)
    resume: bool = False  # continue an interrupted run
    check: bool = False  # compare the curves with those of reference runs (data/check.py)

    def __post_init__(self):
        if self.data and self.tasks:
            raise ValueError("--tasks are those of the town: with --data there are none")

    def resolved(self) -> "Config":
        """The same with the paths that "" stands for."""
        return replace(self, init=self.init or f"{self.out}/pretrain/ckpt.pt")


def sft_loss(model, tokens: torch.Tensor, mask: torch.Tensor, reduction="mean") -> torch.Tensor:
    """Cross-entropy of the tokens (B, T) int64 that mask (B, T) bool marks -> scalar, in nats."""
    hidden = model(tokens[:, :-1])  # (B, T - 1, C): after reading token t ...
    target, learned = tokens[:, 1:], mask[:, 1:]  # ... predict token t + 1, if the response has it
    # Prompt and padding are dropped before the head, where most of the arithmetic is.
    return linear_cross_entropy(hidden[learned], model.head, target[learned], reduction=reduction)


def show_mask(tokenizer, row: dict) -> str:
    """A conversation as text, with [[what is learned]] in brackets."""
    text = ""
    for learned, group in groupby(zip(row["mask"], row["ids"]), key=lambda pair: pair[0]):
        piece = tokenizer.show([token for _, token in group])
        text += f"[[{piece}]]" if learned else piece
    return text


PANELS = {  # of curve.png: what a panel shows -> columns of log.csv
    "loss, nats per token of a response": ["loss", "val_loss"],
    "norm of the gradient": ["grad_norm"],
}


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    cfg = cfg.resolved()
    device = start(cfg)
    run = Run("sft", cfg, PANELS)

    # ---- model
    model, checkpoint = load_init(cfg.init, device)
    model.train()
    set_speed(cfg, model)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # ---- data
    def encode(rows: list[dict]) -> list[dict]:
        for row in rows:
            row["ids"], row["mask"] = encode_chat(tokenizer, row["messages"])
        return keep_fitting(rows, [len(row["ids"]) for row in rows], model.config.context)

    if cfg.data:
        rows, val_rows = held_out(encode(read_conversations(cfg.data)))
    else:
        rows = encode(demonstrations(cfg.demonstrations, cfg.seed, cfg.tasks))
        val_rows = encode(demonstrations(500, "validation", cfg.tasks, split="test"))

    lengths = [len(row["ids"]) for row in rows]
    batches = []
    for epoch in range(cfg.epochs):
        batches += length_batches(lengths, cfg.batch_size, np.random.default_rng([cfg.seed, epoch]))
    # The summed loss of every batch is divided by the same number. Divided by its own count, a
    # token in a batch of short responses would weigh more. (WORLD processes, 1 without torchrun,
    # share a batch, and average_gradients takes the mean over them: each divides by its share.)
    tokens_per_batch = cfg.epochs * sum(sum(row["mask"]) for row in rows) / len(batches)
    tokens_per_rank = tokens_per_batch / WORLD
    used = cfg.epochs * sum(lengths)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    print(
        f"{len(rows):,} conversations, {len(batches)} steps of at most {cfg.batch_size}; "
        f"{1 - used / padded:.1%} of the batches is padding. One, with [[what is learned]]:\n"
        f"    {show_mask(tokenizer, rows[0])}"
    )

    def tensors(batch: list[dict]):
        tokens = pad([row["ids"] for row in batch], tokenizer.pad)  # (B, T)
        mask = pad([row["mask"] for row in batch], 0).bool()  # (B, T)
        assert mask.any(1).all(), "a row without a supervised token teaches nothing"
        return tokens.to(device), mask.to(device)

    # ---- training
    data = fingerprint(len(rows), *([row["ids"], row["mask"]] for row in rows + val_rows))
    made_from = {"init": checkpoint["fingerprint"], "data": data}
    for step in run.steps(len(batches), model, tokenizer, made_from, optimizer=optimizer):
        batch = [rows[i] for i in batches[step]]
        loss = n_tokens = 0.0
        for microbatch in microbatches(shard(batch), cfg.microbatch):
            tokens, mask = tensors(microbatch)
            microbatch_loss = sft_loss(model, tokens, mask, reduction="sum")
            (microbatch_loss / tokens_per_rank).backward()  # adds to the gradients that are there
            loss += microbatch_loss.item()
            n_tokens += mask.sum().item()
        grad_norm = average_gradients(model, cfg.grad_clip)
        per_rank = mean_over_ranks(device, loss=loss, n_tokens=n_tokens)
        # In the log, the mean over the tokens of this batch.
        run.log(step, loss=per_rank["loss"] / per_rank["n_tokens"], grad_norm=grad_norm)
        step_optimizers([optimizer], lr_at(step, len(batches), cfg.warmup))
        run.count(sum(len(row["ids"]) for row in batch), passes=3)  # forward 1, backward 2

        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(batches):
            total = n_tokens = 0
            with torch.no_grad():
                for some_rows in microbatches(val_rows, 64):
                    tokens, mask = tensors(some_rows)
                    total += sft_loss(model, tokens, mask, reduction="sum").item()
                    n_tokens += mask.sum().item()
            run.log(step, val_loss=total / n_tokens)
            run.report(step, "loss", "val_loss")

    # ---- results: what it says to some prompts
    file_prompts = [row["messages"][:-1] for row in val_rows[:8]]
    shown = file_prompts if cfg.data else [question(text) for text in SHOWN]
    run.finish(model, transcript(model, tokenizer, shown, cfg.max_new_tokens, cfg.seed))
    return run.rows[-1]


if __name__ == "__main__":
    run_script(main, Config)
