""".splat: 32 bytes a Gaussian, colours from everywhere the same.

    3 float32 place    3 float32 scale (linear)    4 uint8 red, green, blue, opacity
    4 uint8 quaternion wxyz, q 128 + 128

Sorted by how much they show, opacity times volume, falling, so that what comes first counts most.
Lost: harmonics but the first; colours and opacities beyond 8 bits, rotations beyond 7.
"""

from __future__ import annotations

import numpy as np

from kernels.splats.harmonics import Y0
from training.formats.gaussians import MOST, Splats, logit, quantised, sigmoid

LAYOUT = np.dtype([("place", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("rot", "u1", 4)])


def serialise(splats: Splats) -> bytes:
    opacity, scale = sigmoid(splats.opacities), np.exp(splats.scales)
    rows = np.zeros(len(splats), LAYOUT)
    rows["place"], rows["scale"] = splats.means, scale
    rows["color"][:, :3] = quantised(255 * (0.5 + Y0 * splats.sh[:, 0]))
    rows["color"][:, 3] = quantised(255 * opacity)
    rows["rot"] = quantised(splats.unit_quats() * 128 + 128)
    order = np.argsort(-opacity * scale.prod(1), kind="stable")
    return rows[order].tobytes()


def parse(content: bytes) -> Splats:
    """Raises ValueError unless it is whole Gaussians."""
    if len(content) % LAYOUT.itemsize or len(content) // LAYOUT.itemsize > MOST:
        raise ValueError(f"{len(content)} bytes are no whole number of Gaussians of 32")
    rows = np.frombuffer(content, LAYOUT)
    if not (rows["scale"] > 0).all():
        raise ValueError("a scale is not above 0")
    quats = (rows["rot"].astype(np.float32) - 128) / 128
    quats[(quats == 0).all(1), 0] = 1.0
    color = rows["color"].astype(np.float32) / 255
    return Splats(
        rows["place"].copy(), quats, np.log(rows["scale"]), logit(color[:, 3]),
        ((color[:, None, :3] - 0.5) / Y0).astype(np.float32),
    )  # fmt: skip
