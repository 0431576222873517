"""Time every stage beside `transformers` and `trl`: the same shape, weights, rows and machine.

    pip install transformers trl==1.10.0       the peers; without them only we are measured
    python tests/bench/bench_training.py       about 25 minutes on two cores, no network
    python tests/bench/bench_training.py --stages sft dpo --rounds 5

Needs out/ as the README's commands leave it, for weights and tokenizer; writes
out/bench_training.json. Every measurement is a process of its own, so that its peak memory is its
own too; rounds are interleaved, and the table has medians. Both sides have the batch sizes of our
scripts, no dropout, no evaluation and no checkpoints; the first step is not counted. Both run in
float32 and in bfloat16 (--bf16 of our scripts, bf16=True of the trainers, autocast elsewhere). The
peers have their default collators, and trl's PPO, which it has since dropped, ours of everything
that has a name in both.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch  # noqa: E402

import train_dpo  # noqa: E402
import train_ppo  # noqa: E402
import train_pretrain  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
from data.chat import encode_chat, encode_prompt  # noqa: E402
from data.files import read_preferences  # noqa: E402
from data.gpt2 import export  # noqa: E402
from data.run import Run  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.town.demonstrations import demonstrations  # noqa: E402
from data.town.tasks import draw_tasks  # noqa: E402
from gpt import generate, load_model  # noqa: E402

SCRIPTS = {
    "pretrain": train_pretrain,
    "pretrain, AdamW": train_pretrain,
    "sft": train_sft,
    "rm": train_rm,
    "ppo": train_ppo,
    "dpo": train_dpo,
}
SIDES = ("ours", "ours, bf16", "theirs", "theirs, bf16")
UNITS = {
    "pretrain": "tokens/s",
    "pretrain, AdamW": "tokens/s",
    "sft": "tokens/s without padding",
    "sampling, 48 tokens": "tokens/s",
    "sampling, to the end": "tokens/s",
    "rm": "pairs/s",
    "ppo": "rollouts/s",
    "dpo": "pairs/s",
}
STEPS = {"pretrain": 20, "pretrain, AdamW": 20, "sft": 40, "rm": 20, "ppo": 5, "dpo": 20}


def data(stage: str, out: str) -> list[dict]:
    """The rows of a stage, as our scripts read them: the same for both sides."""
    if stage == "ppo":
        return [{"messages": task.messages} for task in draw_tasks(1000, "bench")]
    # So many that one epoch has STEPS + 2 steps; the last tenth is held out.
    count = int((STEPS[stage] + 2.5) * per_step(stage) / 0.9)
    if stage == "sft":
        return [{"messages": row["messages"]} for row in demonstrations(count, "bench")]
    rows = read_preferences(f"{out}/preferences.jsonl")[:count]
    return [{key: row[key] for key in ("messages", "chosen", "rejected")} for row in rows]


def per_step(stage: str) -> float:
    """How many units of `UNITS` one step has."""
    if stage == "ppo":
        return float(train_ppo.Config().rollouts)
    return float(SCRIPTS[stage].Config().batch_size)


# ---------------------------------------------------------------------------------------------
# Ours


def ours(stage: str, out: str, bf16: bool) -> float:
    """Units per second of one of our scripts, as it is, from its second step on."""
    if stage.startswith("sampling"):
        return sampling_of_ours(stage, out, bf16)
    script, times = SCRIPTS[stage], []
    steps = Run.steps

    def watched(self, total, *args, **parts):
        for step in steps(self, total, *args, **parts):
            times.append(time.perf_counter())
            yield step

    with tempfile.TemporaryDirectory() as folder:
        options = {"out": folder, "eval_every": 10**9, "save_every": 10**9, "bf16": bf16}
        options["threads"] = torch.get_num_threads()
        if script is train_pretrain:
            options.update(steps=STEPS[stage] + 2, documents=3000)
            options["optimizer"] = "adamw" if stage.endswith("AdamW") else "muon"
        else:
            rows = Path(folder) / "rows.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in data(stage, out)))
            options.update(init=f"{out}/sft/ckpt.pt", data=str(rows))
            if stage != "ppo":
                options["epochs"] = 1
        if stage == "ppo":
            options.update(rm=f"{out}/rm/ckpt.pt", iterations=STEPS[stage] + 2)
        with mock.patch.object(Run, "steps", watched):
            script.main(script.Config(**options))
    seconds = (times[-1] - times[1]) / (len(times) - 2)  # the last step also evaluates
    return per_step(stage) * factor(stage, out) / seconds


def factor(stage: str, out: str) -> float:
    """Tokens per row, where the unit is tokens."""
    if stage.startswith("pretrain"):
        return train_pretrain.Config().context
    if stage == "sft":
        tokenizer = load_tokenizer(load_model(f"{out}/sft/ckpt.pt")[1]["tokenizer"])
        rows = data(stage, out)
        return sum(len(encode_chat(tokenizer, row["messages"])[0]) for row in rows) / len(rows)
    return 1.0


def prompts_to_sample(out: str):
    """128 prompts of the town, the SFT model, its tokenizer."""
    model, checkpoint = load_model(f"{out}/sft/ckpt.pt")
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    prompts = [encode_prompt(tokenizer, t.messages) for t in draw_tasks(128, "bench")]
    return prompts, model, tokenizer


def sampling_of_ours(stage: str, out: str, bf16: bool) -> float:
    prompts, model, tokenizer = prompts_to_sample(out)
    model.bf16 = bf16
    stop = tokenizer.end if stage.endswith("end") else None

    def sample():
        replies, _ = generate(model, prompts, 48, stop=stop)
        return sum(map(len, replies))

    return tokens_per_second(sample)


def tokens_per_second(sample) -> float:
    """Of a function that returns how many tokens it has sampled; the first call warms up."""
    sample()
    started = time.perf_counter()
    tokens = sum(sample() for _ in range(3))
    return tokens / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------
# Theirs


def theirs(stage: str, out: str, bf16: bool) -> float:
    """Units per second of `transformers` or `trl`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model, checkpoint = load_model(f"{out}/sft/ckpt.pt")
        export(model, load_tokenizer(checkpoint["tokenizer"]), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        none = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **none)

        def scalar():
            kind = transformers.AutoModelForSequenceClassification
            return kind.from_pretrained(folder, num_labels=1, **none)

        if stage.startswith("pretrain"):
            seconds = plain_loop(model, bf16)
        elif stage.startswith("sampling"):
            return sampling_of_theirs(stage, out, model.eval(), bf16)
        else:
            seconds = trainer_loop(stage, out, folder, model, scalar, tokenizer, bf16)
    return per_step(stage) * factor(stage, out) / seconds


