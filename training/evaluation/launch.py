"""The runs behind a paper's claims: which there are, and in what order they are made.

Runs that have finished are not made again; one that was stopped goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import compose
from training.errors import UserError
from training.evaluation.claims import RUN, PaperClaims
from training.evaluation.verdicts import RunOutcome
from training.logging import read_rows
from training.run import finished
from training.run_directory import run_path
from training.schema import Device, TrainConfig
from training.seeding import stream_seed

PILOT_SEEDS = 1000  # seeds below are for people: thresholds are fixed on them, never judged


@dataclass(frozen=True)
class PlannedRun:
    """One run of a paper: what `afferent train <overrides>` would do."""

    name: str
    index: int
    overrides: tuple[str, ...]
    config: TrainConfig
    alone: bool
    after: tuple[Path, ...] = ()  # directories of the runs that this one begins from

    @property
    def path(self) -> Path:
        return run_path(self.config)

    def results(self) -> dict[str, Any] | None:
        """What it recorded, if it has finished."""
        return finished(self.config)

    def env(self) -> dict[str, Any]:
        """Its provenance, or {} before it has begun."""
        file = self.path / "env.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def wall_s(self) -> float:
        """Seconds spent on it, every start included."""
        launches = read_rows(self.path / "launches.jsonl")
        if launches:
            return sum(row["wall_s"] for row in launches)
        return (self.results() or {}).get("train_s", 0.0)


class Launch(ABC):
    """How a run is made: in a process (subprocesses.py), or as a test likes it."""

    @abstractmethod
    def __call__(self, run: PlannedRun, label: str) -> str | None:
        """Make the run; returns why it failed, or None. Raises RunStopped when asked to stop."""

    def stop(self) -> None:
        """Ask every run at work to save and end."""
        return

    def taking_signals(self) -> AbstractContextManager[None]:
        """While it is open, a signal to this process stops every run at work."""
        return nullcontext()


def judging_seeds(paper: str, count: int) -> list[int]:
    """The seeds a paper is judged on: fresh, distinct, the same on every machine.

    They lie in [1000, 2**31), away from the pilot seeds 0..99 on which thresholds are fixed.
    """
    found: list[int] = []
    draw = 0
    while len(found) < count:
        span = 2**31 - PILOT_SEEDS
        seed = PILOT_SEEDS + stream_seed(0, f"judging/{paper}", draw) % span
        draw += 1
        if seed not in found:
            found.append(seed)
    return found


def plan(claims: PaperClaims, scale: str, seeds: int | None = None) -> list[PlannedRun]:
    """Every run that the claims of this scale read, first seeds first. Raises UserError.

    `seeds` replaces the number of seeds of every run.
    """
    counts = {name: seeds or claims.runs[name].at(scale)[0] for name in claims.needed(scale)}
    found: dict[tuple[str, int], PlannedRun] = {}
    for index, seed in enumerate(judging_seeds(claims.name, max(counts.values(), default=0))):
        for name, count in counts.items():
            if index < count:
                known = {other: run.path for (other, i), run in found.items() if i == index}
                found[name, index] = planned(claims, scale, name, index, seed, known)
    return list(found.values())


def planned(
    claims: PaperClaims, scale: str, name: str, index: int, seed: int, known: Mapping[str, Path]
) -> PlannedRun:
    """Args: known: where the runs of this seed are that it may begin from."""
    spec = claims.runs[name]
    given = spec.at(scale)[1]
    overrides = (
        f"experiment={spec.experiment}",
        f"scale={scale}",
        f"seed={seed}",
        *(RUN.sub(lambda told: str(known[told[1]]), text) for text in given),
    )
    after = tuple(known[told] for text in given for told in RUN.findall(text))
    try:
        return PlannedRun(name, index, overrides, compose(overrides), spec.alone, after)
    except UserError as error:
        where = f"experiments/{claims.name}/claims.yaml: run {name}"
        raise UserError(f"{where}: {error}") from error


def require_device(runs: Sequence[PlannedRun], scale: str) -> None:
    """Raise UserError if a run that is still to be made needs a GPU and there is none."""
    waiting = [run for run in runs if run.config.scale.device == Device.cuda]
    if any(run.results() is None for run in waiting) and not has_gpu():
        raise UserError(
            f"scale={scale} needs a GPU and this machine has none: use scale=cpu, "
            "or give the same command on a machine that has one"
        )


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def execute(runs: Sequence[PlannedRun], launch: Launch, jobs: int = 1) -> dict[str, RunOutcome]:
    """Make every run that has not finished, `jobs` at a time, then those that must be alone.

    A run waits for those that it begins from, and others go before it. A failure ends the further
    seeds of its name. Raises RunStopped when interrupted; what was reached is saved.
    """
    failures: dict[str, str] = {}  # name of a run -> why
    stopping = threading.Event()

    def make(run: PlannedRun) -> None:
        if run.results() is None and not all(holds(path) for path in run.after):
            failures.setdefault(run.name, "a run that it begins from failed")
        if stopping.is_set() or run.name in failures or run.results() is not None:
            return
        label = f"[{runs.index(run) + 1}/{len(runs)}] {run.name}, seed {run.config.seed}"
        say(f"{label}: {run.path}")
        try:
            failure = launch(run, label)
        except BaseException:
            stopping.set()  # before this thread takes up the next run
            raise
        missing = run.results() is None
        if failure is not None:
            after = "failed" if missing else "failed after its results were recorded"
            say(f"{label}: {after}: {failure}")
        if missing:
            failures[run.name] = failure or "it ended without results.json"

    waiting = {run.path: run for run in reversed(runs)}  # two names may share a run
    ordered = [run for run in runs if waiting[run.path] is run]
    todo = [run for run in ordered if not run.alone]
    making: dict[Future[None], PlannedRun] = {}
    with launch.taking_signals(), ThreadPoolExecutor(jobs) as pool:
        try:
            while todo or making:
                unsettled = {run.path for run in (*todo, *making.values())}
                ready = [run for run in todo if unsettled.isdisjoint(run.after)]
                for run in ready[: jobs - len(making)]:
                    todo.remove(run)
                    making[pool.submit(make, run)] = run
                for made in wait(making, return_when=FIRST_COMPLETED).done:
                    del making[made]
                    made.result()
        except BaseException:
            launch.stop()
            pool.shutdown(cancel_futures=True)
            raise
        for run in ordered:
            if run.alone:
                make(run)
    return {run.name: outcome_of(run.name, runs, failures) for run in runs}


def holds(path: Path) -> bool:
    """Whether a run has finished there."""
    return (path / "results.json").exists()


def say(text: str) -> None:
    """A line, written at once: `print` would mix those of two threads."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def outcome_of(name: str, runs: Sequence[PlannedRun], failures: Mapping[str, str]) -> RunOutcome:
    """What the seeds of a name recorded, up to the first that has nothing."""
    outcome = RunOutcome()
    for run in runs:
        if run.name == name and outcome.failure is None:
            results = run.results()
            if results is None:
                outcome.failure = failures.get(name, "the run it shares failed")
            else:
                outcome.results.append(results)
    return outcome


def set_aside(runs: Sequence[PlannedRun]) -> None:
    """Rename the directories of runs, so that they are made again.

    Raises UserError, before anything is renamed, if one of them is still running.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    paths = [path for path in dict.fromkeys(run.path for run in runs) if path.exists()]
    for path in paths:
        with open(path / "lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"fresh=true: the run {path} is still running; wait for it or stop it"
                ) from None
    for path in paths:
        path.rename(path.with_name(f"{path.name}.before-{stamp}"))
