"""One run of a script: its options, its device and processes, its folder, log, plot and progress.

Nothing in it is about language models. The scripts keep their ideas and borrow the mechanics:

    run_script     the command line: the fields of a Config are its options
    start          seed, threads, device, the group of processes
    shard, gather  several processes under torchrun: which of them computes what
    lr_at, ...     a step of an optimizer: learning rate, gradient norm
    Run            out/<name>/ with checkpoint, log, plot, samples, cost; --resume, Ctrl-C, progress
"""

import argparse
import contextlib
import csv
import ctypes
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from data.alarms import Watch
from data.check import COST_ONLY, Check
from gpt import STAGES, InputError, fingerprint, load_checkpoint, save_checkpoint
from kernels import backend

# This process's number, and how many there are: torchrun says so.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCKS = {}  # held by this process: path -> file descriptor
# How messages name what a run was made from.
MADE_FROM = {
    "init": "the checkpoint of --init",
    "rm": "the reward model",
    "data": "the data",
    "tokenizer": "the tokenizer",
}
# Okabe and Ito: eight colours that the colour-blind can tell apart.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #999999 #000000".split()


# ---------------------------------------------------------------------------------------------
# Options


def number(kind: type, least: float):
    """A type for argparse: a finite int or float (kind) that is at least `least`."""

    def parse(text: str):
        value = kind(text)
        if not -math.inf < value < math.inf:  # nor is nan
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        if kind is int and value >= 2**31:
            raise argparse.ArgumentTypeError(f"must be less than 2^31, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name the type
    return parse


def parse_config(config_class):
    """A Config from the command line: every field is an option, its comment is the help text.

    A count is at least 1, unless its default is 0 or its comment says what 0 means, as in "(0 =
    off)". Other numbers are at least 0, unless their default is negative. Whatever else a Config
    demands of its values, it checks in `__post_init__`, by raising ValueError.
    """
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in fields(config_class):
        if field.name not in comments:
            raise TypeError(f"Config.{field.name} needs a comment on its line: the help text")
        comment, default = comments[field.name], field.default
        if field.type in (bool, bool | None):
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is str:
            kind = {"metavar": "str"}
        else:
            may_be_0 = field.type is float or default == 0 or "(0 = " in comment
            least = -math.inf if default < 0 else 0 if may_be_0 else 1
            kind = {"type": number(field.type, least), "metavar": field.type.__name__}
        text = comment.replace("%", "%%") + f" (default: {default!r})"
        parser.add_argument(f"--{field.name}", default=default, help=text, **kind)
    try:
        return config_class(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


def run_script(main, config_class=None):
    """Run a script from the command line.

    An error that its user can mend (a full disk, a missing file) ends it with one line. If nobody
    reads its output any more (`... | head`) it ends in silence, with status 1. A terminal that
    lacks a character shows "?" instead.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # None where the shell has closed it; and one process speaks for all
        if getattr(sys, stream) is None or (RANK > 0 and stream == "stdout"):
            setattr(sys, stream, open(os.devnull, mode))
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # that of a notebook has none
            stream.reconfigure(errors="replace")
    try:
        with contextlib.redirect_stdout(PrintableStream(sys.stdout)):
            main(parse_config(config_class)) if config_class else main()
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # Python would complain once more as it flushes
        raise SystemExit(1)
    except InputError as error:
        raise SystemExit(printable(str(error)))
    except (torch.OutOfMemoryError, MemoryError) as error:
        said = printable((str(error).splitlines() or [""])[0])
        raise SystemExit(f"out of memory: try a smaller --microbatch, or --recompute. {said}")
    except OSError as error:
        raise SystemExit(printable(f"cannot read or write: {error}"))
    except KeyboardInterrupt:  # not in training, where Run hears it
        raise SystemExit("\nstopped; earlier results are untouched")
    finally:
        if WORLD > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def printable(text: str) -> str:
    """Text whose control characters, but for line ends and tabs, are spelled out, as in \\x1b.

    A reply or a row of a file could otherwise move the cursor of a terminal, or rename its window.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


class PrintableStream:
    """A stream that writes `printable` text, and otherwise behaves like the one that it wraps."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        return self.stream.write(printable(text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


# ---------------------------------------------------------------------------------------------
# Device and speed


def start(cfg) -> torch.device:
    """Begin a run: set threads and seed, join the other processes. Returns this process's device.

    Raises InputError if the device is not there.
    """
    device = find_device(cfg.device)
    if WORLD > 1 and not hasattr(cfg, "save_every"):  # only the five scripts share their work
        raise InputError("this runs as one process: start it with python, not torchrun")
    if cfg.threads:
        torch.set_num_threads(min(cfg.threads, os.cpu_count() or 1))
    elif "OMP_NUM_THREADS" not in os.environ and device.type == "cpu" and WORLD == 1:
        use_idle_cpus()
    torch.manual_seed(cfg.seed)  # the same on all ranks: they start from the same weights
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            here, n_gpus = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            if device.index >= n_gpus:
                raise InputError(f"{here} processes need a GPU each; this machine has {n_gpus}")
            torch.cuda.set_device(device)
        backend_of = {"cuda": "nccl"}.get(device.type, "gloo")
        # Others wait while the first rank downloads, or cuts a large text into tokens.
        distributed.init_process_group(backend_of, timeout=timedelta(hours=3))
    if WORLD > 1 or device.type != "cpu":
        many = f"{WORLD} processes" if WORLD > 1 else "running"
        print(f"{many} on {device.type}; kernels.py uses {backend(device)}")
    if device.type == "mps":  # such as https://github.com/pytorch/pytorch/issues/181133
        print("PyTorch has been wrong on mps now and then: compare the first losses with the CPU's")
    return device


def use_idle_cpus():
    """Use no more threads than there are CPUs that other programs leave idle, but at least one.

    In every step threads wait for each other hundreds of times. They wait by spinning, since asleep
    they would take a quarter longer; but a thread that spins is in the way of other programs.
    A step of pretraining that takes 112 ms alone on two cores takes 475 ms beside another such
    program, 343 beside one with a single thread, and 255 if both have one.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return
    for _ in range(5):  # a second in all: a program may just be ending
        idle = max(round(min(idle_cpus(), threads)), 1)
        if idle == threads:
            return
    torch.set_num_threads(idle)
    print(f"other programs are using the CPUs, so here --threads is {idle}")


def idle_cpus(seconds: float = 0.2) -> float:
    """How many CPUs are idle during the next moments; infinite where Linux does not say."""

    def idle_seconds():
        fields = Path("/proc/stat").read_text().split(maxsplit=6)
        ticks = int(fields[4]) + int(fields[5])  # idle, and waiting for a disk, since the start
        if not ticks:
            raise ValueError("a sandbox that hides them")
        return ticks / os.sysconf("SC_CLK_TCK")

    try:
        began, before = time.perf_counter(), idle_seconds()
        time.sleep(seconds)
        return (idle_seconds() - before) / (time.perf_counter() - began)
    except (OSError, ValueError, IndexError):
        return math.inf


def find_device(name: str) -> torch.device:
    """The torch device of a --device option; auto is cuda if there is one, else cpu.

    Raises InputError if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: there are auto, cpu, cuda and mps")
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(name):
        raise InputError(f"--device {name}: not available here; try --device cpu")
    return torch.device(name)


def set_speed(cfg, *models):
    """Apply --bf16, --recompute and --compile to loaded models, GPT or ScalarModel.

    None of them changes the names or the dtype of the weights, so checkpoints stay the same. A
    cfg.bf16 of None becomes True if this CPU multiplies at least twice as fast in bfloat16, else
    False. Raises InputError if --compile finds no compiler.
    """
    if cfg.bf16 is None:
        weight = next(models[0].parameters())
        may_gain = weight.is_cpu and weight.dtype == torch.float32
        gain = bfloat16_gain(weight.shape[1]) if may_gain else 0.0
        gain = mean_over_ranks(weight.device, gain=gain)["gain"]  # all ranks decide alike
        cfg.bf16 = gain >= 2
        if cfg.bf16:
            print(f"multiplying in bfloat16, {gain:.1f} times as fast here (--no-bf16: in float32)")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if cfg.compile and not any(map(shutil.which, compilers)):
        raise InputError("--compile needs a C++ compiler such as g++, and there is none here")
    for model in models:
        gpt = getattr(model, "gpt", model)  # a ScalarModel wraps a GPT
        gpt.bf16, gpt.recompute = cfg.bf16, cfg.recompute
        if cfg.compile:
            gpt.compile()


def bfloat16_gain(width: int) -> float:
    """How many times as fast this CPU multiplies in bfloat16 as in float32, rounding included, what
    an MLP of this width multiplies. With AMX 1.3 at width 32, 4 at 128; without bfloat16 below 1.
    """
    x, w = torch.ones(2048, width), torch.ones(4 * width, width)
    seconds = [], []
    for _ in range(5):  # the fastest of a few: other work only ever makes them slower
        for dtype, times in zip((torch.float32, torch.bfloat16), seconds):
            began = time.perf_counter()
            x.to(dtype) @ w.to(dtype).T
            times.append(time.perf_counter() - began)
        if len(seconds[0]) > 1 and min(seconds[1]) > min(seconds[0]):
            break  # at GPT-2's width, and without bfloat16 in hardware, a round takes a second
    return min(seconds[0]) / min(seconds[1])


# ---------------------------------------------------------------------------------------------
# Batches on several processes. Under torchrun, WORLD processes (ranks) run the same script with the
# same seed, so all know the whole batch. Each computes the loss of its shard, gradients are
# averaged, and all take the same step. All evaluate; rank 0 alone prints and writes files.


def shard(batch):
    """Every WORLD-th item of a batch, from this rank's number on.

    Shards may differ by one item. So every rank divides its sum by (size of the batch / WORLD): the
    mean of these over ranks is the mean over the batch.
    """
    return batch[RANK::WORLD]


def gather(my_shard: list) -> list:
    """The whole batch from the shards of all ranks: undoes `shard`."""
    if WORLD == 1:
        return my_shard
    shards = [None] * WORLD
    distributed.all_gather_object(shards, my_shard)
    return [shards[i % WORLD][i // WORLD] for i in range(sum(map(len, shards)))]


def microbatches(batch, size: int) -> list:
    """A batch in slices of at most `size` rows (0: all at once), whose gradients add up."""
    size = size or max(len(batch), 1)  # a shard may be empty
    return [batch[first : first + size] for first in range(0, len(batch), size)]


def shard_microbatches(rows: np.ndarray, widths: list[int], size: int):
    """Yield this rank's microbatches of a padded batch, as indices (rows, columns) into it.

    rows: numbers of the batch's rows, sorted by width so that those of a microbatch are alike;
    widths: how many columns each row of the batch fills; size: rows at a time (0 = all). Columns in
    which a microbatch has nothing but padding are left out.
    """
    size = size or len(rows)
    for first in range(0, len(rows), size)[RANK::WORLD]:
        microbatch = rows[first : first + size]
        yield microbatch, slice(max(widths[row] for row in microbatch))


def sum_over_ranks(*tensors: torch.Tensor):
    """Replace tensors, of which every rank has filled in its rows, by their sum over ranks."""
    if WORLD > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def mean_over_ranks(device, **numbers) -> dict[str, float]:
    """The mean of each number over ranks."""
    if WORLD > 1:
        values = torch.tensor([float(x) for x in numbers.values()], device=device)
        distributed.all_reduce(values)
        numbers = dict(zip(numbers, (values / WORLD).tolist()))
    return {name: float(x) for name, x in numbers.items()}


def on_first_rank(function, *args):
    """Call a function that writes files on one rank, while the others wait for it."""
    if RANK == 0:
        function(*args)
    if WORLD > 1:
        distributed.barrier()


# ---------------------------------------------------------------------------------------------
# A step of an optimizer


def lr_at(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """The fraction of the peak learning rate at a step: linear up over warmup, then linear down to
    floor.

    Adam's second moments know nothing yet in the first steps, hence the warmup; the decay averages
    out the noise of the last ones.
    """
    up = (step + 1) / max(warmup, 1)
    down = floor + (1 - floor) * (steps - step) / max(steps - warmup, 1)
    return min(up, down, 1.0)


def average_gradients(model, max_norm: float) -> float:
    """Average gradients over ranks, then clip their norm to max_norm (0 = off). Returns the norm
    before clipping.

    What DistributedDataParallel does, but in one call after the backward passes: there may be
    several of them, on some ranks more than on others, and they need no wrapper around the model.
    """
    if WORLD > 1:
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:  # a gradient of 0 for a frozen one would let weight decay move it
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in trained]
        flat = torch.nn.utils.parameters_to_vector(gradients)  # one message, not hundreds
        distributed.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat / WORLD, gradients)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf).item()


def step_optimizers(optimizers, lr_fraction: float):
    """One step of these optimizers at this fraction of their peak rates; gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_fraction * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------
# The run itself


class Run:
    """One training run on disk and on the screen.

    While it goes on, its files are in out/unfinished/<name>/. When it is done, that folder takes
    the place of out/<name>/, all at once. So a run that fails or is stopped, at whatever moment,
    leaves the results of an earlier one as they were. The name is that of the stage, or --name.
    """

    def __init__(self, stage: str, cfg, panels: dict[str, list[str]], unit="step"):
        """panels: what a panel of curve.png shows, with its unit -> the columns of the log in it.
        unit: what this stage calls a step.

        Raises InputError if --name would put this run into the folder of another stage.
        """
        self.stage, self.cfg, self.panels, self.unit = stage, cfg, panels, unit
        self.name = cfg.name or stage
        self.folder = run_path(cfg.out, self.name)
        if self.folder.is_symlink():  # to a larger disk: there the run has its working folder, too
            self.folder = self.folder.resolve()
        if self.folder.is_file():
            raise InputError(f"--name {self.name}: {self.folder} is a file; choose another")
        self.unfinished = self.folder.with_name("unfinished") / self.folder.name
        checkpoints = self.folder / "ckpt.pt", self.unfinished / "resume.pt"
        for other in [self.name] if self.name in STAGES else map(stage_of, checkpoints):
            if other not in (None, stage):
                raise InputError(f"--name {self.name} belongs to train_{other}.py: choose another")
        self.release_lock = None  # until `make_folder`
        self.rows = []  # one dict per line of log.csv
        self.forwards = 0.0  # see `count`
        self.seconds, self.started = 0.0, time.perf_counter()
        self.check = Check(stage, cfg) if cfg.check else None
        if cfg.resume and cfg.bf16 is None and checkpoints[1].exists():  # as it began, fast or not
            saved = load_checkpoint(checkpoints[1], mmap=True)
            cfg.bf16 = saved["train_config"].get("bf16")

    def make_folder(self):
        """An empty out/unfinished/<name>/, or under --resume as it was left. Safe to call twice.

        Raises InputError if another process is at work there.
        """
        if RANK > 0 or self.release_lock:
            return
        self.release_lock = acquire_lock(self.unfinished)
        aside = self.unfinished.with_name(f".{self.unfinished.name}.old")  # see `replace_folder`
        if aside.exists() and not self.folder.exists():
            os.rename(aside, self.folder)
        if not self.cfg.resume:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        for half in self.unfinished.glob("*.tmp"):  # of a process that was killed
            half.unlink()

    def steps(self, total: int, model, tokenizer, made_from: dict[str, str], **others):
        """Yield 0..total-1 under a progress bar; between two steps, save if it is time to.

        made_from: the `fingerprint` of all that the run begins with, such as its data. It is kept
        with the results, and --resume compares. model and others: all that changes from step to
        step and has a state_dict. They are saved every cfg.save_every steps and loaded again under
        --resume. All other randomness must follow from (seed, step), so there is none to save.
        Ctrl-C and SIGTERM let the step in progress finish, save, and exit with status 130.
        """
        trained = {"model": model, **others}
        self.identity = {
            "stage": self.stage,
            "model_config": asdict(model.config),
            "tokenizer": tokenizer.state,
            "train_config": asdict(self.cfg),
            "made_from": {**made_from, "tokenizer": fingerprint(tokenizer.state)},
        }
        on_first_rank(self.make_folder)
        first = self._load(trained) if self.cfg.resume else 0
        if self.check:
            for past in range(first):  # so that the summary knows of it
                self.check.look(self.rows, past)
        learning = {k: v for k, v in trained.items() if isinstance(v, torch.nn.Module)}
        watch = Watch(learning, patience=2 if self.stage == "ppo" else 3)
        device = next(model.parameters()).device
        # disable=None: no bar where the output is not a terminal, say a log file
        silent = True if RANK > 0 else None
        self.bar = tqdm(range(first, total), self.name, total, initial=first, disable=silent)
        with asked_to_stop() as asked, contextlib.ExitStack() as on_failure:
            on_failure.callback(self.release)  # a notebook lives on if its run is stopped or fails
            for step in self.bar:
                yield step
                for sentence in watch.look(self.rows):
                    self.say(sentence)
                if self.check:
                    for sentence in self.check.look(self.rows, step):
                        self.say(sentence)
                # All ranks stop together: one that is gone would keep the others waiting.
                stop = mean_over_ranks(device, asked=bool(asked))["asked"] > 0
                if stop or ((step + 1) % self.cfg.save_every == 0 and step + 1 < total):
                    self._save(trained, step + 1)
                if stop:
                    name = f" --name {self.name}" if self.cfg.name else ""
                    print(
                        f"\nstopped after {self.unit} {step + 1}. `python train_{self.stage}.py"
                        f"{name} --resume` (with the same options) resumes "
                        f"{self.unfinished}/resume.pt"
                    )
                    sys.exit(130)
            on_failure.pop_all()

    def release(self):
        """Let other processes into the folder."""
        if self.release_lock:  # of rank 0
            self.release_lock()
        self.release_lock = None

    def _save(self, trained, step):
        if RANK > 0:
            return
        self.write_log()
        states = {name: part.state_dict() for name, part in trained.items()}
        cost = {"rows": self.rows, "forwards": self.forwards, "seconds": self.elapsed()}
        checkpoint = {**self.identity, "step": step, **cost, **states}
        save_checkpoint(self.unfinished / "resume.pt", checkpoint)

    def _load(self, trained) -> int:
        if not (self.unfinished / "resume.pt").exists():
            raise InputError(
                f"--resume: no run to resume in {self.unfinished}/; start without --resume"
            )
        saved = load_checkpoint(self.unfinished / "resume.pt")
        before, default = saved["train_config"], type(self.cfg)()
        free = ("resume", "out", "name", "device", "threads", "check", *COST_ONLY)
        paths = ("init", "rm", "data")  # files may have moved; what is in them is compared below
        for name, now in asdict(self.cfg).items():
            was = before.get(name, getattr(default, name))  # as if there had been no such option
            if now != was and name not in free + paths:
                option = f"--{name} {was!r}"
                if isinstance(was, bool):
                    option = f"--{name}" if was else f"--no-{name}"
                raise InputError(f"--resume: the run to resume had {option}, not {now!r}")
        made_from = self.identity["made_from"]
        for name in saved["made_from"] | made_from:
            if saved["made_from"].get(name) != made_from.get(name):
                raise InputError(
                    f"--resume: {MADE_FROM[name]} has changed since the run began, so this would "
                    "be a different run; start again without --resume"
                )
        for name, part in trained.items():
            part.load_state_dict(saved[name])
        self.rows, self.forwards, self.seconds = saved["rows"], saved["forwards"], saved["seconds"]
        return saved["step"]

    def elapsed(self) -> float:
        """Seconds of this run, including those before --resume."""
        return self.seconds + time.perf_counter() - self.started

    def count(self, tokens: int, passes: float):
        """Add `passes` passes over `tokens` tokens, padding left out, to the cost of this run.

        The unit is a forward pass of the language model over one token. A backward pass counts as
        two, and a model with a third of the layers as a third. All stages count like this, so that
        their costs can be compared.
        """
        self.forwards += tokens * passes

    def log(self, step: int, **numbers: float):
        """Add numbers to the row of this step. log.csv counts steps from 0, the screen from 1.

        Raises InputError if one of the numbers is not finite.
        """
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{self.stage}: {name} is {value} at step {step}, so training stops. "
                    "The last checkpoint is untouched; a lower learning rate may help."
                )
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1].update({name: float(value) for name, value in numbers.items()})
        shown = {columns[0] for columns in self.panels.values()}  # the first curve of every panel
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in self.rows[-1].items() if k in shown})

    def report(self, step: int, *columns: str):
        """Print the last row of some columns of the log, leaving out those without a value."""
        row = self.rows[-1]
        numbers = (f"{name.replace('_', ' ')} {row[name]:#.3g}" for name in columns if name in row)
        self.say(f"{self.unit} {step + 1:5d}  {'  '.join(numbers)}  {self.elapsed():.0f} s")

    def say(self, text: str):
        """Print a line without tearing the progress bar."""
        tqdm.write(text)

    def write_log(self):
        """log.csv and curve.png, of the steps so far."""
        write_csv(self.rows, self.unfinished / "log.csv")
        plot(self.rows, self.panels, self.unfinished / "curve.png", self.unit)

    def finish(self, model, samples: str, **extra):
        """Write the results of a finished run, which then are its folder."""
        print(samples)
        if RANK > 0:
            return
        self.write_log()
        (self.unfinished / "samples.txt").write_text(samples, encoding="utf-8")
        cost = {"seconds": round(self.elapsed(), 1), "forward_equivalents": self.forwards}
        cost["peak_gb"] = peak_gb()
        (self.unfinished / "cost.json").write_text(json.dumps(cost))
        result = {**self.identity, "model": model.state_dict(), **extra}
        save_checkpoint(self.unfinished / "ckpt.pt", result)
        # If killed before this line, --resume finds resume.pt, and does the last steps again.
        replace_folder(self.folder, self.unfinished)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        self.release()
        if self.check:
            print(self.check.summary())
        print(f"{self.name}: {self.elapsed():.0f} seconds, results in {self.folder}/")


