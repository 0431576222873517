"""Seconds until pretraining has a validation loss: ours with Muon, `transformers` with AdamW.

    pip install transformers
    python tests/bench/bench_loss.py --rates 1e-3 2e-3 4e-3 8e-3 1.6e-2     about 12 minutes
    python tests/bench/bench_loss.py --rates 4e-3 --steps 1500

Needs out/pretrain, as the README's first command leaves it. `transformers` trains its
GPT2LMHeadModel of the same shape on the same batches, with everybody's loop, from the
weights of its own initialisation, with our warmup, decay, clipping, weight decay and betas. Its
time has no validation in it; ours, in out/pretrain/cost.json, has.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.chat import pad, sorted_batches  # noqa: E402
from data.files import read_tokens  # noqa: E402
from data.run import lr_at  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from gpt import load_checkpoint  # noqa: E402
from train_pretrain import Config, cut_documents  # noqa: E402


def train(lr: float, steps: int, cfg: Config, config, tokens: np.ndarray, starts: np.ndarray):
    """`transformers`' model after so many steps with this peak rate, and the seconds they took."""
    torch.manual_seed(cfg.seed)
    model = transformers.GPT2LMHeadModel(config)
    decayed, others = [], []
    for p in model.parameters():
        (decayed if p.ndim > 1 else others).append(p)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    how = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": cfg.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(groups, **how)
    started = time.perf_counter()
    for step in tqdm(range(steps), f"lr {lr:g}", disable=None):
        batch = np.random.default_rng([cfg.seed, step]).choice(starts, cfg.batch_size)
        rows = torch.from_numpy(tokens[batch[:, None] + np.arange(cfg.context + 1)].astype("int64"))
        # (they shift labels themselves: the last token of a row is a target as well)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_at(step, steps, cfg.warmup)
        optimizer.step()
        optimizer.zero_grad()
    return model, time.perf_counter() - started


@torch.no_grad()
def validation_loss(model, tokens: np.ndarray, cuts: np.ndarray) -> float:
    """As that of train_pretrain.py, of their logits."""
    total = scored = 0
    for batch in sorted_batches(np.diff(cuts)):
        rows = [tokens[cuts[i] : cuts[i + 1] + 1].tolist() for i in batch]
        idx, target = pad([row[:-1] for row in rows], 0), pad([row[1:] for row in rows], -100)
        logits = model(input_ids=idx).logits.flatten(0, 1)
        total += F.cross_entropy(logits, target.flatten(), reduction="sum").item()
        scored += (target != -100).sum().item()
    return total / scored


def main():
    """Train once for every rate, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--steps", type=int, default=Config().steps)
    parser.add_argument("--out", default="out", help="folder of all runs (default: out)")
    args = parser.parse_args()
    ours = Path(args.out) / "pretrain"
    if not (ours / "ckpt.pt").exists():
        raise SystemExit(f"there is no {ours}/ckpt.pt: run `python train_pretrain.py` first")
    saved, cfg = load_checkpoint(ours / "ckpt.pt"), Config()
    tokenizer = load_tokenizer(saved["tokenizer"])
    tokens, val = (read_tokens(tokenizer, ours / f"{name}.bin") for name in ("train", "val"))
    starts, cuts = (cut_documents(ids, tokenizer.eot, cfg.context) for ids in (tokens, val))
    starts = starts[starts + cfg.context < len(tokens)]
    transformers.utils.logging.set_verbosity_error()
    shape = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd}
    none = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    vocab_size = math.ceil(tokenizer.n_vocab / 64) * 64
    # One position more than our context, since a row is input and target at once.
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=cfg.context + 1, use_cache=False, **shape, **none
    )
    cost = json.loads((ours / "cost.json").read_text())
    last = (ours / "log.csv").read_text().splitlines()
    at = last[0].split(",").index("val_loss")
    print(f"ours: val loss {last[-1].split(',')[at]} after {cost['seconds']} seconds")
    for lr in args.rates:
        model, seconds = train(lr, args.steps, cfg, config, tokens, starts)
        loss = validation_loss(model.eval(), val, cuts)
        print(
            f"transformers, AdamW, lr {lr:g}: val loss {loss:.4f} after {args.steps} steps, "
            f"{seconds:.1f} seconds",
            flush=True,
        )


if __name__ == "__main__":
    main()
