"""Charts of worlds, from the runs that results/<scale>.json recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.evaluation.plots import Line, dot_chart, final, line_chart, mean_curve
from training.files import write_atomic

ERROR, SHARPNESS = "error of the ball, in pixels of 32", "PSNR where something is shown, dB"
BESIDE = {
    "last frame": ("world", "copy"),
    "straight on": ("world", "straight"),
    "read off true frames": ("world", "parser"),
}
"What errors of dreams are shown beside: name -> run, series."
SPLITS = (
    ("as trained", "eval/error/10"),
    ("other pairs of hue and speed", "eval/pairs/error/10"),
    ("faster", "eval/speed/error/10"),
    ("larger", "eval/size/error/10"),
    ("most alike of the training data", "eval/retrieved/error/10"),
)
Lines = Mapping[str, tuple[str, str]]


def curves_chart(results: dict[str, Any], directory: Path, name: str, lines: Lines) -> None:
    """Write <scale>_<name>.svg: series by frames ahead, of those runs that there are."""
    runs, scale = results["runs"], results["scale"]
    curves = [
        found for label, (run, told) in lines.items() if (found := curve(runs, run, label, told))
    ]
    if curves:
        what = SHARPNESS if name == "sharpness" else ERROR
        chart = line_chart(curves, what, "frames ahead")
        write_atomic(directory / f"{scale}_{name}.svg", chart)


def splits_chart(results: dict[str, Any], directory: Path, run: str = "world") -> None:
    """Write <scale>_splits.svg: the error after ten frames, of balls of every kind."""
    groups = {
        label: values for label, key in SPLITS if (values := final(results["runs"], run, key))
    }
    if groups:
        chart = dot_chart(groups, "error after ten frames, in pixels of 32")
        write_atomic(directory / f"{results['scale']}_splits.svg", chart)


def curve(runs: Mapping[str, Any], run: str, name: str, told: str) -> Line | None:
    """A series by frames ahead, over the seeds of a run."""
    seeds = [seed[told] for seed in runs.get(run, {}).get("series", []) if told in seed]
    return mean_curve(name, range(1, len(seeds[0]) + 1), seeds) if seeds else None
