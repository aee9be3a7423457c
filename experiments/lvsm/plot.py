"""Figures of views from two others, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, measured
from training.files import write_atomic

VIEWS = {
    "four layers": ("glance", "eval/psnr"),
    "one layer": ("shallow", "eval/psnr"),
    "other scenes": ("shuffled", "eval/psnr"),
    "camera elsewhere": ("glance", "eval/elsewhere"),
    "MVSplat": ("sweep", "eval/psnr"),
    "nearest image": ("glance", "eval/floors/nearest"),
    "mean image": ("glance", "eval/floors/mean"),
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_psnr .svg."""
    runs = results["runs"]
    if groups := measured(runs, VIEWS):
        chart = dot_chart(groups, "PSNR of views that are asked for (dB)")
        write_atomic(directory / f"{results['scale']}_psnr.svg", chart)
