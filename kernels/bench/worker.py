"""The process that holds the GPU: reads a job as JSON, answers with one JSON object a line.

    job      {suites, scale, cases, done, crashed, seconds, ceilings, torch}
    answers  {"event": "machine", "gpu", "ceilings"}       once
             {"event": "case", "case", "fingerprint"}      this one begins
             {"event": "entry", "entry", "patience"}       ... this entry of it: hangs after so long
             {"event": "row", "row"}                       it is finished
             {"event": "left", "case", "why"}              it is not measured in this call
             {"event": "end", "why"}                       finished, or why it stopped

Whatever else is printed here goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

import torch

from kernels.bench import ceilings, machine
from kernels.bench.cases import Case, Setting
from kernels.bench.measure import PATIENCE, STAGES, DeviceLost, failed, on_gpu
from kernels.bench.suites import select
from kernels.bench.supervise import BUDGET_SPENT
from kernels.bench.timing import OutOfTime
from kernels.dispatch import arch

LEAST_SECONDS = 20.0
"No case is begun with less than this left."


def main() -> None:
    """Entry point of `python -m kernels.bench.worker`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work(json.load(sys.stdin), answers)


def work(job: dict[str, Any], answers: TextIO) -> None:
    """Measure the cases of a job, in order, until the time is up."""
    deadline = time.monotonic() + job["seconds"]

    def say(event: str, **more: Any) -> None:
        answers.write(json.dumps({"event": event, **more}) + "\n")

    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(job["scale"], "triton", arch(device))
    say("entry", entry="ceilings", patience=PATIENCE["peer"])
    limits = job["ceilings"] or ceilings.measure(device)
    say("machine", gpu=machine.describe(device), ceilings=limits)
    ended = "finished"
    for case in select(job["suites"], job["cases"], setting):
        fingerprint = case.fingerprint()
        crashed = job["crashed"].get(case.id, {})
        if job["done"].get(case.id) == fingerprint:
            say("left", case=case.id, why="done before")
        elif stages := [stage for stage in STAGES if stage in crashed]:
            say("left", case=case.id, why=f"{stages[0]}: {crashed[stages[0]]}")
        elif deadline - time.monotonic() < LEAST_SECONDS:
            ended = BUDGET_SPENT
            say("left", case=case.id, why=ended)
        else:
            say("case", case=case.id, fingerprint=fingerprint)
            try:
                row = _measured(case, device, limits, crashed, deadline, say)
            except OutOfTime as short:
                ended = BUDGET_SPENT
                say("left", case=case.id, why=f"{ended}: {short}")
            else:
                say("row", row=row)
    say("end", why=ended)


def _measured(
    case: Case,
    device: torch.device,
    limits: Any,
    crashed: dict[str, str],
    deadline: float,
    say: Any,
) -> dict[str, Any]:
    """Its row; one that says why, if inputs or oracle cannot be made."""
    try:
        return on_gpu(
            case,
            device,
            limits,
            crashed=crashed,
            deadline=deadline,
            report=lambda name, patience: say("entry", entry=name, patience=patience),
        )
    except DeviceLost as lost:
        # Leaving takes the broken context away; the supervisor starts the next process.
        print(f"the GPU's context was lost: {lost}", file=sys.stderr, flush=True)
        os._exit(3)
    except OutOfTime:
        raise
    except Exception as error:
        traceback.print_exc()
        return failed(case, f"{type(error).__name__}: {error}")
    finally:
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
