"""Byte n-gram floors: what counting alone reaches on the text a model was trained on.

Interpolated Witten-Bell smoothing (Witten & Bell 1991; Chen & Goodman 1998, section 2.4). With
n(c, s) the count of byte s after context c, n(c) its sum and d(c) the number of distinct followers,

    p_k(s | c_k) = (n(c_k, s) + d(c_k) p_{k-1}(s | c_{k-1})) / (n(c_k) + d(c_k)),   p_{-1} = 1/256,

where c_k are the last k bytes; an unseen context leaves p_{k-1} as it is. Contexts never cross a
document start: what would lie before it counts as separators. A context and its byte are packed
into one uint64 (9 bits a symbol), so that counting is a sort.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, UInt64

SEPARATOR = 256
MAX_ORDER = 6
_BITS = np.uint64(9)

Chunk = bytes | np.ndarray
"Bytes, or an integer array of byte values in which SEPARATOR starts a new document."


def bits_per_byte(
    train: Iterable[Chunk], heldout: Iterable[Chunk], max_order: int = 5
) -> list[float]:
    """Bits per byte of the held-out documents under every order 0 .. max_order, trained on `train`.

    Args:
        train: chunks of text; each starts a document of its own, and so does each separator inside.
        heldout: documents to score; every byte is scored, separators are not.
        max_order: longest context in bytes, 0 to 6.
    """
    return [-float(np.log2(p).mean()) for p in probabilities(train, heldout, max_order)]


def probabilities(
    train: Iterable[Chunk], heldout: Iterable[Chunk], max_order: int = 5
) -> Float64[np.ndarray, "orders n"]:
    """Probability of each held-out byte, in order, given the bytes before it, for every order.

    Raises:
        ValueError: if an order cannot be packed, a symbol is no byte, or nothing is held out.
    """
    if not 0 <= max_order <= MAX_ORDER:
        raise ValueError(f"max_order={max_order}: expected 0 to {MAX_ORDER} bytes of context")
    seen, scored = _Stream(train), _Stream(heldout)
    if scored.num_bytes == 0:
        raise ValueError("the held-out part holds no bytes: give at least one document")
    lower = np.full(scored.num_bytes, 1.0 / 256.0)
    table = np.empty((max_order + 1, scored.num_bytes))
    for order in range(max_order + 1):
        lower = table[order] = _interpolate(seen.keys(order), scored.keys(order), lower)
    return table


class _Stream:
    """Chunks joined into one symbol array, with the packed context grown one byte per order."""

    def __init__(self, chunks: Iterable[Chunk]):
        self._symbols = _join(chunks)
        is_start = self._symbols == SEPARATOR
        index = np.arange(len(self._symbols), dtype=np.int32)
        self._since_start = index - np.maximum.accumulate(np.where(is_start, index, 0))
        self._scored = ~is_start
        self._context = np.zeros(len(self._symbols), dtype=np.uint64)
        self.num_bytes = int(self._scored.sum())

    def keys(self, order: int) -> UInt64[np.ndarray, " num_bytes"]:
        """(context, byte) of every byte, packed; to be called with order 0, 1, 2, ... in turn."""
        if order:
            before = np.full(len(self._symbols), SEPARATOR, dtype=np.uint64)
            before[order:] = self._symbols[:-order]
            before[self._since_start <= order] = SEPARATOR
            self._context |= before << np.uint64(int(_BITS) * (order - 1))
        return ((self._context << _BITS) | self._symbols)[self._scored]


def _join(chunks: Iterable[Chunk]) -> UInt64[np.ndarray, " n"]:
    """All chunks in one array, a separator before each."""
    parts: list[np.ndarray] = [np.array([SEPARATOR], dtype=np.uint16)]
    for chunk in chunks:
        symbols = np.frombuffer(chunk, np.uint8) if isinstance(chunk, bytes) else chunk
        if symbols.size and int(symbols.max()) > SEPARATOR:
            raise ValueError(
                f"symbol {int(symbols.max())} is no byte: n-gram floors need bytes "
                "(data.tokenizer=null)"
            )
        parts += [symbols.astype(np.uint16), parts[0]]
    return np.concatenate(parts).astype(np.uint64)


def _interpolate(seen: np.ndarray, scored: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """One order of the recursion: from the packed keys and p_{k-1} to p_k."""
    events, counts = _count(seen)
    contexts, first = _starts(events >> _BITS)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    kinds = np.diff(first, append=len(events))
    count = _look_up(scored, events, counts)
    total = _look_up(scored >> _BITS, contexts, totals)
    kind = _look_up(scored >> _BITS, contexts, kinds)
    return np.where(total > 0, (count + kind * lower) / np.maximum(total + kind, 1), lower)


def _count(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys and how often each occurs; sorts `keys` in place."""
    keys.sort()
    distinct, first = _starts(keys)
    return distinct, np.diff(first, append=len(keys))


def _starts(sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a sorted array and the index where each begins."""
    first = np.flatnonzero(np.diff(sorted_keys, prepend=~sorted_keys[:1]))
    return sorted_keys[first], first


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == wanted, else 0; `keys` sorted and distinct."""
    if len(keys) == 0:
        return np.zeros(len(wanted), dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
