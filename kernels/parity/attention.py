"""Random cases of attention: every option with every other, values and gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.attention import op, reference
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

LENGTHS = {"small": (1, 2, 15, 16, 17, 33, 47), "large": (1, 17, 127, 128, 129, 1000, 2048)}
WIDTHS = {"small": (16, 20, 32, 64), "large": (16, 64, 80, 96, 128, 256)}
HEADS = {"small": ((1, 1), (2, 1), (2, 2), (3, 1)), "large": ((8, 8), (8, 2), (7, 1), (16, 4))}


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        inputs, options = draw(size, SEEDS + index, dtype)
        yield Case("attention", describe(inputs, options), dtype, runner(inputs, options, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable inputs by name, and options."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    b, d = rng.choice([1, 2]), rng.choice(WIDTHS[size])
    h, kv = rng.choice(HEADS[size])
    s = rng.choice(LENGTHS[size])
    t = rng.choice([s, s, min(s, rng.choice(LENGTHS[size])), rng.choice(LENGTHS[size])])
    options: dict[str, Any] = {"causal": rng.random() < 0.7}
    if options["causal"] and rng.random() < 0.4:
        options["window"] = rng.choice([1, 2, rng.randint(1, s + 3), s + 100])
    masked = rng.random()
    if masked < 0.3 and t <= s:
        options["segments"] = torch.randint(0, 3, (b, s), generator=generator)
        if rng.random() < 0.7:
            options["segments"] = options["segments"].sort(dim=1).values
    elif masked < 0.6:
        b, pieces = 1, rng.randint(1, 4)
        for name, total in (("cu_seqlens_q", t), ("cu_seqlens_k", s)):
            cuts = sorted(rng.randint(0, total) for _ in range(pieces - 1))
            options[name] = torch.tensor([0, *cuts, total], dtype=torch.int32)
    inputs = {"q": normal(b, t, h, d), "k": normal(b, s, kv, d), "v": normal(b, s, kv, d)}
    if "window" not in options and rng.random() < 0.4:
        p = rng.choice(LENGTHS[size])
        inputs |= {"prefix_k": normal(p, kv, d), "prefix_v": normal(p, kv, d)}
    if rng.random() < 0.3:
        inputs["sinks"] = normal(h)
    if rng.random() < 0.3:
        options["softcap"] = rng.choice([1.0, 30.0])
    if rng.random() < 0.2:
        options["scale"] = 0.3
    if rng.random() < 0.2:  # large logits
        inputs["q"] *= 10
    if options["causal"] and set(options) <= {"causal", "softcap", "scale"} and rng.random() < 0.5:
        options["block"] = rng.choice([1, 3, 16, rng.randint(1, s + 3)])
    return inputs, options


def describe(inputs: dict[str, Tensor], options: dict[str, Any]) -> str:
    b, t, h, d = inputs["q"].shape
    s, kv = inputs["k"].shape[1:3]
    parts = [f"b{b} t{t} s{s} h{h} kv{kv} d{d}"]
    parts += [f"prefix {inputs['prefix_k'].shape[0]}"] if "prefix_k" in inputs else []
    parts += ["sinks"] if "sinks" in inputs else []
    for name, value in options.items():
        if isinstance(value, Tensor):
            value = value.tolist() if value.ndim == 1 else "random"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def call(function, inputs: dict[str, Tensor], options: dict[str, Any], **more) -> Any:
    """`function` on inputs by name, the prefix as a pair."""
    named = dict(inputs)
    if "prefix_k" in named:
        named["prefix_kv"] = (named.pop("prefix_k"), named.pop("prefix_v"))
    q, k, v = named.pop("q"), named.pop("k"), named.pop("v")
    return function(q, k, v, **named, **options, **more)


def with_gradients(
    function, inputs: dict[str, Tensor], options: dict[str, Any], **more
) -> dict[str, Tensor]:
    """out, lse and the gradients of a random function of both."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        out, lse = call(function, leaves, options, **more)
        generator = torch.Generator().manual_seed(1)
        weight, weight_lse = (
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)
        )
        finite = lse.masked_fill(lse.isinf(), 0.0)
        loss = (out * weight).sum() + (finite * weight_lse).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d {name}": dx for name, dx in zip(leaves, gradients, strict=True)}
    return {"out": out, "lse": lse, **named}


def runner(inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        moved = {n: o.to(device) if isinstance(o, Tensor) else o for n, o in options.items()}
        here = {name: guarded(x.to(device)) for name, x in inputs.items()}
        exact = with_gradients(
            reference.attention, {n: x.double() for n, x in inputs.items()}, options
        )
        eager = with_gradients(op.attention, here, moved, impl="torch", return_lse=True)
        got = with_gradients(op.attention, here, moved, impl=impl, return_lse=True)
        return [
            compare(what, got[what], eager[what], exact[what], dtype, gradient=what[:2] == "d ")
            for what in exact
        ]

    return run
