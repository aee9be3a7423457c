"""What several seeds say together: mean and 95 % interval, without scipy.

Student's t from the exact finite series for whole degrees of freedom (Abramowitz and Stegun, 1964,
26.7.3 and 26.7.4); Wilson's score interval for proportions (Wilson, 1927).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan if a value is not finite. Raises ValueError for no values."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(values) / len(values)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student t interval (low, high) of the mean of independent values, one per seed.

    None for fewer than two values, or where one is not finite: there is no spread to go by.
    """
    count = len(values)
    if count < 2 or not all(map(math.isfinite, values)):
        return None
    middle = mean(values)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1, level) * math.sqrt(variance / count)
    return middle - half, middle + half


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = level, for T of Student's distribution. Two-sided.

    Args:
        degrees: whole degrees of freedom, at least 1.
        level: in (0, 1).
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"t_quantile({degrees}, {level}) needs degrees >= 1 and 0 < level < 1")
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(degrees)), which is finite for every t
    for _ in range(100):
        middle = (low + high) / 2
        if central_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= t) for angle = atan(t / sqrt(degrees)): A(t | degrees) of Abramowitz and Stegun."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def wilson_interval(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval (low, high) of a proportion; inside [0, 1] also at 0 and at 1."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt((share * (1 - share) + weight / 4) / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_bootstrap(
    right: Sequence[float], asked: Sequence[float], resamples: int = 10_000, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of a share over questions that are clustered, e.g. in documents.

    Whole clusters are drawn with replacement, sum of right over sum of asked each time.

    Args:
        right: right answers of each cluster; for a paired difference, of one system less those of
            the other on the same questions.
        asked: questions of each cluster.
    """
    import numpy as np

    numerator, denominator = np.asarray(right, float), np.asarray(asked, float)
    if len(numerator) != len(denominator) or not denominator.sum() > 0:
        raise ValueError(f"{len(numerator)} and {len(denominator)} clusters, or no questions")
    rng = np.random.Generator(np.random.Philox(0))
    drawn = rng.integers(len(numerator), size=(resamples, len(numerator)))
    total = denominator[drawn].sum(1)
    shares = numerator[drawn].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
