"""Random cases of merge_states: values and gradients, with sets that a query saw nothing of."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention import merge, merge_reference
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

LENGTHS = {"small": (1, 2, 17), "large": (1, 127, 2048)}
WIDTHS = {"small": (16, 20, 64), "large": (16, 80, 128, 256)}
HEADS = {"small": (1, 3), "large": (8, 7, 32)}


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        outs, lses = draw(size, SEEDS + index, dtype)
        name = f"states {len(outs)} of {list(outs[0].shape)}"
        yield Case("merge_states", name, dtype, runner(outs, lses, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Values and lses of 1 to 5 states; a third of the lses, and those of row 0, are -inf."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, t, h = rng.choice([1, 2]), rng.choice(LENGTHS[size]), rng.choice(HEADS[size])
    d, n = rng.choice(WIDTHS[size]), rng.randint(1, 5)
    outs = torch.randn(n, b, t, h, d, generator=generator, dtype=torch.float64).to(dtype)
    lses = torch.randn(n, b, h, t, generator=generator) * rng.choice([1.0, 30.0])
    empty = torch.rand(n, b, h, t, generator=generator) < 1 / 3
    empty[:, 0, 0, 0] = True
    lses = lses.masked_fill(empty, float("-inf"))
    outs = outs.masked_fill(empty.mT[..., None], float("nan"))
    return list(outs), list(lses)


def with_gradients(
    function, outs: list[Tensor], lses: list[Tensor], **more: str
) -> dict[str, Tensor]:
    """out, lse and the gradients of a random function of both."""
    outs, lses = ([x.detach().requires_grad_() for x in xs] for xs in (outs, lses))
    with poisoned():
        out, lse = function(list(zip(outs, lses, strict=True)), **more)
        generator = torch.Generator().manual_seed(1)
        weight, weight_lse = (
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)
        )
        loss = (out * weight).sum() + (lse.masked_fill(lse.isinf(), 0.0) * weight_lse).sum()
        gradients = torch.autograd.grad(loss, [*outs, *lses])
    douts, dlses = gradients[: len(outs)], gradients[len(outs) :]
    return {"out": out, "lse": lse, "d outs": torch.stack(douts), "d lses": torch.stack(dlses)}


def runner(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        exact = with_gradients(
            merge_reference.merge_states, [x.double() for x in outs], [x.double() for x in lses]
        )
        here = [[guarded(x.to(device)) for x in xs] for xs in (outs, lses)]
        eager = with_gradients(merge.merge_states, *here, impl="torch")
        got = with_gradients(merge.merge_states, *here, impl=impl)
        return [
            compare(what, got[what], eager[what], exact[what], dtype, gradient=what[:2] == "d ")
            for what in exact
        ]

    return run
