"""Figures of masked images, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, line_chart, mean_curve
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
        name: known
        for name, run in RUNS.items()
        if (known := [v for v in final(runs, run, "eval/probe") if v is not None])
    }
    if pixels := final(runs, "ema", "eval/pixels"):
        groups["pixels"] = pixels
    if groups:
        chart = dot_chart(groups, "share of held-out images named rightly by a linear probe")
        write_atomic(directory / f"{scale}_probe.svg", chart)
    spectra = []
    for name, run in RUNS.items():
        if seeds := [seed["spectrum"] for seed in runs.get(run, {}).get("series", [])]:
            spectra.append(mean_curve(name, range(1, len(seeds[0]) + 1), seeds))
    if spectra:
        chart = line_chart(spectra, "standard deviation of latents", "principal axis")
        write_atomic(directory / f"{scale}_spectrum.svg", chart)


def final(runs: dict[str, Any], run: str, key: str) -> list[float]:
    """What each seed of a run ended with."""
    return runs.get(run, {}).get("final", {}).get(key, [])
