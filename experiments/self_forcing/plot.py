"""Figures of Self Forcing, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.world_charts import curves_chart


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_error.svg and <scale>_sharpness.svg."""
    for name, told in (("error", "error"), ("sharpness", "foreground_psnr")):
        lines = {
            "student, two steps": ("student", told),
            "teacher": ("teacher", told),
            "student that has not learned": ("unlearned", told),
        }
        curves_chart(results, directory, name, lines)
