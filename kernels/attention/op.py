"""Attention: one public function, several implementations that agree with `reference.py`.

    impl     what runs                                       gradients
    torch    two batched matmuls and a softmax in float32    of any order
    sdpa     torch.nn.functional.scaled_dot_product_attention  first order
    auto     `resolve` picks, and says what it picked

An implementation asked for by name never falls back to another one: it runs, or it raises.
Written with torch operators only, so it traces under `torch.compile(fullgraph=True)` and on meta.

Dimensions: b batch, t queries, s keys (the queries are the last t of the s positions), h query
heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "sdpa")


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv d"],
    *,
    causal: bool = True,
    window: int | None = None,
    segments: Int[Tensor, "b s"] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b t h d"]:
    """Grouped-query attention of the last t positions of a sequence of s.

    Args:
        q: queries; query i sits at position s - t + i. Any float dtype, shared by q, k and v.
        k, v: keys and values; kv divides h, and query head i reads head i // (h / kv).
        causal: a query sees no position after its own.
        window: tokens a query sees, itself included, counting back; needs `causal`. None: all.
        segments: document of each of the s positions; a query sees only its own document.
        scale: factor on the scores; None: 1 / sqrt(d).
        impl: one of `IMPLEMENTATIONS`; `resolve` tells what "auto" runs.
    Returns:
        The attended values, in the dtype of q.
    Raises:
        ValueError: an unknown `impl`, or shapes, dtypes or options that contradict each other.
    """
    _check(q, k, v, causal, window, segments)
    chosen = resolve(impl)
    t, s, d = q.shape[1], k.shape[1], q.shape[3]
    scale = d**-0.5 if scale is None else scale
    if window is not None:
        oldest = max(0, s - t - window + 1)  # key that the first query still sees
        k, v = k[:, oldest:], v[:, oldest:]
        segments = None if segments is None else segments[:, oldest:]
        window = window if window < k.shape[1] else None
    compute = _sdpa if chosen == "sdpa" else _matmul
    return compute(q, k, v, causal, window, segments, scale)


def resolve(impl: str = "auto") -> str:
    """The implementation that `attention(..., impl=impl)` runs, never "auto".

    Raises:
        ValueError: `impl` is not one of `IMPLEMENTATIONS`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention impl={impl!r} is unknown: use {', '.join(IMPLEMENTATIONS)}")
    return "sdpa" if impl == "auto" else impl


def _sdpa(q, k, v, causal, window, segments, scale):
    t, s = q.shape[1], k.shape[1]
    square = causal and t == s and window is None and segments is None
    mask = None if square else _visible(t, s, causal, window, segments, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # [b, h, t, d]
        k.transpose(1, 2),  # [b, kv, s, d]
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _matmul(q, k, v, causal, window, segments, scale):
    t, s, kv = q.shape[1], k.shape[1], k.shape[2]
    mask = _visible(t, s, causal, window, segments, q.device)
    # The query heads of one group become more queries of their key head: nothing is repeated.
    queries = rearrange(q * scale, "b t (kv g) d -> b kv (g t) d", kv=kv)
    scores = queries @ rearrange(k, "b s kv d -> b kv d s")
    scores = rearrange(scores, "b kv (g t) s -> b (kv g) t s", t=t)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    weights = rearrange(scores.softmax(-1).to(q.dtype), "b (kv g) t s -> b kv (g t) s", kv=kv)
    out = weights @ rearrange(v, "b s kv d -> b kv s d")
    return rearrange(out, "b kv (g t) d -> b t (kv g) d", t=t)


def _visible(
    t: int,
    s: int,
    causal: bool,
    window: int | None,
    segments: Int[Tensor, "b s"] | None,
    device: torch.device,
) -> Bool[Tensor, "#b 1 t s"] | None:
    """Which key each query sees; None when every query sees every key."""
    visible = None
    if causal and (t > 1 or window is not None):
        # The age of a key as a query sees it: zero at the query's own position.
        age = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)
        visible = age >= 0 if window is None else (age >= 0) & (age < window)
        visible = visible[None, None]  # [1, 1, t, s]
    if segments is not None:
        same = segments[:, None, s - t :, None] == segments[:, None, None, :]  # [b, 1, t, s]
        visible = same if visible is None else visible & same
    return visible


def _check(q, k, v, causal, window, segments) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention expects q [b, t, h, d] and k, v of one shape [b, s, kv, d], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(
            "q and k must agree in batch and head width, "
            f"got q {list(q.shape)} and k {list(k.shape)} ([b, t, h, d] and [b, s, kv, d])"
        )
    if h % kv:
        raise ValueError(f"{kv} key/value heads do not divide {h} query heads")
    if t > s and (causal or segments is not None):
        raise ValueError(
            f"{t} queries cannot be the last of {s} keys: give t <= s, "
            "or causal=False and segments=None"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v need one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window={window}, causal={causal}: a window is >= 1 and needs causal=True"
        )
    if segments is not None and segments.shape != (b, s):
        raise ValueError(f"segments must be [b, s] = {[b, s]}, got {list(segments.shape)}")
