"""Figures of scenes from two images, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, measured
from training.files import write_atomic

VIEWS = {
    "two views": ("glance", "eval/psnr"),
    "each alone": ("alone", "eval/psnr"),
    "other scenes": ("shuffled", "eval/psnr"),
    "camera elsewhere": ("glance", "eval/elsewhere"),
    "all on the table": ("glance", "eval/plane"),
    "nearest image": ("glance", "eval/floors/nearest"),
    "mean image": ("glance", "eval/floors/mean"),
}
DEPTHS = {
    "two views": ("glance", "eval/depth"),
    "each alone": ("alone", "eval/depth"),
    "one depth": ("glance", "eval/depth_flat"),
}
CHARTS = {
    "psnr": (VIEWS, "PSNR of views that are asked for (dB)"),
    "depth": (DEPTHS, "relative error of depth"),
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_psnr and <scale>_depth .svg."""
    runs = results["runs"]
    for name, (rows, label) in CHARTS.items():
        if groups := measured(runs, rows):
            write_atomic(directory / f"{results['scale']}_{name}.svg", dot_chart(groups, label))
