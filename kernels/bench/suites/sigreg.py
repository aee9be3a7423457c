"""SIGReg's averages of exp(i t h): a forward pass, and one with the gradient of the projections.

Floating-point operations, per projection and knot: 8 to turn the angle on and add (both averages),
8 more for the gradient; the first sine and cosine are not counted. Bytes: the projections, read
once per pass, and their gradient. What plain torch keeps besides, projections times knots, is what
the kernels are for: `memory_bytes` of an entry says how much. The peers are the same averages in
plain torch, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench.cases import (
    Case,
    Entry,
    Inputs,
    Parts,
    Setting,
    Target,
    Work,
    generator,
    normal,
    picked,
)
from kernels.bench.peers import compiled
from kernels.parity.case import CAPS
from kernels.sigreg import reference
from kernels.sigreg.op import characteristic_function

SOURCES = ("sigreg/*.py", "tuned/ecf_*.json", "launch.py", "tiles.py")
STEP, KNOTS = 3 / 16, 17
CHECKED = 64
"Directions of the last group that the oracle computes."


@dataclass(frozen=True)
class Problem:
    """g groups (views, time steps) of n samples along k directions."""

    name: str
    g: int
    n: int
    k: int
    gradients: bool = True
    targets: tuple[Target, ...] = ()
    extra: bool = False
    dtype: torch.dtype = torch.float32


def problems(at: Setting) -> Iterator[Problem]:
    k = at.size(1024, 24)
    faster = Target("over compiled torch", 2.0, over="torch compiled")
    yield Problem("eight views", 8, at.length(2048, 40), k, targets=(faster,))
    yield Problem("LeWM's batch", 4, at.length(128, 12), k, targets=(faster,))
    yield Problem("eight views forward", 8, at.length(2048, 40), k, gradients=False, extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        numbers = problem.g * problem.n * problem.k
        passes, tensors = (2, 3) if problem.gradients else (1, 1)
        yield Case(
            "sigreg",
            problem.name,
            {"g": problem.g, "n": problem.n, "k": problem.k, "knots": KNOTS},
            problem.dtype,
            Work(
                passes * 8.0 * KNOTS * numbers,
                float(tensors * numbers * problem.dtype.itemsize),
            ),
            partial(draw, problem),
            partial(oracle, problem),
            parts,
            CAPS[problem.dtype][1],
            tuple(entries(problem, at)),
            problem.targets,
            SOURCES,
            extra=problem.extra,
        )


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Projections, and the gradients of both averages."""
    rng, averages = generator(device, seed), (problem.g, KNOTS, problem.k)
    return {
        "h": normal(rng, problem.g, problem.n, problem.k, dtype=problem.dtype),
        "dcos": normal(rng, *averages, dtype=torch.float32),
        "dsin": normal(rng, *averages, dtype=torch.float32),
    }


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    ours, plain = (partial(characteristic_function, impl=impl) for impl in (at.impl, "torch"))
    kernels = ("ecf_backward",) if problem.gradients else ("ecf_forward",)
    prepare = partial(step, problem.gradients, lambda _: ours)
    note = picked("ecf_forward", at.arch)
    yield Entry("triton", prepare, ours=True, kernels=kernels, on_cpu=True, note=note)
    peers: tuple[tuple[str, Callable[[Tensor], Any]], ...] = (
        ("torch eager", lambda _: plain),
        ("torch compiled", lambda h: compiled(plain, h)),
    )
    for name, function in peers:
        yield Entry(name, partial(step, problem.gradients, function), on_cpu=True)


def step(gradients: bool, function: Any, inputs: Inputs) -> Any:
    """Both averages, and the gradient of the projections if it is asked for."""
    h = inputs["h"].detach().requires_grad_(gradients)
    call = function(h)

    def run() -> tuple[Tensor, ...]:
        cos, sin = call(h, STEP, KNOTS)
        if not gradients:
            return cos, sin
        given = [inputs[name].to(cos.dtype) for name in ("dcos", "dsin")]
        (dh,) = torch.autograd.grad((cos, sin), h, given)
        return cos.detach(), sin.detach(), dh

    return run


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The definition in float64, on the directions that are checked."""
    few = {name: x[-1:, :, -CHECKED:].double() for name, x in inputs.items()}
    function = reference.characteristic_function
    return parts(step(problem.gradients, lambda _: function, few)())


def parts(result: tuple[Tensor, ...]) -> Parts:
    """The averages and the gradient, along some directions of the last group."""
    named = zip(("cos", "sin", "d h"), result, strict=False)
    return {name: x[-1:, :, -CHECKED:] for name, x in named}
