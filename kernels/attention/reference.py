"""The definition of attention, against which every faster implementation is tested.

Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762, eq. 1, with grouped-query
heads (Ainslie et al., 2023, arXiv:2305.13245): query head i reads key/value head i // (h / kv).
Softcap: Gemma 2 (2024, arXiv:2408.00118). Sinks: gpt-oss (2025, arXiv:2508.10925).

Written to be checked by eye: it materialises the whole [b, h, t, s] matrix and shares no code with
the fast paths. float64 stays float64; anything narrower than float32 is computed in float32.

Dimensions: b batch, t queries, s keys (the queries are the last t of the s positions), p prefix
rows, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv d"],
    *,
    causal: bool = True,
    window: int | None = None,
    block: int | None = None,
    segments: Int[Tensor, "b s"] | None = None,
    cu_seqlens_q: Int[Tensor, " n1"] | None = None,
    cu_seqlens_k: Int[Tensor, " n1"] | None = None,
    prefix_kv: tuple[Float[Tensor, "p kv d"], Float[Tensor, "p kv d"]] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h t"]]:
    """softmax(scale * q k^T + mask) v and the log of the softmax's denominator.

    Arguments as in `kernels.attention.op.attention`. A query that sees nothing: 0 and -inf.
    """
    b, t, h, d = q.shape
    s, kv = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    seen = torch.stack(
        [
            _visible(
                t, s, causal, window, block, segments, cu_seqlens_q, cu_seqlens_k, row, q.device
            )
            for row in range(b)
        ]
    )  # [b, t, s]
    if prefix_kv is not None:
        prefix_k, prefix_v = (repeat(x, "p kv d -> b p kv d", b=b) for x in prefix_kv)
        k, v = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
        always = torch.ones(b, t, prefix_k.shape[1], dtype=torch.bool, device=q.device)
        seen = torch.cat([always, seen], 2)
    keys = repeat(k.to(dtype), "b s kv d -> b s (kv group) d", group=h // kv)
    values = repeat(v.to(dtype), "b s kv d -> b s (kv group) d", group=h // kv)

    scores = einsum(q.to(dtype), keys, "b t h d, b s h d -> b h t s")
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A finite value, not -inf, keeps the gradients of empty rows finite; they are zeroed below.
    scores = scores.masked_fill(~seen[:, None], torch.finfo(dtype).min / 4)
    if sinks is not None:
        column = repeat(sinks.to(dtype), "h -> b h t 1", b=b, t=t)
        scores = torch.cat([scores, column], dim=-1)
        empty = torch.zeros(b, 1, t, dtype=torch.bool, device=q.device)
    else:
        empty = ~seen.any(dim=-1)[:, None]  # [b, 1, t]
    lse = scores.logsumexp(dim=-1) if scores.shape[-1] else q.new_zeros(b, h, t, dtype=dtype)
    weights = torch.exp(scores - lse[..., None])[..., : keys.shape[1]]
    weights = weights.masked_fill(empty[..., None], 0.0)
    out = einsum(weights, values, "b h t s, b s h d -> b t h d")
    return out.to(q.dtype), lse.masked_fill(empty, float("-inf"))


def _visible(
    t, s, causal, window, block, segments, cu_seqlens_q, cu_seqlens_k, row, device
) -> Bool[Tensor, "t s"]:
    """Which key each query of one batch row sees, one pair at a time where sequences are packed."""
    query, key = torch.arange(t, device=device)[:, None], torch.arange(s, device=device)[None]
    position = query + (s - t)
    seen = torch.ones(t, s, dtype=torch.bool, device=device)
    if cu_seqlens_q is not None:
        seen, position = torch.zeros_like(seen), position.clone()
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for begin_q, end_q, begin_k, end_k in zip(
            ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True
        ):
            seen[begin_q:end_q, begin_k:end_k] = True
            position[begin_q:end_q] = query[begin_q:end_q] - end_q + end_k
    if block is not None:
        seen = seen & (key // block <= position // block)
    elif causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    if segments is not None:
        document = torch.zeros_like(segments[row])  # number of the run of equal ids
        document[1:] = (segments[row, 1:] != segments[row, :-1]).cumsum(0)
        seen = seen & (document[s - t :, None] == document[None])
    return seen
