"""The model: GPT-2, a cache for sampling from it, and checkpoints. Needs no other file of ours.

It is GPT-2's architecture (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, the
token table used again as the output layer, GPT-2's initialisation. It has no dropout: every later
stage compares log-probabilities of two models, and dropout would turn the comparison into noise.

Notation, here and in all files:

    B   batch               C   channels (width)          V   vocabulary
    T   time (tokens)       nh  attention heads           hs  size of a head, C / nh

`GPT.forward` ends at the hidden states (B, T, C). Three heads read them: the vocabulary
(kernels.py, which never keeps the logits), a reward (one number, at the last token) and a value
(one number at every token); the last two are `ScalarModel`.

`python gpt.py` talks to a trained model: see data/talk.py.
"""

import hashlib
import json
import math
import os
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

# On recent GPUs PyTorch would choose cuDNN's attention, which spends up to half a second planning
# for each new length; and while sampling, every token is a new length.
torch.backends.cuda.enable_cudnn_sdp(False)


class InputError(ValueError):
    """Something that a user can fix, such as a file that is not what it should be.

    A program shows only its message (see run_script in data/run.py), a notebook a traceback.
    """


@dataclass
class GPTConfig:
    """The shape of a model; it is saved with the weights."""

    vocab_size: int  # token ids that mean something
    context: int  # longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int  # channels

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}, not a whole number above 0")
        if self.n_embd % self.n_head:
            raise InputError(f"n_head {self.n_head} must divide n_embd {self.n_embd}")

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table: a multiple of 64, which GPUs multiply faster."""
        return math.ceil(self.vocab_size / 64) * 64

    @property
    def n_parameters(self) -> int:
        """Numbers in a GPT: a block has 4 C^2 in attention, 8 C^2 in its MLP, and 13 C beside."""
        C = self.n_embd
        return (self.padded_vocab + self.context + 2) * C + self.n_layer * (12 * C + 13) * C


class Cache:
    """Keys and values of the tokens read so far, so that sampling reads each token once.

    A token at position p of its row is stored at index p, so rows of different lengths need no
    alignment: a query at position p looks at indices 0..p, and whatever lies beyond is masked.
    """

    def __init__(self, model: "GPT", n_rows: int, length: int):
        config, weight = model.config, model.wte.weight
        hs = config.n_embd // config.n_head
        shape = config.n_layer, n_rows, config.n_head, length, hs  # (L, B, nh, T, hs)
        dtype = torch.bfloat16 if model.bf16 else weight.dtype
        self.keys, self.values = (weight.new_zeros(shape, dtype=dtype) for _ in "kv")
        self.all_rows = torch.arange(n_rows, device=weight.device)

    def rows(self, rows: slice) -> "Cache":
        """A view of some rows: of a group of prompts to read, or of those that go on."""
        view = object.__new__(Cache)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        view.all_rows = self.all_rows[: view.keys.shape[1]]
        return view

    def update(self, layer, positions, mask, k, v):
        """Store k, v (B, nh, T, hs) of one layer and return those that its queries look at.

        Without positions these are prompts, read from their start. With positions (B,), T is 1:
        one more token per row, which looks at as many columns as its mask has.
        """
        keys, values = self.keys[layer], self.values[layer]
        if positions is None:
            keys[:, :, : k.shape[2]], values[:, :, : k.shape[2]] = k, v
            return k, v
        at = self.all_rows, slice(None), positions  # row b at its position, in all heads
        keys[at], values[at] = k[:, :, 0], v[:, :, 0]
        end = mask.shape[-1]  # beyond the longest row there is nothing to look at
        return keys[:, :, :end], values[:, :, :end]  # (B, nh, end, hs)


class Attention(nn.Module):
    """Causal self-attention: every position gathers from the positions up to its own.

    A position asks with a query q; each position up to it offers a key k and a value v. The better
    k matches q, the more of v goes into the result: softmax(q k^T / sqrt(hs)) v, in nh heads side
    by side (Vaswani et al. 2017, equation 1).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads have found

    def forward(self, x, layer=None, cache=None, positions=None, mask=None):
        """x (B, T, C) -> (B, T, C). The other arguments are for sampling: see Cache.update."""
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 C): one product instead of three
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, nh, hs) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(layer, positions, mask, k, v)
        # The fused call below is these four lines, without keeping the (T, T) scores in memory:
        #   scores = q @ k.transpose(2, 3) / math.sqrt(hs)                      (B, nh, T, T)
        #   later  = torch.ones(T, T, dtype=torch.bool).triu(1)                 (T, T): column > row
        #   p      = scores.masked_fill(later, -math.inf).softmax(3)            each row sums to 1
        #   y      = p @ v                                                      (B, nh, T, hs)
        if q.is_cpu and q.dtype == torch.bfloat16 and mask is None:
            # There the backward pass of attention takes several times as long in bfloat16.
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Two layers, applied to each position separately: (B, T, C) -> (B, T, 4 C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU is the tanh one


class Block(nn.Module):
    """Attention, then MLP: each reads the normalised residual stream x and adds its result to x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, *where):
        x = x + self.attn(self.ln_1(x), *where)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids -> hidden states. Module names are GPT-2's, so its weights load by name.

    Two switches change what a pass costs, but not what it computes. bf16: matrices are multiplied
    in bfloat16 (weights, norms and the residual stream stay float32, and on CPUs so does
    attention). recompute: activations inside blocks are not kept for the backward pass, which
    recomputes them (Chen et al. 2016, https://arxiv.org/abs/1604.06174): a third more arithmetic, a
    fraction of the memory.
    """

    bf16 = recompute = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        self.wpe = nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._initialise)

    def _initialise(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):
            # 2 * n_layer results are added to the residual stream: smaller ones keep it from
            # growing with depth (GPT-2, section 2.3)
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def head(self) -> torch.Tensor:
        """The output layer (V, C): the token table without its padding rows.

        No token has the ids of the padding rows. Left out here, they have no probability in any
        loss and can never be sampled.
        """
        return self.wte.weight[: self.config.vocab_size]

    def forward(
        self, idx: torch.Tensor, cache: Cache | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """idx (B, T) int64 -> hidden states after the final norm (B, T, C), bfloat16 with bf16.

        Column t is position t and sees columns 0..t; a cache, if there is one, keeps what later
        tokens will look at. With positions (B,), T is 1: the next token of every row, which sees
        the tokens of its own row in the cache.
        """
        B, T = idx.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context}")
        if positions is None:
            x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)
            mask = None  # the usual causal one
        else:
            x = self.wte(idx) + self.wpe(positions)[:, None]  # (B, 1, C)
            # Beyond a row's own position the cache has zeros, or keys of the padding of its prompt.
            index = torch.arange(int(positions.max()) + 1, device=idx.device)  # (end,)
            later = index > positions[:, None]  # (B, end)
            dtype = torch.bfloat16 if self.bf16 else x.dtype
            mask = torch.zeros_like(later, dtype=dtype).masked_fill(later, -math.inf)
            mask = mask[:, None, None]  # (B, 1, 1, end), added to the scores of all heads
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            for layer, block in enumerate(self.h):
                if self.recompute and torch.is_grad_enabled():
                    x = recomputed(block, x, layer, use_reentrant=False)
                else:
                    x = block(x, layer, cache, positions, mask)
        x = self.ln_f(x)
        return x.bfloat16() if self.bf16 else x


