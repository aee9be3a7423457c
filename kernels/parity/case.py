"""A random input, the ways to compute on it, and how far apart they may be.

The rule of FlashAttention's tests, which calibrates itself: the kernel may be at most twice as far
from the float64 definition as plain torch in the same dtype is, plus four units in the last place
of the largest value (float32: eight times, and 16 units. There both are only a few roundings away,
and online softmax takes a few more of them: base 2, one rescaling for each tile).
Besides, ||difference|| / ||definition|| has a cap for each dtype, so that a bad eager path does not
excuse a bad kernel. Infinities must be where the definition has them, and a NaN is never allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import interpreting

CAPS = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 4e-3),
    torch.bfloat16: (1e-2, 1.5e-2),
}
"Of the relative norm, for values and for gradients, by dtype."

INTERPRETED_BF16 = (2e-2, 4e-2)
"The interpreter truncates where a GPU rounds to bfloat16: twice the error, and a biased one."

FACTOR_AND_ULPS = {torch.float32: (8, 16), torch.float16: (2, 4), torch.bfloat16: (2, 4)}
"Of the rule above: times the error of plain torch, and units in the last place."

SEEDS = 10_000
"Cases draw from here on, so that they share no stream with the tests' own seeds."


@dataclass(frozen=True)
class Comparison:
    """One tensor of a case: its largest error, and what was allowed."""

    what: str
    error: float
    allowed: float
    relative: float
    cap: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed and self.relative <= self.cap


@dataclass(frozen=True)
class Case:
    """One random input of one op."""

    op: str
    "The public function."
    name: str
    "What distinguishes the case: shapes and options, readable."
    dtype: torch.dtype
    run: Callable[[str, torch.device], list[Comparison]]
    "implementation, device -> every result against the definition"


def compare(
    what: str,
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    cap: float | None = None,
    terms: float = 0.0,
) -> Comparison:
    """Hold a result against the definition's, by the rule above.

    Args:
        got: from the kernel. eager: from plain torch in `dtype`. exact: the definition in float64.
        cap: of the relative norm; None: that of the dtype.
        terms: where a result is a sum over everything, the magnitude of what cancels in it: errors
            are relative to this where it is larger than the result.
    """
    got, eager, exact = (x.detach().double().cpu() for x in (got, eager, exact))
    if got.shape != exact.shape:
        raise ValueError(f"{what}: shape {list(got.shape)}, the definition's {list(exact.shape)}")
    finite = exact.isfinite()
    same_infinities = torch.equal(got[~finite], exact[~finite])
    got, eager, exact = got[finite], eager[finite], exact[finite]
    if cap is None:
        cap = CAPS[dtype][gradient]
        if dtype == torch.bfloat16 and interpreting():
            cap = INTERPRETED_BF16[gradient]
    if not same_infinities or not bool(got.isfinite().all()):
        return Comparison(what, float("inf"), 0.0, float("inf"), cap)
    if not exact.numel():
        return Comparison(what, 0.0, 0.0, 0.0, cap)
    largest = max(exact.abs().max().item(), terms)
    ulp = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 and interpreting() else 1)
    error = (got - exact).abs().max().item()
    factor, ulps = FACTOR_AND_ULPS[dtype]
    allowed = factor * (eager - exact).abs().max().item() + ulps * ulp * largest
    norm = max(exact.norm().item(), terms)
    relative = (got - exact).norm().item() / norm if norm else error
    return Comparison(what, error, allowed, relative, cap)


def guarded(x: Tensor, guard: int = 2, pad: int = 8) -> Tensor:
    """x in the middle of a larger tensor of NaN (integers: the largest value): rows before and
    after in every dimension, and `pad` more columns, so that a read outside of x shows."""
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    shape = [n + 2 * guard for n in x.shape[:-1]] + [x.shape[-1] + pad]
    large = torch.full(shape, poison, dtype=x.dtype, device=x.device)
    inside = large[(*(slice(guard, guard + n) for n in x.shape[:-1]), slice(0, x.shape[-1]))]
    return inside.copy_(x)


@contextmanager
def poisoned() -> Iterator[None]:
    """Let `torch.empty` return NaN (integers: the largest value), so that gaps in outputs show."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled
