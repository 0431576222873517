"""Runs of the five scripts with other options, or with a bug planted, one after another.

What is done is not done again, what was stopped goes on.
"""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.preferences import write_rows

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """One run of a script: `python train_<stage>.py --out <folder> --<option> <value> ...`."""

    folder: Path
    stage: str
    options: dict = field(default_factory=dict)
    minutes: float = 1.0  # about how long on two cores, for the bar
    pairs: list | None = None  # preferences to learn from, instead of out/preferences.jsonl
    edit: tuple = ()  # (file, right, wrong): run a copy of the project with this line changed

    def command(self) -> list[str]:
        """The words of the command line."""
        script = [sys.executable, f"train_{self.stage}.py", "--out", str(self.folder.resolve())]
        words = [(f"--{name}", str(value)) for name, value in self.options.items()]
        return script + [word for pair in words for word in pair]

    def is_done(self) -> bool:
        """Whether its checkpoint is there, and from this very command."""
        note = self.folder / f"{self.stage}.command"
        asked = json.dumps([self.command()[1:], self.edit])
        same = note.exists() and note.read_text() == asked
        if not same:  # never run, or with other options: start afresh
            shutil.rmtree(self.folder / self.stage, ignore_errors=True)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(asked)
        return (self.folder / self.stage / "ckpt.pt").exists()

    def run(self):
        """Run it, or go on with it. Exits with the last line it said if it fails."""
        where = ROOT
        if self.edit:
            where = self.folder.resolve() / "edited"
            plant(self.edit, where)
        if self.pairs is not None:
            write_rows(self.pairs, self.folder / "preferences.jsonl")
        command = self.command()
        if (self.folder / self.stage / "unfinished" / "ckpt.pt").exists():
            command.append("--resume")
        log = self.folder / f"{self.stage}.txt"
        with open(log, "w") as file:
            code = subprocess.run(command, cwd=where, stdout=file, stderr=file).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            said = log.read_text().strip().splitlines() or ["nothing"]
            raise SystemExit(f"{' '.join(command)}: {said[-1]} (all of it in {log})")

    def log(self, name: str, where: str = "") -> np.ndarray:
        """A column of its log.csv, of the steps that have a number there (or in column `where`)."""
        with open(self.folder / self.stage / "log.csv") as file:
            rows = [row for row in csv.DictReader(file) if row[where or name]]
        return np.array([float(row[name]) for row in rows])


def plant(edit: tuple, where: Path):
    """A copy of the project with one piece of one file changed."""
    file, right, wrong = edit
    (where / "data/expected").mkdir(parents=True, exist_ok=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/expected/*.csv")]:
        shutil.copy(path, where / path.relative_to(ROOT))
    text = (where / file).read_text("utf-8")
    assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
    (where / file).write_text(text.replace(right, wrong), "utf-8")


def run_jobs(jobs: list[Job]):
    """Run what is not done yet, under a bar that estimates the time left."""
    done = [job.is_done() for job in jobs]
    minutes = [job.minutes for job in jobs]
    start = sum(m for m, d in zip(minutes, done) if d)
    unit = "{desc}{percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    with tqdm(total=sum(minutes), initial=start, bar_format=unit) as bar:
        for job, is_done in zip(jobs, done):
            if not is_done:
                bar.set_description(f"{job.folder.name}: {job.stage}")
                job.run()
                bar.update(job.minutes)