class ScalarModel(nn.Module):
    """A GPT with one number per position instead of a vocabulary: reward model and critic.

    A reward model is read at the last token of a response, a critic at every token. `reward_mean`
    and `reward_sd` are set once, after a reward model is trained, so that its scores have mean 0
    and SD 1 on samples from the SFT model; otherwise PPO's KL coefficient would mean something
    different for every reward model.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gpt = GPT(config)
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.score.weight)  # all scores start at 0, so the first RM loss is ln 2
        nn.init.zeros_(self.score.bias)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_sd", torch.ones(()))

    @property
    def config(self) -> GPTConfig:
        return self.gpt.config

    @classmethod
    def from_gpt(cls, gpt: GPT, n_layer: int | None = None) -> "ScalarModel":
        """Start from a language model's weights, with all or only its lowest n_layer blocks."""
        n_layer = n_layer or gpt.config.n_layer
        if n_layer > gpt.config.n_layer:
            raise ValueError(f"n_layer {n_layer} is more than the {gpt.config.n_layer} there are")
        model = cls(GPTConfig(**{**asdict(gpt.config), "n_layer": n_layer}))
        wanted = model.gpt.state_dict()
        model.gpt.load_state_dict(
            {name: w for name, w in gpt.state_dict().items() if name in wanted}
        )
        return model

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """idx (B, T) -> scores (B, T), float32."""
        hidden = self.gpt(idx).to(self.score.weight.dtype)  # (B, T, C)
        raw = self.score(hidden).squeeze(-1).float()  # (B, T)
        return (raw - self.reward_mean) / self.reward_sd


