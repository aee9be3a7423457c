"""The table and the figure of memories: accuracy against bytes, from the runs of memory_budget.

A run's results have, in `series`, one row of numbers for each memory at each budget: `COLUMNS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.layer_tables import runs_of
from training.evaluation.markdown import table
from training.evaluation.plots import Line, line_chart, mean_curve
from training.evaluation.statistics import mean
from training.recipes.config import PRESS_NAMES

COLUMNS = (
    *("share_of_context", "resident_bytes", "stored_bytes"),
    *("retrieval/accuracy", "retrieval/interval/0", "retrieval/interval/1"),
    *("paraphrase/accuracy", "reversed/accuracy", "two_hop/accuracy"),
    *("conflict/accuracy", "conflict/stale", "unstated/accuracy"),
    *("foreign/accuracy", "shuffled/accuracy"),
    *("absorb_flops", "score_flops", "absorb_s", "score_s"),
    *("lead/mean", "lead/interval/0", "lead/interval/1"),
)
"What each number of a row is: a path in a cell of results.json, and the cartridge's lead over it."
BESIDE = (
    "share_of_context",
    *("heldout/retrieval", "heldout/paraphrase", "heldout/reversed", "asked/retrieval"),
    *(f"{name}/retrieval" for name in ("full", "none", "window", *PRESS_NAMES)),
)
"What a run of cartridges says of itself and of the memories beside it, in `series/beside`."
ANSWERED, BYTES = "share of questions answered", "share of the context's bytes"
PREFIX = "memory/"
Row = dict[str, float]


def rows_of(run: Mapping[str, Any]) -> dict[str, Row]:
    """Memory -> column -> mean over the seeds."""
    seeds = run.get("series", [])
    names = dict.fromkeys(name for seed in seeds for name in seed if name.startswith(PREFIX))
    found = {}
    for name in names:
        every = [seed[name] for seed in seeds if name in seed]
        columns = zip(*every, strict=True)
        found[name.removeprefix(PREFIX)] = {
            column: mean([math.nan if v is None else v for v in values])
            for column, values in zip(COLUMNS, columns, strict=True)
        }
    return found


def memory_table(experiments: Path, paper: str, run: str, scale: str = "cpu") -> str:
    """Markdown: every memory at every budget, the largest first."""
    found = runs_of(experiments, paper, scale).get(run, {})
    header = [
        "memory", "resident", "stored", "retrieval", "paraphrase", "reversed", "two hops",
        "conflict (stale)", "unstated", "absorb", "answer", "the cartridge's lead",
    ]  # fmt: skip
    rows = rows_of(found)
    ordered = sorted(rows, key=lambda name: (-rows[name]["resident_bytes"], name))
    return table(header, [cells(name, rows[name]) for name in ordered]) if rows else "Not run."


def cells(name: str, row: Row) -> list[str]:
    """One line of the table."""
    lead = row["lead/mean"]
    around = row["lead/interval/0"], row["lead/interval/1"]
    says = "" if math.isnan(lead) or name.startswith("cartridge") else f"{lead:+.2f}"
    if says:
        says += f" [{around[0]:+.2f}, {around[1]:+.2f}]"
        says += " **behind**" if around[1] < 0 else " *even*" if around[0] <= 0 else ""
    interval = f"[{row['retrieval/interval/0']:.2f}, {row['retrieval/interval/1']:.2f}]"
    return [
        name.replace("_", " "),
        f"{row['share_of_context']:.3f}",
        size(row["stored_bytes"]),
        f"{row['retrieval/accuracy']:.2f} {interval}",
        *(share(row[f"{kind}/accuracy"]) for kind in ("paraphrase", "reversed", "two_hop")),
        f"{share(row['conflict/accuracy'])} ({share(row['conflict/stale'])})",
        share(row["unstated/accuracy"]),
        f"{flops(row['absorb_flops'])}, {seconds(row['absorb_s'])}",
        f"{flops(row['score_flops'])}, {seconds(row['score_s'])}",
        says,
    ]


def share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def size(count: float) -> str:
    return f"{count / 1024:.1f} KiB"


def flops(count: float) -> str:
    return "0" if count == 0 else f"{count / 1e6:,.1f} MFLOP"


def seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms"


def chart_of(run: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """SVG: retrieval over the share of the context's bytes, for some memories."""
    rows, lines = rows_of(run), []
    for name in names:
        own = {
            key: row
            for key, row in rows.items()
            if key == name or (key.startswith(f"{name}_") and key[len(name) + 1 :].isdecimal())
        }
        points = sorted(own.values(), key=lambda row: row["share_of_context"])
        if points:
            x = [row["share_of_context"] for row in points]
            y = [row["retrieval/accuracy"] for row in points]
            low = [row["retrieval/interval/0"] for row in points]
            high = [row["retrieval/interval/1"] for row in points]
            lines.append(Line(name.replace("_", " "), x, y, (low, high)))
    if not lines:
        return None
    return line_chart(
        lines,
        "share of questions answered",
        "share of the context's bytes",
        log_x=True,
        from_zero=True,
    )


def budget_chart(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """SVG: what cartridges of several sizes answer, beside presses and text of as many bytes."""
    seeds = [run.get("series", []) for run in runs]
    if not any(seeds):
        return None
    shown = {
        "cartridge": "heldout/retrieval",
        "cartridge, another form": "heldout/paraphrase",
        "KVzip, heads compete": "kvzip_adaptive/retrieval",
        "expected attention": "expected_attention/retrieval",
        "H2O": "h2o/retrieval",
        "last tokens": "window/retrieval",
    }
    every = [
        [dict(zip(BESIDE, seed["beside"], strict=True)) for seed in own] for own in seeds if own
    ]
    every.sort(key=lambda own: own[0]["share_of_context"])
    x = [own[0]["share_of_context"] for own in every]
    count = min(map(len, every))
    lines = [
        mean_curve(name, x, [[own[i][key] for own in every] for i in range(count)])
        for name, key in shown.items()
    ]
    full = mean([own[i]["full/retrieval"] for own in every for i in range(count)])
    lines.append(Line("document in context", x, [full] * len(x), bound=True))
    return line_chart(lines, ANSWERED, BYTES, log_x=True, from_zero=True)


def start_chart(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], starts: Mapping[str, str]
) -> str | None:
    """SVG: what is answered over the steps of training, from different starts."""
    lines = []
    for name, run in starts.items():
        seeds = []
        for curve in curves.get(run, []):
            pairs = zip(curve["step"], curve.get("eval/heldout/retrieval", []), strict=False)
            seeds.append([(step, value) for step, value in pairs if value is not None])
        if seeds:
            steps = [step for step, _ in seeds[0]]
            lines.append(mean_curve(name, steps, [[v for _, v in seed] for seed in seeds]))
    return line_chart(lines, ANSWERED, "step", from_zero=True) if lines else None
