"""Time pretraining, sampling and PPO at the size of GPT-2: 124M parameters, context 1024, bfloat16.

    python tests/bench/bench_gpt2.py         for a GPU; no network; out/bench_gpt2.json
    python tests/bench/bench_gpt2.py --only muon sampling
    python tests/bench/bench_gpt2.py --tiny  to try the script itself, on a CPU in about a minute

Weights, token ids and prompts are random, and ids are spelled with made-up bytes, so nothing is
downloaded. Hardly any response ends before its last token, so all cost what the longest does. The
scripts run as they are, but for evaluation and checkpoints, and end when enough is timed. Every
measurement is a process of its own, so that its peak memory is its own too.

    muon, adamw      train_pretrain.py, 64 x 1024 tokens a step, 32 x 1024 a pass, 20 steps from
                     step 10 on; -compiled: with --compile
    sampling         `generate`, 512 prompts of 32 tokens, 128 new tokens each; the second call
    ppo              train_ppo.py, 512 rollouts of 128 tokens, 64 a pass, after prompts of 32 to 96
                     letters, a token each; the second and the third iteration

FLOPs of pretraining, per token: 6 (12 L C^2 + V C) + 6 L T C, with L layers. A number in a matrix,
of the blocks or of the head, costs 2 forward and 4 backward; and so does one in the T / 2 keys and
T / 2 values, of C numbers each, that a position looks at on average in each layer.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np  # noqa: E402
import tiktoken  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402
import train_ppo  # noqa: E402
import train_pretrain  # noqa: E402
from data.files import write_rows  # noqa: E402
from data.run import Run, peak_gb  # noqa: E402
from data.tokenizer import PATTERN, GPT2Tokenizer  # noqa: E402
from gpt import GPT, GPTConfig, ScalarModel, generate, load_model, save_checkpoint  # noqa: E402

CUDA = torch.cuda.is_available()
PRETRAINING = {
    "muon": {},
    "muon-compiled": {"compile": True},
    "adamw": {"optimizer": "adamw"},
    "adamw-compiled": {"optimizer": "adamw", "compile": True},
}
NEVER = {"eval_every": 10**9, "save_every": 10**9}


@dataclass
class Size:
    shape: dict
    batch: int  # sequences per step of pretraining, in two forward passes
    untimed: int  # steps of pretraining that warm up
    timed: int  # and those that follow
    rollouts: int
    new_tokens: int
    microbatch: int  # rollouts per forward pass


GPT2 = Size(dict(context=1024, n_layer=12, n_head=12, n_embd=768), 64, 10, 20, 512, 128, 64)
TINY = Size(dict(context=160, n_layer=2, n_head=2, n_embd=64), 2, 1, 2, 4, 6, 2)


def made_up_vocabulary(name: str) -> tiktoken.Encoding:
    """As many ids as GPT-2's vocabulary, without its spellings: all bytes, then pairs of bytes."""
    spellings = [bytes([i]) for i in range(256)] + [bytes(divmod(i, 256)) for i in range(50_000)]
    ranks = {spelling: i for i, spelling in enumerate(spellings)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def prepare(folder: Path, size: Size):
    """What the scripts read: files of token ids, an SFT and a reward model, prompts."""
    rng, tokenizer = np.random.default_rng(0), GPT2Tokenizer()
    for name, count in (("train.bin", 2_000_000), ("val.bin", 10_000)):
        rng.integers(50257, size=count, dtype=np.uint16).tofile(folder / name)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, **size.shape))
    reward_model = ScalarModel.from_gpt(model)
    torch.nn.init.normal_(reward_model.score.weight, std=0.02)
    for stage, made in (("sft", model), ("rm", reward_model)):
        entries = {"model_config": asdict(model.config), "tokenizer": tokenizer.state}
        checkpoint = {"stage": stage, "model": made.state_dict(), **entries}
        save_checkpoint(folder / stage / "ckpt.pt", checkpoint)
    letters = (rng.choice([*"abcdefgh"], rng.integers(32, 97)) for _ in range(600))
    # " a" is one of the pairs of bytes: a letter is a token
    write_rows([{"prompt": " ".join(some)} for some in letters], folder / "prompts.jsonl")


