"""The table of worlds: what was recorded, and nothing where nothing was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.evaluation.dreams import bytes_of
from training.evaluation.world_tables import WORLDS, world_table


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_recorded_worlds_have_their_numbers_and_others_say_not_run(tmp_path: Path) -> None:
    directory = tmp_path / "genie" / "results"
    directory.mkdir(parents=True)
    world = {"parameters": 812345, "seeds": [1, 2], "final": {"eval/over_copy/5": [0.1, 0.3]}}
    told = [{"fps": 20.0, "p95_ms": 60.0, "cache_mb": 0.25, "steps": 8.0}, None]
    runs = {"world": world, "speed": {"latency": told}}
    (directory / "cpu.json").write_text(json.dumps({"runs": runs}))
    header, _, *rows = cells(world_table(tmp_path))
    assert len(rows) == len(WORLDS) and all(len(row) == len(header) for row in rows)
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    genie = found.pop("Genie")
    assert genie["parameters"] == "812,345" and genie["seeds"] == "2"
    assert genie["error over last frame, 5"].startswith("0.200") and genie["10"] == ""
    assert (genie["frames per second"], genie["steps per frame"]) == ("20", "8")
    assert (genie["p95, ms"], genie["remembered, MB"]) == ("60.0", "0.25")
    for row in found.values():
        assert row["seeds"] == "not run" and not any(list(row.values())[1:-1])


def test_the_bytes_of_a_cache_are_those_of_its_tensors() -> None:
    from models.worlds.video.diamond import Context

    frames = torch.zeros(1, 4, 3, 8, 8)
    cache = Context(frames, torch.zeros(1, 3, dtype=torch.long), torch.zeros(1).long(), 0, 2)
    assert bytes_of(cache) == 4 * frames.numel() + 8 * 3 + 8
    assert bytes_of((frames, [frames], 3)) == pytest.approx(8 * frames.numel())
