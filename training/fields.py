"""What the configuration dataclasses share: fields that a resumed run may change, range checks."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any


def free(default: Any) -> Any:
    """A field that may differ when a run is resumed."""
    return field(default=default, metadata={"free": True})


def checkpoint(default: str | None = None) -> Any:
    """A field that names weights to begin with: a run does not resume with others."""
    return field(default=default, metadata={"weights": True})


def at_least(config: Any, group: str, low: float, *keys: str) -> None:
    """Raise ValueError unless each key of `config` is None or a number from `low` on."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not low <= value < math.inf:  # nan is refused too
            raise ValueError(f"{group}.{key}={value} must be at least {low}, and finite")


def above(config: Any, group: str, low: float, *keys: str) -> None:
    """Raise ValueError unless each key of `config` is None or a number above `low`."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not low < value < math.inf:
            raise ValueError(f"{group}.{key}={value} must be > {low}, and finite")


def span(config: Any, group: str, most: float, *keys: str) -> None:
    """Raise ValueError unless each key of `config` is [least, largest], above 0, up to `most`."""
    for key in keys:
        value = getattr(config, key)
        if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
            raise ValueError(
                f"{group}.{key}={value} must be [least, largest], above 0 and up to {most:g}"
            )


def within(config: Any, group: str, low: float, high: float, *keys: str) -> None:
    """Raise ValueError unless each key of `config` is None or in [low, high]."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{group}.{key}={value} must be between {low} and {high}")
