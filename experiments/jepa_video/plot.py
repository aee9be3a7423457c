"""Figures of video encoders, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import Line, dot_chart, final, line_chart, mean_curve, series_curves
from training.files import write_atomic

ROLLOUTS = {
    "four passes": ("rollout", "predicted"),
    "one pass": ("one_pass", "predicted"),
    "last latent": ("rollout", "copy"),
    "untrained": ("untrained", "predicted"),
}
MASKED = {
    "averaged teacher": "masked",
    "without": "masked_none",
    "untrained": "masked_untrained",
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_precision, <scale>_error, <scale>_digit and <scale>_motion .svg."""
    runs, scale = results["runs"], results["scale"]
    curves = [
        line for name, (run, told) in ROLLOUTS.items() if (line := curve(runs, run, name, told))
    ]
    if curves:
        chart = line_chart(curves, "average precision of detected centres", "frames ahead")
        write_atomic(directory / f"{scale}_precision.svg", chart)
    names = {"rollout": "four passes", "one_pass": "one pass"}
    errors = series_curves(runs, names, "error")
    if errors:
        chart = line_chart(errors, "error over that of the last latent", "frames ahead")
        write_atomic(directory / f"{scale}_error.svg", chart)
    for what, told in (("digit", "digits"), ("motion", "directions")):
        groups = {
            name: values
            for name, run in MASKED.items()
            if (values := final(runs, run, f"eval/probe/{what}"))
        }
        if groups and (pixels := final(runs, "masked", f"eval/pixels/{what}")):
            groups["pixels"] = pixels
        if groups:
            chart = dot_chart(groups, f"share of {told} that a linear probe tells")
            write_atomic(directory / f"{scale}_{what}.svg", chart)


def curve(runs: dict[str, Any], run: str, name: str, told: str) -> Line | None:
    """Average precision by frames ahead, over the seeds of a run."""
    seeds = [seed[f"ap/{told}"] for seed in runs.get(run, {}).get("series", [])]
    return mean_curve(name, range(1, len(seeds[0]) + 1), seeds) if seeds else None
