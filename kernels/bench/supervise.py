"""A worker process, watched: its crash or hang costs one entry, not the call.

A kernel that has never run on a chip may hang it or read where it must not; both end the process
that launched it (a hang: by this one). The entry is noted as crashed, and a new worker goes on.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

WORKER = (sys.executable, "-m", "kernels.bench.worker")
START_SECONDS = 120.0
"Until the first answer: importing torch, making a context."
MOST_RESTARTS = 8
BUDGET_SPENT = "the budget is spent"


@dataclass
class Ended:
    """How one worker ended."""

    finished: bool
    reason: str
    case: str = ""
    fingerprint: str = ""
    entry: str = ""


def watch(
    job: dict[str, Any],
    heard: Callable[[dict[str, Any]], None],
    *,
    deadline: float,
    errors: IO[bytes] | int,
    command: Sequence[str] = WORKER,
    cwd: Path | None = None,
    patience: float = START_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Ended:
    """Run one worker to its end, its silence or the deadline; hand every event to `heard`.

    Args:
        deadline: of `clock`; then the worker is ended, whatever it does.
        patience: seconds of silence before its first answer; each "entry" sets its own.
        errors: where its standard error goes.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=cwd
    )
    assert process.stdin is not None and process.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    ended = Ended(False, "")
    try:
        with suppress(BrokenPipeError):  # it is gone already: its code is read below
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        while not ended.reason:
            wait = min(patience, max(deadline - clock(), 0.0))
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                out_of_time = clock() >= deadline
                ended.finished = out_of_time
                ended.reason = BUDGET_SPENT if out_of_time else f"no answer for {patience:.0f} s"
                break
            if line is None:
                ended.reason = f"the process ended with code {process.wait()}"
                break
            event = json.loads(line)
            _follow(event, ended)
            patience = event.get("patience", patience)
            heard(event)
            if event["event"] == "end":
                ended.finished, ended.reason = True, event["why"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return ended


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    try:
        for line in stream:
            lines.put(line)
    except ValueError:  # closed under us: the worker was ended
        pass
    lines.put(None)


def _follow(event: dict[str, Any], ended: Ended) -> None:
    """Which case and entry the worker is in."""
    if event["event"] == "case":
        ended.case, ended.fingerprint, ended.entry = event["case"], event["fingerprint"], ""
    elif event["event"] == "entry":
        ended.entry = event["entry"]
    elif event["event"] in ("row", "left"):
        ended.case = ended.entry = ""
