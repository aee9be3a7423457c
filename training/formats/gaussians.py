"""Gaussians as files hold them: numpy arrays of what is learned, and of no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float32
from scipy.spatial.transform import Rotation

MOST = 50_000_000
"Gaussians of a file."

MIRRORED_YZ = (1, 2, 4, 7, 9, 11, 12, 14)
"Spherical harmonics that change their sign where y and z do."


@dataclass(frozen=True)
class Splats:
    """As models/worlds/splats/gaussians.py stores them."""

    means: Float32[np.ndarray, "n 3"]
    quats: Float32[np.ndarray, "n 4"]
    "wxyz"
    scales: Float32[np.ndarray, "n 3"]
    "Logarithms."
    opacities: Float32[np.ndarray, " n"]
    "Logits."
    sh: Float32[np.ndarray, "n k 3"]

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Of the harmonics."""
        return round(self.sh.shape[1] ** 0.5) - 1

    def checked(self) -> Splats:
        """Itself, in float32.

        Raises:
            ValueError: shapes that do not belong together, or values that are not finite.
        """
        n, k = len(self.means), self.sh.shape[1]
        if k not in (1, 4, 9, 16):
            raise ValueError(f"{k} spherical harmonics, not 1, 4, 9 or 16")
        shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,),
                  "sh": (n, k, 3)}  # fmt: skip
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x.shape != shape:
                raise ValueError(f"{name} is {list(x.shape)}, expected {list(shape)}")
            if not np.isfinite(x).all():
                raise ValueError(f"{name} has infinite or undefined values")
        return replace(
            self, **{f.name: getattr(self, f.name).astype(np.float32) for f in fields(self)}
        )

    def mirrored_yz(self) -> Splats:
        """The same scene in axes whose y and z point the other way (a turn about x)."""
        sh = self.sh.copy()
        sh[:, [k for k in MIRRORED_YZ if k < sh.shape[1]]] *= -1
        return replace(
            self, means=self.means * np.float32([1, -1, -1]),
            quats=self.quats * np.float32([1, 1, -1, -1]), sh=sh,
        )  # fmt: skip

    def unit_quats(self) -> Float32[np.ndarray, "n 4"]:
        """Of length 1, with w >= 0. Raises ValueError for one of length 0."""
        length = np.linalg.norm(self.quats, axis=1, keepdims=True)
        if not (length > 0).all():
            raise ValueError("a quaternion has length 0")
        q = self.quats / length
        return np.where(q[:, :1] < 0, -q, q)

    def covariances(self) -> Float32[np.ndarray, "n 3 3"]:
        """In space. Raises ValueError for a quaternion of length 0."""
        turned = Rotation.from_quat(self.unit_quats(), scalar_first=True).as_matrix()
        axes = turned * np.exp(self.scales)[:, None]
        return (axes @ axes.transpose(0, 2, 1)).astype(np.float32)


def splats_of(fields: Mapping[str, Any]) -> Splats:
    """Of tensors or arrays as models/worlds/splats/gaussians.py names them."""
    x = {name: np.asarray(values) for name, values in fields.items()}
    sh = np.concatenate([x["sh0"], x["shN"]], axis=1)
    return Splats(x["means"], x["quats"], x["scales"], x["opacities"], sh).checked()


def splats_of_scene(scene: Mapping[str, Any]) -> Splats:
    """Of tensors as `rasterize` takes them: scales, opacities from 0 to 1, harmonics."""
    x = {name: np.asarray(values, np.float32) for name, values in scene.items()}
    covered = np.clip(x["opacities"], 1e-7, 1 - 1e-7)
    logits = np.log(covered / (1 - covered))
    return Splats(x["means"], x["quats"], np.log(x["scales"]), logits, x["sh"]).checked()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


def logit(share: np.ndarray) -> np.ndarray:
    """Of shares whose ends are not 0 and 1 but half a 255th away."""
    share = np.clip(share, 0.5 / 255, 1 - 0.5 / 255)
    return np.log(share / (1 - share)).astype(np.float32)


def quantised(x: np.ndarray) -> np.ndarray:
    """Rounded to whole numbers from 0 to 255."""
    return np.clip(np.round(x), 0, 255).astype(np.uint8)
