"""Stage 3 of 5: the reward model (RM). A model learns which of two responses people prefer.

    p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected))             (Bradley and Terry 1952)
    loss = - mean over pairs of log sigmoid(r(chosen) - r(rejected))       (Ouyang 2022, equation 1)

    trained  a GPT with a scalar head, from the SFT weights    frozen  nothing
    reads    out/sft/ckpt.pt, out/preferences.jsonl (or --data pairs.jsonl)
    writes   out/rm/: ckpt.pt, log.csv, curve.png, samples.txt, reliability.png, report.json
    run      python -m data.preferences; python train_rm.py
    expect   1 minute on two cores; held-out accuracy 0.74, where an oracle judge has 0.79

r is read at the last token of the response, its end-of-turn token, by which point the model has
seen it all. Only differences of r are learned, so afterwards r is shifted and scaled to mean 0 and
SD 1 on samples from the SFT model: then PPO's KL coefficient means the same for every reward model.

How good could a judge of these labels be? Annotators are noisy, so even an oracle, who knows the
true reward of every response, agrees with only so many labels (Bayes accuracy). In the town the
oracle can be consulted: see `judge` in data/metrics.py.

Reference: Stiennon et al. 2020. Differs in: size; the head starts at 0, so the first loss is ln 2.
"""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from data.chat import (
    encode_prompt,
    encode_reply,
    length_batches,
    one_line,
    pad,
    sample_replies,
    sorted_batches,
)
from data.files import held_out, keep_fitting
from data.gpt2 import load_init
from data.metrics import judge, plot_reliability
from data.preferences import load_preferences
from data.run import (
    WORLD,
    Run,
    average_gradients,
    lr_at,
    mean_over_ranks,
    microbatches,
    on_first_rank,
    run_script,
    set_speed,
    shard,
    start,
    step_optimizers,
)
from data.tokenizer import load_tokenizer
from gpt import InputError, ScalarModel, fingerprint


@dataclass
class Config:
    # data
    init: str = ""  # SFT checkpoint to start from ("" = out/sft/ckpt.pt)
    data: str = ""  # JSON or JSONL with preferences ("" = out/preferences.jsonl)
    # model
    n_layer: int = 0  # blocks of the reward model, from the bottom (0 = all of the SFT model's)
    # optimisation
    batch_size: int = 64  # pairs per step
    microbatch: int = 0  # pairs per forward pass; gradients add up to the batch (0 = all)
    epochs: int = 2  # passes over the pairs; reward models overfit soon
    lr: float = 5e-4  # peak learning rate (AdamW)
    warmup: int = 20  # steps until the peak (0 = none)
    grad_clip: float = 1.0  # largest norm of the gradient (0 = off)
    # run
    max_new_tokens: int = 48  # longest response when sampling from the SFT model
    seed: int = 0  # everything random follows from it
    eval_every: int = 50  # steps between evaluations on held-out pairs
    save_every: int = 100  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    bf16: bool | None = None  # multiply in bfloat16; weights stay float32 (None = where it is fast)
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs
    name: str = ""  # of this run, which writes to out/<name> ("" = rm)
    resume: bool = False  # continue an interrupted run
    check: bool = False  # compare the curves with those of reference runs (data/check.py)

    def resolved(self) -> "Config":
        """The same with the paths that "" stands for."""
        return replace(
            self,
            init=self.init or f"{self.out}/sft/ckpt.pt",
            data=self.data or f"{self.out}/preferences.jsonl",
        )