class Enough(Exception):
    """Ends a script when its steps are timed."""


@contextlib.contextmanager
def times_of_steps(count: int):
    """A list, to which a script run inside adds the seconds at which its steps 0 to `count` begin.

    It ends there.
    """
    times, steps = [], Run.steps

    def watched(self, *args, **parts):
        for step in steps(self, *args, **parts):
            times.append(now())
            if step == count:
                raise Enough
            yield step

    with mock.patch.object(Run, "steps", watched), contextlib.suppress(Enough):
        yield times


def now() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def pretraining(folder: Path, size: Size, options: dict) -> dict:
    cfg = train_pretrain.Config(
        data=str(folder / "train.bin"),
        tokenizer="gpt2",
        batch_size=size.batch,
        microbatch=size.batch // 2,
        steps=size.untimed + size.timed + 1,
        bf16=True,
        out=str(folder),
        **size.shape,
        **NEVER,
        **options,
    )
    with times_of_steps(size.untimed + size.timed) as times:
        train_pretrain.main(cfg)
    speed = size.timed * cfg.batch_size * cfg.context / (times[-1] - times[size.untimed])
    L, C, T, V = cfg.n_layer, cfg.n_embd, cfg.context, GPT2Tokenizer().n_vocab
    flops = 6 * (12 * L * C**2 + V * C) + 6 * L * T * C
    return {"tokens/s": speed, "TFLOP/s": speed * flops / 1e12}


def sampling(folder: Path, size: Size) -> dict:
    model, _ = load_model(folder / "sft/ckpt.pt", "cuda" if CUDA else "cpu")
    model.bf16 = True
    prompts = np.random.default_rng(0).integers(50257, size=(size.rollouts, 32)).tolist()
    generate(model, prompts, size.new_tokens)
    start = now()
    replies, _ = generate(model, prompts, size.new_tokens)
    return {"tokens/s": sum(map(len, replies)) / (now() - start)}


def ppo(folder: Path, size: Size) -> dict:
    cfg = train_ppo.Config(
        data=str(folder / "prompts.jsonl"),
        iterations=4,
        rollouts=size.rollouts,
        max_new_tokens=size.new_tokens,
        microbatch=size.microbatch,
        lr=3e-6,
        critic_lr=1e-5,
        bf16=True,
        out=str(folder),
        **NEVER,
    )
    with times_of_steps(3) as times:
        train_ppo.main(cfg)
    return {"s, 2nd iteration": times[2] - times[1], "s, 3rd": times[3] - times[2]}


def measure(name: str, folder: Path, size: Size):
    """What a process of its own does: print one JSON line, speed and peak memory."""
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if name in PRETRAINING:
            found = pretraining(folder, size, PRETRAINING[name])
        else:
            found = {"sampling": sampling, "ppo": ppo}[name](folder, size)
    print(json.dumps({**found, "peak GB": peak_gb()}))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*PRETRAINING, "sampling", "ppo"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--tiny", action="store_true", help="a small model, few rows: a trial")
    parser.add_argument("--out", default="out/bench_gpt2.json", help="JSON file to write")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = TINY if args.tiny else GPT2
    with mock.patch.object(tiktoken, "get_encoding", made_up_vocabulary):
        if args.one:
            return measure(args.one[0], Path(args.one[1]), size)
        device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
        triton = kernels.triton.__version__ if kernels.triton else "none"
        print(f"{device}, torch {torch.__version__}, triton {triton}", flush=True)
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), size)
            for name in args.only:
                command = [sys.executable, __file__, "--one", name, folder]
                command += ["--tiny"] * args.tiny
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:  # one that fails is a line, not the end
                    print(f"{name:16} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                results[name] = json.loads(done.stdout.splitlines()[-1])
                cells = (f"{x:,.{2 * (x < 100)}f} {what}" for what, x in results[name].items())
                print(f"{name:16} {'  '.join(cells)}", flush=True)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    found = {"device": device, "torch": torch.__version__, "triton": triton, "results": results}
    Path(args.out).write_text(json.dumps(found, indent=1))
    print(args.out)


if __name__ == "__main__":
    main()
