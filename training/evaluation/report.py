"""What a person sees of a run: a static page, and a short text at the end of `afferent train`.

    report.html   headline beside its floors, curves, sample, data, configuration, provenance

Both know no recipe: metrics are shown by their prefix (`train/`, `eval/`, `opt/`, `perf/`), and a
run that has not finished gets a page of what is there so far. The one thing they know by name is
the unit of `floors`: bits per byte.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.evaluation import page, plots
from training.evaluation.claims import EXPERIMENTS
from training.evaluation.page import shown
from training.evaluation.paper_page import paper_page
from training.evaluation.run_files import FLOORS_METRIC, OWN, RunFiles, experience, ranking
from training.evaluation.run_page import run_page
from training.files import write_atomic
from training.logging import clock, human

SAMPLE_LINES, SAMPLE_WIDTH = 12, 96  # of the terminal's excerpt


def write_run_report(directory: Path) -> Path:
    """Write `directory`/report.html from what the run has left so far; returns its path."""
    run = RunFiles.read(directory)
    path = directory / "report.html"
    write_atomic(path, page.document(f"{run.experiment}: {run.name}", run_page(run)))
    return path


def write_paper_report(paper: str, experiments_root: Path = EXPERIMENTS) -> Path:
    """Write <runs>/reports/<paper>.html from experiments/<paper> alone; returns its path."""
    path = Path(os.environ.get("AFFERENT_RUNS", "runs")) / "reports" / f"{paper}.html"
    title, parts = paper_page(paper, experiments_root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.document(title, parts))
    return path


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
