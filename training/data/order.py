"""The order in which a run visits its windows: a pure function of (seed, step).

Every epoch is a permutation of all windows, computed pointwise by a keyed bijection (a balanced
Feistel network with cycle walking), so that no shuffled list is built and nothing but the step must
be stored to resume, at any number of processes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from training.seeding import stream_seed

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 arrays with full avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """A keyed bijection on [0, 4**half_bits), elementwise on a uint64 array."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right * _GOLDEN + key) & mask)
    return (left << shift) | right


def permute(index: Int64[np.ndarray, " k"], n: int, key: int) -> Int64[np.ndarray, " k"]:
    """Where a pseudo-random permutation of [0, n) sends each index.

    Args:
        index: positions in [0, n).
        n: size of the permuted set, at least 1 and below 2**62.
        key: any integer; its low 64 bits choose the permutation.

    Raises:
        ValueError: if n or an index is out of range.
    """
    index = np.asarray(index, dtype=np.int64)
    if not 1 <= n < 2**62:
        raise ValueError(f"permute: n={n}, expected 1 <= n < 2**62")
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"permute: an index lies outside [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    counters = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    round_keys = _mix(counters * _GOLDEN + np.uint64(key & (2**64 - 1)))
    out = _feistel(index.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # the domain is a power of 4: walk the cycle until it re-enters [0, n)
        out[outside] = _feistel(out[outside], half_bits, round_keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def visit(first: int, count: int, num_windows: int, seed: int) -> Int64[np.ndarray, " count"]:
    """Window ids at positions first .. first + count - 1 of the endless visiting order.

    Each window comes exactly once per epoch.
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, index = np.divmod(positions, num_windows)
    ids = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(index[here], num_windows, stream_seed(seed, "data/order", int(epoch)))
    return ids


def rank_slice(ids: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The contiguous share of one process; the shares of all ranks concatenate to `ids`.

    Raises:
        ValueError: if the batch does not divide by `world`, or the rank is not in [0, world).
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not in [0, {world})")
    if len(ids) % world:
        raise ValueError(
            f"data.batch_size={len(ids)} does not divide among {world} processes: "
            f"use a multiple of {world}"
        )
    share = len(ids) // world
    return ids[rank * share : (rank + 1) * share]
