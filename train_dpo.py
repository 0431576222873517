"""Stage 5 of 5: DPO. The model learns from preferences directly: no reward model, no sampling.

    h    = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)    (sums over the reply)
    loss = - mean over pairs of log sigmoid(beta h)                      (Rafailov 2023, equation 7)

    trained  the SFT model                                   frozen  the SFT model, as reference
    reads    out/sft/ckpt.pt, out/preferences.jsonl (made if missing; or --data pairs.jsonl)
    writes   out/dpo/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_dpo.py
    expect   1 minute on two cores; gold of samples from 0.0 to 0.8 SD, KL 1.1 nats per reply

Why this is RLHF: the policy that maximises E[r] - beta KL is pi_ref exp(r / beta) / Z. Turned
around, every policy is optimal for the reward beta log(pi / pi_ref) + beta log Z(prompt). Put that
into the Bradley-Terry loss of train_rm.py and Z cancels: the policy is its own reward model.

Watch `chosen` and `rejected` apart: the loss only asks for their difference, and usually both fall.

References: Rafailov et al. 2023; Azar et al. 2023 (IPO); Meng et al. 2024 (SimPO); Mitchell 2023
(cDPO); Pang et al. 2024 (+ NLL). Differs in: size; the reference is run once, before training.
"""

import math
from dataclasses import dataclass

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
    transcript,
)
from data.files import held_out, keep_fitting, read_preferences
from data.gold import gold
from data.preferences import ensure_preferences
from data.tasks import SHOWN, draw_tasks
from data.tokenizer import load_tokenizer
from gpt import load_model
from kernels import linear_logprobs
from train_pretrain import (
    RANK,
    WORLD,
    Run,
    average_gradients,
    lr_at,
    mean_over_ranks,
    my_share,
    on_first_rank,
    pick_device,
    pieces,
    run_script,
    set_speed,
    step_optimizers,
    sum_over_ranks,
)


@dataclass
class Config:
    # data
    init: str = ""  # checkpoint to start from, also the reference ("" = out/sft/ckpt.pt)
    data: str = ""  # JSON or JSONL with preferences ("" = out/preferences.jsonl)
    # loss
    loss: str = "dpo"  # dpo, cdpo, ipo or simpo
    beta: float = 0.25  # how dearly the policy pays for leaving the reference (SimPO: try 2)
    label_smoothing: float = 0.1  # cdpo: the share of labels that are thought to be wrong
    simpo_margin: float = 0.5  # simpo: how much better chosen should be, in units of the loss
    nll: float = 0.0  # weight of the mean negative log-likelihood of chosen, added to any loss
    # optimisation
    batch_size: int = 64  # pairs per step
    microbatch: int = 0  # pairs per forward pass; gradients add up to the batch (0 = all)
    epochs: int = 1  # passes over the data
    lr: float = 2.5e-4  # peak learning rate (AdamW)
    warmup: int = 10  # steps until the peak
    grad_clip: float = 1.0  # largest norm of the gradient (0 = any)
    # run
    max_new_tokens: int = 48  # longest reply when sampling
    seed: int = 0  # everything random follows from it
    eval_every: int = 50  # steps between evaluations on samples
    save_every: int = 200  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    bf16: bool = False  # multiply matrices in bfloat16 (weights stay float32); for GPUs
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs; this one writes to out/dpo
    resume: bool = False  # go on with an interrupted run
    check: bool = False  # compare the curves with those of right runs, in data/expected/


