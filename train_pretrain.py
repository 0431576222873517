"""Stage 1 of 5: pretraining. A model learns to continue text.

    loss = - mean over all tokens of log p(token | the tokens before it)         (cross-entropy)

    trained  a GPT from random weights                       frozen  nothing
    reads    documents of the town, written on the spot      (or --data file.txt)
    writes   out/pretrain/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_pretrain.py
    expect   2 minutes on two cores; validation loss 0.74 nats per token, 0.32 bits per byte

The result knows words, facts, sums and Spanish, but not that anybody wants an answer: asked "What
is 4-2 and 3-1?", it carries on as if that were the start of a story. That is what SFT is for.

References: Radford et al. 2019 (GPT-2); Jordan et al. 2024 (Muon, https://kellerjordan.github.io/
posts/muon/). Differs from GPT-2 in: size, data, Muon for the matrices, no dropout.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.chat import encode_opening, pad, sorted_batches
from data.files import held_out, read_texts, read_tokens, write_tokens
from data.gpt2 import load_init
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
from data.tokenizer import load_tokenizer, make_tokenizer
from data.town.documents import documents
from gpt import GPT, GPTConfig, InputError, fingerprint, generate
from kernels import linear_cross_entropy


@dataclass
class Config:
    # data
    init: str = ""  # weights to start from: gpt2, a folder of its kind, a checkpoint ("" = random)
    data: str = ""  # a text file ("" = the town; see data/download.py for .bin files of token ids)
    documents: int = 30000  # how many documents of the town to write
    tokenizer: str = "bpe"  # bpe (trained here), char, or gpt2; with --init that of the weights
    vocab_size: int = 1152  # tokens of a bpe tokenizer, the five special ones included
    # model (its shape comes with the weights under --init)
    context: int = 96  # longest sequence, in tokens
    n_layer: int = 3  # transformer blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # channels
    # optimisation
    batch_size: int = 32  # sequences per step
    microbatch: int = 0  # sequences per forward pass; gradients add up to the batch (0 = all)
    steps: int = 750  # optimizer steps
    optimizer: str = "muon"  # of the matrices inside the blocks: muon or adamw
    muon_lr: float = 0.04  # peak learning rate of the matrices under Muon
    lr: float = 8e-3  # peak learning rate of all that AdamW trains
    weight_decay: float = 0.1  # of matrices and tables; biases and norms are not decayed
    warmup: int = 20  # steps until the peak (0 = none)
    grad_clip: float = 1.0  # largest norm of the gradient (0 = off)
    # run
    seed: int = 0  # everything random follows from it
    eval_every: int = 100  # steps between validations
    save_every: int = 100  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    threads: int = 0  # CPU threads (0 = as many as other programs leave idle when it starts)
    bf16: bool = False  # multiply in bfloat16; weights stay float32 (for GPUs)
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs
    name: str = ""  # of this run, which writes to out/<name> ("" = pretrain)
    resume: bool = False  # continue an interrupted run
    check: bool = False  # compare the curves with those of reference runs (data/check.py)

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_head {self.n_head} must divide --n_embd {self.n_embd}")
        if self.context < 2:
            raise ValueError("--context 1: a text of two tokens is the shortest to learn from")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"--optimizer {self.optimizer}: there are muon and adamw")


# ---------------------------------------------------------------------------------------------
# Data: documents -> one long row of token ids, and where to read in it


def read_documents(cfg: Config) -> tuple[list[str], list[str]]:
    """Training and validation documents, from the town or from a text file."""
    if not cfg.data:
        return documents(cfg.documents, cfg.seed), documents(1000, "validation")
    texts = read_texts(cfg.data)
    if len(texts) > 1:
        return held_out(texts)
    cut = len(texts[0]) * 9 // 10  # one document: its last tenth is for validation
    return [texts[0][:cut]], [texts[0][cut:]]


def cut_documents(tokens: np.ndarray, eot: int, context: int) -> np.ndarray:
    """Where training rows may start: at every document, and every `context` tokens inside it.

    A row from a random position would have to predict names introduced before it. A row that is
    longer than its document runs on into the next ones, whose tokens then also see the earlier
    document, as in GPT-2. A document begins at end-of-text; what precedes the first one also counts
    as a document. Returns the positions (N + 1,): the first is 0, the last the end of the tokens.
    """
    starts = np.union1d([0], np.flatnonzero(tokens == eot))
    ends = np.append(starts[1:], len(tokens))
    cuts = [np.arange(start, end, context) for start, end in zip(starts, ends)]
    return np.concatenate([*cuts, [len(tokens)]])


# ---------------------------------------------------------------------------------------------
# Optimizers


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """About U V^T, the semi-orthogonal matrix nearest to each g = U S V^T of a stack (n, rows,
    columns), by Newton-Schulz iteration.

    With x = g / |g|, whose singular values s lie between 0 and 1, the product
    a x + b (x x^T) x + c (x x^T)^2 x has the values a s + b s^3 + c s^5 and the same U and V. With
    these coefficients, five rounds bring nearly every s to between 0.7 and 1.2, using only matrix
    products, which are much cheaper than an SVD.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024
    x = g.mT if g.shape[1] > g.shape[2] else g  # so that x x^T is the smaller of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x  # fast there; but it costs the town 0.026 nats, seed 0
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, b * gram + c * gram @ gram, x, beta=a)  # a x + (...) x
    return (x.mT if g.shape[1] > g.shape[2] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, but each step moves a matrix by the same amount in all its directions.

    A gradient has a few large singular values and many small ones, so plain steps learn a few
    directions well and the others hardly at all. Like torch.optim.Muon, but in float32 on CPUs (see
    `orthogonalise`), and with all matrices of one shape at once: one by one, a GPU would wait for
    2,000 launches a step at GPT-2's size.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every parameter along the orthogonalised running mean of its gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                params = [p for p in group["params"] if p.shape == shape]
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["mean"] = torch.zeros_like(p)
                means = [self.state[p]["mean"] for p in params]
                torch._foreach_lerp_(means, grads, 1 - momentum)  # running means of the gradients
                ahead = torch._foreach_lerp(grads, means, momentum)  # Nesterov: where they go
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                tall = max(1, shape[0] / shape[1]) ** 0.5  # more outputs than inputs: step more
                moves = orthogonalise(torch.stack(ahead)).unbind()
                torch._foreach_add_(params, moves, alpha=-lr * tall)


def make_optimizers(model, cfg) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks (unless --optimizer adamw), AdamW for all else.

    Tables and matrices are decayed; biases and norms, one-dimensional, are not.
    """
    # Parameters of the blocks are named h.0.attn...; vectors have no singular values.
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in f".{name}"]
    if cfg.optimizer == "adamw":
        inner = []
    taken = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = {"adamw": torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)}
    if inner:
        optimizers["muon"] = Muon(inner, lr=cfg.muon_lr, weight_decay=cfg.weight_decay)
    return optimizers


# ---------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def validation_loss(model: GPT, tokens: np.ndarray, cuts: np.ndarray, eot: int) -> float:
    """Mean loss in nats over all tokens but the first (cuts: see `cut_documents`).

    Every piece, a document or `context` tokens of a longer one, is read from its start; it predicts
    its own tokens but the first, and then the first token of the next piece.
    """
    total, scored, device = 0.0, 0, model.wte.weight.device
    for batch in sorted_batches(np.diff(cuts)):
        rows = [tokens[cuts[i] : cuts[i + 1] + 1].tolist() for i in batch]
        # What lies beyond the end of a row does not count: its target is -100.
        idx, target = pad([row[:-1] for row in rows], eot), pad([row[1:] for row in rows], -100)
        hidden = model(idx.to(device)).flatten(0, 1)
        target = target.flatten().to(device)
        total += linear_cross_entropy(hidden, model.head, target, reduction="sum").item()
        scored += (target != -100).sum().item()
    return total / scored


PANELS = {  # of curve.png: what a panel shows -> columns of log.csv
    "loss, nats per token": ["loss", "val_loss"],
    "norm of the gradient": ["grad_norm"],
}


def main(cfg: Config) -> dict:
    """Train, and return the last row of the log."""
    device = start(cfg)
    run = Run("pretrain", cfg, PANELS)

    # ---- documents, and a tokenizer and a model to read them
    token_file = cfg.data.endswith(".bin")  # ids of GPT-2's tokenizer, from data.download
    if token_file and not Path(cfg.data).exists():
        raise InputError(f"there is no {cfg.data}: see `python -m data.download --list`")
    train_texts, val_texts = ([], []) if token_file else read_documents(cfg)
    made_from = {}  # fingerprints of what this run starts from: --resume refuses if one has changed
    if cfg.init:
        model, checkpoint = load_init(cfg.init, device)
        made_from["init"] = checkpoint["fingerprint"]
        tokenizer = load_tokenizer(checkpoint["tokenizer"])
        if cfg.context > model.config.context:
            raise InputError(f"--context {cfg.context}: {cfg.init} has {model.config.context}")
    else:
        # Merges come from training text alone; but characters that it has not seen cannot be read.
        read = train_texts + val_texts if cfg.tokenizer == "char" else train_texts
        tokenizer = make_tokenizer(cfg.tokenizer, read, cfg.vocab_size)
        shape = cfg.context, cfg.n_layer, cfg.n_head, cfg.n_embd
        model = GPT(GPTConfig(tokenizer.n_vocab, *shape)).to(device)
    model.train()
    set_speed(cfg, model)
    optimizers = make_optimizers(model, cfg)

    # ---- tokens: one long row of ids in a file, and the positions at which training may start
    if token_file:
        if tokenizer.state["kind"] != "gpt2":
            raise InputError(f"{cfg.data} holds ids of GPT-2: add --tokenizer gpt2 or --init gpt2")
        paths = Path(cfg.data), Path(cfg.data).with_name("val.bin")
        val_texts = [tokenizer.decode(read_tokens(tokenizer, paths[1]).tolist())]
    else:
        run.make_folder()  # for the files of tokens; the other stages leave it to run.steps
        paths = run.unfinished / "train.bin", run.unfinished / "val.bin"
        for texts, path in zip((train_texts, val_texts), paths):
            on_first_rank(write_tokens, texts, tokenizer, path)
    train, val = (read_tokens(tokenizer, path) for path in paths)
    if min(len(train), len(val)) < cfg.context + 1:
        raise InputError(
            f"{cfg.data or 'the town'}: {len(train)} training and {len(val)} validation "
            f"tokens are too few for a context of {cfg.context}"
        )
    starts, val_cuts = (cut_documents(ids, tokenizer.eot, cfg.context) for ids in (train, val))
    starts = starts[starts + cfg.context < len(train)]  # a whole row is left from there
    val_bytes = sum(len(text.encode()) for text in val_texts)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.n_vocab} tokens in "
        f"the vocabulary, {len(train):,} in the data, {cfg.batch_size * cfg.context:,} a step, "
        f"{' and '.join(optimizers)}"
    )

    # ---- training
    made_from["data"] = fingerprint(train, val)
    # run.steps counts the steps; it also saves, resumes, and ends cleanly at Ctrl-C.
    for step in run.steps(cfg.steps, model, tokenizer, made_from, **optimizers):
        rng = np.random.default_rng([cfg.seed, step])
        batch = shard(rng.choice(starts, cfg.batch_size))
        rows = train[batch[:, None] + np.arange(cfg.context + 1)].astype(np.int64)  # (B, T + 1)
        # WORLD processes, or ranks (1 without torchrun), share the batch: this one has its shard.
        rows_per_rank = cfg.batch_size / WORLD
        loss = 0.0
        for tokens in microbatches(torch.from_numpy(rows), cfg.microbatch):
            tokens = tokens.to(device)  # (B, T + 1)
            hidden = model(tokens[:, :-1])  # (B, T, C): after reading token t ...
            target = tokens[:, 1:]  # (B, T): ... the token t + 1, which is to be predicted from it
            mean = linear_cross_entropy(hidden.flatten(0, 1), model.head, target.flatten())
            microbatch_loss = mean * len(tokens) / rows_per_rank  # its part of the batch's mean
            microbatch_loss.backward()  # adds to the gradients that are there
            loss += microbatch_loss.item()
        grad_norm = average_gradients(model, cfg.grad_clip)  # over ranks; and clips them
        run.log(step, **mean_over_ranks(device, loss=loss), grad_norm=grad_norm)
        # One step of each, at its peak learning rate times a factor that rises, then falls to 0.
        step_optimizers(optimizers.values(), lr_at(step, cfg.steps, cfg.warmup))
        run.count(cfg.batch_size * cfg.context, passes=3)  # the cost: forward 1, backward 2

        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            val_loss = validation_loss(model, val, val_cuts, tokenizer.eot)
            # Unlike nats per token, bits per byte can be compared between tokenizers.
            bits = val_loss / math.log(2) * (len(val) - 1) / val_bytes
            run.log(step, val_loss=val_loss, bits_per_byte=bits)
            run.report(step, "loss", "val_loss", "bits_per_byte")

    # ---- results: how it continues some openings
    del train, val  # Windows cannot move files that are mapped into memory
    openings = ["One morning, Mila", "Otto met Rosa at the lake.", "What is 4-2 and 3-1?"]
    if cfg.data:
        openings = [" ".join(text.split(" ")[:4]) for text in val_texts[:3]]
    prompts = [encode_opening(tokenizer, text)[: cfg.context // 2] for text in openings]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    replies, _ = generate(model, prompts, 60, stop=tokenizer.eot, generator=generator)
    texts = [tokenizer.decode(prompt + reply) for prompt, reply in zip(prompts, replies)]
    run.finish(model, "\n\n".join(texts) + "\n")
    return run.rows[-1]


if __name__ == "__main__":
    run_script(main, Config)