def plain_loop(model, bf16) -> float:
    """Seconds per step of the loop that everybody writes around a `transformers` model."""
    cfg, times = train_pretrain.Config(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(STEPS["pretrain"] + 2):
        times.append(time.perf_counter())
        idx = torch.randint(1000, (cfg.batch_size, cfg.context))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (times[-1] - times[1]) / (len(times) - 2)


def sampling_of_theirs(stage: str, out: str, model, bf16) -> float:
    prompts, _, tokenizer = prompts_to_sample(out)
    stop = tokenizer.end if stage.endswith("end") else None
    longest = max(map(len, prompts))
    idx = torch.tensor([[tokenizer.pad] * (longest - len(p)) + p for p in prompts])
    how = dict(do_sample=True, top_k=0, max_new_tokens=48, pad_token_id=tokenizer.pad)
    if stop is None:
        how["min_new_tokens"] = 48

    @torch.no_grad()
    def sample():
        mask = (idx != tokenizer.pad).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            replies = model.generate(idx, attention_mask=mask, eos_token_id=stop, **how)
        replies = replies[:, longest:]
        if stop is None:
            return replies.numel()
        ended = (replies == stop).int()
        # Tokens up to the first stop and with it; a row without one is all reply.
        return int(((ended.cumsum(1) - ended) == 0).sum())

    return tokens_per_second(sample)


def trainer_loop(stage, out, folder, model, scalar, tokenizer, bf16) -> float:
    """Seconds per step of a trainer of `trl`."""
    import transformers
    from datasets import Dataset

    times = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **more):
            times.append(time.perf_counter())

    steps = STEPS[stage] + 1
    common = dict(
        output_dir=folder,
        per_device_train_batch_size=int(per_step(stage)),
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = data(stage, out)
    if stage == "sft":
        from trl import SFTConfig, SFTTrainer

        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
        args = SFTConfig(**common, max_length=96)
        kind, models = SFTTrainer, {"model": model}
    elif stage == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        cfg = train_ppo.Config()
        rows = [{"input_ids": tokenizer.apply_chat_template(r["messages"], **READY)} for r in rows]
        common.update(
            per_device_train_batch_size=cfg.microbatch,
            gradient_accumulation_steps=cfg.rollouts // cfg.microbatch,
        )
        del common["max_steps"]
        args = PPOConfig(
            **common,
            total_episodes=steps * cfg.rollouts,
            num_ppo_epochs=cfg.epochs,
            num_mini_batches=cfg.rollouts // cfg.minibatch,
            local_rollout_forward_batch_size=64,
            response_length=cfg.max_new_tokens,
            stop_token="eos",
            temperature=cfg.temperature,
            num_sample_generations=0,
        )
        kind = PPOTrainer
        models = {"model": model, "ref_model": None}
        models.update(reward_model=scalar(), value_model=scalar())
    else:
        from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

        sides = ("chosen", "rejected")
        rows = [
            {"prompt": r["messages"]}
            | {side: [{"role": "assistant", "content": r[side]}] for side in sides}
            for r in rows
        ]
        if stage == "rm":
            args, kind = RewardConfig(**common, max_length=96), RewardTrainer
            models = {"model": scalar()}
        else:
            args, kind = DPOConfig(**common, max_length=96), DPOTrainer
            models = {"model": model, "ref_model": None}
    trainer = kind(
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Watch()],
        **models,
        **({"eval_dataset": Dataset.from_list(rows[:64])} if stage == "ppo" else {}),
    )
    trainer.train()
    return (times[-1] - times[0]) / (len(times) - 1)


