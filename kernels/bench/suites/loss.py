"""Cross-entropy of a linear head: loss and gradients of hidden states and weight in one pass.

Floating-point operations: 2 n d vocab for the logits, 4 n d vocab for their two gradients; what an
implementation recomputes to save memory is not counted. Bytes: hidden states, weight and their
gradients. `memory_bytes` of an entry says what it holds besides its inputs. The peers' logits are
upcast to float32, as training does under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    variants,
    with_tile,
)
from kernels.bench.peers import compiled
from kernels.cross_entropy.op import linear_cross_entropy, linear_distillation
from kernels.parity.case import CAPS

SOURCES = ("cross_entropy/*.py", "tuned/linear_*.json", "language.py", "launch.py", "tiles.py")
CHECKED = 256
"Rows of the gradients that are checked, the last ones."

CHUNK = 512
"Rows of float64 logits at a time, in the oracle."


@dataclass(frozen=True)
class Problem:
    """n tokens of width d; gradients too, or the loss alone."""

    name: str
    n: int
    d: int
    vocab: int
    gradients: bool = True
    k: int = 0
    "Tokens that a teacher names; 0: cross-entropy."
    targets: tuple[Target, ...] = ()
    extra: bool = False
    dtype: torch.dtype = torch.bfloat16


def problems(at: Setting) -> Iterator[Problem]:
    small = {"n": at.length(8192, 24), "d": at.size(768, 32), "vocab": at.size(50304, 80)}
    large = {"n": at.length(8192, 32), "d": at.size(2048, 32), "vocab": at.size(128256, 96)}
    yield Problem("training step, vocab 128k", **large)
    yield Problem("training step, vocab 50k", **small, extra=True)
    yield Problem("loss alone, vocab 128k", **large, gradients=False, extra=True)
    yield Problem("distillation of 20, vocab 128k", **large, k=at.size(20, 4), extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        n, d, vocab, size = problem.n, problem.d, problem.vocab, problem.dtype.itemsize
        passes = 2 if problem.gradients else 1
        yield Case(
            "loss",
            problem.name,
            {"n": n, "d": d, "vocab": vocab} | ({"k": problem.k} if problem.k else {}),
            problem.dtype,
            Work(
                2.0 * n * d * vocab * (3 if problem.gradients else 1),
                float(passes * size * (n + vocab) * d),
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
    weight = normal(rng, problem.vocab, problem.d, dtype=torch.float32) * problem.d**-0.5
    inputs: Inputs = {
        "hidden": normal(rng, problem.n, problem.d, dtype=dtype),
        "weight": weight.to(dtype),
        "targets": torch.randint(problem.vocab, (problem.n,), generator=rng, device=device),
    }
    if problem.k:
        draws = torch.rand(problem.n, problem.vocab, generator=rng, device=device)
        inputs["tokens"] = draws.topk(problem.k).indices
        logits = normal(rng, problem.n, problem.k, dtype=torch.float32)
        inputs["logprobs"] = logits.log_softmax(-1) - 0.1  # a tenth or so is left to other tokens
    return inputs


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    def ours(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        if problem.k:
            return linear_distillation(
                hidden, weight, inputs["tokens"], inputs["logprobs"], impl=at.impl
            )
        return linear_cross_entropy(hidden, weight, inputs["targets"], impl=at.impl)

    keys = {"bytes": problem.dtype.itemsize}
    note = picked("linear_logsumexp", at.arch, **keys)
    prepare, kernels = partial(step, problem, ours), ("linear_logsumexp",)
    yield Entry("triton", prepare, ours=True, kernels=kernels, on_cpu=True, note=note)
    function = distilled if problem.k else plain
    for name, wrap in (("torch eager", lambda f, _: f), ("torch compiled", compiled)):

        def loss(inputs: Inputs, hidden: Tensor, weight: Tensor, wrap: Any = wrap) -> Tensor:
            more = ("tokens", "logprobs") if problem.k else ("targets",)
            return wrap(function, hidden)(hidden, weight, *(inputs[x] for x in more))

        yield Entry(name, partial(step, problem, loss), on_cpu=True)
    for label, tile in variants("linear_logsumexp", at.arch, **keys) if not problem.extra else ():
        varied = with_tile("linear_logsumexp", tile, prepare)
        yield Entry(f"triton [{label}]", varied, ours=True, variant=True, kernels=kernels)


def step(problem: Problem, loss: Any, inputs: Inputs) -> Any:
    """The loss, and its gradients if they are asked for."""
    leaves = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight")]

    def call() -> tuple[Tensor, ...]:
        if not problem.gradients:
            with torch.no_grad():
                return (loss(inputs, *leaves),)
        value = loss(inputs, *leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return call


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def distilled(hidden: Tensor, weight: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    q = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, tokens)
    return (logprobs.exp() * (logprobs - q)).sum(-1).mean()


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The loss in float64; gradients of the last rows of hidden and of weight."""
    hidden, weight = inputs["hidden"].double(), inputs["weight"].double()
    n, last = problem.n, min(CHECKED, problem.n)
    if problem.k:
        tokens, p = inputs["tokens"], inputs["logprobs"].double().exp()
    else:
        tokens = inputs["targets"][:, None]
        p = torch.ones(n, 1, dtype=torch.float64, device=hidden.device)
    logs, picked_logits = [], []
    for begin in range(0, n, CHUNK):
        logits = hidden[begin : begin + CHUNK] @ weight.mT
        logs.append(logits.logsumexp(-1))
        picked_logits.append(logits.gather(-1, tokens[begin : begin + CHUNK]))
    lse, logq = torch.cat(logs), torch.cat(picked_logits)
    logq = logq - lse[:, None]
    loss = (p * (torch.where(p > 0, p.log(), 0.0) - logq)).sum(-1).mean()
    if not problem.gradients:
        return {"loss": loss}
    # dL / dlogits = (sum(p) softmax - p) / n
    rows = hidden[-last:] @ weight.mT - lse[-last:, None]
    gradient = rows.exp() * p[-last:].sum(-1, keepdim=True)
    gradient = gradient.scatter_add(-1, tokens[-last:], -p[-last:]) / n
    words = min(CHECKED, problem.vocab)
    first = problem.vocab - words
    columns = (hidden @ weight[first:].mT - lse[:, None]).exp() * p.sum(-1, keepdim=True)
    inside = tokens >= first
    columns = columns.scatter_add(-1, (tokens - first).clamp(min=0), torch.where(inside, -p, 0.0))
    return {
        "loss": loss,
        "d hidden": gradient @ weight,
        "d weight": (columns / n).mT @ hidden,
    }


def parts(result: tuple[Tensor, ...]) -> Parts:
    named = dict(zip(("loss", "d hidden", "d weight"), result, strict=False))
    return {name: x if x.ndim == 0 else x[-min(CHECKED, len(x)) :] for name, x in named.items()}
