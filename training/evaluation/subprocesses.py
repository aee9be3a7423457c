"""A process for each run of a paper, one or several at a time.

Torch and jax runs never share a process, and a run that crashes costs only the claims that read
it. A signal that asks us to stop reaches every process once; each saves, and no more begin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from training.errors import RunStopped
from training.evaluation.claims import ROOT
from training.evaluation.launch import Launch, PlannedRun
from training.logging import Progress, clock

FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


class Subprocesses(Launch):
    """Launches runs, from several threads if need be; one line shows how far they all are.

    Args:
        jobs: how many are at work at once; each gets its share of the cores as OMP_NUM_THREADS,
            unless that is set. With one the libraries choose.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self.received: list[signal.Signals] = []
        self.sent: dict[subprocess.Popen[str], int] = {}  # signals that each process has got
        self.at: dict[str, str] = {}  # label -> its progress line
        self.progress = Progress()

    def __call__(self, run: PlannedRun, label: str) -> str | None:
        """Train in a process of its own; its output goes to reproduce.log in the run directory.

        Returns why it failed, or None. Raises RunStopped when it was asked to stop.
        """
        if self.received:
            raise stopped(self.received, 85)
        run.path.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with (
            open(run.path / "reproduce.log", "a", encoding="utf-8") as log,
            subprocess.Popen(
                [sys.executable, "-m", "scripts.train", *run.overrides],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                process_group=0,  # a Ctrl-C reaches it once, through us
            ) as child,
            self.watching(child),
        ):
            assert child.stderr is not None
            tail = self.follow(child.stderr, log, label)
            code = child.wait()
        wall_s = time.monotonic() - began
        with open(run.path / "launches.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"wall_s": round(wall_s, 1), "code": code}) + "\n")
        if code == 0:
            self.progress.message(f"{label}: finished in {clock(wall_s)}")
        if self.received or code in (85, 130):  # also where it was past stopping at the signal
            raise stopped(self.received, code)
        return None if code == 0 else why(code, tail)

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if self.jobs > 1:
            found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        return found

    def follow(self, stream: Iterable[str], log: TextIO, label: str) -> list[str]:
        """Copy the output to the log, show the progress line; returns the last lines."""
        tail: deque[str] = deque(maxlen=20)
        for line in stream:
            log.write(line)
            log.flush()
            if line.startswith("step "):
                self.at[label] = line.strip()
                self.progress.show(self.line())
            elif line.strip():
                tail.append(line.strip())
        self.at.pop(label, None)
        self.progress.close()
        return list(tail)

    def line(self) -> str:
        """All of the progress of one run; how far each is, of several."""
        now = dict(self.at)
        if len(now) == 1:
            return "".join(f"{label}: {text}" for label, text in now.items())
        return ", ".join(f"{label}: {text.partition(' |')[0]}" for label, text in now.items())

    @contextmanager
    def watching(self, child: subprocess.Popen[str]) -> Iterator[None]:
        """Hand signals on to the process while it is at work."""
        self.sent[child] = 0
        try:
            with self.taking_signals():
                self.hand_on(child)
                yield
        finally:
            del self.sent[child]

    def hand_on(self, child: subprocess.Popen[str]) -> None:
        """Send what has come since the last time."""
        for number in self.received[self.sent[child] :]:
            self.sent[child] += 1
            child.send_signal(FORWARDED[number])

    def stop(self) -> None:
        """Ask every process to save and end, unless that was done."""
        if not self.received:
            self.take(signal.SIGTERM)

    def take(self, number: int, _: Any = None) -> None:
        """Hand a signal on to every process."""
        self.received.append(signal.Signals(number))
        for child in list(self.sent):
            self.hand_on(child)

    @contextmanager
    def taking_signals(self) -> Iterator[None]:
        """Signals to this process stop the runs; only the main thread can arrange it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.take) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)


def stopped(received: list[signal.Signals], code: int) -> RunStopped:
    keyboard = signal.SIGINT in received or (not received and code == 130)
    return RunStopped(
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
