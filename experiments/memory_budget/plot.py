"""The figure of memories, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.memory_tables import chart_of
from training.files import write_atomic

SHOWN = (
    "cartridge",
    "expected_attention",
    "kvzip_adaptive",
    "window",
    "lora",
    "bm25",
    "gated_delta",
)


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_memory.svg."""
    if chart := chart_of(results["runs"].get("memories", {}), SHOWN):
        write_atomic(directory / f"{results['scale']}_memory.svg", chart)
