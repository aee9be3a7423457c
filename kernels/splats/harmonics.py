"""Real spherical harmonics to degree 3, in the order and with the signs of every splat format.

A colour is 0.5 + sum_k c_k Y_k(direction), never below 0. Of no framework: arrays are those of
torch, of jax or of numpy.
"""

from __future__ import annotations

from typing import Any

MAX_DEGREE = 3
Y0 = 0.28209479177387814


def degree_of(k: int) -> int:
    """Of so many coefficients.

    Raises:
        ValueError: not 1, 4, 9 or 16.
    """
    for degree in range(MAX_DEGREE + 1):
        if (degree + 1) ** 2 == k:
            return degree
    raise ValueError(f"{k} coefficients of spherical harmonics: expected 1, 4, 9 or 16")


def harmonics(x: Any, y: Any, z: Any, degree: int) -> list[Any]:
    """The (degree + 1)^2 first Y_k of unit vectors (x, y, z), each of their shape."""
    found = [0 * x + Y0]
    if degree >= 1:
        found += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        found += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree >= 3:
        found += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (5 * z * z - 1),
            0.3731763325901154 * z * (5 * z * z - 3),
            -0.4570457994644658 * x * (5 * z * z - 1),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return found


def of_color(color: Any) -> Any:
    """The first coefficient of what has this colour from everywhere."""
    return (color - 0.5) / Y0
