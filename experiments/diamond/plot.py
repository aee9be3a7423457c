"""Figures of DIAMOND's dreams, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import Line, dot_chart, final, line_chart, mean_curve
from training.files import write_atomic

ERRORS = {
    "dream": ("world", "error"),
    "last frame": ("world", "copy"),
    "straight on": ("world", "straight"),
    "read off true frames": ("world", "parser"),
}
POLICIES = (  # as training/recipes/dream_agent.py ranks them
    *(f"follows, {noise} % anything" for noise in (0, 25, 50, 75)),
    "agent",
    "anything",
    "nothing",
)
SHARPNESS = {"dream": ("world", "foreground_psnr"), "without actions": ("blind", "foreground_psnr")}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_error, <scale>_sharpness, <scale>_splits and <scale>_ranks .svg."""
    runs, scale = results["runs"], results["scale"]
    for name, lines, what in (
        ("error", ERRORS, "error of the ball, in pixels of 32"),
        ("sharpness", SHARPNESS, "PSNR where something is shown, dB"),
    ):
        curves = [
            line for label, (run, told) in lines.items() if (line := curve(runs, run, label, told))
        ]
        if curves:
            chart = line_chart(curves, what, "frames ahead")
            write_atomic(directory / f"{scale}_{name}.svg", chart)
    groups = {
        label: values
        for label, key in (
            ("as trained", "eval/error/10"),
            ("other pairs of hue and speed", "eval/pairs/error/10"),
            ("faster", "eval/speed/error/10"),
            ("larger", "eval/size/error/10"),
            ("most alike of the training data", "eval/retrieved/error/10"),
        )
        if (values := final(runs, "world", key))
    }
    if groups:
        chart = dot_chart(groups, "error of the ball after ten frames, in pixels of 32")
        write_atomic(directory / f"{scale}_splits.svg", chart)
    groups = {
        f"{policy}, {place}": [seed[place][at] for seed in runs.get("agent", {}).get("series", [])]
        for at, policy in enumerate(POLICIES)
        for place in ("inside", "outside")
    }
    if all(groups.values()):
        chart = dot_chart(groups, "reward of forty frames in the dream, and in the simulator")
        write_atomic(directory / f"{scale}_ranks.svg", chart)


def curve(runs: dict[str, Any], run: str, name: str, told: str) -> Line | None:
    """A series by frames ahead, over the seeds of a run."""
    seeds = [seed[told] for seed in runs.get(run, {}).get("series", [])]
    return mean_curve(name, range(1, len(seeds[0]) + 1), seeds) if seeds else None
