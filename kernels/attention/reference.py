"""The definition of attention, against which every faster implementation is tested.

Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762, eq. 1, with grouped-query
heads (Ainslie et al., 2023, arXiv:2305.13245): query head i reads key/value head i // (h / kv).

Written to be checked by eye: it materialises the whole [b, h, t, s] matrix and shares no code with
`op.py`. float64 stays float64; anything narrower than float32 is computed in float32.

Dimensions: b batch, t queries, s keys (the queries are the last t of the s positions), h query
heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv d"],
    *,
    causal: bool = True,
    window: int | None = None,
    segments: Int[Tensor, "b s"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b t h d"]:
    """softmax(scale * q k^T + mask) v. Arguments as in `kernels.attention.op.attention`."""
    t, h, d = q.shape[1:]
    s, kv = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = repeat(k.to(dtype), "b s kv d -> b s (kv group) d", group=h // kv)
    values = repeat(v.to(dtype), "b s kv d -> b s (kv group) d", group=h // kv)

    key_position = torch.arange(s, device=q.device)  # [s]
    query_position = key_position[s - t :, None]  # [t, 1]
    visible = torch.ones(t, s, dtype=torch.bool, device=q.device)
    if causal:
        visible &= key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    if segments is not None:
        same_document = segments[:, s - t :, None] == segments[:, None, :]  # [b, t, s]
        visible = (visible & same_document)[:, None]  # [b, 1, t, s]

    scores = einsum(q.to(dtype), keys, "b t h d, b s h d -> b h t s")
    scores = scores * (d**-0.5 if scale is None else scale)
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return einsum(probabilities, values, "b h t s, b s h d -> b t h d").to(q.dtype)
