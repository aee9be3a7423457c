"""Figures of cartridges, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.memory_tables import budget_chart, start_chart
from training.files import write_atomic

SIZES = ("half", "quarter", "eighth", "sixteenth", "thirtysecond")
STARTS = {
    "first tokens": "quarter",
    "sampled tokens": "sampled_start",
    "another text": "unrelated_start",
    "random vectors": "random_start",
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_memory.svg, accuracy against bytes, and <scale>_starts.svg, over the steps."""
    scale = results["scale"]
    if chart := budget_chart([results["runs"].get(name, {}) for name in SIZES]):
        write_atomic(directory / f"{scale}_memory.svg", chart)
    if chart := start_chart(results.get("curves", {}), STARTS):
        write_atomic(directory / f"{scale}_starts.svg", chart)
