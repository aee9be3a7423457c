"""The cost of reading: medians per length, and how they grow."""

from __future__ import annotations

import time

import pytest

from training.evaluation.cost import exponent, prefill_cost


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    lengths = [256, 512, 1024, 4096]
    assert exponent(lengths, [3e-6 * n**1.7 for n in lengths]) == pytest.approx(1.7)


def test_the_first_call_is_not_counted_and_growth_is() -> None:
    calls: list[int] = []

    def prepare(length: int):
        def call() -> None:
            time.sleep(0.2 if length not in calls else length * 1e-4)
            calls.append(length)

        return call

    found = prefill_cost(prepare, lambda length: 10 * length, [50, 400], repeats=3)
    assert calls.count(50) == calls.count(400) == 4
    assert 0.7 < found["exponent"] < 1.2 and found["exponent"] == found["exponent_end"]
    assert found["bytes"] == [500, 4000] and found["growth"] == 8
    assert max(found["seconds"]) < 0.15
