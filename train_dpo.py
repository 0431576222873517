"""Stage 5 of 5: DPO. The model learns from preferences directly: no reward model, no sampling.

    h    = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)  (sums over the response)
    loss = - mean over pairs of log sigmoid(beta h)                      (Rafailov 2023, equation 7)

    trained  the SFT model                                   frozen  the SFT model, as reference
    reads    out/sft/ckpt.pt, out/preferences.jsonl (or --data pairs.jsonl)
    writes   out/dpo/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_dpo.py
    expect   1 minute on two cores; gold of samples from 0.2 to 0.8 SD, KL 1.0 nats per response

Why this is RLHF, in four lines:

    maximise   E[r(x, y)] - beta KL(pi || pi_ref)                what PPO does
    solution   pi(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)           (equation 4)
    so         r(x, y) = beta log(pi / pi_ref)(y|x) + beta log Z(x)       solved for r
    hence      r(chosen) - r(rejected) = beta h                  Z(x) cancels: same prompt

Put the last line into the loss of train_rm.py, and the policy is its own reward model.

In the log, `chosen` and `rejected` are log-ratios to the reference in nats, `margin` is beta h (or
with --loss simpo what that loss compares), and `accuracy` is how often it is above 0. Watch the
first two: the loss concerns only their difference, and usually both fall.

References: Rafailov et al. 2023; Azar et al. 2023 (IPO); Meng et al. 2024 (SimPO); Mitchell 2023
(cDPO); Pang et al. 2024 (+ NLL). Differs in: size; the reference reads the pairs once, before
training.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from data.chat import (
    encode_chat,
    encode_prompt,
    length_batches,
    pad,
    question,
    sample_replies,
    sorted_batches,
    transcript,
)
from data.files import held_out, keep_fitting
from data.gpt2 import load_init
from data.preferences import load_preferences
from data.run import (
    RANK,
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
    sum_over_ranks,
)
from data.tokenizer import load_tokenizer
from data.town.gold import gold
from data.town.tasks import SHOWN, draw_tasks
from gpt import InputError, fingerprint
from kernels import linear_logprobs


@dataclass
class Config:
    # data
    init: str = ""  # checkpoint to start from, also the reference ("" = out/sft/ckpt.pt)
    data: str = ""  # JSON or JSONL with preferences ("" = out/preferences.jsonl)
    # loss
    loss: str = "dpo"  # dpo, cdpo, ipo or simpo
    beta: float = 0.4  # strength of the KL term: small ones let the policy go far (SimPO: try 2)
    label_smoothing: float = 0.1  # cdpo: the fraction of labels that are thought to be wrong
    simpo_margin: float = 0.5  # simpo: gamma, the log-odds by which chosen should lead
    nll: float = 0.0  # weight of the mean negative log-likelihood of chosen, added to any loss
    # optimisation
    batch_size: int = 64  # pairs per step
    microbatch: int = 0  # pairs per forward pass; gradients add up to the batch (0 = all)
    epochs: int = 1  # passes over the data
    lr: float = 1.5e-4  # peak learning rate (AdamW)
    warmup: int = 10  # steps until the peak (0 = none)
    grad_clip: float = 1.0  # largest norm of the gradient (0 = off)
    # run
    max_new_tokens: int = 48  # longest response when sampling
    seed: int = 0  # everything random follows from it
    eval_every: int = 50  # steps between evaluations on samples
    save_every: int = 200  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    bf16: bool | None = None  # multiply in bfloat16; weights stay float32 (None = where it is fast)
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs
    name: str = ""  # of this run, which writes to out/<name> ("" = dpo)
    resume: bool = False  # continue an interrupted run
    check: bool = False  # compare the curves with those of reference runs (data/check.py)

    def __post_init__(self):
        if self.beta == 0:
            raise ValueError("--beta 0: preferences would count for nothing")
        if self.loss not in ("dpo", "cdpo", "ipo", "simpo"):
            raise ValueError(f"--loss {self.loss}: there are dpo, cdpo, ipo and simpo")

    def resolved(self) -> "Config":
        """The same with the paths that "" stands for."""
        return replace(
            self,
            init=self.init or f"{self.out}/sft/ckpt.pt",
            data=self.data or f"{self.out}/preferences.jsonl",
        )


def sequence_logprobs(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log p(response | prompt), a sum over the response: tokens, mask (B, T) -> (B,), in nats."""
    hidden = model(tokens[:, :-1])  # (B, T - 1, C): after reading token t ...
    target = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # ... token t + 1, if it counts
    logprobs = linear_logprobs(hidden.flatten(0, 1), model.head, target.flatten())
    return logprobs.view_as(target).sum(1)


