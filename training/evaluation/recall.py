"""Recall: how many of a document's facts a model can still answer for, by their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from training.data.facts import FactsData, answers
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
