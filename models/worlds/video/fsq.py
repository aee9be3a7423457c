"""Finite scalar quantisation: numbers rounded to a few levels each, a codebook without learning.

Finite Scalar Quantization: VQ-VAE Made Simple, 2023, arXiv:2309.15505. Of k numbers, the i-th takes
one of L_i levels, evenly spread over [-1, 1]; together they are one of L_1 L_2 .. codes:

    digit    = round((L - 1) (1 + tanh z) / 2)          the gradient skips the rounding
    code     = 2 digit / (L - 1) - 1
    index    = sum_i digit_i L_1 .. L_{i-1}

No code can die, so that no loss is needed for them. What differs: all levels lie evenly about z = 0
if their number is even, too. The paper shifts those so that 0 is one of them: of two levels the
other is reached at z = -3.8 then, which a network that begins near 0 does not find.

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


def quantise(z: Float[Tensor, "... k"], levels: Sequence[int]) -> Float[Tensor, "... k"]:
    """Codes in [-1, 1]; a gradient flows as if nothing had been rounded."""
    most, _ = spans(levels, z.device)
    digit = most * (1 + torch.tanh(z)) / 2
    return 2 * (digit + (digit.round() - digit).detach()) / most - 1


def index_of(code: Float[Tensor, "... k"], levels: Sequence[int]) -> Int64[Tensor, " ..."]:
    """The number of each code, from 0 to the product of the levels, excluded."""
    most, basis = spans(levels, code.device)
    return ((code + 1) * most / 2).round().long().mul(basis).sum(-1)


def code_of(index: Int64[Tensor, " ..."], levels: Sequence[int]) -> Float[Tensor, "... k"]:
    """The code of each number."""
    most, _ = spans(levels, index.device)
    return 2 * digits_of(index, levels) / most - 1


def moved(
    index: Int64[Tensor, " ..."], by: Int64[Tensor, "... k"], levels: Sequence[int]
) -> Int64[Tensor, " ..."]:
    """The code whose numbers are so many levels further, as far as there are any."""
    most, basis = spans(levels, index.device)
    digit = (digits_of(index, levels) + by).clamp(min=0).minimum(most)
    return digit.mul(basis).sum(-1)


def digits_of(index: Int64[Tensor, " ..."], levels: Sequence[int]) -> Int64[Tensor, "... k"]:
    """The level of each number of each code."""
    most, basis = spans(levels, index.device)
    return index[..., None] // basis % (most + 1)


def joined(logits: Float[Tensor, "... m"], levels: Sequence[int]) -> Float[Tensor, "... v"]:
    """Logits of each code, of logits of the levels of each of its numbers: their sums."""
    every, *others = logits.split(list(levels), dim=-1)
    for one in others:
        every = (one[..., :, None] + every[..., None, :]).flatten(-2)
    return every


def spans(levels: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The highest level of each number [k], and how many codes lie between two of them [k]."""
    return known_spans(tuple(levels), device)


@lru_cache(32)
def known_spans(levels: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once, as what is copied to a GPU cannot be part of a CUDA graph."""
    basis = accumulate(levels[:-1], mul, initial=1)
    most = torch.tensor(levels, device=device) - 1
    return most, torch.tensor(list(basis), device=device)


def size_of(levels: Sequence[int]) -> int:
    """How many codes there are."""
    return math.prod(levels)