def dpo_margin(logprobs, ref_logprobs, lengths, cfg) -> torch.Tensor:
    """How much higher the policy, read as its own reward model, scores chosen than rejected: (B,).

    logprobs and ref_logprobs (2, B) are sums over the chosen and the rejected response; lengths (2,
    B) count its tokens, end-of-turn included.
    """
    if cfg.loss == "simpo":  # Meng et al. 2024, equation 4: per token, and no reference
        return cfg.beta * (logprobs[0] / lengths[0] - logprobs[1] / lengths[1])
    chosen, rejected = logprobs - ref_logprobs
    return cfg.beta * (chosen - rejected)  # Rafailov et al. 2023: beta h


def dpo_loss(logprobs, ref_logprobs, lengths, cfg) -> torch.Tensor:
    """The loss of every pair, (B,). The arguments are those of `dpo_margin`."""
    margin, eps = dpo_margin(logprobs, ref_logprobs, lengths, cfg), cfg.label_smoothing
    if cfg.loss == "dpo":  # Rafailov et al. 2023, equation 7
        loss = -F.logsigmoid(margin)
    elif cfg.loss == "cdpo":  # Mitchell 2023: labels are wrong with probability eps
        loss = -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
    elif cfg.loss == "ipo":  # Azar et al. 2023, equation 17: a target, so h cannot run away
        h = margin / cfg.beta
        loss = (h - 1 / (2 * cfg.beta)) ** 2
    elif cfg.loss == "simpo":  # Meng et al. 2024, equation 6
        loss = -F.logsigmoid(margin - cfg.simpo_margin)
    # Pang et al. 2024: a term that keeps chosen from becoming unlikely
    return loss - cfg.nll * logprobs[0] / lengths[0]


