"""The definition of appending to a paged cache, against which faster implementations are tested.

Written to be checked by eye: one token after the other, each in the order RMSNorm (2019,
arXiv:1910.07467, eq. 4), rotation by its position (RoFormer, 2021, arXiv:2104.09864, eq. 34, pairs
(i, i + d/2)), rounding to the model's dtype, quantisation (`kernels/kv_cache/quantise.py`), page.
It shares no code with the fast paths but what the codes mean. float64 stays float64; anything
narrower than float32 is computed in float32.

Dimensions: n new tokens of r requests, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.quantise import encode_keys, encode_rows, encode_values


def append_kv(
    cache: PagedKV,
    table: BlockTable,
    k: Float[Tensor, "n kv d"],
    v: Float[Tensor, "n kv d"],
    *,
    cu_seqlens: Int32[Tensor, " r1"],
    q: Float[Tensor, "n h d"] | None = None,
    rope: tuple[Float[Tensor, "positions d"], Float[Tensor, "positions d"]] | None = None,
    k_norm: Float[Tensor, " d"] | None = None,
    q_norm: Float[Tensor, " d"] | None = None,
    norm_eps: float = 1e-6,
    positions: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "n h d"] | None:
    """Write k and v into the cache; return q, normalised and rotated. Arguments as in
    `kernels.kv_cache.append.op.append_kv`."""
    queries = None if q is None else torch.empty_like(q)
    ends = cu_seqlens.tolist()
    for i, length in enumerate(table.lengths.tolist()):
        held = length - (ends[i + 1] - ends[i])
        keys = []
        for token in range(ends[i], ends[i + 1]):
            index = held + token - ends[i]  # within the request
            position = index if positions is None else int(positions[token])
            page, slot = int(table.pages[i, index // cache.page]), index % cache.page
            keys.append(_turned(k[token], k_norm, norm_eps, rope, position))
            if cache.quant.kind != "int4":
                _write(cache, page, 0, slot, keys[-1])
                _write(cache, page, 1, slot, v[token])
            else:
                _write_int4_value(cache, page, slot, v[token])
            if q is not None:
                queries[token] = _turned(q[token], q_norm, norm_eps, rope, position)
        if keys and cache.quant.kind == "int4":
            _write_int4_keys(cache, table.pages[i], cache.tail[table.tails[i]], held, keys)
    return queries


def _turned(x: Float[Tensor, "heads d"], norm, eps: float, rope, position: int):
    """x of one token, normalised and rotated."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps) * norm.to(y.dtype)
    if rope is not None:
        half = x.shape[-1] // 2
        cos, sin = rope[0][position, :half], rope[1][position, half:]
        a, b = y[:, :half], y[:, half:]
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return y.to(x.dtype)


def _write(cache: PagedKV, page: int, which: int, slot: int, x: Float[Tensor, "kv d"]) -> None:
    """A key (which = 0) or value (1), as it is or in fp8 or int8."""
    if cache.quant.kind == "none":
        cache.data[page, which, slot] = x
    else:
        code, cache.scales[page, which, slot] = encode_rows(x, cache.quant.kind)
        # As bytes: not every torch operator copies float8.
        cache.data.view(torch.uint8)[page, which, slot] = code.view(torch.uint8)


def _write_int4_value(cache: PagedKV, page: int, slot: int, x: Float[Tensor, "kv d"]) -> None:
    code, scale, zero = encode_values(x, cache.quant.group)
    cache.data[page, 1, slot] = code
    cache.value_scales[page, slot], cache.value_zeros[page, slot] = scale, zero


def _write_int4_keys(cache: PagedKV, pages: Int32[Tensor, " most"], tail, held: int, keys) -> None:
    """Keys that follow the `held` ones of a request: pages that are full are encoded, the keys of
    the last one stay in the tail, where those of the first one begin."""
    number, begun = held // cache.page, held % cache.page
    keys = [*tail[:begun].clone(), *keys]
    while len(keys) >= cache.page:
        page, full = pages[number], torch.stack(keys[: cache.page])
        cache.data[page, 0], cache.key_scales[page], cache.key_zeros[page] = encode_keys(full)
        keys, number = keys[cache.page :], number + 1
    for slot, key in enumerate(keys):
        tail[slot] = key
