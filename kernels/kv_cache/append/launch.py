"""The Triton kernels of append as a custom operator of torch, which writes the cache in place.

    afferent::append_kv    turned q = ...    tiles: tuned/kv_append{,_int4_keys}.json

It traces under `torch.compile(fullgraph=True)`. Arguments are as in `op.append_kv`, checked there,
the cache and its table taken apart. Without q the result is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import arch
from kernels.launch import dense_rows, launch, padded
from kernels.tiles import pick


def append(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    pages: Tensor,
    lengths: Tensor,
    tails: Tensor | None,
    data: Tensor,
    scales: Tensor | None,
    key_scales: Tensor | None,
    key_zeros: Tensor | None,
    value_scales: Tensor | None,
    value_zeros: Tensor | None,
    tail: Tensor | None,
    norm_eps: float,
    kind: str,
) -> Tensor:
    """q, normalised and rotated, [n, h, d]; everything else goes into the cache."""
    from kernels.kv_cache.append.triton import append_int4_keys, append_rows

    (n, kv, d), r, page = k.shape, len(lengths), data.shape[2]
    h = 0 if q is None else q.shape[1]
    q, k, v, pages, lengths, tails, cu_seqlens, positions, q_norm, k_norm = (
        None if x is None else dense_rows(x)
        for x in (q, k, v, pages, lengths, tails, cu_seqlens, positions, q_norm, k_norm)
    )
    turned = k.new_empty(0) if q is None else q.new_empty(q.shape)
    half, chip = (d + 1) // 2, arch(k.device)
    shared: dict[str, Any] = {
        "k": k, "k_norm": k_norm, "cos": cos, "sin": sin, "positions": positions,
        "cu_seqlens": cu_seqlens, "pages": pages, "lengths": lengths, "data": data,
        "pages_r": pages.stride(0), "n": n, "r": r, "steps": (r - 1).bit_length(),
        "table_rows": 0 if cos is None else len(cos), "eps": norm_eps,
        "KV": kv, "D": d, "HALF": half, "PAGE": page, "ROPE": cos is not None,
        "K_NORM": k_norm is not None, "POSITIONS": positions is not None,
        **_strides("k_", "nh", k),
    }  # fmt: skip

    tile = pick("kv_append", chip, head_dim=d)
    heads = h + (kv if kind == "int4" else 2 * kv)
    launch(
        append_rows,
        (-(-n // tile.blocks["BLOCK_T"]) * heads,),
        tile,
        **shared, q=q, v=v, turned=turned, q_norm=q_norm, Q_NORM=q_norm is not None,
        scales=scales, value_scales=value_scales, value_zeros=value_zeros,
        **_strides("q_", "nh", q), **_strides("v_", "nh", v),
        **_strides("data_", "pwsh", data), **_strides("scales_", "pwsh", scales),
        **_strides("values_", "psh", value_scales),
        H=h, GROUP=0 if value_scales is None else d // value_scales.shape[3], KIND=kind,
        BLOCK_C=padded(half),
    )  # fmt: skip
    if kind == "int4":
        tile = pick("kv_append_int4_keys", chip, page=page)
        blocks = -(-half // tile.blocks["BLOCK_C"])
        launch(
            append_int4_keys,
            ((r + -(-n // page)) * kv * blocks,),
            tile,
            **shared, tails=tails, key_scales=key_scales, key_zeros=key_zeros, tail=tail,
            **_strides("data_", "p.sh", data), **_strides("keys_", "ph", key_scales),
            **_strides("tail_", "psh", tail),
        )  # fmt: skip
    return turned


def _strides(name: str, letters: str, x: Tensor | None) -> dict[str, int]:
    """The strides of x's first dimensions by letter; those of "." are left out."""
    strides = (0,) * len(letters) if x is None else x.stride()
    named = zip(letters, strides, strict=False)
    return {name + letter: stride for letter, stride in named if letter != "."}


_WRITTEN = (
    "data", "scales", "key_scales", "key_zeros", "value_scales", "value_zeros", "tail",
)  # fmt: skip


append_kv = torch.library.custom_op("afferent::append_kv", append, mutates_args=_WRITTEN)


@append_kv.register_fake
def _(q, k, *others):
    return k.new_empty(0) if q is None else q.new_empty(q.shape)