def run_path(out: str, name: str) -> Path:
    """out/name. Raises InputError if that leads elsewhere, or into what evaluation and experiments
    write."""
    taken = "base best_of_n experiments quick unfinished".split()
    taken += "report.json report.md report.png report_details.md".split()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in taken:
        raise InputError(
            f"--name {name}: choose a plain name, of letters and digits, other than "
            f"{', '.join(taken)}"
        )
    return Path(out) / name


def acquire_lock(folder: Path):
    """Keep other processes out of a folder until this one ends, however it ends. Returns a function
    that releases it earlier. Raises InputError if another process has it.

    A file beside the folder says who that is. It stays: were it deleted, a process that has just
    opened it and one that makes it anew would both hold "the" lock. Windows has no such locks.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in LOCKS:  # a notebook, in which a run has failed, tries again
        os.close(LOCKS.pop(path))
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 200).decode(errors="replace")
        os.close(file)
        raise InputError(
            f"another run is using {folder} ({holder}): wait for it, stop it, or choose another "
            "--name or --out"
        )
    except OSError:
        pass  # a file system without locks
    LOCKS[path] = file  # which the system closes, and so releases, when the process ends
    os.ftruncate(file, 0)
    since = time.strftime("%Y-%m-%d %H:%M")
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())

    def release():
        if LOCKS.get(path) == file:  # not the next run's
            os.close(LOCKS.pop(path))

    return release


def replace_folder(old: Path, new: Path):
    """Let the folder `new` take the place and the name of `old`. What only `old` has is kept.

    Readers see one or the other, even if this process is killed in between: Linux can swap two
    names at once. Elsewhere there is a moment without either, and if the process is killed in it,
    the next run of that name finds the old folder put aside (see `make_folder`).
    """
    aside = new.with_name(f".{new.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if not old.exists():
        os.rename(new, old)
        return
    for file in old.rglob("*"):  # the user's own, say
        copy = new / file.relative_to(old)
        if not os.path.lexists(copy) and (file.is_symlink() or not file.is_dir()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, copy, follow_symlinks=False)  # never half of it, as a copy might be
            except OSError:  # a file system without links
                shutil.copy2(file, copy, follow_symlinks=False)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = os.fsencode(old), os.fsencode(new)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "renameat2"):
        if libc.renameat2(here, paths[0], here, paths[1], exchange) == 0:
            shutil.rmtree(new)  # which is the old one by now
            return
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside)


def stage_of(path: Path) -> str | None:
    """The stage whose checkpoint this is; None if there is none."""
    # mmap: the weights, by far the most of it, stay on disk
    return load_checkpoint(path, mmap=True)["stage"] if path.exists() else None


@contextlib.contextmanager
def asked_to_stop():
    """Inside it, Ctrl-C and SIGTERM stop nothing: they only append True to the list it yields."""
    asked = []
    if threading.current_thread() is not threading.main_thread():  # only the main one gets signals
        yield asked
        return

    def hear(*_):
        if not asked:  # by the system's own call, since this may interrupt a print
            with contextlib.suppress(OSError):  # nobody reads, or the shell has closed it
                os.write(2, b"\nfinishing this step, then saving ...\n")
        asked.append(True)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, hear) for s in signals]
    try:
        yield asked
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def write_csv(rows: list[dict], path: Path):
    """One line per row; columns that a row lacks stay empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


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


