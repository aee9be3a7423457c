"""Figures of Genie's dreams, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.world_charts import BESIDE, curves_chart, splits_chart


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_error, <scale>_sharpness and <scale>_splits .svg."""
    curves_chart(results, directory, "error", {"dream": ("world", "error"), **BESIDE})
    sharp = {"dream": ("world", "foreground_psnr"), "without actions": ("blind", "foreground_psnr")}
    curves_chart(results, directory, "sharpness", sharp)
    splits_chart(results, directory)
