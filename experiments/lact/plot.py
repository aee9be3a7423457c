"""Figures of the layers with fast weights, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.positions import chart_of
from training.files import write_atomic


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_loss_at_<length>.svg for each length that was read."""
    runs = {n: run for n, run in results["runs"].items() if n != "own_table_per_chunk"}
    for length in (256, 1024):
        if chart := chart_of(runs, length, "static"):
            write_atomic(directory / f"{results['scale']}_loss_at_{length}.svg", chart)
