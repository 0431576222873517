"""The leaderboard: rerun a student's train_ppo.py or train_dpo.py, and measure what comes out.

A copy of the project with the student's script is the arena. In it the town is closed: whatever is
called from data/town raises an error, gold too. Prompts and preferences are files, without answers
and without gold, and none is of the test split. There the script runs with seeds that its author
has not seen. Every pass through a block of the model is counted by a hook on Block.forward, not by
the script, and a run that goes beyond the budget ends there. The script may write in out/ alone,
and may not read what the grader has (see `fence` in grading.py). Of what it leaves, only the
checkpoint is used: gold and KL are measured afterwards, in the grader's own process, on held-out
prompts. To compare with, run the project's own script in the same way.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KL_LIMIT = 2.0  # nats per response: who is farther from SFT is measured, but not ranked
PROMPTS = 600  # held-out ones, to measure on
RUNS = 3  # with a seed each: the luck of one is as large as what there is to gain
SECONDS = 1200  # of a run
SCRIPT = 60_000  # bytes of a script: more would be weights rather than code
# Forward passes of the SFT model over one token, padding included; a backward pass counts as two.
BUDGET = {"ppo": 3_000_000, "dpo": 4_200_000}
# What every file of data/town is replaced by.
CLOSED = '''"""Closed while a script of the leaderboard runs."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def closed(*args, **options):
        raise PermissionError(f"{__name__}.{name} is closed while the leaderboard trains")

    return closed
