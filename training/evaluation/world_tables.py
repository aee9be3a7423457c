"""The table of worlds side by side, from the results of the papers that they belong to.

All learned the same world. Frames are timed at batch 1, in runs beside which nothing else was at
work (`speed`); how long one learned is what it took beside whatever was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.layer_tables import count, runs_of, spread
from training.evaluation.markdown import table
from training.evaluation.statistics import mean

WORLDS = (
    ("DIAMOND", "diamond", "world"),
    ("Diffusion Forcing", "diffusion_forcing", "world"),
    ("Dreamer 4", "dreamer4", "world"),
    ("Genie", "genie", "world"),
    ("Self Forcing, of Diffusion Forcing", "self_forcing", "student"),
)
"Name, paper and run."
QUALITY = (
    ("error over last frame, 5", "eval/over_copy/5"),
    ("10", "eval/over_copy/10"),
    ("20", "eval/over_copy/20"),
    ("balls alive, 30", "eval/alive/30"),
    ("turns in time", "eval/turns_in_time"),
    ("paddle", "eval/separation"),
)
SPEED = "speed"


def world_table(experiments: Path, scale: str = "cpu") -> str:
    """Markdown: what dreams are worth, and what they take."""
    header = [
        "world", "parameters", "minutes to learn", *(name for name, _ in QUALITY),
        "steps per frame", "frames per second", "p95, ms", "remembered, MB", "seeds",
    ]  # fmt: skip
    rows = [line(name, runs_of(experiments, paper, scale), run) for name, paper, run in WORLDS]
    return table(header, rows)


def line(name: str, runs: Mapping[str, Any], run: str) -> list[str]:
    """One world; what was not run is empty, and says so."""
    found, timed = runs.get(run, {}), runs.get(SPEED, {})
    final = found.get("final", {})
    cells = [spread([v for v in final.get(key, []) if v is not None]) for _, key in QUALITY]
    told = [one for one in timed.get("latency", []) if one]
    seeds = str(len(found.get("seeds", []))) if final else "not run"
    seconds = [one for one in found.get("train_s", []) if one]
    took = f"{mean(seconds) / 60:.0f}" if seconds else ""
    return [
        name, count(found.get("parameters")), took, *cells, over(told, "steps", ".0f"),
        over(told, "fps", ".0f"), over(told, "p95_ms", ".1f"), over(told, "cache_mb", ".2f"), seeds,
    ]  # fmt: skip


def over(told: Sequence[Mapping[str, float]], key: str, form: str) -> str:
    """Mean over the seeds."""
    return format(mean([one[key] for one in told]), form) if told else ""
