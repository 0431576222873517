"""The command line: python -m data.experiments."""

from dataclasses import dataclass
from pathlib import Path

from data import experiments
from data.experiments.base import bases
from data.experiments.broken import broken
from data.experiments.critics import critics
from data.experiments.frontier import frontier
from data.experiments.mixtures import mixtures
from data.experiments.overoptimisation import overoptimisation
from data.experiments.pairs import pairs
from data.run import run_script

__doc__ = experiments.__doc__  # the map of the experiments is what -h prints

# Each takes the folder of its runs, that of its results, the bases, and whether to be quick. It
# runs its jobs, then writes NAME.csv and draws NAME.png.
EXPERIMENTS = {
    "frontier": frontier,
    "critics": critics,
    "overoptimisation": overoptimisation,
    "pairs": pairs,
    "tasks": mixtures,
    "broken": broken,
}


@dataclass
class Config:
    quick: bool = False  # one seed and fewer settings
    only: str = ""  # experiments to run, separated by commas ("" = all)
    base: str = "out"  # folder in which the README's commands have run, with seed 0
    out: str = ""  # folder of the runs made here ("" = BASE/experiments, or BASE/quick)
    results: str = ""  # folder for CSV and PNG files ("" = that of the runs)

    def __post_init__(self):
        self.only = self.only or ",".join(EXPERIMENTS)
        unknown = set(self.only.split(",")) - set(EXPERIMENTS)
        if unknown:
            raise ValueError(
                f"--only {self.only}: there are {', '.join(EXPERIMENTS)}, "
                f"but not {', '.join(map(repr, sorted(unknown)))}"
            )
        self.out = self.out or f"{self.base}/{'quick' if self.quick else 'experiments'}"
        self.results = self.results or self.out


def main(cfg: Config):
    """Run the experiments, one after another."""
    out, results = Path(cfg.out), Path(cfg.results)
    try:
        start = bases(out, Path(cfg.base), seeds=1 if cfg.quick else 3)
        results.mkdir(parents=True, exist_ok=True)
        for name in cfg.only.split(","):
            EXPERIMENTS[name](out / name, results, start, cfg.quick)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command resumes")


if __name__ == "__main__":
    run_script(main, Config)
