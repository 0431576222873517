"""Stage 1 of 5: pretraining. A model learns to continue text.

    loss = - mean over all tokens of log p(token | the tokens before it)         (cross-entropy)

    trained  a GPT from random weights                       frozen  nothing
    reads    documents of the town, generated on the spot    (or --data file.txt)
    writes   out/pretrain/: ckpt.pt, log.csv, curve.png, samples.txt
    run      python train_pretrain.py
    expect   2 to 3 minutes on two cores; validation loss 0.72 nats per token, 0.30 bits per byte

The result knows words, facts, sums and Spanish, but not that anybody wants an answer: asked "What
is 4-2 and 3-1?", it carries on as if that were the start of a story. That is what SFT is for.

The second half of this file is for all five scripts: options from the command line, the device,
several processes, and `Run`, which keeps the folder, log, plot and progress bar, and survives
Ctrl-C. The later scripts import them from here and keep only their own ideas. Pretraining itself
ends where that half begins.

References: Radford et al. 2019 (GPT-2); Jordan et al. 2024 (Muon, https://kellerjordan.github.io/
posts/muon/). Differs from GPT-2 in: size, data, Muon for the matrices, no dropout.
"""

import argparse
import csv
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from data.chat import encode_opening, pad
from data.expected import Check
from data.files import held_out, read_text
from data.options import number
from data.tokenizer import load_tokenizer, make_tokenizer
from data.town import documents
from gpt import (
    GPT,
    GPTConfig,
    find_device,
    generate,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from kernels import backend, linear_cross_entropy

matplotlib.use("Agg")  # draw into files: no window, no display needed
import matplotlib.pyplot as plt


@dataclass
class Config:
    # data
    init: str = ""  # weights to start from: gpt2, a folder with GPT-2's, a checkpoint ("" = random)
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
    warmup: int = 20  # steps until the peak
    grad_clip: float = 1.0  # largest norm of the gradient (0 = any)
    # run
    seed: int = 0  # everything random follows from it
    eval_every: int = 100  # steps between validations
    save_every: int = 100  # steps between the checkpoints that --resume starts from
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, mps
    bf16: bool = False  # multiply matrices in bfloat16 (weights stay float32); for GPUs
    recompute: bool = False  # keep no activations inside blocks: less memory, a third more work
    compile: bool = False  # torch.compile the blocks; worth its minute in long runs on GPUs
    out: str = "out"  # folder of all runs; this one writes to out/pretrain
    resume: bool = False  # go on with an interrupted run
    check: bool = False  # compare the curves with those of right runs, in data/expected/


# ---------------------------------------------------------------------------------------------
# Data: documents -> one long row of token ids, and where to read in it


def write_tokens(texts: list[str], tokenizer, path: Path):
    """Encode documents, each opened by end-of-text, into one file of ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for text in texts:
            ids = [tokenizer.eot] + tokenizer.encode(text)
            np.array(ids, dtype=token_dtype(tokenizer)).tofile(file)


def read_tokens(tokenizer, path: Path) -> np.memmap:
    """That file, memory-mapped: it may be larger than the memory. Exits if it is unreadable."""
    try:
        return np.memmap(path, dtype=token_dtype(tokenizer), mode="r")
    except (OSError, ValueError) as error:  # not there; empty, or half a token at the end
        raise SystemExit(f"cannot read {path} as token ids: {error}")


def token_dtype(tokenizer):
    """Two bytes per token where they suffice."""
    return np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32


def cut_documents(tokens: np.ndarray, eot: int, context: int) -> np.ndarray:
    """Where training may start to read: at every document, and every `context` tokens inside it.

    Windows cut anywhere would ask the model to guess names whose introduction it cannot see.
    Returns the positions (N + 1,), of which the last is the end of the tokens.
    """
    documents = np.flatnonzero(tokens == eot)
    ends = np.append(documents[1:], len(tokens))
    cuts = [np.arange(start, end, context) for start, end in zip(documents, ends)]
    return np.concatenate([*cuts, [len(tokens)]])


# ---------------------------------------------------------------------------------------------
# Optimizers and learning rate


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """The matrix closest to g = U S V^T whose singular values are all alike: about U V^T.

    With x = g / |g|, whose singular values s lie between 0 and 1, the product
    a x + b (x x^T) x + c (x x^T)^2 x has the values a s + b s^3 + c s^5 and the same U and V. With
    these coefficients five rounds of it bring nearly every s to between 0.7 and 1.2, and that with
    matrix products alone, which are much cheaper than an SVD.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g  # so that x x^T is the smaller of the two products
    x = x / x.norm().clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x  # precise enough, but slow on many CPUs
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, b * gram + c * gram @ gram, x, beta=a)  # a x + (...) x
    return (x.T if g.shape[0] > g.shape[1] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, but each step moves a matrix by the same amount in all its directions.

    A gradient has a few large singular values and many small ones, so plain steps learn a few
    directions well and the others hardly. As torch.optim.Muon, but in float32 on CPUs, where
    torch's bfloat16 took three times as long.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every parameter along its gradient's running mean, made orthogonal."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - momentum)  # running mean of the gradient
                ahead = p.grad.lerp(state["mean"], momentum)  # Nesterov: where it is going
                p.mul_(1 - lr * group["weight_decay"])
                tall = max(1, p.shape[0] / p.shape[1]) ** 0.5  # more outputs than inputs: step more
                p.sub_(orthogonalise(ahead), alpha=lr * tall)


def make_optimizers(model, cfg) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks (or not), AdamW for all else; for pretraining only.

    Tables and matrices are decayed; biases and norms, one-dimensional, are not.
    """
    if cfg.optimizer not in ("muon", "adamw"):
        raise SystemExit(f"--optimizer {cfg.optimizer}: there are muon and adamw")
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


def step_optimizers(optimizers, lr_share: float):
    """One step of these optimizers at this share of their peak rates; gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_share * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()


def lr_at(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Share of the peak learning rate: linear up over warmup, then linear down to floor."""
    up = (step + 1) / max(warmup, 1)
    down = floor + (1 - floor) * (steps - step) / max(steps - warmup, 1)
    return min(up, down, 1.0)


# ---------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def validation_loss(model: GPT, tokens: np.ndarray, cuts: np.ndarray, eot: int) -> float:
    """Mean loss in nats over all tokens, each predicted from its own document up to there."""
    total, device = 0.0, model.wte.weight.device
    pieces = sorted(zip(cuts, cuts[1:]), key=lambda piece: piece[1] - piece[0])
    for i in range(0, len(pieces), 64):  # pieces of similar length side by side: little padding
        rows = [tokens[start : end + 1].tolist() for start, end in pieces[i : i + 64]]
        idx, target = pad([row[:-1] for row in rows], eot), pad([row[1:] for row in rows], -100)
        hidden = model(idx.to(device)).flatten(0, 1)
        target = target.flatten().to(device)
        total += linear_cross_entropy(hidden, model.head, target, reduction="sum").item()
    return total / (len(tokens) - 1)


def main(cfg: Config) -> dict:
    """Train, and return the last validation loss and bits per byte."""
    run = Run("pretrain", cfg)
    run.panels = {
        "loss, nats per token": ["loss", "val_loss"],
        "norm of the gradient": ["grad_norm"],
    }
    device = pick_device(cfg.device)
    if cfg.n_embd % cfg.n_head:
        raise SystemExit(f"--n_head {cfg.n_head} must divide --n_embd {cfg.n_embd}")
    if cfg.context < 2:
        raise SystemExit("--context 1: a text of two tokens is the shortest that can be learned")

    # ---- data: documents -> one long row of token ids; the model that will read them
    token_files = cfg.data.endswith(".bin")  # ids of GPT-2's tokenizer, from data.download
    if token_files:
        train_texts, val_texts = [], []
    elif cfg.data:
        texts = [text for text in read_text(cfg.data).split("<|endoftext|>") if text.strip()]
        if len(texts) == 1:  # one document: its last tenth is for validation
            cut = len(texts[0]) * 9 // 10
            train_texts, val_texts = [texts[0][:cut]], [texts[0][cut:]]
        else:
            train_texts, val_texts = held_out(texts)
        openings = [text[:20] for text in val_texts[:3]]
    else:
        train_texts = documents(cfg.documents, cfg.seed)
        val_texts = documents(1000, "validation")
        openings = ["One morning, Mila", "Otto met Rosa at the lake.", "What is 4-2 and 3-1?"]
    if cfg.init:
        model, checkpoint = load_model(cfg.init, device)
        tokenizer = load_tokenizer(checkpoint["tokenizer"])
        if cfg.context > model.config.context:
            raise SystemExit(f"--context {cfg.context}: {cfg.init} has {model.config.context}")
    else:
        tokenizer = make_tokenizer(cfg.tokenizer, train_texts + val_texts, cfg.vocab_size)
        shape = cfg.context, cfg.n_layer, cfg.n_head, cfg.n_embd
        model = GPT(GPTConfig(tokenizer.n_vocab, *shape)).to(device)
    model.train()
    set_speed(cfg, model)
    if token_files:
        if tokenizer.state["kind"] != "gpt2":
            raise SystemExit(f"{cfg.data} holds ids of GPT-2: add --tokenizer gpt2 or --init gpt2")
        paths = Path(cfg.data), Path(cfg.data).with_name("val.bin")
        val_texts = [tokenizer.decode(read_tokens(tokenizer, paths[1]).tolist())]
        openings = [" ".join(val_texts[0].split(" ")[:4])]
    else:
        paths = run.folder / "train.bin", run.folder / "val.bin"
        for texts, path in zip((train_texts, val_texts), paths):
            on_first_rank(write_tokens, texts, tokenizer, path)
    train, val = (read_tokens(tokenizer, path) for path in paths)
    if min(len(train), len(val)) < cfg.context + 1:
        raise SystemExit(
            f"{cfg.data or 'the town'}: {len(train)} training and {len(val)} validation "
            f"tokens are too few for a context of {cfg.context}"
        )
    starts, val_cuts = (cut_documents(ids, tokenizer.eot, cfg.context) for ids in (train, val))
    starts = starts[starts + cfg.context < len(train)]
    val_bytes = sum(len(text.encode()) for text in val_texts)

    optimizers = make_optimizers(model, cfg)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.n_vocab} tokens in "
        f"the vocabulary, {len(train):,} in the data, {cfg.batch_size * cfg.context:,} a step, "
        f"{' and '.join(optimizers)}"
    )

    # ---- training
    for step in run.steps(cfg.steps, model, tokenizer, **optimizers):
        rng = np.random.default_rng([cfg.seed, step])
        mine = my_share(rng.choice(starts, cfg.batch_size))
        rows = [train[i : i + cfg.context + 1] for i in mine]
        loss = 0.0
        for part in pieces(torch.from_numpy(np.stack(rows).astype(np.int64)), cfg.microbatch):
            idx = part.to(device)  # (B, T + 1)
            hidden = model(idx[:, :-1])  # (B, T, C): what the model knows after reading token t ...
            target = idx[:, 1:]  # ... and the token t + 1 that it must predict from it
            mean = linear_cross_entropy(hidden.flatten(0, 1), model.head, target.flatten())
            part_loss = mean * len(part) / len(mine)
            part_loss.backward()
            loss += part_loss.item()
        grad_norm = average_gradients(model, cfg.grad_clip)
        run.log(step, **mean_over_ranks(device, loss=loss), grad_norm=grad_norm)
        step_optimizers(optimizers.values(), lr_at(step, cfg.steps, cfg.warmup))
        run.forwards += 3 * cfg.batch_size * cfg.context  # forward 1, backward 2

        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            val_loss = validation_loss(model, val, val_cuts, tokenizer.eot)
            bits = val_loss / math.log(2) * (len(val) - 1) / val_bytes
            run.log(step, val_loss=val_loss, bits_per_byte=bits)
            run.say(
                f"step {step + 1:5d}  loss {run.rows[-1]['loss']:.3f}  "
                f"validation loss {val_loss:.3f}, {bits:.3f} bits per byte  {run.elapsed():.0f} s"
            )

    # ---- results
    prompts = [encode_opening(tokenizer, text)[: cfg.context // 2] for text in openings]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    replies, _ = generate(model, prompts, 60, stop=tokenizer.eot, generator=generator)
    texts = [tokenizer.decode(prompt + reply) for prompt, reply in zip(prompts, replies)]
    samples = "\n\n".join(texts) + "\n"
    print(samples)
    run.finish(model, samples)
    return {"val_loss": val_loss, "bits_per_byte": bits}


# ---------------------------------------------------------------------------------------------
# Run mechanics, shared by all five scripts


def parse_config(config_class):
    """A Config from the command line: every field is an option, its comment is the help text."""
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in fields(config_class):
        text = comments[field.name].replace("%", "%%") + f" (default: {field.default!r})"
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is str:
            kind = {"metavar": "str"}
        else:
            # Counts are at least 1, unless 0 is the default and so means something. No number is
            # negative, unless its default is.
            count = field.type is int and field.default != 0 and field.name != "warmup"
            least = -math.inf if field.default < 0 else 1 if count else 0
            kind = {"type": number(field.type, least), "metavar": field.type.__name__}
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    return config_class(**vars(parser.parse_args()))


def run_script(main, config_class):
    """Run a script from the command line; a full disk ends it with a message."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks becomes "?"
    try:
        main(parse_config(config_class))
    except OSError as error:
        raise SystemExit(f"cannot read or write: {error}. Results of earlier runs are untouched.")
    finally:
        if WORLD > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """This rank's torch device for a --device option, which it prints. Exits if it is not there."""
    device = find_device(name)
    name = device.type
    if WORLD > 1:
        if name == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    many = f"{WORLD} processes" if WORLD > 1 else "running"
    print(f"{many} on {name}, the fused head in {backend(device)}")
    if name == "mps":  # such as https://github.com/pytorch/pytorch/issues/181133
        print("PyTorch has been wrong on mps now and then: compare the first losses with the CPU's")
    return device


# ---- Several processes. Under torchrun, WORLD processes (ranks) run the same script with the same
# seed, so all know the whole batch. Each computes the loss of its share, gradients are averaged,
# and all take the same step. All evaluate; rank 0 alone prints and writes files.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def my_share(batch):
    """Every WORLD-th item of a batch, from this rank's number on. Exits if shares are unequal."""
    if len(batch) % WORLD:  # the mean over the batch would not be the mean of the ranks' means
        raise SystemExit(f"{WORLD} processes cannot share a batch of {len(batch)} equally")
    return batch[RANK::WORLD]


def gather(share: list) -> list:
    """The whole batch from the shares that the ranks made of it: undoes `my_share`."""
    if WORLD == 1:
        return share
    shares = [None] * WORLD
    distributed.all_gather_object(shares, share)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def sum_over_ranks(*tensors: torch.Tensor):
    """Replace tensors, of which every rank has filled in a part, by their sum over ranks."""
    if WORLD > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def mean_over_ranks(device, **numbers) -> dict[str, float]:
    """Means over this rank's share -> means over the batch."""
    if WORLD > 1:
        values = torch.tensor([float(x) for x in numbers.values()], device=device)
        distributed.all_reduce(values)
        numbers = dict(zip(numbers, (values / WORLD).tolist()))
    return {name: float(x) for name, x in numbers.items()}


def average_gradients(model, largest_norm: float) -> float:
    """Average gradients over ranks, cut them to a largest norm (0: any); returns the one before.

    What DistributedDataParallel does, but in one call after the backward passes: there may be
    several of them, on some ranks more than on others, and they need no wrapper around the model.
    """
    if WORLD > 1:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in model.parameters()]
        together = torch.nn.utils.parameters_to_vector(gradients)  # one message, not hundreds
        distributed.all_reduce(together)
        torch.nn.utils.vector_to_parameters(together / WORLD, gradients)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm or math.inf).item()


