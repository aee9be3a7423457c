"""Figures of the layers with fast weights, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import line_chart
from training.evaluation.positions import curves_of
from training.files import write_atomic


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_loss_at_<length>.svg for each length that was read."""
    for length in (256, 1024):
        lines = curves_of(results["runs"], f"{length}/static", length)
        first = next(iter(results["runs"].values()))
        lines += curves_of({"Bayes": first}, f"{length}/floor", length)
        if lines:
            chart = line_chart(lines, "nats per token", f"position in documents of {length} tokens")
            write_atomic(directory / f"{results['scale']}_loss_at_{length}.svg", chart)
