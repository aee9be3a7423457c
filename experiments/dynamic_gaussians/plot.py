"""Figures of scenes that move, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, measured
from training.files import write_atomic

RUNS = {
    "followed": "tracked",
    "followed, loose": "loose",
    "network": "network",
    "planes": "planes",
    "polynomials": "polynomials",
    "still": "still",
    "times of others": "confused",
}
CHARTS = {
    "moving": ("eval/moving", "PSNR of what moves (dB)", "eval/floors/nearest", "nearest image"),
    "tracking": ("eval/tracking/error", "tracking error / width", "eval/tracking/still", "staying"),
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_moving and <scale>_tracking .svg."""
    runs = results["runs"]
    for name, (metric, label, floor, what) in CHARTS.items():
        groups = measured(runs, {shown: (run, metric) for shown, run in RUNS.items()})
        if least := final(runs, "still", floor):
            groups[what] = least
        if groups:
            write_atomic(directory / f"{results['scale']}_{name}.svg", dot_chart(groups, label))
