"""Noise by number: normal numbers that depend on what they are for, and on nothing else.

A rollout's noise is a function of (seed, episode, frame, step), so that a frame drawn anew, in
another batch, on another device or after a restart, is drawn alike. The numbers are those of the
splitmix64 generator (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014),
whose output function is applied to a count, then by Box and Muller normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """A word of 64 bits as torch holds it."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def shifted(x: Int64[Tensor, " ..."], bits: int) -> Int64[Tensor, " ..."]:
    """The unsigned word, shifted to the right."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x: Int64[Tensor, " ..."]) -> Int64[Tensor, " ..."]:
    """A bijection of words in which every bit of the output depends on every one of the input."""
    x = (x ^ shifted(x, 30)) * signed(FIRST)
    x = (x ^ shifted(x, 27)) * signed(SECOND)
    return x ^ shifted(x, 31)


def uniform(key: Int64[Tensor, " ..."], count: int) -> Float[Tensor, "... count"]:
    """Numbers in (0, 1), float64: `count` for each key."""
    index = torch.arange(1, count + 1, device=key.device) * signed(GOLDEN)
    return (shifted(mix(key[..., None] + index), 11).double() + 0.5) / 2**53


def normal(
    seed: int,
    episodes: Int64[Tensor, " *b"],
    counters: Sequence[int | Int64[Tensor, " ..."]],
    shape: Sequence[int],
) -> Float[Tensor, " ..."]:
    """[*b, *shape] float32: for each episode, what (seed, episode, *counters) gives.

    Args:
        counters: non-negative numbers that tell one use from another, such as frame and step; or
            many of them, which are broadcast with the episodes: [b, 1] and [t] give [b, t, *shape].
    """
    key = mix(episodes.long() + signed(seed * GOLDEN))
    for counter in counters:
        if isinstance(counter, Tensor):
            key = mix(key ^ (counter + 1) * signed(GOLDEN))
        else:
            key = mix(key ^ signed((counter + 1) * GOLDEN))
    size = math.prod(shape)
    half = (size + 1) // 2
    first, second = uniform(key, 2 * half).split(half, dim=-1)
    length, turn = (-2 * first.log()).sqrt(), 2 * math.pi * second
    both = torch.cat([length * turn.cos(), length * turn.sin()], dim=-1)[:, :size]
    return both.float().reshape(*key.shape, *shape)


def even(
    seed: int,
    episodes: Int64[Tensor, " *b"],
    counters: Sequence[int | Int64[Tensor, " ..."]],
    shape: Sequence[int],
) -> Float[Tensor, " ..."]:
    """The same, evenly spread over [0, 1]: how far along the normal curve each number lies."""
    return (1 + (normal(seed, episodes, counters, shape) / 2**0.5).erf()) / 2
