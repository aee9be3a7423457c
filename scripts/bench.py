"""`afferent bench suite=<suite>`: speed as ratios, measured in one run on this machine.

A ratio compares two medians of interleaved repetitions (A B A B ...), so that a machine whose speed
drifts drifts for both. Absolute times are shown for orientation only.

  suite=training      the training step on this machine, whatever it is
      repeats=9         repetitions of each side

  suite=serving      decoding behind one document for many requests: full context, shared, cartridge
      repeats=9         repetitions of each side
      scale=h200        or small, for a smaller card
      dry_run=true      check the arms at tiny size on the CPU; times nothing

  suite=attention,decode,...   our kernels against this GPU's own ceilings and named peers
      budget=600        seconds of this call; the same command goes on where it ended
      out=<file>.json   results; a case in it is skipped unless its kernels have changed
      cases=<part>      only cases with this in their name
      scale=h200        or small: a quarter as long, for a smaller card; targets are for h200
      dry_run=true      compose every case at tiny size and check it on the CPU; times nothing

Without a GPU the kernels' suites time nothing, write nothing and end with exit code 2.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.bench import SUITES as KERNELS
from training.errors import UserError

OWN = {
    "training": {"repeats": "9"},
    "serving": {"repeats": "9", "scale": "h200", "dry_run": "false"},
}
"Suites with keys of their own."
SUITES = (*OWN, *KERNELS)
KERNEL_DEFAULTS = {"budget": "600", "out": "", "cases": "", "scale": "h200", "dry_run": "false"}
"Keys of the kernels' suites."


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
    """Entry point. Exit code 1: a ratio over its limit, or a kernel that is wrong; 2: refused."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(f"afferent bench suite=<{'|'.join(SUITES)}> [key=value ...]\n\n{__doc__}")
        return
    try:
        given = parse(words)
        sys.exit(bench_own(given) if given["suite"] in OWN else bench_kernels(given))
    except UserError as error:
        print(f"afferent: {error}", file=sys.stderr)
        sys.exit(error.code)


def bench_own(given: dict[str, str]) -> int:
    """Time a suite of whole models, print and save it; 1 if a ratio is over its limit."""
    suite = importlib.import_module(f"scripts.benchmarks.{given['suite']}")
    if given.get("dry_run") == "true":
        print("\n".join(suite.check()))
        return 0
    options = [given["scale"]] if "scale" in given else []
    measurements = suite.run(*options, int(given["repeats"]))
    print(table(measurements))
    print(save(given["suite"], measurements))
    return int(any(m.ratio > m.limit for m in measurements))


def bench_kernels(given: dict[str, str]) -> int:
    """Time the kernels' suites, or check them with dry_run=true; the exit code."""
    kernels = importlib.import_module("scripts.benchmarks.kernels")
    options = kernels.Options(
        suites=tuple(given["suite"].split(",")),
        out=Path(given["out"] or runs() / "kernels.json"),
        budget=float(given["budget"]),
        cases=given["cases"],
        scale=given["scale"],
        log=runs() / "kernels.log",
    )
    return kernels.check(options) if given["dry_run"] == "true" else kernels.run(options)


def parse(words: list[str]) -> dict[str, str]:
    """key=value words, checked. Raises UserError."""
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    suites = given.get("suite", "").split(",")
    for suite in suites:
        if suite not in SUITES:
            raise UserError(
                f"suite={suite}: there is no such suite.{near(suite, SUITES)} "
                f"Use: {', '.join(SUITES)}"
            )
    own = [suite for suite in suites if suite in OWN]
    if own and len(suites) > 1:
        raise UserError(
            f"suite={given['suite']}: {own[0]} has keys of its own: bench it in a call of its own"
        )
    defaults = {"suite": ""} | (OWN[own[0]] if own else KERNEL_DEFAULTS)
    for key in given:
        if key not in defaults:
            raise UserError(
                f"there is no key `{key}` for suite={given['suite']}."
                f"{near(key, list(defaults))} Use: {', '.join(defaults)}"
            )
    given = defaults | given
    check_numbers(given)
    return given


def check_numbers(given: dict[str, str]) -> None:
    """Raise UserError for a value that its key does not take."""
    if "repeats" in given and (not given["repeats"].isdigit() or int(given["repeats"]) < 1):
        raise UserError(f"repeats={given['repeats']} must be a whole number, at least 1")
    if "budget" in given and (not given["budget"].isdigit() or int(given["budget"]) < 30):
        raise UserError(f"budget={given['budget']} must be whole seconds, at least 30")
    for key, known in (("scale", ("h200", "small")), ("dry_run", ("true", "false"))):
        if key in given and given[key] not in known:
            raise UserError(
                f"{key}={given[key]} is unknown.{near(given[key], known)} Use: {', '.join(known)}"
            )
    if given.get("out") and not given["out"].endswith(".json"):
        raise UserError(f"out={given['out']} must end in .json")


def near(given: str, known: Sequence[str]) -> str:
    """' Did you mean a?' for the nearest of `known`, or ''. (Without training.config: a GPU machine
    may lack the packages that configurations need.)"""
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def runs() -> Path:
    """Where benchmarks are kept if nothing else is said."""
    return Path(os.environ.get("AFFERENT_RUNS", "runs")) / "bench"


def save(suite: str, measurements: list[Measurement]) -> Path:
    """Write the measurements and where they come from below the runs directory."""
    from training.files import write_json
    from training.provenance import provenance

    path = runs() / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(m), "ratio": m.ratio} for m in measurements]
    write_json(path, {"suite": suite, "measurements": json.loads(json.dumps(rows)), **provenance()})
    return path


if __name__ == "__main__":
    main()
