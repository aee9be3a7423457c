"""Tables of every layer side by side, from the results of the papers that they belong to.

Attention and every layer with fast weights were trained by the same recipe on the same documents,
with as many parameters as each other; TTT-E2E by a recipe of its own on the same documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.markdown import table
from training.evaluation.statistics import interval, mean

READING = (
    ("full attention", "ttt_layers", "full_attention", "static"),
    ("sliding attention", "ttt_layers", "sliding_window", "static"),
    ("TTT-Linear", "ttt_layers", "ttt_linear", "static"),
    ("TTT-MLP", "ttt_layers", "ttt_mlp", "static"),
    ("Titans' memory", "ttt_layers", "titans", "static"),
    ("LaCT", "lact", "lact", "static"),
    ("LaCT without Muon", "lact", "momentum_without_muon", "static"),
    ("DeltaNet", "gated_delta", "delta", "static"),
    ("Gated DeltaNet", "gated_delta", "gated_delta", "static"),
    ("sliding, Gated DeltaNet, sliding", "gated_delta", "hybrid", "static"),
    ("TTT-E2E", "ttt_e2e", "ttt", "learning"),
    ("*best possible in the window*", "ttt_layers", "ttt_linear", "window_floor"),
    ("*best possible*", "ttt_layers", "ttt_linear", "floor"),
)
"Name, paper, run and what its documents were scored with."

RECALL = (
    ("sliding, then full attention", "recall_attention"),
    ("sliding attention", "recall_window"),
    ("DeltaNet", "recall_delta"),
    ("DeltaNet, twice the state", "recall_delta_twice_the_state"),
    ("Gated DeltaNet", "recall_gated_delta"),
    ("TTT-Linear", "recall_ttt_linear"),
)
LENGTHS = (256, 1024)
Runs = Mapping[str, Any]


def reading_table(experiments: Path, scale: str = "cpu") -> str:
    """Markdown: nats per token in the last eighth of documents, layer by layer."""
    header = ["layers", "parameters", *(f"last eighth of {n}" for n in LENGTHS), "seeds"]
    rows = []
    for name, paper, run, arm in READING:
        found = runs_of(experiments, paper, scale).get(run, {})
        series = found.get("series", [])
        values = [[last_eighth(seed, f"{n}/{arm}") for seed in series] for n in LENGTHS]
        parameters = "" if name.startswith("*") else count(found.get("parameters"))
        cells = [spread([v for v in value if v is not None]) for value in values]
        rows.append([name, parameters, *cells, str(len(series)) if series else "not run"])
    return table(header, rows)


def recall_table(experiments: Path, scale: str = "cpu") -> str:
    """Markdown: the share of facts recalled, by their number, layer by layer."""
    runs = runs_of(experiments, "gated_delta", scale)
    known = [seed for _, run in RECALL for seed in runs.get(run, {}).get("series", [])]
    facts = next((seed["recall/facts"] for seed in known if "recall/facts" in seed), [])
    header = ["layers", "parameters", *(f"of {int(n)} facts" for n in facts), "seeds"]
    rows = []
    for name, run in RECALL:
        found = runs.get(run, {})
        shares = [seed["recall/recalled"] for seed in found.get("series", [])]
        cells = [spread([seed[place] for seed in shares]) for place in range(len(facts))]
        seeds = str(len(shares)) if shares else "not run"
        rows.append([name, count(found.get("parameters")), *cells, seeds])
    return table(header, rows)


def runs_of(experiments: Path, paper: str, scale: str) -> Runs:
    """Runs by name, none where nothing was judged."""
    file = experiments / paper / "results" / f"{scale}.json"
    return json.loads(file.read_text())["runs"] if file.exists() else {}


def last_eighth(series: Mapping[str, Sequence[float]], key: str) -> float | None:
    """Mean over the last eighth of a curve along documents."""
    curve = series.get(key)
    return None if curve is None else mean(curve[-max(1, len(curve) // 8) :])


def spread(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds."""
    if not values:
        return ""
    middle, around = f"{mean(values):.3f}", interval(list(values))
    return middle if around is None else f"{middle} [{around[0]:.3f}, {around[1]:.3f}]"


def count(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters:,}"
