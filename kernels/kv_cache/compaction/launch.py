"""The Triton kernels of KV compaction as custom operators of torch.

    afferent::window_attention    scores = ...       tiles: tuned/kv_window.json
    afferent::expected_logits     logits = ...       tiles: tuned/kv_expected.json
    afferent::gather_kept         writes data, scales in place; tiles: tuned/kv_gather.json

Arguments are checked in `scores.py` and `op.py`. None of them has a derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import arch
from kernels.language import LOG2E
from kernels.launch import dense_rows, launch, padded, precision
from kernels.tiles import pick


def _keys(k: Tensor, lengths: Tensor | None, heads: int) -> dict[str, Any]:
    """Arguments that the score kernels share."""
    return {
        "k": k, **dict(zip(("k_b", "k_s", "k_h"), k.stride()[:3], strict=True)), "s": k.shape[1],
        "lengths": lengths, "RAGGED": lengths is not None, "GROUP": heads // k.shape[2],
        "D": k.shape[3], "BLOCK_D": padded(k.shape[3]), "PRECISION": precision(k.dtype),
    }  # fmt: skip


def window(q: Tensor, k: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Sums over the window's queries and the group's heads of each key's attention, [b, kv, s]."""
    from kernels.kv_cache.compaction import triton as kernels

    (b, w, h, d), (s, kv) = q.shape, k.shape[1:3]
    q, k = dense_rows(q), dense_rows(k)
    tile = pick("kv_window", arch(k.device), bytes=k.itemsize, head_dim=d)
    tiles = -(-s // tile.blocks["BLOCK_N"])
    shared = _keys(k, lengths, h) | {"q": q, "w": w, "scale": scale * LOG2E.value}
    shared |= dict(zip(("q_b", "q_t", "q_h"), q.stride()[:3], strict=True))
    partial = k.new_empty(b, tiles, h, w, dtype=torch.float32)
    launch(kernels.window_lse, (tiles, kv, b), tile, **shared, partial=partial)
    scores = k.new_empty(b, kv, s, dtype=torch.float32)
    lse = partial.logsumexp(1)
    launch(kernels.window_scores, (tiles, kv, b), tile, **shared, lse=lse, scores=scores)
    return scores


def expected(
    mean: Tensor, covariance: Tensor | None, k: Tensor, lengths: Tensor | None, scale: float
) -> Tensor:
    """Logarithm of each key's expected unnormalised attention, [b, h, s]."""
    from kernels.kv_cache.compaction.triton import expected_logits

    (b, h, d), (s, kv), k = mean.shape, k.shape[1:3], dense_rows(k)
    tile = pick("kv_expected", arch(k.device), bytes=k.itemsize, head_dim=d)
    logits = k.new_empty(b, h, s, dtype=torch.float32)
    launch(
        expected_logits,
        (-(-s // tile.blocks["BLOCK_N"]), kv, b),
        tile,
        **_keys(k, lengths, h), mean=mean.float().contiguous(), logits=logits, scale=scale,
        covariance=None if covariance is None else covariance.to(k.dtype).contiguous(),
        COVARIANCE=covariance is not None,
    )  # fmt: skip
    return logits


def gather(
    data: Tensor,
    scales: Tensor | None,
    pages: Tensor,
    tokens: Tensor,
    counts: Tensor,
    head_pages: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Move tokens [r, kv, most] of the pages [r, most_pages] to head_pages [r * kv, ...]."""
    from kernels.kv_cache.compaction.triton import gather_kept

    (_, _, page, kv, d), (r, _, most) = data.shape, tokens.shape
    if data.itemsize == 1:  # codes are moved, not computed with
        data = data.view(torch.uint8)
    tile = pick("kv_gather", arch(data.device), bytes=data.itemsize, head_dim=d)
    launch(
        gather_kept,
        (r * kv, -(-most // tile.blocks["BLOCK"])),
        tile,
        data=data, scales=scales, pages=pages.contiguous(), tokens=tokens.contiguous(),
        counts=counts.contiguous(), head_pages=head_pages.contiguous(),
        cos=cos, sin=sin,
        most_pages=pages.shape[1], most=most, most_head_pages=head_pages.shape[1],
        KV=kv, PAGE=page, D=d, BLOCK_D=padded(d), HALF=max(1, padded(d) // 2),
        SCALES=scales is not None, ROTATE=cos is not None,
    )  # fmt: skip


@torch.library.custom_op("afferent::window_attention", mutates_args=())
def window_attention(q: Tensor, k: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    return window(q, k, lengths, scale)


@window_attention.register_fake
def _(q, k, lengths, scale):
    return k.new_empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32)


@torch.library.custom_op("afferent::expected_logits", mutates_args=())
def expected_logits(
    mean: Tensor, covariance: Tensor | None, k: Tensor, lengths: Tensor | None, scale: float
) -> Tensor:
    return expected(mean, covariance, k, lengths, scale)


@expected_logits.register_fake
def _(mean, covariance, k, lengths, scale):
    return k.new_empty(mean.shape[0], mean.shape[1], k.shape[1], dtype=torch.float32)


@torch.library.custom_op("afferent::gather_kept", mutates_args=("data", "scales"))
def gather_kept(
    data: Tensor,
    scales: Tensor | None,
    pages: Tensor,
    tokens: Tensor,
    counts: Tensor,
    head_pages: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    gather(data, scales, pages, tokens, counts, head_pages, cos, sin)


@gather_kept.register_fake
def _(data, scales, pages, tokens, counts, head_pages, cos, sin):
    return None
