"""Finite scalar quantisation: numbers rounded to a few levels each, a codebook without learning.

Finite Scalar Quantization: VQ-VAE Made Simple, 2023, arXiv:2309.15505. Of k numbers, the i-th takes
one of L_i levels, evenly spread over [-1, 1]; together they are one of L_1 L_2 .. codes:

    bounded  = (L - 1) (1 + eps) / 2 tanh(z + shift) - offset      offset 1/2 if L is even, else 0
    code     = round(bounded) / floor(L / 2)                       the gradient skips the rounding
    index    = sum_i (round(bounded_i) + floor(L_i / 2)) L_1 .. L_{i-1}

`shift` makes z = 0 what is bounded to 0. No code can die, so that no loss is needed for them.

Dimensions: k numbers of a code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Float, Int64
from torch import Tensor

EPS = 1e-3  # so much beyond the outer levels: they are reached before z is infinite


def quantise(z: Float[Tensor, "... k"], levels: Sequence[int]) -> Float[Tensor, "... k"]:
    """Codes in [-1, 1]; a gradient flows as if nothing had been rounded."""
    of, _ = spans(levels, z.device)
    half = (of - 1) * (1 + EPS) / 2
    offset = torch.where(of % 2 == 0, 0.5, 0.0)
    bounded = half * torch.tanh(z + (offset / half).atanh()) - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    return rounded / (of // 2)


def index_of(code: Float[Tensor, "... k"], levels: Sequence[int]) -> Int64[Tensor, " ..."]:
    """The number of each code, from 0 to the product of the levels, excluded."""
    of, basis = spans(levels, code.device)
    return ((code * (of // 2)).round().long() + of // 2).mul(basis).sum(-1)


def code_of(index: Int64[Tensor, " ..."], levels: Sequence[int]) -> Float[Tensor, "... k"]:
    """The code of each number."""
    of, basis = spans(levels, index.device)
    digit = index[..., None] // basis % of
    return (digit - of // 2) / (of // 2)


def joined(logits: Float[Tensor, "... m"], levels: Sequence[int]) -> Float[Tensor, "... v"]:
    """Logits of each code, of logits of the levels of each of its numbers: their sums."""
    every, *others = logits.split(list(levels), dim=-1)
    for one in others:
        every = (one[..., :, None] + every[..., None, :]).flatten(-2)
    return every


def spans(levels: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [k], and how many codes lie between two of each [k]."""
    return known_spans(tuple(levels), device)


@lru_cache(32)
def known_spans(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once, as what is copied to a GPU cannot be part of a CUDA graph."""
    basis = accumulate(levels[:-1], mul, initial=1)
    return torch.tensor(levels, device=device), torch.tensor(list(basis), device=device)


def size_of(levels: Sequence[int]) -> int:
    """How many codes there are."""
    return math.prod(levels)
