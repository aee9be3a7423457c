"""Figures of masked images, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, line_chart, series_curves
from training.files import write_atomic

RUNS = {
    "averaged teacher": "ema",
    "with gradient": "none",
    "untrained": "untrained",
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_probe and <scale>_spectrum .svg."""
    runs, scale = results["runs"], results["scale"]
    groups = {
        name: known for name, run in RUNS.items() if (known := final(runs, run, "eval/probe"))
    }
    if pixels := final(runs, "ema", "eval/pixels"):
        groups["pixels"] = pixels
    if groups:
        chart = dot_chart(groups, "share of images that a linear probe names")
        write_atomic(directory / f"{scale}_probe.svg", chart)
    names = {run: name for name, run in RUNS.items()}
    spectra = series_curves(runs, names, "spectrum", end=-1)  # a LayerNorm empties one axis
    if spectra:
        chart = line_chart(spectra, "standard deviation of latents", "principal axis")
        write_atomic(directory / f"{scale}_spectrum.svg", chart)
