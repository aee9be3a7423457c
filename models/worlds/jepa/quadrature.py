"""Where and with what weight SIGReg compares characteristic functions. Loads no framework.

A trapezoid over [0, 3], doubled for the symmetric other half, with exp(-t^2 / 2) as in LeJEPA
(2025, arXiv:2511.08544).
"""

from __future__ import annotations

import math

KNOTS, REACH = 17, 3.0
STEP = REACH / (KNOTS - 1)


def quadrature() -> tuple[list[float], list[float]]:
    """Knots t, and the weights of |ecf(t) - exp(-t^2 / 2)|^2 at them."""
    knots = [i * STEP for i in range(KNOTS)]
    lengths = [STEP if i in (0, KNOTS - 1) else 2 * STEP for i in range(KNOTS)]
    weights = [n * math.exp(-t * t / 2) for t, n in zip(knots, lengths, strict=True)]
    return knots, weights
