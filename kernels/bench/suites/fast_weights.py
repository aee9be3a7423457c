"""Fast weights: the gated delta rule and TTT-Linear, a forward pass and one with gradients.

Floating-point operations are those of the chunked forms, for chunks of C tokens, keys of dk and
values of dv, per token and head:

    gated delta   states 6 dk dv (known, written, read), products of a chunk 4 C dk + 4 C dv
    TTT-Linear    states 6 d d (inner model, its step, reading), products of a mini-batch 4 C d

and twice as many again for gradients. Solving the triangular system is not counted. Bytes: inputs,
outputs and, with gradients, those of both. The peer is the same chunked form in plain torch, eager
and, for the gated delta rule, compiled: TTT-Linear's loop over hundreds of mini-batches would be
compiled as one graph, for longer than anybody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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
from kernels.fast_weights.gated_delta import op as delta
from kernels.fast_weights.ttt import op as ttt
from kernels.parity.case import CAPS

SOURCES = (
    "fast_weights/*/*.py", "tuned/delta_*.json", "tuned/ttt_*.json", "language.py", "launch.py",
    "tiles.py",
)  # fmt: skip
NAMES = {
    "gated delta": ("q", "k", "v", "beta", "g"),
    "TTT-Linear": ("q", "k", "v", "rate", "position", "weight", "bias", "scale", "shift"),
}
TABLES = {"gated delta": "delta_states", "TTT-Linear": "ttt_states"}
CHECKED = 2
"Heads of the last sequence that the oracle computes."


@dataclass(frozen=True)
class Problem:
    """b sequences of t tokens, h heads of width d."""

    layer: str
    b: int
    t: int
    h: int
    d: int
    gradients: bool
    targets: tuple[Target, ...] = ()
    extra: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        passes = "forward and backward" if self.gradients else "forward"
        return f"{self.layer} {passes}"


def problems(at: Setting) -> Iterator[Problem]:
    shape = {
        "b": at.size(4, 1),
        "t": at.length(8192, 40),
        "h": at.size(12, 2),
        "d": at.size(64, 16),
    }
    targets = {
        "gated delta": Target("over compiled torch", 2.0, over="torch compiled"),
        "TTT-Linear": Target("over eager torch", 10.0, over="torch eager"),
    }
    for layer, target in targets.items():
        yield Problem(layer, **shape, gradients=True, targets=(target,))
    for layer in targets:
        yield Problem(layer, **shape, gradients=False, extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        tokens, d = problem.b * problem.t * problem.h, problem.d
        c = delta.CHUNK if problem.layer == "gated delta" else ttt.LONGEST
        products = 8 if problem.layer == "gated delta" else 4
        passes, tensors = (3, 8) if problem.gradients else (1, 4)  # q, k, v and out; of each d
        yield Case(
            "fast_weights",
            problem.name,
            {"b": problem.b, "t": problem.t, "h": problem.h, "d": d},
            problem.dtype,
            Work(
                passes * tokens * (6.0 * d * d + products * c * d),
                float(tensors * tokens * d * problem.dtype.itemsize),
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
    rng, dtype = generator(device, seed), problem.dtype
    b, t, h, d = problem.b, problem.t, problem.h, problem.d

    def wide(*shape: int) -> Tensor:
        return normal(rng, *shape, dtype=torch.float32)

    inputs: Inputs = {name: wide(b, t, h, d).to(dtype) for name in ("q", "v", "dout")}
    keys, rates = wide(b, t, h, d), wide(b, t, h).sigmoid()
    if problem.layer == "gated delta":
        inputs["k"] = F.normalize(keys, dim=-1).to(dtype)
        return inputs | {"beta": rates.to(dtype), "g": -0.05 * wide(b, t, h).abs()}
    places = torch.arange(1, ttt.LONGEST + 1, device=device)
    start = {"weight": 0.02 * wide(b, h, d, d), "bias": torch.zeros(b, h, d, device=device)}
    norm = {"scale": 1 + 0.1 * wide(h, d), "shift": 0.1 * wide(h, d)}
    stepping = {"rate": (rates / d).to(dtype), "position": 1 / places}
    return inputs | {"k": keys.to(dtype)} | stepping | start | norm


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    names, table = NAMES[problem.layer], TABLES[problem.layer]
    ours, plain = (partial(function_of(problem.layer), impl=impl) for impl in (at.impl, "torch"))
    note = picked(table, at.arch, bytes=problem.dtype.itemsize, width=problem.d)
    prepare = partial(step, problem.gradients, names, lambda _: ours)
    yield Entry("triton", prepare, ours=True, kernels=(table,), on_cpu=True, note=note)
    peers: list[tuple[str, Callable[[Tensor], Any]]] = [("torch eager", lambda _: plain)]
    if problem.layer == "gated delta":
        peers.append(("torch compiled", lambda q: compiled(plain, q)))
    for name, function in peers:
        yield Entry(name, partial(step, problem.gradients, names, function), on_cpu=True)


def function_of(layer: str) -> Callable[..., tuple[Tensor, ...]]:
    return delta.gated_delta_rule if layer == "gated delta" else ttt.ttt_linear


def step(gradients: bool, names: tuple[str, ...], function: Any, inputs: Inputs) -> Any:
    """Outputs, and the gradients of all inputs if they are asked for."""
    leaves = [inputs[name].detach().requires_grad_(gradients) for name in names]
    call = function(leaves[0])

    def run() -> tuple[Tensor, ...]:
        out = call(*leaves)[0]
        if not gradients:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs["dout"].to(out.dtype))

    return run


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The chunked form in float64, on the heads that are checked; the tests hold it against the
    definition, which goes token by token."""
    last = slice(-CHECKED, None)
    heads = {
        name: x.double() if name == "position" else
        x[last].double() if name in ("scale", "shift") else
        x[-1:, last].double() if name in ("weight", "bias") else
        x[-1:, :, last].double()
        for name, x in inputs.items()
    }  # fmt: skip

    def function(*x: Tensor) -> Any:  # not by the public function: what ran is recorded
        if problem.layer == "gated delta":
            return delta.chunked(*x, None, problem.d**-0.5)
        *tokens, weight, bias, scale, shift = x
        return ttt.dual(*tokens, [weight, bias], scale, shift)

    return parts(step(problem.gradients, NAMES[problem.layer], lambda _: function, heads)())


def parts(result: tuple[Tensor, ...]) -> Parts:
    """The output and the gradients of q, k and v."""
    named = zip(("out", "d q", "d k", "d v"), result, strict=False)
    return {name: x[-1:, :, -CHECKED:] for name, x in named}
