"""Random cases of TTT-Linear: widths, lengths, mini-batches and rates, with gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.fast_weights.ttt import op, reference
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

LENGTHS = {"small": (1, 2, 5, 15, 16, 33), "large": (1, 63, 64, 200, 500)}
WIDTHS = {"small": (5, 8, 16, 20), "large": (16, 48, 64)}
BATCHES = {"small": (1, 4, 11, 16), "large": (4, 16)}
RESULTS = ("out", "weight", "bias")


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        inputs = draw(size, SEEDS + index, dtype)
        b, t, h, d = inputs["q"].shape
        title = f"ttt_linear b{b} t{t} h{h} d{d}, mini-batches of {len(inputs['position'])}"
        yield Case("ttt_linear", title, dtype, runner(inputs, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by the names of the function's arguments, in their order."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t, d, c = (rng.choice(table[size]) for table in (LENGTHS, WIDTHS, BATCHES))
    if dtype == torch.float32:
        d = min(d, op.WIDEST // 2)
    b, h, fastest = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([0.02, 0.1, 1.0]) / d
    places = torch.arange(1, c + 1, dtype=torch.float64)
    inputs = {
        "q": normal(b, t, h, d).to(dtype),
        "k": normal(b, t, h, d).to(dtype),
        "v": normal(b, t, h, d).to(dtype),
        "rate": (fastest * normal(b, t, h).sigmoid()).to(rng.choice([dtype, torch.float32])),
        "position": (1 / places + 0.1 * normal(c)).clamp(min=0).float(),
        "weight": (rng.choice([0.02, 0.3]) * normal(b, h, d, d)).float(),
        "bias": (0.1 * normal(b, h, d)).float(),
        "norm_weight": (1 + 0.2 * normal(h, d)).float(),
        "norm_bias": (0.2 * normal(h, d)).float(),
    }
    return inputs


def definition(q, k, v, rate, position, weight, bias, norm_weight, norm_bias):
    out, last = reference.ttt(q, k, v, rate, position, [weight, bias], norm_weight, norm_bias)
    return out, *last


def with_gradients(function, inputs: dict[str, Tensor], **more) -> dict[str, Tensor]:
    """Outputs, the last model, and the gradients of a random function of them."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        results = function(*leaves.values(), **more)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
            for x in results
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d {name}": dx for name, dx in zip(leaves, gradients, strict=True)}
    return dict(zip(RESULTS, results, strict=True)) | named


def runner(inputs: dict[str, Tensor], dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        here = {name: guarded(x.to(device)) for name, x in inputs.items()}
        exact = with_gradients(definition, {k: x.double() for k, x in inputs.items()})
        eager = with_gradients(op.ttt_linear, here, impl="torch")
        got = with_gradients(op.ttt_linear, here, impl=impl)
        # sum_s rate_s drate_s = sum_t position_t dposition_t, over every token of the batch, and
        # over those places of a mini-batch that the sequence reaches.
        terms = (inputs["rate"].double() * exact["d rate"]).abs().sum().item()
        terms /= inputs["position"][: inputs["q"].shape[1]].sum().item()
        return [
            compare(
                what, got[what], eager[what], exact[what], dtype,
                gradient=what[:2] == "d ", terms=terms if what == "d position" else 0.0,
            )
            for what in exact
        ]  # fmt: skip

    return run
