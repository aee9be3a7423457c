"""The training clock and the window of metrics between two rows of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from training.profiling import device_name, peak_flops, peak_memory_gb
from training.protocols import Recipe


@dataclass
class LoopState:
    """What the loop itself needs to go on: saved with every checkpoint."""

    step: int = 0
    units: int = 0
    elapsed_s: float = 0.0
    rows: int = 0
    window: list[dict[str, float]] = field(default_factory=list)


class Meter:
    """Collects metrics between rows and keeps the training clock (evaluation is off it)."""

    def __init__(self, recipe: Recipe, state: LoopState, world: int) -> None:
        self.recipe = recipe
        self.pending: list[Mapping[str, Any]] = []
        self.before = state.elapsed_s
        self.started = time.monotonic()
        self.marked = (self.started, state.step, state.units)
        peak = peak_flops(device_name(recipe.framework))
        self.peak = peak * world if peak else None

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.before + time.monotonic() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for the length of a `with` block."""
        began = time.monotonic()
        yield
        away = time.monotonic() - began
        self.started += away
        moment, step, units = self.marked
        self.marked = (moment + away, step, units)

    def collect(self, state: LoopState) -> None:
        """Fetch the metrics that may still be on the device into the state's window."""
        for metrics in self.pending:
            state.window.append({key: float(value) for key, value in metrics.items()})
        self.pending.clear()

    def row(self, state: LoopState) -> tuple[dict[str, float], dict[str, float]]:
        """Mean of each metric over the steps since the last row that had it, and the speed."""
        found: dict[str, list[float]] = {}
        for metrics in state.window:
            for key, value in metrics.items():
                found.setdefault(key, []).append(value)
        row: dict[str, float] = {self.recipe.unit: state.units}
        row.update({key: sum(values) / len(values) for key, values in found.items()})
        state.window.clear()
        now = time.monotonic()
        seconds = max(now - self.marked[0], 1e-9)
        steps, units = state.step - self.marked[1], state.units - self.marked[2]
        self.marked = (now, state.step, state.units)
        perf = {
            f"perf/{self.recipe.unit}_per_s": units / seconds,
            "perf/step_s": seconds / max(steps, 1),
            "perf/memory_gb": peak_memory_gb(self.recipe.framework),
        }
        if self.peak and self.recipe.flops_per_step:
            perf["perf/mfu"] = self.recipe.flops_per_step * steps / seconds / self.peak
        return row, perf
