"""Figures of the coloured rooms, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, line_chart, series_curves
from training.evaluation.room_figures import rgb_paths_chart
from training.files import write_atomic

POLICIES = {
    "true dynamics": ("world", "true_dynamics"),
    "plans, width as trained": ("world", "model"),
    "plans, width 8": ("narrow", "model"),
    "plans, width 192": ("wide", "model"),
    "untrained": ("untrained", "model"),
    "collapsed": ("collapsed", "model"),
    "random": ("world", "random"),
    "nothing done": ("world", "zero"),
}
SPECTRA = {"world": "as trained", "narrow": "8 wide", "wide": "192 wide", "collapsed": "no SIGReg"}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_success, <scale>_paths and <scale>_spectrum .svg."""
    runs, scale = results["runs"], results["scale"]
    groups = {
        name: values
        for name, (run, policy) in POLICIES.items()
        if (values := final(runs, run, f"eval/{policy}"))
    }
    if groups:
        chart = dot_chart(groups, "share of goals reached")
        write_atomic(directory / f"{scale}_success.svg", chart)
    series = runs.get("world", {}).get("series", [])
    if series and "paths/model" in series[0]:
        write_atomic(directory / f"{scale}_paths.svg", rgb_paths_chart(series[0]))
    spectra = series_curves(runs, SPECTRA, "spectrum")
    if spectra:
        chart = line_chart(spectra, "standard deviation of latents", "principal axis")
        write_atomic(directory / f"{scale}_spectrum.svg", chart)
