"""Random cases of the gated delta rule: widths, lengths, gates and states, with gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fast_weights.gated_delta import op, reference
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

LENGTHS = {"small": (1, 2, 15, 16, 17, 40, 50), "large": (1, 63, 64, 65, 200, 1000)}
WIDTHS = {"small": (5, 8, 16, 20), "large": (16, 64, 100, 128)}
NAMES = ("q", "k", "v", "beta", "g", "state")


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        inputs, scale = draw(size, SEEDS + index, dtype)
        b, t, h, dk = inputs["q"].shape
        given = [name for name in ("g", "state") if name in inputs]
        title = f"gated_delta_rule b{b} t{t} h{h} dk{dk} dv{inputs['v'].shape[-1]}, scale {scale}"
        title = ", ".join([title, *given])
        yield Case("gated_delta_rule", title, dtype, runner(inputs, scale, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], float | None]:
    """Tensors by name, and the scale."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t, dk, dv = rng.choice(LENGTHS[size]), rng.choice(WIDTHS[size]), rng.choice(WIDTHS[size])
    if dtype == torch.float32:
        dk = min(dk, op.WIDEST // 2)
    b, h = rng.choice([1, 2]), rng.choice([1, 2, 3])
    keys, reach = F.normalize(normal(b, t, h, dk), dim=-1), rng.choice([1.0, 1.0, 1.8])
    if rng.random() < 0.3:  # keys that repeat: the corrections depend on each other most
        keys, reach = keys[:, :1].expand(b, t, h, dk), 1.0
    inputs = {
        "q": normal(b, t, h, dk).to(dtype),
        "k": keys.to(dtype),
        "v": normal(b, t, h, dv).to(dtype),
        "beta": (reach * normal(b, t, h).sigmoid()).to(dtype),
    }
    if rng.random() < 0.8:
        inputs["g"] = -(rng.choice([0.01, 0.3, 3.0]) * normal(b, t, h).abs()).float()
    if rng.random() < 0.5:
        inputs["state"] = normal(b, h, dk, dv).float()
    return inputs, rng.choice([None, 1.0])


def with_gradients(
    function, inputs: dict[str, Tensor], scale: float | None, **more
) -> dict[str, Tensor]:
    """Outputs, the last state, and the gradients of a random function of them."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        given = [leaves.get(name) for name in NAMES[:5]]
        out, last = function(*given, state=leaves.get("state"), scale=scale, **more)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
            for x in (out, last)
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d {name}": dx for name, dx in zip(leaves, gradients, strict=True)}
    return {"out": out, "last": last, **named}


def runner(inputs: dict[str, Tensor], scale: float | None, dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        here = {name: guarded(x.to(device)) for name, x in inputs.items()}
        exact = with_gradients(
            reference.gated_delta_rule, {k: x.double() for k, x in inputs.items()}, scale
        )
        eager = with_gradients(op.gated_delta_rule, here, scale, impl="torch")
        got = with_gradients(op.gated_delta_rule, here, scale, impl=impl)
        return [
            compare(what, got[what], eager[what], exact[what], dtype, gradient=what[:2] == "d ")
            for what in exact
        ]

    return run
