"""Figures of joint embedding, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, line_chart, measured, series_curves
from training.files import write_atomic

RUNS = {
    "SIGReg": "sigreg",
    "its weight x 2": "heavy",
    "its weight / 5": "light",
    "VICReg": "vicreg",
    "averaged teacher": "ema",
    "untrained": "untrained",
    "nothing": "none",
}
SPECTRA = ("SIGReg", "VICReg", "averaged teacher", "nothing")


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_probe and <scale>_spectrum .svg."""
    runs, scale = results["runs"], results["scale"]
    groups = measured(runs, {name: (run, "eval/probe") for name, run in RUNS.items()})
    if pixels := final(runs, "sigreg", "eval/pixels"):
        groups["pixels"] = pixels
    if groups:
        chart = dot_chart(groups, "share of images that a linear probe names")
        write_atomic(directory / f"{scale}_probe.svg", chart)
    spectra = series_curves(runs, {RUNS[name]: name for name in SPECTRA}, "spectrum")
    if spectra:
        chart = line_chart(spectra, "standard deviation of projections", "principal axis")
        write_atomic(directory / f"{scale}_spectrum.svg", chart)