'''


def leaderboard(handin: Path, stage: str, out: Path, secret: str, results, budget=None) -> int:
    """Run, measure, print, and write Gradescope's results.json if a path is given."""
    from grading import HandInError, find_file

    try:
        script = find_file(handin, f"train_{stage}.py")
    except HandInError as error:
        raise SystemExit(f"--leaderboard {handin}: {error}")
    for name in ("sft/ckpt.pt", "rm/ckpt.pt", "preferences.jsonl"):
        if not (out / name).exists():
            raise SystemExit(f"there is no {out / name}: run the seven commands of README.md first")
    if not knows_the_town(out):
        raise SystemExit(f"{out / 'sft'} knows another town: run this in the copy of --solved")
    measured, most, error = [], 0.0, ""
    if script.stat().st_size > SCRIPT:
        error = f"the script is larger than {SCRIPT:,} bytes"
    while len(measured) < RUNS and not error:
        with tempfile.TemporaryDirectory() as folder:
            arena, seed = Path(folder).resolve() / "arena", f"{secret} {len(measured)}"
            build_arena(arena, script, out, stage, seed)
            used, error = run(arena, stage, out, handin, seed, budget or BUDGET[stage])
            most = max(most, used)
            try:
                if not error:
                    measured.append(measure(arena / f"out/{stage}/ckpt.pt", out, secret))
            except ValueError as problem:  # InputError: no checkpoint, or of another size
                error = str(problem).replace(f"{arena}{os.sep}", "")
    if error:
        said, gold, kl = f"not measured: {error}", "-", "-"
    else:
        golds, kls = zip(*measured)
        gold, kl = sum(golds) / RUNS, sum(kls) / RUNS
        said = f"gold {gold:.2f} ({', '.join(f'{x:.2f}' for x in golds)})  KL {kl:.2f}  "
        said += f"at most {most:,.0f} forward passes"
        gold, kl = round(gold, 3), round(kl, 2)
        if kl > KL_LIMIT:
            said, gold = f"{said}; not ranked: its KL is above {KL_LIMIT:g} nats", "-"
    print(said)
    if results:
        rows = [
            {"name": "gold", "value": gold, "order": "desc"},
            {"name": "KL", "value": kl, "order": "asc"},
        ]
        data = {"score": 0, "output": said, "leaderboard": rows}
        results.write_text(json.dumps(data, indent=1), "utf-8")
    return int(bool(error))


def knows_the_town(out: Path) -> bool:
    """Whether the SFT model answers questions about residents as this town would."""
    sys.path.insert(0, str(ROOT))
    from data.talk import Speaker
    from data.town.gold import exact_match
    from data.town.tasks import draw_tasks

    tasks = draw_tasks(100, "town", "fact")
    replies = Speaker(out / "sft/ckpt.pt").answer([t.messages for t in tasks], 24, 0, temperature=0)
    return sum(exact_match(t, r.text) for t, r in zip(tasks, replies)) > 50


def build_arena(arena: Path, script: Path, out: Path, stage: str, secret: str):
    """A folder in which the student's script can train and has nothing else to learn from."""
    sys.path.insert(0, str(ROOT))
    from data.files import held_out, read_rows, write_rows
    from data.town.tasks import draw_tasks

    arena.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "data", arena / "data", ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, arena)
    shutil.copy(script, arena / f"train_{stage}.py")
    for path in (arena / "data/town").glob("*.py"):
        path.write_text(CLOSED, "utf-8")
    for name in ("sft", "rm"):
        (arena / "out" / name).mkdir(parents=True)
        shutil.copy(out / name / "ckpt.pt", arena / "out" / name)
    # The last tenth of the preferences is of the test split: it stays here.
    pairs, _ = held_out(read_rows(out / "preferences.jsonl"))
    kept = ("messages", "chosen", "rejected", "sampled_from")
    pairs = [{name: row[name] for name in kept if name in row} for row in pairs]
    write_rows(pairs, arena / "out/preferences.jsonl")
    tasks = draw_tasks(3700, f"leaderboard {secret}")  # nine tenths are as many as PPO draws
    write_rows([{"messages": task.messages} for task in tasks], arena / "prompts.jsonl")


def run(arena, stage: str, out: Path, handin: Path, secret: str, budget: float):
    """Run the script in its arena, a folder. Returns the forward passes that were counted, and what
    went wrong ("" if nothing did)."""
    data = "prompts.jsonl" if stage == "ppo" else "out/preferences.jsonl"
    seed = zlib.crc32(f"leaderboard {secret}".encode()) % 2**31
    options = [f"--seed={seed}", "--device=cpu", f"--data={data}"]
    folders = [str(folder.resolve()) for folder in (out, handin)]
    command = [sys.executable, __file__, *folders, str(budget), stage, *options]
    # Compiled, a model would pass the hook by.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    environment["PYTHONIOENCODING"] = "utf-8"
    environment.pop("PYTHONPATH", None)
    log = arena / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=arena, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 0.0, f"stopped after {SECONDS} seconds"
    counted = arena / "passes.txt"
    numbers = counted.read_text().split() if counted.exists() else []
    used = float(numbers[-1]) if numbers else 0.0
    if code:
        said = log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"]
        return used, said[-1]
    return used, ""


def run_script_in_arena(out: str, handin: str, budget: float, stage: str, options: list[str]):
    """In a process of its own, whose folder is the arena: count, put up the fence, and run."""
    from grading import PYTHON, fence

    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    sys.path.insert(0, os.getcwd())
    import runpy

    import matplotlib.figure  # noqa: F401
    import torch

    from gpt import Block, load_model

    torch.set_num_threads(1)

    def size(module):
        return sum(p.numel() for p in module.parameters())

    model, _ = load_model("out/sft/ckpt.pt")
    whole, used, forward = size(model.h), 0.0, Block.forward
    counted = open("passes.txt", "w")

    def counted_forward(self, x, *where):
        nonlocal used
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        used += (3 if trains else 1) * x.shape[0] * x.shape[1] * size(self) / whole
        if used > budget:
            print(f"over the budget of {budget:,.0f} forward passes", file=sys.stderr, flush=True)
            os._exit(3)  # which no script can catch
        return forward(self, x, *where)

    Block.forward = counted_forward
    sys.argv = [f"train_{stage}.py", *options]
    fence(writable=Path("out"), closed=(ROOT, Path(out), Path(handin)), opened=PYTHON)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(used, file=counted, flush=True)


def measure(checkpoint: Path, out: Path, secret: str) -> tuple[float, float]:
    """Gold of samples on held-out prompts, in SD of those of the SFT model, and KL from it.

    Raises InputError if the checkpoint is missing, damaged, or of another shape than the SFT model.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    from data.evaluate import golds, reply_logprobs
    from data.talk import Speaker
    from data.town.tasks import draw_tasks
    from gpt import InputError

    torch.set_num_threads(1)
    sft, policy = Speaker(out / "sft/ckpt.pt"), Speaker(checkpoint)
    if policy.model.config != sft.model.config or policy.tokenizer.state != sft.tokenizer.state:
        raise InputError(f"{checkpoint} is of another shape, or reads other tokens, than SFT's")
    tasks = draw_tasks(PROMPTS, f"leaderboard {secret}", split="test")
    asked, seed = [task.messages for task in tasks], zlib.crc32(f"samples {secret}".encode())
    replies = policy.answer(asked, 48, seed)
    before = golds(tasks, sft.answer(asked, 48, seed))
    gold = (golds(tasks, replies) - before.mean()) / max(before.std(), 1e-6)
    prompts, ids = [policy.encode(m) for m in asked], [reply.ids for reply in replies]
    with torch.no_grad():
        logprobs, ref_logprobs = (reply_logprobs(s.model, prompts, ids) for s in (policy, sft))
    return float(gold.mean()), float((logprobs - ref_logprobs).mean())


if __name__ == "__main__":
    run_script_in_arena(*sys.argv[1:3], float(sys.argv[3]), sys.argv[4], sys.argv[5:])
