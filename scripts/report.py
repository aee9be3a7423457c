"""`afferent report <run | sweep | paper>`: writes its page and says where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from training.config import did_you_mean
from training.errors import UserError
from training.evaluation.claims import EXPERIMENTS
from training.evaluation.claims_file import papers
from training.evaluation.report import write_paper_report, write_run_report
from training.evaluation.run_files import is_run
from training.evaluation.sweep import write_sweep_summary

HELP = """afferent report <run | sweep | paper>

Writes one static page and prints its path; it needs no network and holds everything it shows.

  <run>     a run directory, or its path below runs/: quickstart/stdlib/cpu-seed0-1234abcd
            (an experiment's name is enough if it has one run); unfinished runs get a page too
  <sweep>   a sweep's directory, or its path below runs/: its table and plot are written again
  <paper>   a folder below experiments/: its claims, verdicts and figures
"""
NO_RUNS = ("sweeps", "reports", "checkpoints", "figures", "wandb", "tensorboard")
LISTED = 5  # runs named in a message


def main(experiments_root: Path = EXPERIMENTS) -> None:
    """Entry point: what the user can mend ends with one sentence and exit code 2."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(HELP, end="")
        return
    try:
        if len(words) != 1:
            raise UserError(f"name one run, sweep or paper. {existing(experiments_root)}")
        print(report(words[0], experiments_root))
    except UserError as error:
        print(f"afferent: {error}", file=sys.stderr)
        sys.exit(error.code)


def report(name: str, experiments_root: Path) -> str:
    """Write what `name` asks for; the last line of the answer is its path. Raises UserError."""
    for path in (Path(name), runs_root() / name):
        if is_run(path):
            return str(write_run_report(path))
        if any(path.glob("run_*.json")):
            return write_sweep_summary(path)
    name = name.strip("/").removeprefix("experiments/")
    if name in papers(experiments_root):
        return str(write_paper_report(name, experiments_root))
    below = list(run_directories(runs_root() / name))
    if len(below) == 1:
        return str(write_run_report(below[0]))
    if below:
        raise UserError(f"{name} has {len(below)} runs, name one: {listed(below)}")
    runs = [Path(shortened(path)) for path in run_directories(runs_root())]
    folders = {str(folder) for path in runs for folder in list(path.parents)[:-1]}
    known = [*papers(experiments_root), *sorted(folders), *map(str, runs)]
    near = did_you_mean(name, list(dict.fromkeys(known)))
    raise UserError(f"there is no run or paper `{name}`.{near} {existing(experiments_root)}")


def runs_root() -> Path:
    """Where runs are: AFFERENT_RUNS, or runs/ here."""
    return Path(os.environ.get("AFFERENT_RUNS", "runs"))


def run_directories(root: Path) -> Iterator[Path]:
    """Every run below `root`, without looking inside of one."""
    for folder, inside, _ in os.walk(root):
        if is_run(Path(folder)):
            inside.clear()
            yield Path(folder)
        inside[:] = sorted(name for name in inside if name not in NO_RUNS)


def shortened(path: Path) -> str:
    """The path below runs/."""
    return path.relative_to(runs_root()).as_posix()


def listed(paths: list[Path]) -> str:
    """The newest few, as they can be given here."""
    newest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    return ", ".join(shortened(path) for path in newest[:LISTED]) + more


def existing(experiments_root: Path) -> str:
    """What there is to report on."""
    runs = list(run_directories(runs_root()))
    said = f"Runs below {runs_root()}: {listed(runs)}." if runs else f"No runs below {runs_root()}."
    return f"{said} Papers: {', '.join(papers(experiments_root)) or 'none'}."


if __name__ == "__main__":
    main()
