"""`afferent bench suite=<suite>`: speed as ratios, measured in one run on this machine.

A ratio compares two medians of interleaved repetitions (A B A B ...), so that a machine whose speed
drifts drifts for both. Absolute times are shown for orientation only.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import did_you_mean
from training.errors import UserError

SUITES = ("training",)


@dataclass(frozen=True)
class Measurement:
    """One line of the table: how long `what` took beside `peer`."""

    what: str
    peer: str
    seconds: float
    peer_seconds: float
    limit: float  # the ratio must not exceed this

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def interleaved(
    first: Callable[[], None], second: Callable[[], None], repeats: int, warmup: int = 2
) -> tuple[float, float]:
    """Median seconds of two functions, called in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(warmup + repeats):
        for function, kept in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            if index >= warmup:
                kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def table(measurements: list[Measurement]) -> str:
    """The measurements as text, ratios first."""
    lines = [f"{'ratio':>7}  {'limit':>6}  {'ours':>10}  {'peer':>10}  what / against what"]
    for m in measurements:
        verdict = "" if m.ratio <= m.limit else "  <-- over its limit"
        lines.append(
            f"{m.ratio:7.3f}  {m.limit:6.3f}  {m.seconds * 1e3:7.1f} ms  "
            f"{m.peer_seconds * 1e3:7.1f} ms  {m.what} / {m.peer}{verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point; exit code 1 if a ratio is over its limit."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(f"afferent bench suite=<{'|'.join(SUITES)}> [repeats=N]\n\n{__doc__}")
        return
    try:
        given = parse(words)
        suite = importlib.import_module(f"scripts.benchmarks.{given['suite']}")
        measurements = suite.run(int(given["repeats"]))
    except UserError as error:
        print(f"afferent: {error}", file=sys.stderr)
        sys.exit(error.code)
    print(table(measurements))
    print(save(given["suite"], measurements))
    sys.exit(any(m.ratio > m.limit for m in measurements))


def parse(words: list[str]) -> dict[str, str]:
    """key=value words, checked. Raises UserError."""
    given = {"suite": "", "repeats": "9"}
    for word in words:
        key, _, value = word.partition("=")
        if key not in given:
            raise UserError(f"there is no key `{key}`.{did_you_mean(key, list(given))}")
        given[key] = value
    if given["suite"] not in SUITES:
        near = did_you_mean(given["suite"], SUITES)
        raise UserError(
            f"suite={given['suite']}: there is no such suite.{near} Use: {', '.join(SUITES)}"
        )
    if not given["repeats"].isdigit() or int(given["repeats"]) < 1:
        raise UserError(f"repeats={given['repeats']} must be a whole number, at least 1")
    return given


def save(suite: str, measurements: list[Measurement]) -> Path:
    """Write the measurements and where they come from below the runs directory."""
    from training.files import write_json
    from training.provenance import provenance

    path = Path(os.environ.get("AFFERENT_RUNS", "runs")) / "bench" / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(m), "ratio": m.ratio} for m in measurements]
    write_json(path, {"suite": suite, "measurements": json.loads(json.dumps(rows)), **provenance()})
    return path


if __name__ == "__main__":
    main()
