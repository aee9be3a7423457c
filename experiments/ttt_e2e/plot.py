"""Figures of TTT-E2E, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import Line, curve, line_chart, mean_curve
from training.evaluation.positions import curves_of
from training.files import write_atomic

ARMS = {
    "TTT-E2E": ("ttt", "learning"),
    "first order": ("first_order", "learning"),
    "naive TTT": ("sliding_window", "naive"),
    "sliding window": ("sliding_window", "static"),
    "TTT-E2E, not learning": ("ttt", "static"),
    "Bayes": ("ttt", "floor"),
}

TEXT = {
    "TTT-E2E": ("text", "learning"),
    "TTT-E2E, not learning": ("text", "static"),
    "sliding window": ("text_sliding_window", "static"),
}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_loss_at_<length>.svg per length, <scale>_text, _training and _cost.svg."""
    runs, scale = results["runs"], results["scale"]
    lengths = {name.split("/")[0] for seed in runs["ttt"].get("series", []) for name in seed}
    for length in sorted(lengths - {"cost"}, key=int):
        lines = [
            line
            for name, (run, arm) in ARMS.items()
            for line in curves_of({name: runs.get(run, {})}, f"{length}/{arm}", int(length))
        ]
        chart = line_chart(lines, "nats per token", f"position in documents of {length} tokens")
        write_atomic(directory / f"{scale}_loss_at_{length}.svg", chart)
    seeds = runs.get("text", {}).get("series", [])
    if seeds:
        length = min(int(name.partition("/")[0]) for seed in seeds for name in seed)
        lines = [
            line
            for name, (run, arm) in TEXT.items()
            for line in curves_of({name: runs.get(run, {})}, f"{length}/{arm}", length)
        ]
        chart = line_chart(lines, "nats per byte", "position in files of the standard library")
        write_atomic(directory / f"{scale}_text.svg", chart)
    curves = training("TTT-E2E", "ttt", results) + training("full", "full_attention", results)
    chart = line_chart(curves, "nats per token, last eighth")
    write_atomic(directory / f"{scale}_training.svg", chart)
    times = {
        "TTT-E2E": "cost",
        "full attention": "cost_full_attention",
        "full attention, SDPA": "cost_sdpa",
    }
    curves = [line for name, run in times.items() if (line := cost(name, runs.get(run, {})))]
    if curves:
        chart = line_chart(curves, "seconds to read the context", "tokens", log_x=True)
        write_atomic(directory / f"{scale}_cost.svg", chart)


def training(name: str, run: str, results: dict[str, Any]) -> list[Line]:
    """The last eighth's loss at each evaluation of the training, seed by seed: they differ."""
    return [
        curve(
            [
                {"step": step, "loss": loss}
                for step, loss in zip(seed["step"], seed["eval/last_eighth"], strict=True)
                if loss is not None
            ],
            "loss",
            f"{name}, seed {number}",
        )
        for number, seed in enumerate(results["curves"].get(run, []), 1)
    ]


def cost(name: str, run: dict[str, Any]) -> Line | None:
    seeds = [seed for seed in run.get("series", []) if "cost/seconds" in seed]
    if not seeds:
        return None
    return mean_curve(name, seeds[0]["cost/lengths"], [seed["cost/seconds"] for seed in seeds])