def sequence_logprobs(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log p(reply | prompt), a sum over the reply: tokens (B, T), mask (B, T) bool -> (B,)."""
    hidden = model(tokens[:, :-1])  # (B, T - 1, C): after reading token t ...
    target = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)  # ... token t + 1, if the reply has it
    logprobs = linear_logprobs(
        hidden.flatten(0, 1), model.head, target.flatten(), ignore_index=-100
    )
    return logprobs.view_as(target).sum(1)


def dpo_loss(logprobs, ref_logprobs, lengths, cfg) -> torch.Tensor:
    """The loss of every pair, (B,). The arguments are (2, B): chosen, then rejected.

    logprobs and ref_logprobs are sums over a reply, lengths are its tokens, end-of-turn included.
    """
    chosen, rejected = logprobs - ref_logprobs
    chosen_mean, rejected_mean = logprobs / lengths
    h, beta, eps = chosen - rejected, cfg.beta, cfg.label_smoothing
    if cfg.loss == "dpo":  # Rafailov et al. 2023, equation 7
        loss = -F.logsigmoid(beta * h)
    elif cfg.loss == "cdpo":  # Mitchell 2023: labels are wrong with probability eps
        loss = -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)
    elif cfg.loss == "ipo":  # Azar et al. 2023, equation 17: a target, so h cannot run away
        loss = (h - 1 / (2 * beta)) ** 2
    elif cfg.loss == "simpo":  # Meng et al. 2024, equation 6: per token, and no reference
        loss = -F.logsigmoid(beta * (chosen_mean - rejected_mean) - cfg.simpo_margin)
    else:
        raise SystemExit(f"--loss {cfg.loss}: there are dpo, cdpo, ipo and simpo")
    return loss - cfg.nll * chosen_mean  # Pang et al. 2024, equation 4: keeps chosen from falling


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    run = Run("dpo", cfg)
    run.panels = {
        "loss per pair": ["loss", "val_loss"],
        "log-ratio to ref, nats per reply": ["chosen", "rejected"],
        "share of pairs, of replies": ["accuracy", "no_end"],
    }
    if not cfg.data:
        run.panels["gold, SD of SFT samples"] = ["gold"]
    device = pick_device(cfg.device)
    if cfg.beta == 0:
        raise SystemExit("--beta 0: preferences would count for nothing")

    # ---- model
    init = cfg.init or f"{cfg.out}/sft/ckpt.pt"
    model, checkpoint = load_model(init, device)
    ref, _ = load_model(init, device)
    set_speed(cfg, model, ref)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # ---- data
    data = cfg.data or f"{cfg.out}/preferences.jsonl"
    if not cfg.data:
        on_first_rank(ensure_preferences, data, init, cfg.seed, cfg.max_new_tokens, device)
    rows = read_preferences(data)
    for row in rows:
        for side in ("chosen", "rejected"):
            reply = [{"role": "assistant", "content": row[side]}]
            row[f"{side}_ids"], row[f"{side}_mask"] = encode_chat(
                tokenizer, row["messages"] + reply
            )
            # Replies to earlier questions, the same on both sides, are no part of the choice.
            start = len(encode_prompt(tokenizer, row["messages"]))
            row[f"{side}_mask"][:start] = [0] * start
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    rows = keep_fitting(rows, [row["length"] for row in rows], model.config.context)
    rows, test_rows = held_out(rows)
    test_rows_by_length = sorted(test_rows, key=lambda row: row["length"])
    batches = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        batches += length_batches([row["length"] for row in rows], cfg.batch_size, rng)
    print(
        f"{len(rows):,} pairs, {len(test_rows)} held out, {len(batches)} steps of {cfg.batch_size}"
    )

    def tensors(sequences: list[tuple[list, list]]):
        tokens = pad([ids for ids, _ in sequences], tokenizer.pad)  # (B, T)
        mask = pad([mask for _, mask in sequences], 0).bool()  # (B, T)
        return tokens.to(device), mask.to(device)

    def both_sides(batch: list[dict]):
        """Chosen replies, then rejected ones, so that one forward pass treats them alike."""
        return tensors(
            [
                (row[f"{side}_ids"], row[f"{side}_mask"])
                for side in ("chosen", "rejected")
                for row in batch
            ]
        )

    # ---- the reference speaks once: two numbers per pair, and it costs nothing while training
    by_length = sorted(rows + test_rows, key=lambda row: row["length"])
    ref_logprobs = torch.zeros(2, len(by_length), device=device)  # of chosen, of rejected
    with torch.no_grad():
        for start in range(0, len(by_length), 64)[RANK::WORLD]:
            part = slice(start, start + 64)
            ref_logprobs[:, part] = sequence_logprobs(ref, *both_sides(by_length[part])).view(2, -1)
    sum_over_ranks(ref_logprobs)
    for row, pair in zip(by_length, ref_logprobs.T):
        row["ref_logprobs"] = pair
        run.forwards += len(row["chosen_ids"]) + len(row["rejected_ids"])

    def losses_of(batch: list[dict]):
        """(losses (B,), log-ratios (2, B) of chosen and rejected) of some rows."""
        tokens, mask = both_sides(batch)
        logprobs = sequence_logprobs(model, tokens, mask).view(2, -1)  # (2, B)
        ref_logprobs = torch.stack([row["ref_logprobs"] for row in batch], dim=1)  # (2, B)
        lengths = mask.sum(1).view(2, -1)
        return dpo_loss(logprobs, ref_logprobs, lengths, cfg), (logprobs - ref_logprobs).detach()

    # ---- held-out prompts to sample on
    if cfg.data:
        asked = [row["messages"] for row in test_rows[:100]]
    else:
        tasks = draw_tasks(150, "dpo", split="test")
        asked = [question(task.prompt) for task in tasks]
    prompts = [encode_prompt(tokenizer, messages) for messages in asked]

    @torch.no_grad()
    def evaluate() -> dict:
        """Held-out pairs, and what the model says by itself: the loss knows nothing of that."""
        losses, log_ratios = zip(*(losses_of(part) for part in pieces(test_rows_by_length, 64)))
        chosen, rejected = torch.cat(log_ratios, 1)
        replies = sample_replies(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
        said = tensors(
            [(p + r.ids, [0] * len(p) + [1] * len(r.ids)) for p, r in zip(prompts, replies)]
        )
        kl = sequence_logprobs(model, *said) - sequence_logprobs(ref, *said)
        numbers = {
            "val_loss": torch.cat(losses).mean().item(),
            "val_accuracy": (chosen > rejected).float().mean().item(),
            "kl": kl.mean().item(),
            "length": np.mean([len(reply.ids) for reply in replies]),
            "no_end": np.mean([not reply.ended for reply in replies]),
        }
        if not cfg.data:
            numbers["gold"] = np.mean([gold(t, r.text, r.ended) for t, r in zip(tasks, replies)])
        return numbers

    # ---- training
    for step in run.steps(len(batches), model, tokenizer, optimizer=optimizer):
        mine = [rows[i] for i in my_share(batches[step])]
        loss, log_ratios = 0.0, []
        for part in pieces(mine, cfg.microbatch):
            losses, part_log_ratios = losses_of(part)
            (losses.sum() / len(mine)).backward()
            loss += losses.sum().item() / len(mine)
            log_ratios.append(part_log_ratios)
        chosen, rejected = log_ratios = torch.cat(log_ratios, 1)  # (2, B)
        if step == 0:
            rounding = 1.0 if cfg.bf16 else 1e-2
            assert log_ratios.abs().max() < rounding, "policy and reference start as the same model"
            if cfg.loss == "dpo" and not cfg.nll:
                assert abs(loss - math.log(2)) < rounding, "margin 0, so the loss is ln 2"
        grad_norm = average_gradients(model, cfg.grad_clip)
        numbers = {
            "loss": loss,
            "margin": cfg.beta * (chosen - rejected).mean(),
            "accuracy": (chosen > rejected).float().mean(),
            "chosen": chosen.mean(),
            "rejected": rejected.mean(),
        }
        run.log(step, **mean_over_ranks(device, **numbers), grad_norm=grad_norm)
        step_optimizers([optimizer], lr_at(step, len(batches), cfg.warmup))
        run.forwards += 3 * 2 * sum(rows[i]["length"] for i in batches[step])

        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(batches):
            numbers = evaluate()
            run.log(step, **numbers)
            run.say(
                f"step {step + 1:4d}  loss {run.rows[-1]['loss']:.3f}  "
                + "  ".join(
                    f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items()
                )
                + f"  {run.elapsed():.0f} s"
            )

    # ---- results
    if cfg.data:
        shown = [row["messages"] for row in test_rows[:8]]
    else:
        shown = [question(text) for text in SHOWN]
    samples = transcript(model, tokenizer, shown, cfg.max_new_tokens, cfg.seed)
    print(samples)
    run.finish(model, samples)
    return run.rows[-1]


if __name__ == "__main__":
    run_script(main, Config)