# ---------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token per row: logits (B, V) -> ids (B,), their log-probabilities (B,).

    temperature 0 is greedy (log-probability at temperature 1). top_k keeps the k likeliest tokens;
    top_p the smallest set of likeliest tokens with probability >= top_p (Holtzman et al. 2020). The
    log-probability is that of the distribution sampled from, after temperature, top_k and top_p.
    """
    logits = logits.float()
    if temperature == 0:
        logprobs = logits.log_softmax(1)
        ids = logits.argmax(1)
        return ids, logprobs.gather(1, ids[:, None]).squeeze(1)
    logits = logits / max(temperature, 1e-30)  # dividing by less could overflow
    if top_k and top_k < logits.shape[1]:
        smallest = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=1, descending=True)
        before = sorted_logits.softmax(1).cumsum(1) - sorted_logits.softmax(1)
        out = before >= top_p
        out[:, 0] = False  # the likeliest stays, even where top_p is 0 in float32
        logits = logits.masked_fill(out.scatter(1, order, out), -math.inf)  # in the order of ids
    probs = logits.softmax(1)
    # Inverse transform: lay the probabilities end to end and see where a uniform number falls. In
    # float64, so that rare tokens keep their probability; but Apple's GPUs have none.
    # (torch.multinomial draws one random number per token of the vocabulary; that made sampling a
    # third slower.)
    dtype = torch.float32 if probs.is_mps else torch.float64
    edges = probs.cumsum(1, dtype=dtype)  # (B, V)
    u = torch.rand(len(probs), 1, dtype=dtype, device=probs.device, generator=generator)
    ids = torch.searchsorted(edges, u * edges[:, -1:], right=True).squeeze(1)
    return ids, probs.gather(1, ids[:, None]).squeeze(1).log()


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    stop: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int = 512,
    progress: str = "",
) -> tuple[list[list[int]], list[list[float]]]:
    """Continue every prompt: token ids in, (responses, log-probabilities of their tokens) out.

    A response ends with the token `stop`, which it includes, or without it after max_new_tokens or
    at the end of the context. Prompts may differ in length. Rows are padded on
    the right, and a row that has ended leaves the batch, so it costs nothing more. batch_size: rows
    in the cache at a time; more is faster and needs more memory. Sampling settings: see `sample`.
    progress: the label of a progress bar ("" for none).

    Raises ValueError if a prompt is empty or leaves no room in the context for a response.
    """
    context, device = model.config.context, model.wte.weight.device
    for ids in prompts:
        if not 0 < len(ids) < context:
            raise ValueError(
                f"a prompt of {len(ids)} tokens: the context of {context} has room "
                f"for 1 to {context - 1}"
            )
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    results = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    starts = range(0, len(prompts), batch_size)
    # disable=None: no bar where the output is not a terminal, say a log file
    for start in tqdm(starts, progress, disable=None if progress else True):
        rows = by_length[start : start + batch_size]  # prompts of similar length: little padding
        # Autocast rounds weights once for all tokens: it keeps them until its outermost block ends.
        with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
            batch = _continue_together(
                model, [prompts[i] for i in rows], max_new_tokens, stop, draw
            )
        for i, result in zip(rows, batch):
            results[i] = result
    return [ids for ids, _ in results], [logprobs for _, logprobs in results]


def _continue_together(model, prompts, max_new_tokens, stop, draw):
    """One batch of `generate`: [(response, log-probabilities of its tokens)], one per prompt.

    draw: logits (B, V) -> a token of every row (B,), their log-probabilities (B,)
    """
    context, device = model.config.context, model.wte.weight.device
    forward = model.forward  # not model(...), which --compile has compiled for training's shapes
    # The head has the precision that it has in training (kernels.py).
    rounded = model.bf16 and device.type == "cuda" and torch.version.cuda  # not AMD's GPUs
    wte = model.wte.weight.bfloat16() if rounded else model.wte.weight
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = Cache(model, len(prompts), min(int(lengths.max()) + max_new_tokens, context))

    last = _read_prompts(forward, prompts, cache)  # (B, C)

    # Add one token to every row until all have ended.
    results = [([], []) for _ in prompts]
    rows = list(range(len(prompts)))  # those that go on
    positions = lengths  # where the next token of each row goes
    for n in range(max_new_tokens):
        with torch.autocast(device.type, enabled=False):  # logits are never rounded to bfloat16
            if rounded:
                logits = torch.mm(last, wte.T, out_dtype=torch.float32)
            else:
                logits = last.to(wte.dtype) @ wte.T
            # The padding rows of the table make the product faster, but are not tokens.
            ids, lp = draw(logits[:, : model.config.vocab_size])  # (B, V) -> (B,), (B,)
        for i, token, logprob in zip(rows, ids.tolist(), lp.tolist()):
            results[i][0].append(token)
            results[i][1].append(logprob)
        alive = (positions < context - 1) & (n + 1 < max_new_tokens)
        if stop is not None:
            alive &= ids != stop
        # Rows that have ended leave the batch, and rows from its end move into the gaps: where 1
        # and 2 of 0, 1, 2, 3, 4 have ended, 3 and 4 take their places, and 0, 3, 4 go on.
        n_alive = int(alive.sum())
        if n_alive == 0:
            break
        if n_alive < len(rows):
            gaps = (~alive[:n_alive]).nonzero().squeeze(1)
            movers = n_alive + alive[n_alive:].nonzero().squeeze(1)  # as many as there are gaps
            keep = torch.arange(n_alive, device=device)
            keep[gaps] = movers
            for table in (cache.keys, cache.values):
                table[:, gaps] = table[:, movers]  # cheaper than copying all that stay
            cache = cache.rows(slice(n_alive))
            rows = [rows[i] for i in keep.tolist()]
            ids, positions = ids[keep], positions[keep]
        last = forward(ids[:, None], cache, positions).squeeze(1)
        positions = positions + 1
    return results


def _read_prompts(forward, prompts, cache) -> torch.Tensor:
    """Fill the cache with the prompts; returns the hidden state of each one's last token (B, C).

    They are read 32 at a time, and a prompt that gets several responses is read once.
    """
    device = cache.keys.device
    different, last = list(dict.fromkeys(map(tuple, prompts))), []
    for first in range(0, len(different), 32):
        group = different[first : first + 32]
        width = max(map(len, group))
        idx = [prompt + (0,) * (width - len(prompt)) for prompt in group]
        rows = slice(first, first + len(group))
        hidden = forward(torch.tensor(idx, device=device), cache.rows(rows))  # (32, width, C)
        ends = torch.tensor([len(prompt) - 1 for prompt in group], device=device)
        last.append(hidden[torch.arange(len(group)), ends])
    row_of = {prompt: row for row, prompt in enumerate(different)}
    rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
    if len(different) < len(prompts):
        for table in (*cache.keys, *cache.values):  # layer by layer: less memory than all at once
            table[:] = table[rows]
    return torch.cat(last)[rows]


# ---------------------------------------------------------------------------------------------
# Checkpoints

STAGES = ("pretrain", "sft", "rm", "ppo", "dpo")  # train_<stage>.py writes out/<stage>/ckpt.pt


def fingerprint(*things) -> str:
    """A hash of things, 16 hexadecimal digits: equal things have equal ones.

    things: weights (a dict of tensors, in any order), arrays, and whatever JSON can hold. A
    checkpoint keeps what its model was made from in this form, for later comparison.
    """
    digest = hashlib.blake2b(digest_size=8)
    for thing in things:
        if isinstance(thing, np.ndarray):
            digest.update(f"{thing.dtype}{thing.shape}".encode())
            digest.update(np.ascontiguousarray(thing))
        elif isinstance(thing, dict) and any(isinstance(x, torch.Tensor) for x in thing.values()):
            for name, tensor in sorted(thing.items()):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(thing, sort_keys=True).encode())
    return digest.hexdigest()


def save_checkpoint(path: str | Path, checkpoint: dict):
    """Write a dict of plain values and tensors; readers see the old file or the new, never half.

    Raises InputError if it cannot be written (a full disk, a read-only folder); the previous file
    is then left intact.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")  # each process has its own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # "No space left on device" is only in the error that torch met before it raised its own.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot save {path}: {reason}. An earlier file there is untouched.")
    finally:
        if temporary.exists():
            temporary.unlink()