def on_first_rank(function, *args):
    """Call a function that writes files on one rank, while the others wait for it."""
    if RANK == 0:
        function(*args)
    if WORLD > 1:
        distributed.barrier()


# ---- Speed


def set_speed(cfg, *models):
    """What --bf16, --recompute and --compile ask of models, GPTs or scalar ones, that are loaded.

    None of them changes the names or the dtype of the weights, so checkpoints stay the same.
    """
    for model in models:
        gpt = getattr(model, "gpt", model)
        gpt.bf16, gpt.recompute = cfg.bf16, cfg.recompute
        if cfg.compile:
            gpt.compile()


def pieces(batch, size: int) -> list:
    """A batch in parts of at most `size` rows (0: all at once), whose gradients add up."""
    size = size or len(batch)
    return [batch[start : start + size] for start in range(0, len(batch), size)]


# ---- The run itself


class Run:
    """One training run on disk and on the screen.

    While it goes on, its files are in out/<stage>/unfinished/; when it is done they move up to
    out/<stage>/, the checkpoint last. So a run that fails or is stopped leaves the results of an
    earlier one as they were.
    """

    def __init__(self, stage: str, cfg):
        self.stage, self.cfg = stage, cfg
        self.folder = Path(cfg.out) / stage
        self.unfinished = self.folder / "unfinished"
        self.rows = []  # one dict per line of log.csv
        self.forwards = 0.0  # cost so far, in forward passes of one token; a backward pass counts 2
        self.seconds, self.started = 0.0, time.perf_counter()
        self.check = Check(stage, cfg) if cfg.check else None
        torch.manual_seed(cfg.seed)  # on all ranks the same: they start from the same weights

    def steps(self, total: int, model, tokenizer, **others):
        """Yield 0..total-1 under a progress bar, and let the run survive an interruption.

        model and others: all that changes from step to step and has a state_dict. They are saved
        every cfg.save_every steps and loaded again under --resume. All other randomness must follow
        from (seed, step), so there is none to save. Ctrl-C and SIGTERM let the step in progress
        finish, save, and exit with status 130.
        """
        parts = {"model": model, **others}
        first = self._load(parts) if self.cfg.resume else 0
        self.identity = {
            "stage": self.stage,
            "model_config": asdict(model.config),
            "tokenizer": tokenizer.state,
            "train_config": asdict(self.cfg),
        }
        on_first_rank(self._make_folder)
        asked = []  # to stop, by Ctrl-C or SIGTERM
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(s, lambda *_: asked.append(True)) for s in signals]
        try:
            # disable=None: no bar where the output is not a terminal, say a log file
            silent = True if RANK > 0 else None
            self.bar = tqdm(range(first, total), self.stage, total, initial=first, disable=silent)
            device = next(model.parameters()).device
            for step in self.bar:
                yield step
                for sentence in self.check.look(self.rows, step) if self.check else ():
                    self.say(sentence)
                # All stop together: one that is gone would keep the others waiting.
                stop = mean_over_ranks(device, asked=bool(asked))["asked"] > 0
                if stop or ((step + 1) % self.cfg.save_every == 0 and step + 1 < total):
                    self._save(parts, step + 1)
                if stop:
                    print(
                        f"\nstopped after step {step}. `python train_{self.stage}.py --resume` "
                        f"(with the same options) goes on from {self.unfinished / 'ckpt.pt'}"
                    )
                    sys.exit(130)
        finally:
            for s, handler in zip(signals, before):
                signal.signal(s, handler)

    def _make_folder(self):
        if not self.cfg.resume:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True, exist_ok=True)

    def _save(self, parts, step):
        if RANK > 0:
            return
        self.write_log()
        states = {name: part.state_dict() for name, part in parts.items()}
        cost = {"rows": self.rows, "forwards": self.forwards, "seconds": self.elapsed()}
        checkpoint = {**self.identity, "step": step, **cost, **states}
        save_checkpoint(self.unfinished / "ckpt.pt", checkpoint)

    def _load(self, parts) -> int:
        if not (self.unfinished / "ckpt.pt").exists():
            raise SystemExit(f"--resume: no run to go on with in {self.unfinished}/; leave it out")
        saved = load_checkpoint(self.unfinished / "ckpt.pt")
        for name, now in asdict(self.cfg).items():
            was = saved["train_config"].get(name)  # None if there was no such option yet
            if was != now and name not in ("resume", "out", "device", "check"):
                raise SystemExit(f"--resume: the run to go on with had --{name} {was}, not {now}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.rows, self.forwards, self.seconds = saved["rows"], saved["forwards"], saved["seconds"]
        return saved["step"]

    def elapsed(self) -> float:
        """Seconds of this run, those before it was resumed included."""
        return self.seconds + time.perf_counter() - self.started

    def log(self, step: int, **numbers: float):
        """Add numbers to the row of this step. Exits if a loss or gradient norm is not finite."""
        for name, value in numbers.items():
            if name.endswith(("loss", "grad_norm")) and not math.isfinite(value):
                raise SystemExit(
                    f"{self.stage}: {name} is {value} at step {step}, so training stops. "
                    "The last checkpoint is untouched; a lower learning rate may help."
                )
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1].update({name: float(value) for name, value in numbers.items()})
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()})

    def say(self, text: str):
        """Print a line without tearing the progress bar."""
        tqdm.write(text)

    def write_log(self):
        """log.csv and curve.png, of the steps so far."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(self.unfinished / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        plot(self.rows, self.panels, self.unfinished / "curve.png")

    def finish(self, model, samples: str, **extra):
        """Write the results of a finished run and move them to out/<stage>/."""
        if RANK > 0:
            return
        self.write_log()
        (self.unfinished / "samples.txt").write_text(samples, encoding="utf-8")
        cost = {"seconds": round(self.elapsed(), 1), "forward_equivalents": self.forwards}
        cost["peak_gb"] = peak_gb()
        (self.unfinished / "cost.json").write_text(json.dumps(cost))
        # Killed in here, --resume still finds its checkpoint, and does the last steps again.
        for file in self.unfinished.iterdir():
            if file.name != "ckpt.pt":
                os.replace(file, self.folder / file.name)
        result = {**self.identity, "model": model.state_dict(), **extra}
        save_checkpoint(self.folder / "ckpt.pt", result)
        shutil.rmtree(self.unfinished)
        if self.check:
            print(self.check.summary())
        print(f"{self.stage}: {self.elapsed():.0f} seconds, results in {self.folder}/")


def peak_gb() -> float | None:
    """Most memory that this process has held, in GB: of the GPU if it used one, else of the CPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():  # not under --device cpu
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plot(rows: list[dict], panels: dict[str, list[str]], path: Path):
    """Draw log columns against the step into a PNG file. panels: {what a panel shows: columns}."""
    wide = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    high = math.ceil(len(panels) / wide)
    size = dict(figsize=(4.5 * wide, 3.2 * high), sharex=True, squeeze=False)
    figure, axes = plt.subplots(high, wide, **size)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (what, columns) in zip(axes.flat, panels.items()):
        usual = None
        for name, colour in zip(columns, COLOURS):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if not points:
                continue
            x, y = map(np.array, zip(*points))
            if len(points) <= 60:
                axis.plot(x, y, "o-", color=colour, ms=3, label=name)
            else:  # many noisy points: their running mean is what the eye should follow
                width = len(points) // 30
                mean = np.convolve(y, np.ones(width) / width, "valid")
                axis.plot(x, y, color=colour, lw=0.5, alpha=0.4)
                axis.plot(x[width - 1 :], mean, color=colour, label=name)
                usual = 0.9 * y.min(), np.percentile(y, 97.5)
        if columns[0] in ("loss", "grad_norm") and usual is not None:
            axis.set_ylim(*usual)  # the first steps would flatten all the rest
        axis.set(xlabel="step", ylabel=what)
        axis.tick_params(labelbottom=True)  # in all rows of panels
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito: safe for the colour-blind


if __name__ == "__main__":
    run_script(main, Config)
