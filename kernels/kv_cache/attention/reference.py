"""The definition of attention over a paged cache: one request and one head after the other.

The cache and the table say which keys and values a request has (`kernels.kv_cache.quantise`, in
plain loops, dequantised exactly); what is computed on them is attention as in
`kernels.attention.reference`, written out for one head. float64 throughout.

Dimensions: n queries, r requests, g groups of requests, h query heads, kv key/value heads, d head
width, s tokens of a request.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.quantise import dequantise


def decode_paged(
    q: Float[Tensor, "r h d"], cache: PagedKV, table: BlockTable, **options
) -> tuple[Float64[Tensor, "r h d"], Float64[Tensor, "h r"]]:
    """out and lse. Arguments as in `op.decode_paged`."""
    out, lse = nothing(q)
    for i, (keys, values) in enumerate(dequantise(cache, table)):
        out[i], lse[:, i] = attend(q[i], keys, values, len(keys) - 1, **options)
    return out, lse


def extend_paged(
    q: Float[Tensor, "n h d"],
    cache: PagedKV,
    table: BlockTable,
    *,
    cu_seqlens: Int32[Tensor, " r+1"],
    **options,
) -> tuple[Float64[Tensor, "n h d"], Float64[Tensor, "h n"]]:
    """out and lse. Arguments as in `op.extend_paged`."""
    out, lse = nothing(q)
    for i, (keys, values) in enumerate(dequantise(cache, table)):
        begin, end = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        for n in range(begin, end):
            position = len(keys) - end + n  # the last query is at the last key
            out[n], lse[:, n] = attend(q[n], keys, values, position, **options)
    return out, lse


def decode_cascade(
    q: Float[Tensor, "r h d"],
    cache: PagedKV,
    table: BlockTable,
    *,
    prefix: BlockTable,
    groups: Int32[Tensor, " g+1"],
    **options,
) -> tuple[Float64[Tensor, "r h d"], Float64[Tensor, "h r"]]:
    """out and lse: decoding over the tokens of the prefix and then the request's own."""
    out, lse = nothing(q)
    prefixes, own = dequantise(cache, prefix), dequantise(cache, table)
    for group in range(len(groups) - 1):
        for i in range(int(groups[group]), int(groups[group + 1])):
            keys, values = (torch.cat(pair) for pair in zip(prefixes[group], own[i], strict=True))
            out[i], lse[:, i] = attend(q[i], keys, values, len(keys) - 1, **options)
    return out, lse


def nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    n, h, _ = q.shape
    return q.double().clone().zero_(), q.new_full((h, n), float("-inf"), dtype=torch.float64)


def attend(
    q: Float[Tensor, "h d"],
    keys: Float64[Tensor, "s kv d"],
    values: Float64[Tensor, "s kv d"],
    position: int,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Float64[Tensor, "h d"], Float64[Tensor, " h"]]:
    """All heads of one query that is at `position` of its request."""
    (h, d), kv = q.shape, keys.shape[1]
    out, lse = torch.zeros(h, d).to(keys), torch.full((h,), float("-inf")).to(keys)
    seen = [
        j
        for j in range(len(keys))
        if (j <= position or not causal) and (window is None or j > position - window)
    ]
    for head in range(h):
        own = head // (h // kv)  # its key/value head
        scores = keys[seen, own] @ q[head].double() * (d**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:  # a score whose value is zero
            scores = torch.cat([scores, sinks[head : head + 1].double()])
        if len(scores):
            lse[head] = scores.logsumexp(0)
            out[head] = torch.exp(scores - lse[head])[: len(seen)] @ values[seen, own]
    return out, lse
