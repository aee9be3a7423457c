"""Gaussians that are followed from one time to the next: the same ones, always.

Dynamic 3D Gaussians: Tracking by Persistent Dynamic View Synthesis (2023, arXiv:2308.09713). At
the first time a scene is fitted; at every other one only places and rotations are, from where the
two times before lead, all else as it was. What keeps neighbours i and j, found at the first time,
together, w_ij = exp(-decay |x_j - x_i|^2) there, R_i being rotations and ' what was a time ago:

    rigid   w_ij |(x_j' - x_i') - R_i' R_i^-1 (x_j - x_i)|
    rot     w_ij |q_j q_j'^-1 - q_i q_i'^-1|
    iso     w_ij | |x_j - x_i| - what it was at the first time |

What differs: no masks of what is in front are asked for, and so no losses by them. Between times
that were fitted Gaussians are on straight lines.

Dimensions: n Gaussians, m places for them, t times, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.splats.project import rotations
from models.worlds.splats.gaussians import Fields
from models.worlds.splats.motions import Still
from models.worlds.splats.rigid import inverse, product, towards


class Tracked(Still):
    """Where Gaussians were at the times that are done; at later ones they are as they are."""

    times: Float[Tensor, " t"]
    means: Float[Tensor, "t m 3"]
    quats: Float[Tensor, "t m 4"]
    known: Int[Tensor, ""]
    "Times that are done."

    def __init__(self, times: Float[Tensor, " t"], capacity: int) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.register_buffer("means", torch.zeros(len(times), capacity, 3))
        self.register_buffer("quats", torch.zeros(len(times), capacity, 4))
        self.register_buffer("known", torch.zeros((), dtype=torch.long))

    def forward(self, scene: Fields, fields: Mapping[str, Tensor], time: float) -> Fields:
        n, known = len(scene["means"]), int(self.known)
        after = int((self.times[:known] < time).sum())
        if after == known and (known < len(self.times) or not known):
            return scene
        after = min(max(after, 1), known - 1)
        if after == 0:
            return scene | {"means": self.means[0, :n], "quats": self.quats[0, :n]}
        a, b = after - 1, after
        share = ((time - self.times[a]) / (self.times[b] - self.times[a])).clamp(0, 1)
        p, q = self.quats[a, :n], towards(self.quats[b, :n], self.quats[a, :n])
        return scene | {
            "means": torch.lerp(self.means[a, :n], self.means[b, :n], share),
            "quats": torch.lerp(p, q, share),
        }

    @torch.no_grad()
    def advance(self, means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"]) -> None:
        """The time in hand is done: keep where Gaussians are, and move them on as they went, in
        place."""
        n, now = len(means), int(self.known)
        self.means[now, :n], self.quats[now, :n] = means, F.normalize(quats, dim=-1)
        self.known += 1
        if 0 < now < len(self.times) - 1:
            span = (self.times[now + 1] - self.times[now]) / (self.times[now] - self.times[now - 1])
            p = self.quats[now - 1, :n]
            q = towards(self.quats[now, :n], p)
            means += span * (means - self.means[now - 1, :n])
            quats.copy_(F.normalize(q + span * (q - p), dim=-1))

    def together(
        self, means: Float[Tensor, "n 3"], quats: Float[Tensor, "n 4"], bonds: Bonds
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three losses, at a time that is not the first."""
        n, before = len(means), int(self.known) - 1
        x, q = self.means[before, :n], self.quats[before, :n]
        turned = towards(F.normalize(quats, dim=-1), q)
        j, w = bonds.neighbours, bonds.weights
        was, now = x[j] - x[:, None], means[j] - means[:, None]
        back = rotations(q) @ rotations(turned).transpose(-1, -2)
        rigid = w * length(was - torch.einsum("nab,nkb->nka", back, now))
        turn = product(turned, inverse(q))
        rot = w * length(turn[j] - turn[:, None])
        iso = w * (length(now) - bonds.lengths).abs()
        return rigid.mean(), rot.mean(), iso.mean()


@dataclass(frozen=True)
class Bonds:
    """Who is near whom at the first time."""

    neighbours: Int[Tensor, "n k"]
    weights: Float[Tensor, "n k"]
    lengths: Float[Tensor, "n k"]


@torch.no_grad()
def bonds_of(means: Float[Tensor, "n 3"], k: int, decay: float) -> Bonds:
    """Of the k nearest, or as many as there are; a few thousand Gaussians at a time."""
    k, rows, distances = min(k, len(means) - 1), [], []
    for some in means.split(4096):
        nearest = torch.cdist(some, means).topk(k + 1, largest=False)
        rows.append(nearest.indices[:, 1:])
        distances.append(nearest.values[:, 1:])
    apart = torch.cat(distances)
    return Bonds(torch.cat(rows), (-decay * apart.square()).exp(), apart)


def length(x: Tensor) -> Tensor:
    """Whose gradient is finite at 0."""
    return (x.square().sum(-1) + 1e-20).sqrt()
