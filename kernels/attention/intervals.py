"""Which keys a query sees. Every mask here is an interval of keys, so that is how it is handed on.

Causality, a sliding window, documents in a row and packed sequences of different lengths all let
query i see the keys first_i <= j < last_i, and both ends only grow with i. Hence a tile of queries
needs the keys from its smallest first to its largest last, those between its largest first and its
smallest last need no mask, and in the backward pass the queries that see key j are an interval too.

Dimensions: b batch, t queries, s keys.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor

UNBOUNDED = 2**30
"A reach further than any sequence: no limit on that side."


def reach(causal: bool, window: int | None) -> tuple[int, int]:
    """How many keys before and after its own position a query sees."""
    return (UNBOUNDED if window is None else window - 1), (0 if causal else UNBOUNDED)


def from_positions(
    t: int, s: int, before: int, after: int, device: torch.device
) -> Int32[Tensor, "1 2 t"]:
    """Intervals of t queries that are the last t of s positions: first and last + 1."""
    position = torch.arange(s - t, s, device=device, dtype=torch.int32)
    first = (position - before).clamp(min=0)
    last = torch.maximum((position + after + 1).clamp(max=s), first)
    return torch.stack([first, last])[None]


def from_blocks(t: int, s: int, block: int, device: torch.device) -> Int32[Tensor, "1 2 t"]:
    """Intervals of the last t of s positions, each to the end of its block of `block` positions."""
    position = torch.arange(s - t, s, device=device, dtype=torch.int32)
    last = ((position.div(block, rounding_mode="floor") + 1) * block).clamp(0, s)
    return torch.stack([torch.zeros_like(last), last])[None]


def from_segments(
    segments: Int[Tensor, "b s"], t: int, before: int, after: int
) -> Int32[Tensor, "b 2 t"]:
    """Intervals of the last t of s positions, each inside its document: a run of equal ids."""
    s = segments.shape[1]
    position = torch.arange(s, device=segments.device, dtype=torch.int32)
    changed = segments[:, 1:] != segments[:, :-1]  # [b, s - 1]
    begins = torch.where(changed, position[1:], 0)
    ends = torch.where(changed, position[1:], s)
    begin = torch.nn.functional.pad(begins, (1, 0)).cummax(dim=1).values  # [b, s]
    end = torch.nn.functional.pad(ends, (0, 1), value=s).flip(1).cummin(dim=1).values.flip(1)
    own = position[s - t :]
    first = torch.maximum(own - before, begin[:, s - t :])
    last = torch.minimum(own + after + 1, end[:, s - t :])
    return torch.stack([first, last], dim=1).int()


def from_lengths(
    cu_seqlens_q: Int[Tensor, " n1"],
    cu_seqlens_k: Int[Tensor, " n1"],
    t: int,
    before: int,
    after: int,
) -> Int32[Tensor, "1 2 t"]:
    """Intervals of packed sequences: the queries of each are the last positions of its keys.

    Args:
        cu_seqlens_q, cu_seqlens_k: where each sequence begins, and the end of the last; queries
            beyond that end see nothing.
    """
    query = torch.arange(t, device=cu_seqlens_q.device)
    begins_q, begins_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    sequence = torch.searchsorted(begins_q, query, right=True) - 1
    outside = query >= begins_q[-1]
    sequence = sequence.clamp(max=len(begins_q) - 2)
    begin, end = begins_k[sequence], begins_k[sequence + 1]
    own = end - (begins_q[sequence + 1] - query)  # bottom right: last query at last key
    first = torch.maximum(own - before, begin)
    last = torch.maximum(torch.minimum(own + after + 1, end), first)
    nothing = begins_k[-1]
    ends = [torch.where(outside, nothing, first), torch.where(outside, nothing, last)]
    return torch.stack(ends)[None].int()


def transposed(intervals: Int32[Tensor, "b 2 t"], s: int) -> Int32[Tensor, "b 2 s"]:
    """The queries that see each of s keys: from the first whose interval ends after it."""
    b = intervals.shape[0]
    key = torch.arange(s, device=intervals.device, dtype=torch.int32).expand(b, s).contiguous()
    first, last = intervals[:, 0].contiguous(), intervals[:, 1].contiguous()
    begin = torch.searchsorted(last, key, right=True, out_int32=True)
    end = torch.searchsorted(first, key, right=True, out_int32=True)
    return torch.stack([begin, end], dim=1)


def visible(intervals: Int32[Tensor, "b 2 t"], s: int) -> Bool[Tensor, "b t s"]:
    """The intervals as a mask."""
    key = torch.arange(s, device=intervals.device)
    return (key >= intervals[:, 0, :, None]) & (key < intervals[:, 1, :, None])
