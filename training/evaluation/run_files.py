"""What a run directory holds, read back: for its page, for the terminal, for sweeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.logging import Row, read_rows

FLOORS_METRIC, FLOORS_LOSS = "eval/bpb", "eval/loss"
"The metric that a run's floors share a unit with, and the loss it is proportional to."
OWN = "this model"
STANDING = ("scale", "seed", "date", "run", "experiment", "stopped_by", "uniform_bpb")


@dataclass(frozen=True)
class RunFiles:
    """A run directory as it is on the disk; empty where a file is not there yet."""

    directory: Path
    results: dict[str, Any]
    status: dict[str, Any]
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[Row]
    perf: list[Row]

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Raises UserError if the directory does not hold a run."""
        if not is_run(directory):
            raise UserError(f"{directory} holds no run: there is neither config.yaml nor status")
        return cls(
            directory,
            *(read_json(directory / f"{name}.json") for name in ("results", "status")),
            read_config(directory / "config.yaml"),
            read_json(directory / "env.json"),
            read_rows(directory / "metrics.jsonl"),
            read_rows(directory / "perf.jsonl"),
        )

    @property
    def name(self) -> str:
        return self.results.get("run") or self.directory.resolve().name

    @property
    def experiment(self) -> str:
        return self.results.get("experiment") or self.config.get("experiment") or "unnamed"

    @property
    def metrics(self) -> dict[str, Any]:
        """The results' metrics; the newest of each logged one while there are none."""
        newest = {k: v for row in self.rows for k, v in row.items() if k[:5] in ("eval/", "train")}
        return self.results.get("metrics") or newest


def is_run(directory: Path) -> bool:
    """Whether a run has begun in this directory."""
    return any((directory / name).is_file() for name in ("config.yaml", "status.json"))


def read_json(path: Path) -> dict[str, Any]:
    """What a .json file holds, {} if there is none. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.exists():
        return {}
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return found if isinstance(found, dict) else {}  # type: ignore[return-value]


def ranking(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The model among its floors and the uniform distribution, worst first; [] without floors."""
    value = results.get("metrics", {}).get(FLOORS_METRIC)
    if not results.get("floors") or value is None or not math.isfinite(value):
        return []
    named = {**results["floors"], OWN: value}
    if results.get("uniform_bpb") is not None:
        named["uniform"] = results["uniform_bpb"]
    known = [(k, v) for k, v in named.items() if v is not None and math.isfinite(v)]
    return sorted(known, key=lambda item: -item[1])


def headline(metrics: Mapping[str, Any]) -> str | None:
    """The metric that is shown largest: the floors' if there is one, else the first evaluated."""
    evaluated = [key for key in metrics if key.startswith("eval/")]
    return FLOORS_METRIC if FLOORS_METRIC in evaluated else next(iter(evaluated), None)


def experience(results: Mapping[str, Any]) -> dict[str, float]:
    """Unit -> how much the run has seen: the top-level counts that have no name of their own."""
    named = (*STANDING, "steps", "train_s", "parameters")
    return {
        key: value
        for key, value in results.items()
        if key not in named and isinstance(value, int) and not isinstance(value, bool)
    }
