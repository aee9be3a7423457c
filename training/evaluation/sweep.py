"""The table and the plot at the end of a sweep: one row per combination, seeds taken together.

<sweep>/run_0000.json   which overrides, which run directory: written when the run began
<sweep>/summary.json    values per seed, mean, interval      summary.md, summary.svg
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation import plots
from training.evaluation.page import printable, shown
from training.evaluation.run_files import headline, read_json
from training.evaluation.statistics import interval, mean
from training.files import write_atomic, write_json

Combination = tuple[str, ...]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep and how far it is: `finished`, another status, or `not run`."""

    combination: Combination
    seed: str | None
    path: Path
    status: str
    metrics: dict[str, float]

    @classmethod
    def read(cls, note: Path) -> SweepRun:
        """The run that a note names."""
        said = read_json(note)
        path, overrides = Path(said["path"]), said["overrides"]
        seeds = [o.partition("=")[2] for o in overrides if o.startswith("seed=")]
        results = read_json(path / "results.json")
        status = "finished" if results else read_json(path / "status.json").get("status", "not run")
        metrics = {
            key: math.nan if value is None else float(value)
            for key, value in results.get("metrics", {}).items()
            if key.startswith("eval/")
        }
        combination = tuple(printable(o) for o in overrides if not o.startswith("seed="))
        return cls(combination, seeds[-1] if seeds else None, path, status, metrics)


Groups = Mapping[Combination, Sequence[SweepRun]]


def write_sweep_summary(directory: Path) -> str:
    """Write summary.json, summary.md and summary.svg; returns the table, its path as last line.

    A run that has not finished is in no mean; it is listed with its status.
    """
    runs = [SweepRun.read(note) for note in sorted(directory.glob("run_*.json"))]
    groups = grouped(runs)
    metrics = headline_metrics(runs)
    write_json(directory / "summary.json", record(groups, metrics))
    text = summary_text(groups, metrics)
    write_atomic(directory / "summary.md", text + "\n")
    panels = {
        metric: {name: values(groups[key], metric) for key, name in names(groups).items()}
        for metric in metrics
    }
    if panels:
        write_atomic(directory / "summary.svg", plots.dot_charts(panels))
    return f"{text}\n{directory / 'summary.md'}"


def headline_metrics(runs: Sequence[SweepRun]) -> list[str]:
    """Evaluated metrics, the headline first, without counts that are the same in every run."""
    found = dict.fromkeys(key for run in runs for key in run.metrics)
    varying = [key for key in found if len(set(values(runs, key))) > 1]
    several = sum(run.status == "finished" for run in runs) > 1
    kept = varying if several and varying else list(found)
    first = headline(dict.fromkeys(kept))
    return sorted(kept, key=lambda key: key != first)


def values(group: Sequence[SweepRun], metric: str) -> list[float]:
    """One value per finished run."""
    return [run.metrics[metric] for run in group if metric in run.metrics]


def grouped(runs: Sequence[SweepRun]) -> dict[Combination, list[SweepRun]]:
    """Runs that differ in nothing but their seed, together."""
    groups: dict[Combination, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.combination, []).append(run)
    return groups


def shared(groups: Groups) -> list[str]:
    """Overrides that every one of several combinations has."""
    first, *others = groups or [()]
    return [o for o in first if others and all(o in combination for combination in others)]


def names(groups: Groups) -> dict[Combination, str]:
    """What to call each combination: its overrides that not all of them share."""
    common = shared(groups)
    return {
        combination: " ".join(o for o in combination if o not in common) or "(no overrides)"
        for combination in groups
    }


def record(groups: Groups, metrics: Sequence[str]) -> dict[str, Any]:
    """What summary.json holds; a value that is not finite is null."""
    return {
        "metrics": list(metrics),
        "combinations": [
            {
                "overrides": list(combination),
                "runs": [
                    {"seed": run.seed, "path": str(run.path), "status": run.status} for run in group
                ],
                "metrics": {metric: statistics(values(group, metric)) for metric in metrics},
            }
            for combination, group in groups.items()
        ],
    }


def statistics(found: Sequence[float]) -> dict[str, Any]:
    """Values per seed, their mean, their 95 % interval."""
    middle = mean(found) if found else math.nan
    return {
        "values": [value if math.isfinite(value) else None for value in found],
        "mean": middle if math.isfinite(middle) else None,
        "interval": interval(found),
    }


def summary_text(groups: Groups, metrics: Sequence[str]) -> str:
    """The table, and below it the runs that have not finished."""
    rows, called = [], names(groups)
    for combination, group in groups.items():
        finished = sum(run.status == "finished" for run in group)
        seeds = str(finished) if finished == len(group) else f"{finished} of {len(group)}"
        rows.append([called[combination], seeds, *(cell(values(group, m)) for m in metrics)])
    lines = [markdown(["combination", "seeds", *metrics], rows), ""]
    lines.append("Mean over seeds [95 % interval, Student t].")
    if common := shared(groups):
        lines.append(f"In every combination: {' '.join(common)}.")
    missing = [run for group in groups.values() for run in group if run.status != "finished"]
    for run in missing:
        seed = f" seed={run.seed}" if run.seed is not None else ""
        lines.append(f"- {run.status}: {called[run.combination]}{seed} ({run.path})")
    return "\n".join(lines)


def cell(found: Sequence[float]) -> str:
    """`2.173 [2.101, 2.245]`; without an interval for one seed."""
    if not found:
        return "-"
    spread = interval(found)
    inside = f" [{shown(spread[0])}, {shown(spread[1])}]" if spread else ""
    return shown(mean(found)) + inside


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns also line up in a terminal."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(f'{text:<{width}}' for text, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
