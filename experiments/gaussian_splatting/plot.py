"""Figures of reconstructed scenes, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final
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
    groups = {
        name: known
        for name, run in RUNS.items()
        if (known := [v for v in final(runs, run, "eval/psnr") if v is not None])
    }
    if nearest := final(runs, "scene", "eval/floors/nearest"):
        groups["nearest image"] = nearest
    if groups:
        chart = dot_chart(groups, "PSNR of held-out views (dB)")
        write_atomic(directory / f"{results['scale']}_psnr.svg", chart)
