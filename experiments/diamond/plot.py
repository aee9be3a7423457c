"""Figures of DIAMOND's dreams, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import dot_chart
from training.evaluation.world_charts import BESIDE, curves_chart, splits_chart
from training.files import write_atomic

POLICIES = (  # as training/recipes/dream_agent.py ranks them
    *(f"follows, {noise} % anything" for noise in (0, 25, 50, 75)),
    "agent",
    "anything",
    "nothing",
)
SHARPNESS = {"dream": ("world", "foreground_psnr"), "without actions": ("blind", "foreground_psnr")}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_error, <scale>_sharpness, <scale>_splits and <scale>_ranks .svg."""
    curves_chart(results, directory, "error", {"dream": ("world", "error"), **BESIDE})
    curves_chart(results, directory, "sharpness", SHARPNESS)
    splits_chart(results, directory)
    groups = {
        f"{policy}, {place}": [seed[place][at] for seed in results["runs"]["agent"]["series"]]
        for at, policy in enumerate(POLICIES)
        for place in ("inside", "outside")
        if "series" in results["runs"].get("agent", {})
    }
    if groups:
        chart = dot_chart(groups, "reward of forty frames in the dream, and in the simulator")
        write_atomic(directory / f"{results['scale']}_ranks.svg", chart)
