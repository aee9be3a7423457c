"""Random cases of the losses of a linear head: every option with every other, with gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.cross_entropy import op, reference
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

FUNCTIONS = ("linear_cross_entropy", "linear_logprobs", "linear_distillation")
ROWS = {"small": (1, 2, 15, 17, 33, 40), "large": (1, 17, 129, 1000, 4096)}
VOCABS = {"small": (3, 64, 65, 130, 200), "large": (3, 257, 1000, 32000, 50257)}
WIDTHS = {"small": (5, 16, 20, 32, 48), "large": (16, 100, 256, 768, 1024)}


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases, the functions in turn; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        name = FUNCTIONS[index % len(FUNCTIONS)]
        inputs, options, limits = draw(name, size, SEEDS + index, dtype)
        title = describe(name, inputs, options, limits)
        yield Case(name, title, dtype, runner(name, inputs, options, limits, dtype))


def draw(
    name: str, size: str, seed: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]:
    """Tensors by name, those with gradients first; options; and limits of chunks and splits."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def tokens(*shape: int, absent: int) -> Tensor:
        ids = torch.randint(0, vocab, shape, generator=generator)
        return ids.masked_fill(torch.rand(shape, generator=generator) < 0.2, absent)

    n, vocab, d = (rng.choice(choices[size]) for choices in (ROWS, VOCABS, WIDTHS))
    spread = rng.choice([0.3, 1.0, 1.0, 4.0])  # of the logits
    inputs = {"hidden": normal(n, d).to(dtype), "weight": (normal(vocab, d) * spread / d**0.5)}
    inputs["weight"] = inputs["weight"].to(dtype)
    options: dict[str, Any] = {"softcap": rng.choice([None, None, 5.0, 30.0])}
    if name == "linear_cross_entropy":
        options["ignore_index"] = rng.choice([-100, 0])
        inputs["targets"] = tokens(n, absent=options["ignore_index"])
    else:
        options["temperature"] = rng.choice([1.0, 0.7, 2.0])
    if name == "linear_logprobs":
        inputs["tokens"] = tokens(n, absent=op.PADDING)
    if name == "linear_distillation":
        k = min(vocab, rng.choice([1, 3, 5]))
        teacher = normal(n, vocab).log_softmax(1).topk(k, dim=1)
        absent = torch.rand(n, k, generator=generator) < 0.2
        inputs["teacher_tokens"] = teacher.indices.masked_fill(absent, op.PADDING)
        inputs["teacher_logprobs"] = teacher.values.float()
        # A rest of rounding errors only has no logarithm to compare.
        options["tail"] = rng.choice(op.TAILS if vocab > 5 else op.TAILS[:2])
    if name != "linear_logprobs":
        options["reduction"] = rng.choice(op.REDUCTIONS)
    limits = {"of_hidden": 1, "of_weight": 1}
    limits[rng.choice(["of_hidden", "of_weight", "neither", "neither"])] = 0  # frozen
    limits["WORKSPACE"] = rng.choice([op.WORKSPACE, 64 * n * 4])
    if size == "small":
        limits |= {"GROUP": rng.choice([1, 2, 16]), "PROGRAMS": rng.choice([1, 528])}
    return inputs, options, limits


def describe(name: str, inputs: dict[str, Tensor], options: dict, limits: dict) -> str:
    (n, d), vocab = inputs["hidden"].shape, inputs["weight"].shape[0]
    parts = [f"{name} n{n} d{d} vocab{vocab}"]
    parts += [f"{key} {value}" for key, value in {**options, **limits}.items() if value is not None]
    return ", ".join(parts)


@contextmanager
def limited(limits: dict[str, int], kernels: bool) -> Iterator[None]:
    """Chunks and splits small enough that a small case has several."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(op, "WORKSPACE", limits["WORKSPACE"]))
        if kernels:
            from kernels.cross_entropy import launch

            for name in ("GROUP", "PROGRAMS"):
                if name in limits:
                    stack.enter_context(mock.patch.object(launch, name, limits[name]))
        yield


def with_gradients(
    function, inputs: dict[str, Tensor], options: dict[str, Any], limits: dict[str, int], **more
) -> dict[str, Tensor]:
    """The results and the gradients of a random function of them."""
    leaves = dict(inputs)
    wanted = [name for name in ("hidden", "weight") if limits[f"of_{name}"]]
    for name in wanted:
        leaves[name] = inputs[name].detach().requires_grad_()
    with poisoned(), limited(limits, kernels=more.get("impl") in ("triton", "interpret")):
        results = function(*leaves.values(), **options, **more)
        results = results if isinstance(results, tuple) else (results,)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
            for x in results
        )
        gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    named = {f"d {name}": dx for name, dx in zip(wanted, gradients, strict=True)}
    return dict(zip(("result", "entropy"), results, strict=False)) | named


def runner(
    name: str,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    limits: dict[str, int],
    dtype: torch.dtype,
):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        more = {"return_entropy": True} if name == "linear_logprobs" else {}
        floats = ("hidden", "weight")
        here = {
            key: guarded(x.to(device)) if key in floats else x.to(device)
            for key, x in inputs.items()
        }
        double = {key: x.double() if key in floats else x for key, x in inputs.items()}
        exact = with_gradients(getattr(reference, name), double, options, limits)
        function = getattr(op, name)
        eager = with_gradients(function, here, options, limits, impl="torch", **more)
        got = with_gradients(function, here, options, limits, impl=impl, **more)
        return [
            compare(what, got[what], eager[what], exact[what], dtype, gradient=what[:2] == "d ")
            for what in exact
        ]

    return run


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest tensor of floats has that is made inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        sizes = [x.numel() for x in tensors if x.is_floating_point()]
        self.numel = max(self.numel, *sizes, 0)
        return result
