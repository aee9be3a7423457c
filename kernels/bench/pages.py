"""Paged caches for the suites: random keys and values, stored in pages in random order.

What is stored is known densely too, quantised and restored without pages, so that an oracle needs
no block table.

Dimensions: r requests, s tokens of each, kv key/value heads, d head width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.quantise import (
    decode_keys,
    decode_rows,
    decode_values,
    encode_keys,
    encode_rows,
    encode_values,
)

GROUP = 64
"int4: channels of a value that share a scale."


def empty_cache(pages: int, page: int, x: Tensor, kind: str, slots: int) -> PagedKV:
    """For keys and values as `x` [..., kv, d]."""
    kv, d = x.shape[-2:]
    return PagedKV.create(
        pages,
        page,
        kv,
        d,
        dtype=x.dtype,
        quant=QuantSpec(kind, min(GROUP, d)),
        slots=slots if kind == "int4" else 0,
        device=x.device,
    )


def table_of(pages: Tensor, lengths: list[int], cache: PagedKV) -> BlockTable:
    """A checked table; requests have a tail each."""
    tails = None if cache.tail is None else torch.arange(len(lengths))
    return BlockTable.create(pages.cpu(), torch.tensor(lengths), cache, tails)


def store(
    cache: PagedKV, pages: Tensor, k: Float[Tensor, "s kv d"], v: Float[Tensor, "s kv d"]
) -> None:
    """Write whole pages of one request."""
    kind, pages = cache.quant.kind, pages.long().to(cache.device)
    k, v = (x.unflatten(0, (-1, cache.page)) for x in (k, v))
    if kind == "none":
        cache.data[pages, 0], cache.data[pages, 1] = k, v
    elif kind == "int4":
        code, scale, zero = encode_keys(k)
        cache.data[pages, 0], cache.key_scales[pages], cache.key_zeros[pages] = code, scale, zero
        code, scale, zero = encode_values(v, cache.quant.group)
        cache.data[pages, 1] = code
        cache.value_scales[pages], cache.value_zeros[pages] = scale, zero
    else:
        for side, x in enumerate((k, v)):
            code, scale = encode_rows(x, kind)
            # As bytes: not every torch operator moves float8.
            cache.data.view(torch.uint8)[pages, side] = code.view(torch.uint8)
            cache.scales[pages, side] = scale


def restored(
    k: Float[Tensor, "s kv d"], v: Float[Tensor, "s kv d"], page: int, kind: str
) -> tuple[Tensor, Tensor]:
    """What a cache of this kind holds of whole pages of keys and values, float64."""
    if kind == "none":
        return k.double(), v.double()
    if kind == "int4":
        keys = decode_keys(*encode_keys(k.unflatten(0, (-1, page))), torch.float64)
        values = decode_values(*encode_values(v, min(GROUP, v.shape[-1])), torch.float64)
        return keys.flatten(0, 1), values
    keys, values = (decode_rows(*encode_rows(x, kind), torch.float64) for x in (k, v))
    return keys, values


def paged(
    k: Float[Tensor, "r s kv d"], v: Float[Tensor, "r s kv d"], page: int, kind: str, seed: int
) -> tuple[PagedKV, BlockTable]:
    """Every request in pages of its own, in random order."""
    r, s = k.shape[:2]
    rng = torch.Generator().manual_seed(seed)
    pages = torch.randperm(r * (s // page), generator=rng).view(r, -1)
    cache = empty_cache(pages.numel(), page, k, kind, r)
    for own, keys, values in zip(pages, k, v, strict=True):
        store(cache, own, keys, values)
    return cache, table_of(pages, [s] * r, cache)


def bytes_per_token(kind: str, itemsize: int, page: int, kv: int, d: int) -> float:
    """Of keys and values of one layer, scales included."""
    if kind == "none":
        return 2 * kv * d * itemsize
    if kind == "int4":  # 4 + 4 bytes of scale and zero: a channel of a page, a group of a value
        return kv * (d + 4 * d / page + 4 * d / min(GROUP, d))
    return 2 * kv * (d + 4)


def rope(positions: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions 0, 1, ..., float32 [positions, d]: see `append_kv`."""
    frequency = 10000.0 ** -(torch.arange(d // 2, device=device) * 2 / d)
    angle = torch.outer(torch.arange(positions, device=device).float(), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotated(x: Float[Tensor, "n *heads d"], positions: Tensor) -> Float[Tensor, "n *heads d"]:
    """x turned to positions, in float64 by complex numbers: the oracle of the above."""
    d = x.shape[-1]
    frequency = 10000.0 ** -(torch.arange(d // 2, dtype=torch.float64, device=x.device) * 2 / d)
    angle = torch.outer(positions.double().to(x.device), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)
    y = torch.complex(*x.double().chunk(2, -1)) * turn.view(len(x), *[1] * (x.ndim - 2), -1)
    return torch.cat([y.real, y.imag], -1)


def wipe(cache: PagedKV, pages: Tensor | None = None) -> None:
    """Overwrite stored values (of some pages), so that only a call that writes them is right."""
    stored = cache.data.view(torch.uint8)
    if pages is None:
        stored.fill_(0x7F)
    else:
        stored[pages] = 0x7F
