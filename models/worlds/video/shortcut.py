"""Shortcut forcing: a network that is told how far to go, and goes there in one step.

One Step Diffusion via Shortcut Models (2024, arXiv:2410.12557), in the space of what is clean and
with levels of each frame by itself, as in Dreamer 4 (2025, arXiv:2509.24527). Between noise x_0 and
what is to be told, x_1, lies

    z = (1 - tau) x_0 + tau x_1        f(z, tau, d) tells x_1
    a step of d goes to z + d (f - z) / (1 - tau)

The smallest step, d = 1 / most, is learned from what is true; one twice as large from two of the
smaller, taken one after the other without a gradient:

    b'   = (f(z, tau, d/2) - z) / (1 - tau)          z'  = z + b' d/2
    b''  = (f(z', tau + d/2, d/2) - z') / (1 - tau - d/2)
    loss = (1 - tau)^2 |(f(z, tau, d) - z) / (1 - tau) - (b' + b'') / 2|^2

weighed by 0.9 tau + 0.1. Without the (1 - tau)^2, which undoes what a slope divides by, errors are
those of slopes, as in the first of the two papers: `slopes`. Pure functions; all of tau and d are
given as whole numbers of the smallest step, so that they lie on its grid exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Tell = Callable[[Tensor, Tensor, Tensor], Tensor]  # z, tau, d (in smallest steps) -> x_1


def powers(most: int) -> list[int]:
    """Sizes of a step in smallest ones: 1, 2, 4, .. most.

    Raises:
        ValueError: `most` is no power of two.
    """
    if most < 1 or most & (most - 1):
        raise ValueError(f"most={most} must be a power of two")
    return [2**i for i in range(most.bit_length())]


def draw_levels(
    share: Float[Tensor, "... 2"], most: int, least: int = 1
) -> tuple[Int64[Tensor, " ..."], Int64[Tensor, " ..."]]:
    """tau and d from two uniform numbers each: d a power of two from `least` on, tau a multiple of
    it, below 1."""
    sizes = [size for size in powers(most) if size >= least]
    index = (share[..., 0] * len(sizes)).long().clamp(max=len(sizes) - 1)
    d = torch.tensor(sizes, device=share.device)[index]
    steps = most // d
    return (share[..., 1] * steps).long().clamp(max=steps - 1) * d, d


def between(x_0: Tensor, x_1: Tensor, tau: Tensor, most: int) -> Tensor:
    """z, where tau [b, t] broadcasts over what follows."""
    share = spread(tau, x_1) / most
    return (1 - share) * x_0 + share * x_1


def spread(tau: Tensor, like: Tensor) -> Tensor:
    """[b, t] -> [b, t, 1, ..], in the dtype of `like`, at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tau.to(dtype).view(*tau.shape, *[1] * (like.ndim - tau.ndim))


def slope(told: Tensor, z: Tensor, tau: Tensor, most: int) -> Tensor:
    """(x_1 - z) / (1 - tau)."""
    return (told - z) / (1 - spread(tau, z) / most)


@torch.no_grad()
def two_halves(tell: Tell, z: Tensor, tau: Tensor, d: Tensor, most: int) -> Tensor:
    """The mean slope of two steps of d / 2."""
    half = d // 2
    first = slope(tell(z, tau, half), z, tau, most)
    there = z + first * spread(half, z) / most
    second = slope(tell(there, tau + half, half), there, tau + half, most)
    return (first + second) / 2


def flow_loss(
    tell: Tell, x_0: Tensor, x_1: Tensor, tau: Tensor, most: int, slopes: bool = False
) -> Float[Tensor, "b t"]:
    """Weighed errors of frames [b, t, ...] that are told by the smallest step from tau on."""
    told = tell(between(x_0, x_1, tau, most), tau, torch.ones_like(tau))
    return weighed((told - x_1).float(), tau, most, slopes)


def jump_loss(
    tell: Tell, x_0: Tensor, x_1: Tensor, tau: Tensor, d: Tensor, most: int, slopes: bool = False
) -> Float[Tensor, "b t"]:
    """The same of a step of d, two smallest ones or more, beside two of half its size."""
    z = between(x_0, x_1, tau, most)
    off = slope(tell(z, tau, d), z, tau, most) - two_halves(tell, z, tau, d, most)
    return weighed(((1 - spread(tau, z) / most) * off).float(), tau, most, slopes)


def weighed(error: Tensor, tau: Tensor, most: int, slopes: bool) -> Float[Tensor, "b t"]:
    """Mean square of errors [b, t, ...] of what is clean, or of slopes to it, that of cleaner
    frames counting more."""
    if slopes:
        error = error / (1 - spread(tau, error) / most)
    return (0.9 * tau / most + 0.1) * error.square().flatten(tau.ndim).mean(-1)


def travel(tell: Tell, z: Tensor, steps: int, most: int) -> Tensor:
    """From noise z [b, t, ...] to what is told, in `steps` equal steps.

    Raises:
        ValueError: no power of two, or more than the smallest steps there are.
    """
    if steps not in powers(most):
        raise ValueError(f"steps={steps} must be one of {powers(most)}")
    size = most // steps
    d = torch.full(z.shape[:2], size, device=z.device)
    for count in range(steps):
        tau = torch.full(z.shape[:2], count * size, device=z.device)
        told = tell(z, tau, d)
        last = count == steps - 1  # then d = 1 - tau: what is told is there
        z = told if last else z + slope(told, z, tau, most) * spread(d, z) / most
    return z
