"""Figures of the quickstart, from results/<scale>.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.evaluation.plots import Line, dot_chart, line_chart, mean_curve
from training.files import write_atomic

SHOWN_FLOORS = ("seen/order_2", "corpus/order_2", "corpus/order_5", "xz")


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_learning.svg (main run beside its floors) and <scale>_twins.svg."""
    curves, scale = results["curves"], results["scale"]
    levels = {
        name.removeprefix("floors/"): value
        for claim in results["claims"]
        for name, value in claim["floors"].items()
        if name.endswith(SHOWN_FLOORS) and value is not None
    }
    if "main" in curves:
        chart = line_chart([over_seeds("main", curves)], "bits per byte, held out", levels=levels)
        write_atomic(directory / f"{scale}_learning.svg", chart)
    twins = {name: last(curves[name]) for name in ("twin_torch", "twin_jax") if name in curves}
    if len(twins) == 2:
        chart = dot_chart(twins, "bits per byte, held out")
        write_atomic(directory / f"{scale}_twins.svg", chart)


def over_seeds(name: str, curves: dict[str, list[dict[str, list[Any]]]]) -> Line:
    """Mean and interval over seeds of a run's evaluations."""
    seeds = [evaluated(seed) for seed in curves[name]]
    return mean_curve(name, [step for step, _ in seeds[0]], [[y for _, y in s] for s in seeds])


def evaluated(seed: dict[str, list[Any]]) -> list[tuple[int, float]]:
    """(step, bits per byte) where the run was evaluated."""
    pairs = zip(seed["step"], seed["eval/bpb"], strict=True)
    return [(step, value) for step, value in pairs if value is not None]


def last(seeds: list[dict[str, list[Any]]]) -> list[float]:
    """Final value per seed."""
    return [evaluated(seed)[-1][1] for seed in seeds]