READY = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}


# ---------------------------------------------------------------------------------------------


def measure(stage: str, who: str, out: str):
    """What a process of its own does: one JSON line with speed and peak memory."""
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        side = ours if who.startswith("ours") else theirs
        speed = side(stage, out, bf16=who.endswith("bf16"))
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"speed": speed, "megabytes": megabytes}))


def main():
    """Run all measurements and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", choices=UNITS, default=list(UNITS))
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--out", default="out", help="folder of all runs (default: out)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(*args.one, args.out)
    for needed in ("sft/ckpt.pt", "rm/ckpt.pt", "preferences.jsonl"):
        if not (Path(args.out) / needed).exists():
            raise SystemExit(f"there is no {args.out}/{needed}: run the commands of the README")
    sides = SIDES
    if not importlib.util.find_spec("trl"):
        print("transformers and trl==1.10.0 are not installed: measuring ours only")
        sides = [side for side in SIDES if side.startswith("ours")]
    results = {stage: {who: [] for who in sides} for stage in args.stages}
    for _, stage, who in itertools.product(range(args.rounds), args.stages, sides):
        command = [sys.executable, __file__, "--out", args.out, "--one", stage, who]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{stage}, {who}: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[stage][who].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{stage:22} {who:12} {results[stage][who][-1]['speed']:.1f}", flush=True)

    for what in ("speed", "megabytes"):
        print(f"\n| {what} | unit | {' | '.join(SIDES)} | best of ours / best of theirs |")
        print("|---|---|---|---|---|---|---|")
        for stage, by_side in results.items():
            medians = {
                who: statistics.median(m[what] for m in runs)
                for who, runs in by_side.items()
                if runs
            }
            cells = [
                f"{medians[w]:,.{1 if medians[w] < 100 else 0}f}" if w in medians else "–"
                for w in SIDES
            ]
            best = max if what == "speed" else min
            us, them = (
                [m for who, m in medians.items() if who.startswith(side)]
                for side in ("ours", "theirs")
            )
            cells += [f"{best(us) / best(them):.2f}" if us and them else "–"]
            unit = UNITS[stage] if what == "speed" else "MB"
            print(f"| {stage} | {unit} | {' | '.join(cells)} |")
    path = Path(args.out) / "bench_training.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
