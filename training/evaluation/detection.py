"""Where things are, read off maps of latents: a detector that is fitted to frozen latents.

As in the video example of eb_jepa (2026, arXiv:2602.03604): a grid of cells, in each of which an
object's centre may lie, and average precision over all cells. Nothing flows back to the encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

Detector = Callable[[Float[Tensor, "n c s s"]], Float[Tensor, "n g g"]]
WIDTH, STEPS, BATCH = 64, 400, 64


def grid_of(
    positions: Float[Tensor, "n t k 2"], cells: int, size: float
) -> Bool[Tensor, "n t g g"]:
    """Which cells of a frame of [0, size]^2 hold a centre; rows are y."""
    index = (positions * (cells / size)).long().clamp(0, cells - 1)
    flat = index[..., 1] * cells + index[..., 0]  # [n, t, k]
    held = torch.zeros(*flat.shape[:2], cells * cells, dtype=torch.bool, device=flat.device)
    return held.scatter_(2, flat, torch.ones_like(flat, dtype=torch.bool)).unflatten(
        2, (cells, cells)
    )


def detector(
    z: Float[Tensor, "n c s s"], truth: Bool[Tensor, "n g g"], generator: torch.Generator
) -> Detector:
    """Two convolutions over cells, fitted by Adam; gives logits."""
    cells = truth.shape[-1]
    mean, scale = (f(z, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))

    def features(x: Tensor) -> Tensor:
        x = (x - mean) / scale.clamp(min=1e-6)
        return rearrange(x, "n c (g p) (f q) -> n (c p q) g f", g=cells, f=cells)

    wide = features(z[:1]).shape[1]
    first = torch.randn(WIDTH, wide, 3, 3, generator=generator, device=z.device)
    first = (first * (2 / (9 * wide)) ** 0.5).requires_grad_()
    last = torch.randn(1, WIDTH, 1, 1, generator=generator, device=z.device)
    last = (last * WIDTH**-0.5).requires_grad_()
    biases = [torch.zeros(n, device=z.device, requires_grad=True) for n in (WIDTH, 1)]
    parameters = [first, last, *biases]

    def find(x: Tensor) -> Tensor:
        hidden = F.relu(F.conv2d(features(x.float()), first, biases[0], padding=1))
        return F.conv2d(hidden, last, biases[1])[:, 0]

    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(len(z), (BATCH,), generator=generator, device=z.device)
            loss = F.binary_cross_entropy_with_logits(find(z[rows]), truth[rows].float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return lambda x: torch.cat([find(part) for part in x.split(512)])


def average_precision(scores: Float[Tensor, "*n"], truth: Bool[Tensor, "*n"]) -> float:
    """Area under precision over recall: the mean, over what is there, of the precision at its
    score. Equal scores share one threshold."""
    flat, right = scores.flatten(), truth.flatten().double()
    order = flat.argsort(descending=True)
    flat, right = flat[order], right[order]
    found = right.cumsum(0)
    last = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    last[:-1] = flat[1:] != flat[:-1]  # the last of equal scores
    found, count = found[last], (torch.arange(len(flat), device=flat.device) + 1)[last]
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return ((found / count * gained).sum() / right.sum().clamp(min=1)).item()
