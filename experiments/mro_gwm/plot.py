"""Figures of pushing, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, measured
from training.files import write_atomic

ERRORS = {
    "told": ("pushes", "eval/error"),
    "told, other actions": ("pushes", "eval/shuffled"),
    "learned from other pushers": ("confused", "eval/error"),
    "goes on": ("pushes", "eval/floors/velocity"),
    "stays": ("pushes", "eval/floors/position"),
}
PLANS = {
    "plans": ("pushes", "eval/plans/success"),
    "plans of the confused": ("confused", "eval/plans/success"),
    "explorer": ("pushes", "eval/explorer/success"),
    "random": ("pushes", "eval/random/success"),
}
CHARTS = {
    "errors": (ERRORS, "metres off after ten steps"),
    "plans": (PLANS, "share of goals that are reached"),
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_errors and <scale>_plans .svg."""
    runs = results["runs"]
    for name, (rows, label) in CHARTS.items():
        if groups := measured(runs, rows):
            write_atomic(directory / f"{results['scale']}_{name}.svg", dot_chart(groups, label))
