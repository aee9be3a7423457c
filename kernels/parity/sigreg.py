"""Random cases of the characteristic function: averages, and the gradient of the projections."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned
from kernels.sigreg import op, reference

SAMPLES = {"small": (1, 2, 17, 40), "large": (1, 127, 128, 4096)}
DIRECTIONS = {"small": (1, 3, 16, 37), "large": (1, 64, 1000, 2048)}


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        h, step, knots = draw(size, SEEDS + index, dtype)
        name = f"{list(h.shape)} {knots} knots"
        yield Case("characteristic_function", name, dtype, runner(h, step, knots, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, float, int]:
    """Projections of a few groups, narrow and wide, the knots' distance and their number."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    groups = rng.choice([(), (1,), (3,), (2, 2)])
    shape = (*groups, rng.choice(SAMPLES[size]), rng.choice(DIRECTIONS[size]))
    h = torch.randn(shape, generator=generator, dtype=torch.float64) * rng.choice([0.1, 1.0, 3.0])
    return h.to(dtype), rng.choice([3 / 16, 0.05]), rng.choice([1, 2, 10, 17])


def with_gradient(function, h: Tensor, step: float, knots: int, **more: str) -> dict[str, Tensor]:
    """Both averages, and the gradient of a random function of them."""
    h = h.detach().requires_grad_()
    with poisoned():
        cosines, sines = function(h, step, knots, **more)
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            for x in (cosines, sines)
        ]
        loss = (cosines * weights[0]).sum() + (sines * weights[1]).sum()
        (dh,) = torch.autograd.grad(loss, h)
    return {"cos": cosines, "sin": sines, "d h": dh}


def runner(h: Tensor, step: float, knots: int, dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        exact = with_gradient(reference.characteristic_function, h.double(), step, knots)
        here = guarded(h.to(device))
        eager = with_gradient(op.characteristic_function, here, step, knots, impl="torch")
        got = with_gradient(op.characteristic_function, here, step, knots, impl=impl)
        return [
            compare(what, got[what], eager[what], exact[what], dtype, gradient=what[:2] == "d ")
            for what in exact
        ]

    return run