def preference_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: scores (B,), (B,) -> scalar. logsigmoid, since log(1 + exp(x)) overflows."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def last_token_scores(model: ScalarModel, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The score of every sequence of ids, read at its last token: (B,).

    Padding stands on the right, where causal attention cannot see it, so it changes nothing.
    """
    device = model.reward_mean.device
    last = torch.tensor([len(row) - 1 for row in rows], device=device)  # (B,)
    scores = model(pad(rows, pad_id).to(device))  # (B, T)
    return scores.gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def score_sequences(model: ScalarModel, sequences: list[list[int]], pad_id: int) -> np.ndarray:
    """`last_token_scores` of any number of sequences: (N,)."""
    scores = np.empty(len(sequences))
    for batch in sorted_batches([len(ids) for ids in sequences]):
        scores[batch] = last_token_scores(model, [sequences[i] for i in batch], pad_id).cpu()
    return scores


PANELS = {  # of curve.png: what a panel shows -> columns of log.csv
    "loss, nats per pair": ["loss", "val_loss"],
    "accuracy on held-out pairs": ["val_accuracy"],
    "norm of the gradient": ["grad_norm"],
}


def main(cfg: Config) -> dict:
    """Train, and return what `judge` says about the result."""
    cfg = cfg.resolved()
    device = start(cfg)
    run = Run("rm", cfg, PANELS)

    # ---- models
    sft, checkpoint = load_init(cfg.init, device)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if cfg.n_layer > sft.config.n_layer:
        raise InputError(f"--n_layer {cfg.n_layer}: {cfg.init} has {sft.config.n_layer}")
    model = ScalarModel.from_gpt(sft, cfg.n_layer).to(device).train()
    set_speed(cfg, sft, model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # ---- data
    rows = load_preferences(cfg.data, checkpoint["fingerprint"])
    for row in rows:
        prompt = encode_prompt(tokenizer, row["messages"])
        row["chosen_ids"] = prompt + encode_reply(tokenizer, row["chosen"])
        row["rejected_ids"] = prompt + encode_reply(tokenizer, row["rejected"])
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    rows = keep_fitting(rows, [row["length"] for row in rows], sft.config.context)
    rows, test_rows = held_out(rows)
    batches = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        batches += length_batches([row["length"] for row in rows], cfg.batch_size, rng)
    print(
        f"{len(rows):,} pairs to train on, {len(test_rows)} held out, "
        f"{len(batches)} steps of at most {cfg.batch_size}"
    )

    def score_test_rows():
        """Scores of the held-out pairs, (N,) of the chosen and (N,) of the rejected responses."""
        for side in ("chosen_ids", "rejected_ids"):
            yield score_sequences(model, [row[side] for row in test_rows], tokenizer.pad)

    # ---- training
    encoded = ([row["chosen_ids"], row["rejected_ids"]] for row in rows + test_rows)
    made_from = {"init": checkpoint["fingerprint"], "data": fingerprint(len(rows), *encoded)}
    for step in run.steps(len(batches), model, tokenizer, made_from, optimizer=optimizer):
        batch = [rows[i] for i in batches[step]]
        pairs_per_rank = len(batch) / WORLD  # since gradients are averaged over ranks
        loss = accuracy = 0.0
        for microbatch in microbatches(shard(batch), cfg.microbatch):
            # One forward pass for both sides, so that they are treated alike.
            sequences = [row[side] for side in ("chosen_ids", "rejected_ids") for row in microbatch]
            scores = last_token_scores(model, sequences, tokenizer.pad)  # (2 B,)
            chosen, rejected = scores.view(2, -1)  # (B,) each
            # A mean over the pairs of the batch, of which this microbatch has some.
            pair_loss = preference_loss(chosen, rejected) * len(microbatch) / pairs_per_rank
            pair_loss.backward()  # adds to the gradients that are there
            loss += pair_loss.item()
            right = 0.5 + 0.5 * (chosen - rejected).sign()  # a tie is half right
            accuracy += right.sum().item() / pairs_per_rank
        grad_norm = average_gradients(model, cfg.grad_clip)
        numbers = mean_over_ranks(device, loss=loss, accuracy=accuracy)
        if step == 0:
            assert abs(numbers["loss"] - math.log(2)) < 1e-6, "the head starts at 0: loss ln 2"
        run.log(step, **numbers, grad_norm=grad_norm)
        step_optimizers([optimizer], lr_at(step, len(batches), cfg.warmup))
        n_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in batch)
        size = model.config.n_layer / sft.config.n_layer  # of the language model's
        run.count(n_tokens, passes=3 * size)  # forward 1, backward 2

        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(batches):
            chosen, rejected = score_test_rows()
            val_loss = preference_loss(torch.tensor(chosen), torch.tensor(rejected)).item()
            val_accuracy = 0.5 + 0.5 * np.sign(chosen - rejected).mean()
            run.log(step, val_loss=val_loss, val_accuracy=val_accuracy)
            run.report(step, "loss", "val_loss", "val_accuracy")

    # ---- normalisation: mean 0 and SD 1 on samples of the SFT model, where PPO will start. The
    # pairs would not do: equal responses were left out of them. Unfinished samples are left out
    # here, since PPO gives them --no_end_score instead.
    model.eval()
    sampled_rows = rows[:: max(len(rows) // 512, 1)]  # about 512, spread over the file
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in sampled_rows]
    replies = sample_replies(sft, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    sampled = list(zip(prompts, replies))
    sequences = [prompt + reply.ids for prompt, reply in sampled if reply.ended]
    if not sequences:
        print("no sample of the SFT model ends: scores are normalised on unfinished ones")
        sequences = [prompt + reply.ids for prompt, reply in sampled]
    scores = score_sequences(model, sequences, tokenizer.pad)
    model.reward_mean.fill_(scores.mean())
    model.reward_sd.fill_(max(scores.std(), 1e-6))  # 0 if all are alike, say of one response

    # ---- results: how good is it, and could it have been better?
    chosen, rejected = score_test_rows()
    report, table = judge(chosen, rejected, test_rows, float(model.reward_sd))
    on_first_rank(plot_reliability, table, run.unfinished / "reliability.png")
    on_first_rank((run.unfinished / "report.json").write_text, json.dumps(report, indent=1))
    numbers = [f"{k} {v:.3f}" for k, v in report.items() if isinstance(v, float)]
    print(f"{report['pairs']} held-out pairs: {'  '.join(numbers)}")
    samples = ""
    for row, c, r in list(zip(test_rows, chosen, rejected))[:12]:
        samples += f"> {one_line(row['messages'])}\n"
        samples += f"{c:+.2f} chosen    {row['chosen']}\n{r:+.2f} rejected  {row['rejected']}\n\n"
    run.finish(model, samples, report=report)
    return report


if __name__ == "__main__":
    run_script(main, Config)
