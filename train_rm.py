"""Stage 3 of 5: the reward model (RM). A model learns which of two replies people prefer.

    p(chosen beats rejected) = sigmoid(r(chosen) - r(rejected))             (Bradley and Terry 1952)
    loss = - mean over pairs of log sigmoid(r(chosen) - r(rejected))       (Ouyang 2022, equation 1)

    trained  a GPT with a scalar head, from the SFT weights    frozen  nothing
    reads    out/sft/ckpt.pt, out/preferences.jsonl (made if missing; or --data pairs.jsonl)
    writes   out/rm/: ckpt.pt, log.csv, curve.png, samples.txt, reliability.png, report.json
    run      python train_rm.py
    expect   2 minutes on two cores; right on 0.75 of held-out labels, gold itself on 0.81

r is read at the last token of the reply, its end-of-turn token, where the model has seen all of it.
Only differences of r are learned, so afterwards r is shifted and scaled to mean 0 and SD 1 on
samples of the SFT model: then PPO's KL coefficient means the same for every reward model.

In the town we can ask what nobody can ask elsewhere: how good could a judge of these labels be?
Annotators are noisy, so even one who knows gold agrees with only so many of them (Bayes accuracy).

Reference: Stiennon et al. 2020. Differs in: size; the head starts at 0, so the first loss is ln 2.
"""

import json
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from data.chat import encode_prompt, encode_reply, length_batches, pad, sample_replies
from data.files import held_out, keep_fitting, read_preferences
from data.preferences import ensure_preferences
from data.tokenizer import load_tokenizer
from gpt import ScalarModel, load_model
from train_pretrain import (
    COLOURS,
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
)


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
    warmup: int = 20  # steps until the peak
    grad_clip: float = 1.0  # largest norm of the gradient (0 = any)
    # run
    max_new_tokens: int = 48  # longest reply when sampling from the SFT model
    seed: int = 0  # everything random follows from it
    eval_every: int = 50  # steps between evaluations on held-out pairs
    save_every: int = 100  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    bf16: bool = False  # multiply matrices in bfloat16 (weights stay float32); for GPUs
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs; this one writes to out/rm
    resume: bool = False  # go on with an interrupted run
    check: bool = False  # compare the curves with those of right runs, in data/expected/


def preference_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: scores (B,), (B,) -> scalar. logsigmoid, since log(1 + exp(x)) overflows."""
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def last_token_scores(model: ScalarModel, rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """The score of every sequence of ids, read at its last token: (B,).

    Padding stands on the right, where causal attention cannot see it, so it changes nothing.
    """
    device = model.mean.device
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    scores = model(pad(rows, pad_id).to(device))  # (B, T)
    return scores.gather(1, last[:, None]).squeeze(1)


def expected_calibration_error(p: np.ndarray, won: np.ndarray, bins: int = 10):
    """How far predicted win rates are from observed ones (Guo et al. 2017, equation 3).

    p (N,): predicted probability that the first reply wins; won (N,): 1 if it did. Returns the
    error and, per filled bin, (mean p, observed rate, count).
    """
    which = np.minimum((p * bins).astype(int), bins - 1)
    table = [
        (p[which == b].mean(), won[which == b].mean(), (which == b).sum())
        for b in range(bins)
        if (which == b).any()
    ]
    return sum(n * abs(mean - rate) for mean, rate, n in table) / len(p), table


def spearman(x, y) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count + 1) / 2)[place]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


@torch.no_grad()
def score_sequences(model: ScalarModel, sequences: list[list[int]], pad_id: int) -> np.ndarray:
    """`last_token_scores` of any number of sequences, 64 of similar length at a time: (N,)."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = np.empty(len(sequences))
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        scores[part] = last_token_scores(model, [sequences[i] for i in part], pad_id).cpu()
    return scores


