"""`afferent reproduce paper=<paper> [scale=cpu|h200|paper] [seeds=N] [jobs=N] [fresh=true]
[--dry-run]`

Makes the runs that are missing, judges every claim and control, writes results/<scale>.json, the
figures and the README tables. Exits 1 if a claim that is judged at this scale is not reproduced.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from training.config import did_you_mean
from training.errors import UserError
from training.evaluation.claims import EXPERIMENTS, SCALES
from training.evaluation.claims_file import load_claims, one_of, papers
from training.evaluation.launch import Launch, PlannedRun, plan
from training.evaluation.reproduce import check_scale, is_trial, reproduce
from training.evaluation.tables import (
    console_table,
    limit,
    stale_results,
    update_tables,
    verdict_counts,
)
from training.evaluation.verdicts import described, failures

HELP = """afferent reproduce paper=<paper> [scale=cpu] [seeds=N] [jobs=N] [fresh=true] [--dry-run]
afferent reproduce --tables

Re-runs a paper's claims and judges them. Finished runs are not made again; an interrupted command
goes on when it is given again. Exit code 1: a claim did not come out. 2: something to mend.

  scale=cpu|h200|paper  which machine: two CPU cores, one large GPU, the paper's own
  seeds=N               seeds per run; fewer than claims.yaml says is a trial, nothing is written
  jobs=N                runs made at a time, each with its share of the cores; small ones gain
  fresh=true            put finished runs aside and make them again
  --dry-run             list runs, what is cached, and claims; run nothing
  --tables              regenerate the tables of every README from the recorded results
"""
KEYS = ("paper", "scale", "seeds", "jobs", "fresh", "dry_run", "tables")
FLAGS = {"--dry-run": "dry_run=true", "--tables": "tables=true"}


@dataclass
class Asked:
    """The command line."""

    paper: str | None = None
    scale: str = "cpu"
    seeds: int | None = None
    jobs: int = 1
    fresh: bool = False
    dry_run: bool = False
    tables: bool = False


def parse(words: list[str]) -> Asked:
    """Check the command line. Raises UserError."""
    asked = Asked()
    for word in (FLAGS.get(word, word) for word in words):
        key, given, value = word.partition("=")
        if not given or key not in KEYS:
            near = did_you_mean(key, [*KEYS, *FLAGS])
            raise UserError(
                f"reproduce knows no `{word}`.{near} Use: {', '.join(KEYS)} as key=value"
            )
        if key in ("fresh", "dry_run", "tables"):
            one_of(value, ("true", "false"), "value", key)
            setattr(asked, key, value == "true")
        elif key in ("seeds", "jobs"):
            if not value.isdecimal() or int(value) < 1:
                raise UserError(f"{word} must be a whole number of at least 1")
            setattr(asked, key, int(value))
            cores = os.cpu_count() or 1
            if asked.jobs > cores:
                raise UserError(f"{word}: this machine has {cores} cores; use at most that many")
        else:
            setattr(asked, key, one_of(value, SCALES, "scale", key) if key == "scale" else value)
    return asked


def run(asked: Asked, experiments_root: Path, launch: Launch | None) -> int:
    """Do what was asked; returns the exit code. Raises UserError."""
    if asked.tables:
        for file in update_tables(experiments_root.parent):
            print(f"updated {file.relative_to(experiments_root.parent)}")
        for sentence in stale_results(experiments_root.parent):
            print(sentence, file=sys.stderr)
        return 0
    if asked.paper is None:
        print(list_papers(experiments_root))
        return 0
    if asked.dry_run:
        print(dry_run(asked, experiments_root))
        return 0
    results, file = reproduce(
        asked.paper,
        asked.scale,
        seeds=asked.seeds,
        fresh=asked.fresh,
        experiments_root=experiments_root,
        launch=launch,
        jobs=asked.jobs,
    )
    print(console_table(results))
    print(file if file else "a trial with fewer seeds than claims.yaml says: nothing was written")
    return 1 if failures(results["claims"]) else 0


def list_papers(experiments_root: Path) -> str:
    """The papers, one line each, with their verdicts."""
    lines = ["afferent reproduce paper=<one of> [scale=cpu|h200|paper]"]
    names = papers(experiments_root)
    width = max((len(name) for name in names), default=0)
    for name in names:
        claims = load_claims(name, experiments_root)
        verdicts = "; ".join(f"{k}: {v}" for k, v in verdict_counts(claims).items())
        lines.append(f"  {name:<{width}}  {claims.about} ({verdicts})")
    return "\n".join(lines)


def dry_run(asked: Asked, experiments_root: Path) -> str:
    """Which runs there are, how far each is, what is judged."""
    assert asked.paper is not None
    claims = load_claims(asked.paper, experiments_root)
    check_scale(claims, asked.scale)
    claims = claims.at(asked.scale)
    runs = plan(claims, asked.scale, asked.seeds)
    lines = [f"{len(runs)} runs:"]
    for item in runs:
        lines.append(f"  {item.name:<16} {state(item):<28} {' '.join(item.overrides)}")
    judged = [claim for claim in claims.claims if asked.scale in claim.threshold]
    lines.append(f"{len(judged)} of {len(claims.claims)} claims are judged at scale={asked.scale}:")
    for claim in judged:
        record = described(claim, asked.scale)
        lines.append(f"  {claim.id} ({limit(record)}): {claim.statement}")
        lines += [f"    must hold: {control.statement}" for control in claim.controls]
    if is_trial(claims, asked.scale, asked.seeds):
        lines.append("a trial with fewer seeds than claims.yaml says: nothing would be written")
    return "\n".join(lines)


def state(item: PlannedRun) -> str:
    """How far a run is."""
    if item.results() is not None:
        return "cached"
    file = item.path / "status.json"
    if not file.exists():
        return "to run"
    status = json.loads(file.read_text())
    return f"{status['status']}, resumes" + (f" at {status['step']}" if "step" in status else "")


def main(experiments_root: Path = EXPERIMENTS, launch: Launch | None = None) -> None:
    """Entry point: what the user can mend ends with one sentence and its exit code."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(HELP, end="")
        return
    try:
        code = run(parse(words), experiments_root, launch)
    except UserError as error:
        print(f"afferent: {error}", file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        print("afferent: interrupted; the same command goes on", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