def load_checkpoint(path: str | Path, device="cpu", mmap=False) -> dict:
    """Read a checkpoint without unpickling code. Raises InputError if there is none,
    or if it is damaged.

    mmap: leave the weights on disk until they are used, and do not look for damage in them.
    """
    path = Path(path)
    if not path.exists():
        message, stage, out = f"there is no checkpoint {path}", path.parent.name, path.parent.parent
        if stage in STAGES:
            where = "" if out == Path("out") else f" --out {out}"
            message += f": run `python train_{stage}.py{where}` first, or name another checkpoint"
        raise InputError(message)
    try:
        with zipfile.ZipFile(path) as file:
            if not mmap and file.testzip():  # torch.load does not see most flipped bits
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if (stage := checkpoint.get("stage")) not in STAGES:
            raise ValueError(f"its stage is {stage!r}")
        for name in ("model", "model_config", "tokenizer"):
            if not isinstance(checkpoint.get(name), dict):
                raise ValueError(f"its {name} is missing, or no dict")
    except Exception as error:  # truncated, a pickle with code in it, some other file
        reason = str(error).partition(". ")[0]  # what follows in torch is how to run such code
        raise InputError(f"{path} is not a checkpoint of this project, or damaged: {reason}")
    return checkpoint


def load_model(path: str | Path, device="cpu", kind=GPT) -> tuple[nn.Module, dict]:
    """The model in a checkpoint, in evaluation mode, and the checkpoint's other entries, to which
    the `fingerprint` of the model and its tokenizer is added.

    kind: GPT, or ScalarModel for a reward model. Raises InputError if the checkpoint holds the
    other kind, or parts that do not fit together.
    """
    checkpoint = load_checkpoint(path, device)
    if (checkpoint["stage"] == "rm") != (kind is ScalarModel):
        kinds = ["a language model", "a reward model"]
        found, needed = kinds if kind is ScalarModel else reversed(kinds)
        raise InputError(f"{path} is {found}, but {needed} is needed here")
    weights = checkpoint.pop("model")
    try:
        config = GPTConfig(**checkpoint["model_config"])
        if 4 * config.n_parameters > os.path.getsize(path):  # perhaps more than the memory, too
            raise ValueError("model_config is that of a larger model")
    except Exception as error:  # a field that is unknown, missing, or not a number
        raise InputError(f"{path}: {str(error)[:300]}")
    model = kind(config)  # outside: a mistake in the model's code is no fault of the file
    try:
        model.load_state_dict(weights)  # names what is missing, or of another shape
        for name, weight in weights.items():
            if weight.dtype != torch.float32 or not weight.isfinite().all():
                raise ValueError(f"{name} is not float32, or holds nan or inf")
        checkpoint["fingerprint"] = fingerprint(weights, checkpoint["tokenizer"])
    except Exception as error:
        raise InputError(f"{path}: {str(error)[:300]}")
    return model.to(device).eval(), checkpoint


if __name__ == "__main__":  # `python gpt.py` talks; nothing above needs the rest of the project
    from data.run import run_script
    from data.talk import Config, main

    run_script(main, Config)
