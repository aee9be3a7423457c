"""The runs behind a paper's claims: which there are, and one process for each.

Torch and jax runs never share a process, and a run that crashes costs only the claims that read
it. Runs that have finished are not made again; one that was stopped goes on where it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from training.config import compose
from training.errors import RunStopped, UserError
from training.evaluation.claims import ROOT, PaperClaims
from training.evaluation.verdicts import RunOutcome
from training.logging import Progress, clock, read_rows
from training.run import finished
from training.run_directory import run_path
from training.schema import Device, TrainConfig
from training.seeding import stream_seed

PILOT_SEEDS = 1000  # seeds below are for people: thresholds are fixed on them, never judged
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a paper: what `afferent train <overrides>` would do."""

    name: str
    index: int
    overrides: tuple[str, ...]
    config: TrainConfig

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


Launch = Callable[[PlannedRun, str], str | None]  # (run, label) -> why it failed, or None


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
    drawn = judging_seeds(claims.name, max(counts.values(), default=0))
    return [
        planned(claims, scale, name, index, drawn[index])
        for index in range(len(drawn))
        for name, count in counts.items()
        if index < count
    ]


def planned(claims: PaperClaims, scale: str, name: str, index: int, seed: int) -> PlannedRun:
    spec = claims.runs[name]
    overrides = (
        f"experiment={spec.experiment}",
        f"scale={scale}",
        f"seed={seed}",
        *spec.at(scale)[1],
    )
    try:
        return PlannedRun(name, index, overrides, compose(overrides))
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


def execute(runs: Sequence[PlannedRun], launch: Launch) -> dict[str, RunOutcome]:
    """Make every run that has not finished. A failure ends the further seeds of its name.

    Raises RunStopped when interrupted; what was reached is saved.
    """
    outcomes = {run.name: RunOutcome() for run in runs}
    for number, run in enumerate(runs, 1):
        outcome = outcomes[run.name]
        if outcome.failure is not None:
            continue
        label = f"[{number}/{len(runs)}] {run.name}, seed {run.config.seed}"
        results = run.results()
        if results is None:
            print(f"{label}: {run.path}", file=sys.stderr, flush=True)
            failure = launch(run, label)
            results = run.results()
            if failure is not None:
                after = "failed" if results is None else "failed after its results were recorded"
                print(f"{label}: {after}: {failure}", file=sys.stderr, flush=True)
            if results is None:
                outcome.failure = failure or "it ended without results.json"
                continue
        outcome.results.append(results)
    return outcomes


def run_in_subprocess(run: PlannedRun, label: str) -> str | None:
    """Train in a process of its own; its output goes to reproduce.log in the run directory."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run.path.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (
        open(run.path / "reproduce.log", "a", encoding="utf-8") as log,
        subprocess.Popen(
            [sys.executable, "-m", "scripts.train", *run.overrides],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            process_group=0,  # a Ctrl-C reaches it once, through us
        ) as child,
        forwarding(child) as received,
    ):
        assert child.stderr is not None
        tail = follow(child.stderr, log, label)
        code = child.wait()
    wall_s = time.monotonic() - began
    with open(run.path / "launches.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"wall_s": round(wall_s, 1), "code": code}) + "\n")
    if code == 0:
        print(f"{label}: finished in {clock(wall_s)}", file=sys.stderr, flush=True)
    stop_if_asked(received, code)  # also where the run was past stopping when the signal came
    return None if code == 0 else why(code, tail)


def follow(stream: Iterable[str], log: TextIO, label: str) -> list[str]:
    """Copy the output to the log, show the progress line; returns the last lines."""
    progress = Progress()
    tail: deque[str] = deque(maxlen=20)
    for line in stream:
        log.write(line)
        log.flush()
        if line.startswith("step "):
            progress.show(f"{label}: {line.strip()}")
        elif line.strip():
            tail.append(line.strip())
    progress.close()
    return list(tail)


@contextmanager
def forwarding(child: subprocess.Popen[str]) -> Iterator[list[signal.Signals]]:
    """Hand signals on to the child, which saves and ends; yields those that came."""
    received: list[signal.Signals] = []

    def forward(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        child.send_signal(FORWARDED[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_if_asked(received: list[signal.Signals], code: int) -> None:
    """Raise RunStopped if the run did not fail but was asked to stop."""
    if not received and code not in (85, 130):
        return
    keyboard = signal.SIGINT in received or (not received and code == 130)
    raise RunStopped(
        "interrupted; the run is saved and results/ is as it was: the same command goes on "
        "(without fresh=true)",
        130 if keyboard else 85,
    )


def why(code: int, tail: list[str]) -> str:
    """One sentence for a run that failed, without this machine's paths."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = (tail[-1] if tail else f"exit code {code}").removeprefix("afferent: ")
    for place, name in ((str(ROOT), "."), (str(Path.home()), "~")):
        text = text.replace(place, name)
    return text if len(text) <= 300 else f"{text[:297]}..."


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