def main(cfg: Config) -> dict:
    """Train, and return what `judge` says about the result."""
    run = Run("rm", cfg)
    run.panels = {
        "loss, nats per pair": ["loss", "val_loss"],
        "right on held-out pairs, share": ["val_accuracy"],
        "norm of the gradient": ["grad_norm"],
    }
    device = pick_device(cfg.device)

    # ---- models
    init = cfg.init or f"{cfg.out}/sft/ckpt.pt"
    sft, checkpoint = load_model(init, device)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if cfg.n_layer > sft.config.n_layer:
        raise SystemExit(f"--n_layer {cfg.n_layer}: {init} has {sft.config.n_layer}")
    model = ScalarModel.from_gpt(sft, cfg.n_layer).to(device).train()
    set_speed(cfg, sft, model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    # ---- data
    data = cfg.data or f"{cfg.out}/preferences.jsonl"
    if not cfg.data:
        on_first_rank(ensure_preferences, data, init, cfg.seed, cfg.max_new_tokens, device)
    rows = read_preferences(data)
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
        f"{len(batches)} steps of {cfg.batch_size}"
    )

    # ---- training
    for step in run.steps(len(batches), model, tokenizer, optimizer=optimizer):
        batch = [rows[i] for i in batches[step]]
        mine = my_share(batch)
        loss = accuracy = 0.0
        for part in pieces(mine, cfg.microbatch):
            # One forward pass for both sides, so that they are treated alike.
            sequences = [row["chosen_ids"] for row in part] + [row["rejected_ids"] for row in part]
            chosen, rejected = last_token_scores(model, sequences, tokenizer.pad).view(2, -1)
            part_loss = preference_loss(chosen, rejected) * len(part) / len(mine)
            part_loss.backward()
            loss += part_loss.item()
            accuracy += (chosen > rejected).sum().item() / len(mine)
        if step == 0:
            assert abs(loss - math.log(2)) < 1e-6, "the head starts at 0: loss ln 2"
        grad_norm = average_gradients(model, cfg.grad_clip)
        numbers = mean_over_ranks(device, loss=loss, accuracy=accuracy)
        run.log(step, **numbers, grad_norm=grad_norm)
        step_optimizers([optimizer], lr_at(step, len(batches), cfg.warmup))
        n_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in batch)
        run.forwards += 3 * n_tokens * model.config.n_layer / sft.config.n_layer

        if (step + 1) % cfg.eval_every == 0 or step + 1 == len(batches):
            chosen = score_sequences(model, [row["chosen_ids"] for row in test_rows], tokenizer.pad)
            rejected = score_sequences(
                model, [row["rejected_ids"] for row in test_rows], tokenizer.pad
            )
            val_loss = preference_loss(torch.tensor(chosen), torch.tensor(rejected)).item()
            val_accuracy = float((chosen > rejected).mean())
            run.log(step, val_loss=val_loss, val_accuracy=val_accuracy)
            run.say(
                f"step {step + 1:5d}  loss {run.rows[-1]['loss']:.3f}  held out: "
                f"loss {val_loss:.3f}, accuracy {val_accuracy:.3f}  {run.elapsed():.0f} s"
            )

    # ---- normalisation: mean 0 and SD 1 on samples of the SFT model
    model.eval()
    some = rows[:: max(len(rows) // 512, 1)]
    prompts = [encode_prompt(tokenizer, row["messages"]) for row in some]
    replies = sample_replies(sft, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    sequences = [prompt + reply.ids for prompt, reply in zip(prompts, replies)]
    scores = score_sequences(model, sequences, tokenizer.pad)
    model.mean.fill_(scores.mean())
    model.sd.fill_(scores.std())

    # ---- results: how good is it, and could it have been better?
    chosen = score_sequences(model, [row["chosen_ids"] for row in test_rows], tokenizer.pad)
    rejected = score_sequences(model, [row["rejected_ids"] for row in test_rows], tokenizer.pad)
    report = judge(chosen, rejected, test_rows, run.unfinished / "reliability.png", float(model.sd))
    print(json.dumps({k: v for k, v in report.items() if k != "by_task"}))
    samples = ""
    for row, c, r in list(zip(test_rows, chosen, rejected))[:12]:
        samples += f"> {row['messages'][-1]['content']}\n"
        samples += f"{c:+.2f} chosen    {row['chosen']}\n{r:+.2f} rejected  {row['rejected']}\n\n"
    print(samples)
    (run.unfinished / "report.json").write_text(json.dumps(report, indent=1))
    run.finish(model, samples, report=report)
    return report


def judge(chosen, rejected, rows, picture, sd) -> dict:
    """What scores of held-out pairs say about a reward model; with gold, if the rows have it."""
    # Before normalisation the difference of scores is a log-odds: sd turns it back into one.
    difference = sd * (chosen - rejected)
    order = np.arange(len(rows)) % 2 == 0  # "chosen" would always win: look at every other pair
    p = 1 / (1 + np.exp(-np.where(order, difference, -difference)))  # from the other side
    ece, table = expected_calibration_error(p, order.astype(float))
    report = {"pairs": len(rows), "accuracy": float((difference > 0).mean()), "ece": float(ece)}
    plot_reliability(table, picture)
    if all("gold" in row for row in rows):
        gold = np.array([row["gold"] for row in rows])  # (N, 2): of chosen, of rejected
        p = np.array([row["p"] for row in rows])
        separated = gold[:, 0] != gold[:, 1]
        right = (difference > 0) == (gold[:, 0] > gold[:, 1])
        # What a judge who knows gold would score: on average over labels, and on these very ones.
        report["bayes_accuracy"] = float(np.maximum(p, 1 - p).mean())
        report["gold_accuracy"] = float(0.5 + 0.5 * np.sign(gold[:, 0] - gold[:, 1]).mean())
        report["spearman_gold"] = spearman(np.concatenate([chosen, rejected]), gold.T.flatten())
        report["gold_order"] = float(right[separated].mean())
        report["by_task"] = {}
        for kind in sorted({row["kind"] for row in rows}):
            here = np.array([row["kind"] == kind for row in rows])
            report["by_task"][kind] = {
                "pairs": int(here.sum()),
                "accuracy": float((difference > 0)[here].mean()),
                "bayes_accuracy": float(np.maximum(p, 1 - p)[here].mean()),
                "gold_order": float(right[here & separated].mean())
                if (here & separated).any()
                else None,
            }
    return report


def plot_reliability(table, path):
    """Predicted against observed win rates; on the diagonal a probability means what it says."""
    predicted, observed, count = map(np.array, zip(*table))
    figure, axis = plt.subplots(figsize=(4, 4))
    axis.plot([0, 1], [0, 1], "--", color="grey", lw=1, label="calibrated")
    axis.errorbar(
        predicted,
        observed,
        1.96 * np.sqrt(observed * (1 - observed) / count),
        fmt="o-",
        color=COLOURS[0],
        capsize=3,
        label="reward model, 95 % interval",
    )
    axis.set(xlabel="predicted win rate", ylabel="observed win rate", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main, Config)
