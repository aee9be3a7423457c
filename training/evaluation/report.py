"""What a person sees of a run: a static page, and a short text at the end of `afferent train`.

    report.html   headline beside its floors, curves, sample, data, configuration, provenance

Both know no recipe: metrics are shown by their prefix (`train/`, `eval/`, `opt/`, `perf/`), and a
run that has not finished gets a page of what is there so far. The one thing they know by name is
the unit of `floors`: bits per byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.evaluation import page, plots
from training.evaluation.claims import EXPERIMENTS
from training.evaluation.page import shown
from training.files import write_atomic
from training.logging import Row, clock, human, read_rows

FLOORS_METRIC, FLOORS_LOSS = "eval/bpb", "eval/loss"
"The metric that a run's floors share a unit with, and the loss it is proportional to."
OWN = "this model"
STANDING = ("scale", "seed", "date", "run", "experiment", "stopped_by", "uniform_bpb")
SAMPLE_LINES, SAMPLE_WIDTH = 12, 96  # of the terminal's excerpt


def write_run_report(directory: Path) -> Path:
    """Write `directory`/report.html from what the run has left so far; returns its path."""
    from training.evaluation.run_page import run_page

    run = RunFiles.read(directory)
    path = directory / "report.html"
    write_atomic(path, page.document(f"{run.experiment}: {run.name}", run_page(run)))
    return path


def write_paper_report(paper: str, experiments_root: Path = EXPERIMENTS) -> Path:
    """Write <runs>/reports/<paper>.html from experiments/<paper> alone; returns its path."""
    from training.evaluation.paper_page import paper_page

    path = Path(os.environ.get("AFFERENT_RUNS", "runs")) / "reports" / f"{paper}.html"
    title, parts = paper_page(paper, experiments_root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.document(title, parts))
    return path


@dataclass(frozen=True)
class RunFiles:
    """A run directory as it is on the disk; empty where a file is not there yet."""

    directory: Path
    results: dict[str, Any]
    status: dict[str, Any]
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[Row]
    perf: list[Row]

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Raises UserError if the directory does not hold a run."""
        if not is_run(directory):
            raise UserError(f"{directory} holds no run: there is neither config.yaml nor status")
        return cls(
            directory,
            *(read_json(directory / f"{name}.json") for name in ("results", "status")),
            read_config(directory / "config.yaml"),
            read_json(directory / "env.json"),
            read_rows(directory / "metrics.jsonl"),
            read_rows(directory / "perf.jsonl"),
        )

    @property
    def name(self) -> str:
        return self.results.get("run") or self.directory.resolve().name

    @property
    def experiment(self) -> str:
        return self.results.get("experiment") or self.config.get("experiment") or "unnamed"

    @property
    def metrics(self) -> dict[str, Any]:
        """The results' metrics; the newest of each logged one while there are none."""
        newest = {k: v for row in self.rows for k, v in row.items() if k[:5] in ("eval/", "train")}
        return self.results.get("metrics") or newest


def is_run(directory: Path) -> bool:
    """Whether a run has begun in this directory."""
    return any((directory / name).is_file() for name in ("config.yaml", "status.json"))


def read_json(path: Path) -> dict[str, Any]:
    """What a .json file holds, {} if there is none. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.exists():
        return {}
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return found if isinstance(found, dict) else {}  # type: ignore[return-value]


def ranking(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The model among its floors and the uniform distribution, worst first; [] without floors."""
    value = results.get("metrics", {}).get(FLOORS_METRIC)
    if not results.get("floors") or value is None or not math.isfinite(value):
        return []
    named = {**results["floors"], OWN: value}
    if results.get("uniform_bpb") is not None:
        named["uniform"] = results["uniform_bpb"]
    known = [(k, v) for k, v in named.items() if v is not None and math.isfinite(v)]
    return sorted(known, key=lambda item: -item[1])


def headline(metrics: Mapping[str, Any]) -> str | None:
    """The metric that is shown largest: the floors' if there is one, else the first evaluated."""
    evaluated = [key for key in metrics if key.startswith("eval/")]
    return FLOORS_METRIC if FLOORS_METRIC in evaluated else next(iter(evaluated), None)


def run_summary(results: Mapping[str, Any]) -> str:
    """A finished run in a few lines of plain text, safe to print whatever the model has said."""
    metrics = results.get("metrics", {})
    blocks = [summary_line(results)]
    if metrics:
        width = max(map(len, metrics))
        blocks.append("\n".join(f"  {k:<{width}}  {shown(v)}" for k, v in metrics.items()))
    if ranked := ranking(results):
        blocks.append("\n".join(ranking_lines(ranked)))
    if excerpt := sample_lines(results.get("sample", "")):
        blocks.append("\n".join(["sample", *(f"  | {line}" for line in excerpt)]))
    return page.printable("\n\n".join(blocks))


def summary_line(results: Mapping[str, Any]) -> str:
    """`quickstart/stdlib: 1,230 steps, 1.2M tokens, 2:10 of training, 837k parameters`."""
    parts = [f"{shown(results['steps'])} steps"] if "steps" in results else []
    parts += [f"{human(value)} {unit}" for unit, value in experience(results).items()]
    if "train_s" in results:
        parts.append(f"{clock(results['train_s'])} of training")
    if "parameters" in results:
        parts.append(f"{human(results['parameters'])} parameters")
    early = " (ended early by its budget)" if results.get("stopped_by") == "budget" else ""
    return f"{results.get('experiment') or 'unnamed'}: {', '.join(parts)}{early}"


def experience(results: Mapping[str, Any]) -> dict[str, float]:
    """Unit -> how much the run has seen: the top-level counts that have no name of their own."""
    named = (*STANDING, "steps", "train_s", "parameters")
    return {
        key: value
        for key, value in results.items()
        if key not in named and isinstance(value, int) and not isinstance(value, bool)
    }


def ranking_lines(ranked: list[tuple[str, float]]) -> list[str]:
    unit = plots.label(FLOORS_METRIC)
    lines = [f"{unit} of the same held-out data, worst first (lower is better)"]
    for name, value in ranked:
        lines.append(f"{'>' if name == OWN else ' '} {value:7.3f}  {name}")
    return lines


def sample_lines(sample: str) -> list[str]:
    """The first lines of a sample, without control characters, cut to the terminal."""
    lines = page.printable(sample).expandtabs(4).rstrip().splitlines()
    cut = [line[: SAMPLE_WIDTH - 3] + "..." if len(line) > SAMPLE_WIDTH else line for line in lines]
    return cut if len(cut) <= SAMPLE_LINES else [*cut[:SAMPLE_LINES], "..."]