def plot(rows: list[dict], panels: dict[str, list[str]], path: Path, unit: str):
    """Draw log columns against the step into a PNG file. panels: {what a panel shows: columns}."""
    measured = {name for row in rows for name in row}
    panels = {what: names for what, names in panels.items() if measured & {*names}}
    columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
    lines = math.ceil(len(panels) / columns)
    from matplotlib.figure import Figure  # takes half a second, so not before it is needed

    figure = Figure(figsize=(4.5 * columns, 3.2 * lines))
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (what, names) in zip(axes.flat, panels.items()):
        limits = None
        for name, colour in zip(names, COLOURS):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if not points:
                continue
            x, y = map(np.array, zip(*points))
            label = name.replace("_", " ")
            if len(points) <= 60:
                axis.plot(x, y, "o-", color=colour, ms=3, label=label)
            else:  # many noisy points: their running mean is what the eye should follow
                width = len(points) // 30
                mean = np.convolve(y, np.ones(width) / width, "valid")
                axis.plot(x, y, color=colour, lw=0.5, alpha=0.4)
                axis.plot(x[width - 1 :], mean, color=colour, label=label)
                limits = limits or (0.9 * y.min(), np.percentile(y, 97.5))
        if names[0] in ("loss", "grad_norm") and limits is not None:
            axis.set_ylim(*limits)  # the first steps would flatten all the rest
        axis.set(xlabel=unit, ylabel=what)
        axis.tick_params(labelbottom=True)  # in all rows of panels
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
