"""Figures of plans on a frozen encoder, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart, final, line_chart, series_curves
from training.evaluation.room_figures import rgb_paths_chart
from training.files import write_atomic

POLICIES = {
    "true dynamics": ("frozen", "true_dynamics"),
    "plans, world model's encoder": ("frozen", "model"),
    "plans, random encoder": ("random_encoder", "model"),
    "untrained predictor": ("untrained", "model"),
    "random": ("frozen", "random"),
    "nothing done": ("frozen", "zero"),
}
ENCODERS = {"frozen": "world model's encoder", "random_encoder": "random encoder"}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_success, <scale>_ahead and <scale>_paths .svg."""
    runs, scale = results["runs"], results["scale"]
    groups = {
        name: values
        for name, (run, policy) in POLICIES.items()
        if (values := final(runs, run, f"eval/{policy}"))
    }
    if groups:
        chart = dot_chart(groups, "share of goals reached")
        write_atomic(directory / f"{scale}_success.svg", chart)
    ahead = series_curves(runs, ENCODERS, "ahead")
    if ahead:
        chart = line_chart(
            ahead, "error over that of the last frame seen", "blocks of actions ahead"
        )
        write_atomic(directory / f"{scale}_ahead.svg", chart)
    series = runs.get("frozen", {}).get("series", [])
    if series and "paths/model" in series[0]:
        write_atomic(directory / f"{scale}_paths.svg", rgb_paths_chart(series[0]))
