"""Loss along documents: eighths, groups, and the distance to the best possible loss."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.positions import by_position, read_documents

RNG = np.random.default_rng(0)


def test_eighths_are_means_over_documents_and_stretches() -> None:
    losses = np.arange(8, dtype=np.float32).repeat(4)[None] * np.array([[1.0], [3.0]])
    found = by_position(losses)
    assert found["eighths"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert (found["first_eighth"], found["last_eighth"], found["fall"]) == (0, 14, -14)
    assert found["largest_rise"] == 2 and found["mean"] == 7
    assert found["groups"] == [7, 21]
    assert found["half_width"] == pytest.approx(12.706 * 7, rel=1e-3)  # t for two documents


def test_the_margin_tells_a_leak_from_noise() -> None:
    floor = RNG.normal(1.0, 0.2, (200, 64))
    honest = by_position(floor + RNG.normal(0.0, 0.3, floor.shape), floor)
    leaking = by_position(floor - 0.1 * (np.arange(64) >= 56), floor + 0.0)
    worse = by_position(floor + 0.5, floor)
    assert honest["floor_margin"] > -3.5
    assert leaking["floor_margin"] < -100 and leaking["above_floor"] == pytest.approx(-0.1)
    assert worse["floor_margin"] > 100
    assert by_position(floor, floor)["floor_margin"] == 0


def test_all_arms_score_the_same_documents() -> None:
    class Data:
        def heldout_sequences(self, count: int, length: int) -> dict[str, np.ndarray]:
            tokens = np.random.default_rng(length).integers(9, size=(count, length + 1))
            return {"tokens": tokens, "floor": np.zeros((count, length))}

    arms = {"one": lambda tokens: tokens[:, 1:] * 1.0, "two": lambda tokens: tokens[:, 1:] * 2.0}
    found, series = read_documents(Data(), 5, [16, 64], arms)
    for length in ("16", "64"):
        assert found[length]["two"]["mean"] == 2 * found[length]["one"]["mean"]
        assert found[length]["floor"]["mean"] == 0
    assert len(series["64/one"]) == 32 and len(series["16/one"]) == 16
