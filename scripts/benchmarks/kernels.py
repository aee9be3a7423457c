"""The kernels on this machine's GPU: a worker is watched, and its rows are kept as they come.

A second call with the same `out` skips the cases it has, unless the sources of their kernels have
changed. Without a GPU nothing is timed and nothing is written.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.bench import machine, plot, results, supervise, table
from kernels.bench.cases import Setting
from kernels.bench.measure import dry_run
from kernels.bench.suites import select
from training.errors import RunStopped, UserError
from training.files import write_json
from training.provenance import ROOT, provenance

MARGIN_SECONDS = 5.0
"The worker stops this long before it would be stopped."


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    suites: tuple[str, ...]
    out: Path
    budget: float = 600.0
    "Seconds of this call."
    cases: str = ""
    "Part of the ids of the cases to run."
    scale: str = "h200"
    log: Path = Path("runs/bench/kernels.log")
    "What the workers print."


def check(options: Options) -> int:
    """Compose every case at tiny size and check its entries on the CPU; exit code."""
    count = failed = 0
    for case in _some(options, Setting("tiny", "torch", 0)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex says that it is not compiled
            row = dry_run(case)
        count += 1
        said = [e for e in row["entries"] if e["status"] != "left out"]
        bad = [e for e in said if e["status"] != "right"]
        failed += len(bad)
        left = len(row["entries"]) - len(said)
        print(f"{case.id}: {len(said) - len(bad)} right, {left} need a GPU")
        for entry in bad:
            print(f"  {entry['name']}: {entry['reason']}")
    print(f"dry run: nothing was timed; {count} cases composed, {failed} entries wrong")
    return int(failed > 0)


def _some(options: Options, setting: Setting) -> list[Any]:
    found = list(select(options.suites, options.cases, setting))
    if not found:
        raise UserError(
            f"cases={options.cases}: no case of suite={','.join(options.suites)} has that in its "
            "name; dry_run=true lists them"
        )
    return found


def run(options: Options, command: Sequence[str] = supervise.WORKER) -> int:
    """Measure on the GPU, print the tables, write results and figure; exit code."""
    if (reason := machine.no_gpu()) is not None:
        raise UserError(
            f"no GPU: not run. {reason}, and a CPU's time is not a kernel's. "
            "dry_run=true checks every case here without timing"
        )
    _some(options, Setting(options.scale, "triton", 0))
    document = opened(options.out, machine.gpu_name())
    call = Call(options, document)
    why = call.work(command)
    print(table.text(document))
    print(f"{why}; the same command goes on where it ended" if why != "finished" else why)
    print(options.out)
    if any(row["complete"] for row in document["cases"]):
        with suppress(ImportError):  # the figure needs matplotlib; the results do not
            print(*plot.draw(document, options.out), sep="\n")
    failures = results.wrong(document)
    print(*failures, sep="\n", end="\n" if failures else "")
    return int(bool(failures))


def opened(path: Path, gpu: str) -> results.Document:
    """The results to go on with, or new ones. Raises UserError if they are another GPU's."""
    if not path.exists():
        return results.empty()
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"out={path} is no JSON ({error}): give another out=") from error
    problem = results.problem_with(document, gpu)
    if problem is not None:
        raise UserError(f"out={path} {problem}: give another out=")
    return document


def tail(log: Path, characters: int = 300) -> str:
    """The end of a log, on one line."""
    return " ".join(log.read_text(errors="replace")[-characters:].split())


class Call:
    """One call of the command: its workers, and what they add to the document."""

    def __init__(
        self,
        options: Options,
        document: results.Document,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.document, self.clock = options, document, clock
        self.deadline = clock() + options.budget
        self.ceilings: dict[str, Any] | None = None
        self.index = len(document["calls"])

    def work(self, command: Sequence[str]) -> str:
        """Run workers until the cases or the budget are used up; how it ended."""
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        log = self.options.log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        for _ in range(supervise.MOST_RESTARTS + 1):
            with open(log, "ab") as errors:
                ended = supervise.watch(
                    self.job(),
                    self.heard,
                    deadline=self.deadline,
                    errors=errors,
                    command=command,
                    cwd=ROOT,
                    clock=self.clock,
                )
            if ended.finished:
                return ended.reason
            last = tail(log)
            if not ended.case:
                raise RunStopped(f"the bench's worker failed: {ended.reason}: {last} ({log})")
            ended.reason += f": {last}"
            print(f"{ended.case}: {ended.entry}: {ended.reason}; going on without it", flush=True)
            results.put_crash(
                self.document, ended.case, ended.fingerprint, ended.entry, ended.reason
            )
            self.save()
        return f"{supervise.MOST_RESTARTS} workers ended early: see {log}"

    def job(self) -> dict[str, Any]:
        """What the next worker is to do."""
        rows = self.document["cases"]
        return {
            "suites": self.options.suites,
            "scale": self.options.scale,
            "cases": self.options.cases,
            "seconds": self.deadline - self.clock() - MARGIN_SECONDS,
            "ceilings": self.ceilings,
            "done": {row["case"]: row["fingerprint"] for row in rows if row["complete"]},
            "crashed": {
                row["case"]: results.crashes(self.document, row["case"], row["fingerprint"])
                for row in rows
                if not row["complete"]
            },
        }

    def heard(self, event: dict[str, Any]) -> None:
        """Keep what a worker says."""
        kind = event["event"]
        if kind == "machine" and self.ceilings is None:
            self.ceilings = event["ceilings"]
            facts = provenance()
            facts["dirty"] = bool(facts.pop("dirty_diff"))
            facts |= {"scale": self.options.scale, "budget_s": self.options.budget}
            facts |= {"gpu": event["gpu"], "ceilings": event["ceilings"]}
            self.document["calls"].append(facts)
            rates = {name: found["rate"] for name, found in event["ceilings"].items()}
            print(
                f"{event['gpu']['name']}: copy {rates['copy'] / 1e9:.0f} GB/s, "
                f"matmul {rates['matmul'] / 1e12:.0f} TFLOP/s, host {rates['host'] / 1e9:.1f} GB/s"
            )
            self.save()
        elif kind == "row":
            results.put(self.document, {**event["row"], "call": self.index})
            self.save()
            said = list(table.lines(event["row"], self.ceilings or {}))
            print(*said, event["row"].get("reason", ""), sep="\n", flush=True)
        elif kind == "left":
            print(f"{event['case']}: {event['why']}", flush=True)

    def save(self) -> None:
        write_json(self.options.out, self.document)
