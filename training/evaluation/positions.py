"""Loss against position: what shows that a model learns from what it has read.

Documents are scored token by token. The mean over documents of the loss at a position falls along
the document where the model uses what came before, and stays flat where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from training.evaluation.plots import Line, line_chart, mean_curve
from training.evaluation.statistics import interval

PARTS = 8  # of a document
GROUPS = 10  # of documents, for paired comparisons
POINTS = 32  # of a curve

Losses = Float[np.ndarray, "n t"]
Score = Callable[[np.ndarray], Losses]  # tokens [n, t + 1] -> nats of each next token


class Documents(Protocol):
    """Data with held-out sequences, none of them across two documents."""

    def heldout_sequences(self, count: int, length: int) -> Mapping[str, np.ndarray]:
        """`tokens` int32 [count, length + 1] and, where the best possible loss is known, `floor`
        float32 [count, length]. The same for every model of a seed."""
        ...


def read_documents(
    data: Documents, count: int, lengths: Sequence[int], arms: Mapping[str, Score]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Score `count` held-out documents of each length in several ways, on the same documents.

    Returns:
        {length: {arm: what `by_position` says}}, with an arm `floor` where it is known; and the
        curves behind it, `POINTS` values each, by "<length>/<arm>".
    """
    found: dict[str, Any] = {}
    series: dict[str, list[float]] = {}
    for length in lengths:
        sequences = data.heldout_sequences(count, length)
        floor = sequences.get("floor")
        losses = {arm: score(sequences["tokens"]) for arm, score in arms.items()}
        if floor is not None:
            losses["floor"] = floor
        found[str(length)] = {arm: by_position(nats, floor) for arm, nats in losses.items()}
        series |= {f"{length}/{arm}": binned(nats, POINTS) for arm, nats in losses.items()}
    return found, series


def reading_summary(
    parameters: int,
    vocab_size: int,
    data: Any,
    reading: Mapping[str, Any] | None,
    cost: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a recipe that reads documents reports at its end.

    Args:
        reading: {"reading": ..., "series": ...}, as `read_documents` returned them.
        cost: what `prefill_cost` returned; its curves join the series.
    """
    found: dict[str, Any] = {
        "parameters": parameters,
        "uniform": math.log(vocab_size),
        "data": data.describe(),
        **(reading or {}),
    }
    if cost is not None:
        curves = {f"cost/{key}": cost[key] for key in ("lengths", "seconds", "bytes")}
        found |= {"cost": cost, "series": {**found.get("series", {}), **curves}}
    return found


def by_position(losses: Losses, floor: Losses | None = None) -> dict[str, Any]:
    """Mean loss of each eighth of the documents, and what is read off it.

    `fall` is the first eighth less the last, `largest_rise` the worst step from one eighth to the
    next, `half_width` that of the last eighth's 95 % interval over documents, `groups` its means
    over `GROUPS` groups of documents. With a floor: `above_floor` in the last eighth, and
    `floor_margin`, the smallest over the eighths of (mean of loss - floor) / its standard error:
    far below zero only if targets leak.
    """
    parts = binned(losses, PARTS)
    last = losses[:, -max(1, losses.shape[1] // PARTS) :].mean(axis=1, dtype=np.float64)
    spread = interval([float(value) for value in last])
    found: dict[str, Any] = {
        "mean": float(losses.mean(dtype=np.float64)),
        "first_eighth": parts[0],
        "last_eighth": parts[-1],
        "fall": parts[0] - parts[-1],
        "largest_rise": max(b - a for a, b in pairwise(parts)),
        "half_width": (spread[1] - spread[0]) / 2 if spread else math.nan,
        "eighths": parts,
        "groups": [float(group.mean()) for group in np.array_split(last, GROUPS) if len(group)],
    }
    if floor is not None:
        found["above_floor"] = parts[-1] - binned(floor, PARTS)[-1]
        found["floor_margin"] = floor_margin(losses, floor)
    return found


def binned(losses: Losses, parts: int) -> list[float]:
    """Mean over documents and over each of `parts` equal stretches of positions."""
    curve = losses.mean(axis=0, dtype=np.float64)
    return [float(part.mean()) for part in np.array_split(curve, min(parts, len(curve)))]


def floor_margin(losses: Losses, floor: Losses) -> float:
    """Smallest standardised distance of an eighth above its floor; 0 where they are equal."""
    margins = []
    for part in np.array_split(losses.astype(np.float64) - floor, PARTS, axis=1):
        excess = part.mean(axis=1)  # [n]
        error = excess.std(ddof=1) / math.sqrt(len(excess)) if len(excess) > 1 else math.nan
        margins.append(0.0 if not excess.any() else float(excess.mean() / max(error, 1e-12)))
    return min(margins)


def curves_of(runs: Mapping[str, Mapping[str, Any]], key: str, length: int) -> list[Line]:
    """A curve along documents for each named run of a results file that has kept `key`.

    Mean over seeds, in the middle of each stretch of positions.
    """
    lines = []
    for name, run in runs.items():
        seeds = [seed[key] for seed in run.get("series", []) if key in seed]
        if seeds:
            width = length / len(seeds[0])
            middles = [(i + 0.5) * width for i in range(len(seeds[0]))]
            lines.append(mean_curve(name.replace("_", " "), middles, seeds))
    return lines


def chart_of(runs: Mapping[str, Mapping[str, Any]], length: int, arm: str) -> str | None:
    """SVG of the loss along documents for each run that has read that length, with its floors.

    `floor` and `window_floor` are drawn once, from the first run that knows them.
    """
    lines = curves_of(runs, f"{length}/{arm}", length)
    for name, floor in (("Bayes", "floor"), ("Bayes, in a window", "window_floor")):
        found = curves_of(runs, f"{length}/{floor}", length)[:1]
        lines += [replace(line, label=name, bound=True) for line in found]
    if not lines:
        return None
    return line_chart(lines, "nats per token", f"position in documents of {length} tokens")
