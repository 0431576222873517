"""Runs of the scripts with other options, or with a bug planted, one after another.

What is done is not done again, and what was stopped is resumed; unless the command has changed, or
a file that it starts from.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.experiments.bugs import ROOT, Bug, plant
from gpt import InputError


@dataclass
class Job:
    """One run: `python train_<stage>.py --out <out> --<option> <value> ...`.

    The stage may also be "preferences": then it is `python -m data.preferences`.
    """

    out: Path
    stage: str
    options: dict = field(default_factory=dict)
    minutes: float = 1.0  # about how long on two cores, for the bar
    bug: Bug | None = None  # run a copy of the project in which this is planted

    def __post_init__(self):
        self.out = self.out.resolve()  # a copy with a bug runs in a folder of its own
        self.folder = self.out / self.stage  # of its results
        self.unfinished = self.out / "unfinished" / self.stage
        self.result = self.folder / "ckpt.pt"  # what is there when it has run to its end
        self.command = [f"train_{self.stage}.py"]
        if self.stage == "preferences":
            self.result = self.out / "preferences.jsonl"
            self.command = ["-m", "data.preferences"]
        for name, value in {"out": self.out, **self.options}.items():
            self.command += [f"--{name}", str(value)]
        self.note = self.out / f"{self.stage}.command"  # says what the run in this folder is

    @property
    def identity(self) -> str:
        """What makes a run this one: its stage, its options, its bug, and what its files hold.

        Where they are does not, so a folder of runs may be moved. A file may be the result of an
        earlier job, and not there yet.
        """
        options = {}
        for name, value in self.options.items():
            if isinstance(value, Path):
                data = value.read_bytes() if value.exists() else b""
                value = hashlib.blake2b(data, digest_size=8).hexdigest()
            options[name] = value
        return json.dumps([self.stage, options, (self.bug or ())[:3]])

    def is_begun(self) -> bool:
        """Whether what is there, finished or not, comes from this very command and these files."""
        return self.note.exists() and self.note.read_text() == self.identity

    def is_done(self) -> bool:
        """Whether that has run to its end."""
        return self.is_begun() and self.result.exists()

    def run(self):
        """Run it, or resume it. Raises InputError with the last line that it said if it fails."""
        if not self.is_begun():  # what another command left there is of no use
            for folder in (self.folder, self.unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            self.result.unlink(missing_ok=True)
            self.out.mkdir(parents=True, exist_ok=True)
            self.note.write_text(self.identity)
        project = self.out / "edited" if self.bug else ROOT
        if self.bug:
            plant(self.bug, project)
        command = [sys.executable, *self.command]
        if (self.unfinished / "resume.pt").exists():
            command.append("--resume")
        log = self.out / f"{self.stage}.txt"
        with open(log, "w") as file:
            process = subprocess.Popen(command, cwd=project, stdout=file, stderr=file)
            try:
                code = process.wait()
            except KeyboardInterrupt:  # it has heard the Ctrl-C, too, and is saving its step
                process.wait()
                raise
        if code == 130:
            raise KeyboardInterrupt
        if code:
            said = log.read_text().strip().splitlines() or ["nothing"]
            raise InputError(
                f"{' '.join(command)}: {said[-1]} (exit code {code}; all that it said is in {log})"
            )


def run_jobs(jobs: list[Job]):
    """Run what is not done yet, under a bar that estimates the time left."""
    total = sum(job.minutes for job in jobs)
    left = sum(job.minutes for job in jobs if not job.is_done())
    unit = "{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    with tqdm(total=total, initial=total - left, bar_format=unit) as bar:
        for job in jobs:
            if job.is_done():  # asked again: an earlier one may have made new files for it
                continue
            bar.set_description(f"{job.out.name}: {job.stage}")
            job.run()
            bar.update(job.minutes)
