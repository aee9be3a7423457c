"""A set of Gaussians that may grow and shrink while it learns.

Room for `capacity` is allocated once, of which the first `count` rows are there, so that a
checkpoint has one shape and an optimiser one state. What is stored is what is learned:

    means      [m, 3]        in the world's units
    quats      [m, 4]        rotation wxyz, of any length but 0
    scales     [m, 3]        log of the standard deviations
    opacities  [m]           logit
    sh0        [m, 1, 3]     spherical harmonics: the colour from everywhere
    shN        [m, k - 1, 3] and what depends on the direction
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.splats.harmonics import of_color

Fields = dict[str, Tensor]


@dataclass(frozen=True)
class Edit:
    """How a set changes: rows that stay, in this order, and those that come after them."""

    stay: Int[Tensor, " s"]
    new: Fields


class Gaussians(nn.Module):
    """Rows of parameters, the first `count` of which are Gaussians."""

    def __init__(
        self, capacity: int, degree: int, extra: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        """
        Args:
            extra: shapes of what else each Gaussian has.
        """
        super().__init__()
        self.capacity, self.degree, self.count = capacity, degree, 0
        k = (degree + 1) ** 2
        shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3),
                  "shN": (k - 1, 3)}  # fmt: skip
        for name, shape in (shapes | dict(extra or {})).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(capacity, *shape)))

    def fields(self) -> Fields:
        """Of the Gaussians that are there, as they are stored; gradients reach the parameters."""
        return {name: p[: self.count] for name, p in self.named_parameters()}

    @torch.no_grad()
    def apply_edit(self, edit: Edit, others: Iterable[Tensor] = ()) -> None:
        """Carry out an edit; what does not fit is refused.

        Args:
            others: tensors [capacity, ...] that belong to rows, such as an optimiser's moments:
                those of rows that stay go with them, those of new ones are 0.

        Raises:
            ValueError: more Gaussians than there is room for.
        """
        stay, added = len(edit.stay), len(next(iter(edit.new.values()))) if edit.new else 0
        if stay + added > self.capacity:
            raise ValueError(f"{stay + added} Gaussians, and room for {self.capacity}")
        for name, p in self.named_parameters():
            rows = [p[edit.stay], edit.new[name].to(p)] if added else [p[edit.stay]]
            p.zero_()
            p[: stay + added] = torch.cat(rows)
        for x in others:
            kept = x[edit.stay]
            x.zero_()
            x[:stay] = kept
        self.count = stay + added


def begin(
    points: Float[Tensor, "n 3"],
    colors: Float[Tensor, "n 3"],
    opacity: float,
    degree: int,
    scale: float = 1.0,
) -> Fields:
    """Round Gaussians at points, as wide as their three nearest neighbours are far (rms), times
    `scale`."""
    n = len(points)
    distances = neighbour_distances(points, 3)
    widths = distances.square().mean(-1).sqrt().clamp_min(1e-7) * scale
    quats = torch.zeros(n, 4).to(points)
    quats[:, 0] = 1.0
    logit = torch.logit(torch.tensor(opacity, dtype=points.dtype)).item()
    return {
        "means": points,
        "quats": quats,
        "scales": widths.log()[:, None].repeat(1, 3),
        "opacities": torch.full((n,), logit).to(points),
        "sh0": of_color(colors)[:, None],
        "shN": points.new_zeros(n, (degree + 1) ** 2 - 1, 3),
    }


def neighbour_distances(points: Float[Tensor, "n 3"], k: int) -> Float[Tensor, "n k"]:
    """To the k nearest other points, or as many as there are; a few thousand at a time."""
    k = min(k, len(points) - 1)
    if k < 1:
        return points.new_ones(len(points), 1)
    found = [
        torch.cdist(some, points).topk(k + 1, largest=False).values for some in points.split(4096)
    ]
    return torch.cat(found)[:, 1:]


def activated(fields: Mapping[str, Tensor]) -> Fields:
    """Arguments of `rasterize`: scales, opacities from 0 to 1, harmonics."""
    return {
        "means": fields["means"],
        "quats": fields["quats"],
        "scales": fields["scales"].exp(),
        "opacities": fields["opacities"].sigmoid(),
        "sh": torch.cat([fields["sh0"], fields["shN"]], dim=1),
    }
