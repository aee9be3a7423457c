"""What the loop asks of data and of a recipe, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Data(Protocol):
    """Where batches come from: a function of the step alone, at any number of processes."""

    def batch(self, step: int) -> Any:
        """This process's part of batch `step`."""

    def ids(self, step: int) -> list[str]:
        """Names of what batch `step` holds, for messages."""

    @property
    def content_hash(self) -> str:
        """Changes when the data does: a run does not resume on other data."""


class Recipe(Protocol):
    """What is trained, towards what, how: everything the loop needs to know of a paper."""

    framework: str  # "torch" or "jax": how its state is saved
    unit: str  # what experience is counted in: "tokens", "frames", "env_steps"
    units_per_step: int  # of all processes together
    remedy: str  # which keys to change when a metric is not finite
    alarm: str | None  # what the last evaluation found wrong, for a person to know at once
    flops_per_step: float  # of all processes together; 0 where unknown
    data: Data

    def step(self, batch: Any) -> Mapping[str, Any]:
        """One training step; scalars by name (`train/loss`), which may still be on the device
        (they are fetched later: no views of what the next step changes)."""

    def evaluate(self, final: bool = False) -> Mapping[str, float]:
        """The metrics of the held-out protocol (`eval/...`); `final` covers all of it."""

    def summary(self) -> Mapping[str, Any]:
        """What else results.json holds at the end: sizes, floors, samples."""

    def export(self, directory: Path) -> None:
        """Write what others may load: weights as safetensors."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
