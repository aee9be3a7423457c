"""How Gaussians move: where each of them is at a time from 0 to 1, as what is learned says.

    deformation   a network of place and time says how far off each is
                  Deformable 3D Gaussians (2023, arXiv:2309.13101)
    hexplane      the same of features that six planes hold, over pairs of x, y, z, t
                  4D Gaussian Splatting (2023, arXiv:2310.08528)
    polynomial    each has a polynomial of its own, and a time about which it is there
                  Spacetime Gaussian Feature Splatting (2023, arXiv:2312.16812), its features apart

(and tracked, in tracked.py). Each takes a scene as `rasterize` does and the rows that it is made
of, and gives the scene at a time.

Dimensions: n Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.splats.config import DynamicGaussiansConfig
from models.worlds.splats.gaussians import Fields

ORDER = 3  # of polynomials


class Still(nn.Module):
    """Nothing moves: what all others are compared with."""

    rows: ClassVar[dict[str, tuple[int, ...]]] = {}
    "Shapes of what each Gaussian has of its own for this."

    def forward(self, scene: Fields, fields: Mapping[str, Tensor], time: float) -> Fields:
        return scene

    def first(self, n: int) -> Fields:
        """Rows of n Gaussians at the beginning."""
        return {}

    def penalty(self) -> Tensor | float:
        """What the loss has besides."""
        return 0.0


class Deformation(Still):
    """Offsets by a network: f(place, time) = of the mean, of the quaternion, of log scales."""

    box: Float[Tensor, "2 3"]

    def __init__(self, config: DynamicGaussiansConfig, box: Float[Tensor, "2 3"]) -> None:
        super().__init__()
        self.place, self.time = config.frequencies, config.time_frequencies
        self.register_buffer("box", box)
        inputs = 3 * (1 + 2 * self.place) + 1 + 2 * self.time
        self.network = Perceptron(inputs, config.width, config.layers)

    def forward(self, scene: Fields, fields: Mapping[str, Tensor], time: float) -> Fields:
        means = scene["means"].detach()  # the paper's: offsets do not pull at where things are
        when = means.new_full((len(means), 1), 2 * time - 1)
        x = [encoded(within(means, self.box), self.place), encoded(when, self.time)]
        return offset(scene, self.network(torch.cat(x, dim=-1)))


class HexPlane(Still):
    """Offsets by features of planes: the product over pairs of axes, levels one after the other."""

    box: Float[Tensor, "2 3"]

    def __init__(self, config: DynamicGaussiansConfig, box: Float[Tensor, "2 3"]) -> None:
        super().__init__()
        self.register_buffer("box", box)
        f, (*space, time) = config.plane_features, config.planes
        self.planes = nn.ParameterList()
        for level in config.levels:
            sizes = [*(size * level for size in space), time]
            for a, b in combinations(range(4), 2):
                begun = torch.ones(1, f, sizes[b], sizes[a])  # in time: nothing changes
                self.planes.append(begun if b == 3 else begun.uniform_(0.1, 0.5))
        self.network = Perceptron(f * len(config.levels), config.width, config.layers)
        self.levels = len(config.levels)
        self.plane_weight, self.time_weight, self.change_weight = (
            config.plane_weight, config.time_weight, config.change_weight,
        )  # fmt: skip

    def forward(self, scene: Fields, fields: Mapping[str, Tensor], time: float) -> Fields:
        means = scene["means"]
        when = means.new_full((len(means), 1), 2 * time - 1)
        at = torch.cat([within(means, self.box), when], dim=-1)  # [n 4]
        features = []
        for level in range(self.levels):
            found = means.new_ones(())
            for i, pair in enumerate(combinations(range(4), 2)):
                found = found * looked_up(self.planes[6 * level + i][0], at[:, pair])
            features.append(found)
        return offset(scene, self.network(torch.cat(features, dim=-1)))

    def penalty(self) -> Tensor:
        """Planes are even, in time without jerks, and 1 unless something changes."""
        total = self.planes[0].new_zeros(())
        for i, plane in enumerate(self.planes):
            (_, b) = list(combinations(range(4), 2))[i % 6]
            if b < 3:
                down, across = plane.diff(dim=2), plane.diff(dim=3)
                total = total + self.plane_weight * (down.square().mean() + across.square().mean())
            else:
                jerk = plane.diff(n=2, dim=2)
                total = total + self.time_weight * jerk.square().mean()
                total = total + self.change_weight * (plane - 1).abs().mean()
        return total


class Polynomial(Still):
    """With u = t - middle: mean + b1 u + b2 u^2 + b3 u^3, quaternion + c u, opacity times
    exp(-(u / lasting)^2)."""

    rows: ClassVar[dict[str, tuple[int, ...]]] = {
        "velocities": (ORDER, 3), "spins": (4,), "middles": (), "lastings": (),
    }  # fmt: skip

    def forward(self, scene: Fields, fields: Mapping[str, Tensor], time: float) -> Fields:
        u = (time - fields["middles"])[:, None]
        powers = torch.cat([u**k for k in range(1, ORDER + 1)], dim=-1)
        there = (-(u[:, 0] / fields["lastings"].exp()).square()).exp()
        return scene | {
            "means": scene["means"] + torch.einsum("nk,nki->ni", powers, fields["velocities"]),
            "quats": scene["quats"] + fields["spins"] * u,
            "opacities": scene["opacities"] * there,
        }

    def first(self, n: int) -> Fields:
        """At rest, and there about times that are spread evenly."""
        return {
            "velocities": torch.zeros(n, ORDER, 3), "spins": torch.zeros(n, 4),
            "middles": torch.linspace(0, 1, n), "lastings": torch.zeros(n),
        }  # fmt: skip


class Perceptron(nn.Module):
    """Layers of one width, the input once more in the middle, and ten numbers that are 0 at
    first."""

    def __init__(self, inputs: int, width: int, layers: int) -> None:
        super().__init__()
        self.again = layers // 2
        self.layers = nn.ModuleList(
            nn.Linear((inputs if i == 0 else width) + (inputs if i == self.again > 0 else 0), width)
            for i in range(layers)
        )
        self.last = nn.Linear(width, 10)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n 10"]:
        h = x
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([h, x], dim=-1) if i == self.again > 0 else h))
        return self.last(h)


def looked_up(plane: Float[Tensor, "f h w"], at: Float[Tensor, "n 2"]) -> Float[Tensor, "n f"]:
    """Between the nodes of a plane, from -1 to 1 along w and h, at its edge beyond; by indexing,
    whose gradient has the same bits every time, on a GPU too."""
    f, h, w = plane.shape
    size = at.new_tensor([w - 1, h - 1])
    place = ((at + 1) / 2 * size).clamp(min=at.new_zeros(2), max=size)
    low = torch.minimum(place.detach().floor(), size - 1).clamp_min(0).long()
    share, nodes = place - low, plane.reshape(f, h * w).T
    found = plane.new_zeros(())
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = (low[:, 0] + dx).clamp(max=w - 1), (low[:, 1] + dy).clamp(max=h - 1)
        weight = (share[:, 0] if dx else 1 - share[:, 0]) * (share[:, 1] if dy else 1 - share[:, 1])
        found = found + weight[:, None] * nodes[y * w + x]
    return found


def offset(scene: Fields, by: Float[Tensor, "n 10"]) -> Fields:
    """Means and quaternions so much further, scales so much larger."""
    move, turn, grow = by.split([3, 4, 3], dim=-1)
    return scene | {
        "means": scene["means"] + move,
        "quats": scene["quats"] + turn,
        "scales": scene["scales"] * grow.exp(),
    }


def within(means: Float[Tensor, "n 3"], box: Float[Tensor, "2 3"]) -> Float[Tensor, "n 3"]:
    """From -1 to 1 inside the box."""
    return 2 * (means - box[0]) / (box[1] - box[0]) - 1


def encoded(x: Float[Tensor, "n i"], frequencies: int) -> Float[Tensor, "n j"]:
    """x, and sines and cosines of 2^k pi x."""
    angles = x[:, :, None] * (math.pi * 2.0 ** torch.arange(frequencies).to(x))
    return torch.cat([x, angles.sin().flatten(1), angles.cos().flatten(1)], dim=-1)
