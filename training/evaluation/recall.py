"""Recall: how many of a document's facts a model can still answer for, by their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from training.data.facts import FactsData, answers
from training.evaluation.plots import line_chart, mean_curve
from training.evaluation.positions import Score


def read_facts(
    data: FactsData, count: int, facts: Sequence[int], score: Score
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Score the answers of `count` held-out documents for each number of facts.

    Returns:
        {number: {"recalled", "nats"}}: the share of answers that get a probability above 1/2, which
        no guess among the values of a document gets, and their mean loss; and the curve
        `recall/facts`, `recall/recalled`.
    """
    found = {}
    for number in facts:
        nats = score(data.heldout(count, number))[:, answers(data.config, number)]
        recalled = float((nats < math.log(2)).mean())
        found[str(number)] = {"recalled": recalled, "nats": float(nats.mean())}
    shares = [entry["recalled"] for entry in found.values()]
    return found, {"recall/facts": [float(n) for n in facts], "recall/recalled": shares}


def chart_of(runs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """SVG of the share recalled over the number of facts, for each run that was asked."""
    lines = []
    for name, run in runs.items():
        seeds = [seed for seed in run.get("series", []) if "recall/facts" in seed]
        if seeds:
            shares = [seed["recall/recalled"] for seed in seeds]
            lines.append(mean_curve(name.replace("_", " "), seeds[0]["recall/facts"], shares))
    if not lines:
        return None
    return line_chart(lines, "share recalled", "facts in the document", log_x=True)