PANELS = {  # of curve.png: what a panel shows -> columns of log.csv
    "loss per pair": ["loss", "val_loss"],
    "log-ratio to ref, nats per response": ["chosen", "rejected"],
    "fraction of pairs, of responses": ["accuracy", "no_end"],
    "KL from SFT, nats per response": ["kl"],
    "gold, SD of SFT samples": ["gold"],
}


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    cfg = cfg.resolved()
    device = start(cfg)
    run = Run("dpo", cfg, PANELS)

    # ---- models
    model, checkpoint = load_init(cfg.init, device)
    ref, _ = load_init(cfg.init, device)
    set_speed(cfg, model, ref)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # ---- data
    rows = load_preferences(cfg.data, checkpoint["fingerprint"])
    for row in rows:
        for side in ("chosen", "rejected"):
            response = [{"role": "assistant", "content": row[side]}]
            ids, mask = encode_chat(tokenizer, row["messages"] + response)
            # Answers to earlier questions, the same on both sides, are no part of the choice.
            start_at = len(encode_prompt(tokenizer, row["messages"]))
            row[f"{side}_ids"], row[f"{side}_mask"] = ids, [0] * start_at + mask[start_at:]
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    rows = keep_fitting(rows, [row["length"] for row in rows], model.config.context)
    rows, test_rows = held_out(rows)
    batches = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        batches += length_batches([row["length"] for row in rows], cfg.batch_size, rng)
    print(
        f"{len(rows):,} pairs to train on, {len(test_rows)} held out, "
        f"{len(batches)} steps of at most {cfg.batch_size}"
    )

    def tensors(sequences: list[tuple[list, list]]):
        tokens = pad([ids for ids, _ in sequences], tokenizer.pad)  # (B, T)
        mask = pad([mask for _, mask in sequences], 0).bool()  # (B, T)
        assert mask.any(1).all(), "a row without a supervised token teaches nothing"
        return tokens.to(device), mask.to(device)

    def both_sides(batch: list[dict]):
        """Chosen responses, then rejected ones, so that one forward pass treats them alike."""
        return tensors(
            [
                (row[f"{side}_ids"], row[f"{side}_mask"])
                for side in ("chosen", "rejected")
                for row in batch
            ]
        )

    def count(batch: list[dict], passes: int):
        run.count(sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in batch), passes)

    # ---- the reference reads all pairs once: two numbers each, so training steps need not run it
    all_rows = rows + test_rows
    ref_logprobs = torch.zeros(2, len(all_rows), device=device)  # of chosen, of rejected
    with torch.no_grad():
        for batch in sorted_batches([row["length"] for row in all_rows])[RANK::WORLD]:
            sides = both_sides([all_rows[i] for i in batch])
            ref_logprobs[:, batch] = sequence_logprobs(ref, *sides).view(2, -1)
    sum_over_ranks(ref_logprobs)
    for row, pair in zip(all_rows, ref_logprobs.T):
        row["ref_logprobs"] = pair  # (2,)
    count(all_rows, passes=1)

    def measure(batch: list[dict]) -> dict[str, torch.Tensor]:
        """The loss of every row, and what else the log shows of it: name -> (B,)."""
        tokens, mask = both_sides(batch)
        logprobs = sequence_logprobs(model, tokens, mask).view(2, -1)  # (2, B)
        ref_logprobs = torch.stack([row["ref_logprobs"] for row in batch], dim=1)  # (2, B)
        lengths = mask.sum(1).view(2, -1)  # (2, B)
        loss = dpo_loss(logprobs, ref_logprobs, lengths, cfg)
        margin = dpo_margin(logprobs, ref_logprobs, lengths, cfg).detach()
        chosen, rejected = (logprobs - ref_logprobs).detach()
        accuracy = 0.5 + 0.5 * margin.sign()  # a tie is half right
        return dict(loss=loss, margin=margin, accuracy=accuracy, chosen=chosen, rejected=rejected)

    # ---- held-out prompts to sample on: of the town, where there is a gold reward, or of the file
    of_town = all("gold" in row for row in rows)
    asked = [row["messages"] for row in test_rows[:100]]
    if of_town:
        tasks = draw_tasks(150, "dpo", split="test")
        asked = [task.messages for task in tasks]
    prompts = [encode_prompt(tokenizer, messages) for messages in asked]
    if max(map(len, prompts)) >= model.config.context:
        raise InputError(
            f"questions of the town leave no room for a response in a context of "
            f"{model.config.context} tokens; pretrain with a larger --context"
        )

    @torch.no_grad()
    def evaluate() -> dict:
        """Metrics on held-out pairs and on the model's own samples, which the loss never sees."""
        by_length = sorted(test_rows, key=lambda row: row["length"])
        measured = [measure(batch) for batch in microbatches(by_length, 64)]
        losses, accuracies = (torch.cat([m[x] for m in measured]) for x in ("loss", "accuracy"))
        # A policy can widen every margin and still forget how to answer: length, no_end and gold
        # are those of its own samples.
        replies = sample_replies(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
        sampled = tensors(
            [(p + r.ids, [0] * len(p) + [1] * len(r.ids)) for p, r in zip(prompts, replies)]
        )
        # (N,): of the policy's own samples, so the mean estimates KL(pi || pi_ref) without bias
        kl = sequence_logprobs(model, *sampled) - sequence_logprobs(ref, *sampled)
        numbers = {
            "val_loss": losses.mean().item(),
            "val_accuracy": accuracies.mean().item(),
            "kl": kl.mean().item(),
            "length": np.mean([len(reply.ids) for reply in replies]),
            "no_end": np.mean([not reply.ended for reply in replies]),
        }
        if of_town:
            numbers["gold"] = np.mean([gold(t, r.text, r.ended) for t, r in zip(tasks, replies)])
        return numbers

    # ---- training
    encoded = ([row["chosen_ids"], row["rejected_ids"]] for row in all_rows)
    made_from = {"init": checkpoint["fingerprint"], "data": fingerprint(len(rows), *encoded)}
    for step in run.steps(len(batches), model, tokenizer, made_from, optimizer=optimizer):
        batch = [rows[i] for i in batches[step]]
        pairs_per_rank = len(batch) / WORLD  # since gradients are averaged over ranks
        rounding = 0.2 if cfg.bf16 else 1e-2  # of a mean; 5 times that of one response
        numbers = dict.fromkeys(("loss", "margin", "accuracy", "chosen", "rejected"), 0.0)
        for microbatch in microbatches(shard(batch), cfg.microbatch):
            measured = measure(microbatch)
            (measured["loss"].sum() / pairs_per_rank).backward()  # adds to the gradients so far
            for name, values in measured.items():
                numbers[name] += values.sum().item() / pairs_per_rank
            if step == 0:
                difference = torch.stack([measured["chosen"], measured["rejected"]]).abs().max()
                assert difference < 5 * rounding, "policy and reference start as the same model"
        numbers = mean_over_ranks(device, **numbers)
        if step == 0 and cfg.loss == "dpo" and not cfg.nll:
            assert abs(numbers["loss"] - math.log(2)) < rounding, "margin 0, so the loss is ln 2"
        run.log(step, **numbers, grad_norm=average_gradients(model, cfg.grad_clip))
        step_optimizers([optimizer], lr_at(step, len(batches), cfg.warmup))
        count(batch, passes=3)  # forward 1, backward 2

        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(batches):
            numbers = evaluate()
            run.log(step, **numbers)
            run.report(step, "loss", *numbers)

    # ---- results: what it says to some prompts
    shown = [question(text) for text in SHOWN] if of_town else asked[:8]
    run.finish(model, transcript(model, tokenizer, shown, cfg.max_new_tokens, cfg.seed))
    return run.rows[-1]


if __name__ == "__main__":
    run_script(main, Config)
