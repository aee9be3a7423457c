"""What every model's configuration has in common. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelConfig:
    """Base of every model's configuration; `configs/model/<option>.yaml` picks the subclass."""

    name: str = "???"
    "Which model: the stem of its file, e.g. `transformer` for models/language/transformer.py."
