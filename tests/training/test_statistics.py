"""Intervals equal the textbooks' tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.evaluation.statistics import interval, mean, t_quantile, wilson_interval


@pytest.mark.parametrize(
    ("degrees", "level", "expected"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (5, 0.95, 2.571),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (2, 0.90, 2.920),
        (7, 0.99, 3.499),
    ],
)
def test_t_quantiles_of_the_table(degrees: int, level: float, expected: float) -> None:
    assert t_quantile(degrees, level) == pytest.approx(expected, abs=6e-4)


def test_t_becomes_normal() -> None:
    assert t_quantile(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_interval_of_three_values() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (math.nan, math.nan)
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.normal(1.0, 2.0, size=(2000, 4)).tolist()
    covered = sum(low <= 1.0 <= high for low, high in filter(None, map(interval, drawn)))
    low, high = wilson_interval(covered, len(drawn), level=0.999)
    assert low <= 0.95 <= high


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_without_spread(values: list[float]) -> None:
    assert interval(values) is None


def test_equal_values_have_a_point() -> None:
    assert interval([2.5, 2.5, 2.5]) == (2.5, 2.5)


def test_mean() -> None:
    assert mean([0.1] * 10) == 0.1
    assert math.isnan(mean([1.0, math.nan]))
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_wilson_interval() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="degrees"):
        t_quantile(0)
