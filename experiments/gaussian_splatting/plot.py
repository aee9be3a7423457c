"""Figures of reconstructed scenes, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, measured
from training.files import write_atomic

RUNS = {
    "3000 Gaussians": "scene",
    "1000": "middle",
    "500": "small",
    "none added": "fixed",
    "AbsGS": "absolute",
    "MCMC": "mcmc",
    "no SSIM": "blurred",
    "no harmonics": "dull",
    "wrong cameras": "shuffled",
    "doubtful cameras": "misplaced",
    "cameras corrected": "found",
    "uneven light": "uneven",
    "light corrected": "lit",
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_psnr .svg."""
    runs = results["runs"]
    groups = measured(runs, {name: (run, "eval/psnr") for name, run in RUNS.items()})
    if nearest := final(runs, "scene", "eval/floors/nearest"):
        groups["nearest image"] = nearest
    if groups:
        chart = dot_chart(groups, "PSNR of held-out views (dB)")
        write_atomic(directory / f"{results['scale']}_psnr.svg", chart)
