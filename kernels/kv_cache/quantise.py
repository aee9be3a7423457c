"""What the codes of a quantised cache mean, and how they are chosen, in plain torch.

    rows (fp8, int8): symmetric, a scale for each token and head                  x ~ code * scale
        scale = amax / 448 (e4m3) or amax / 127, at least the smallest normal float32
        code  = x * (1 / scale), rounded to nearest even

    int4: asymmetric, a scale and a zero point for each channel of a page of keys (KIVI: Liu et al.,
    2024, arXiv:2402.02750), or for each token, head and group of channels of values
        scale = max((high - low) / 15, amax / 1024) as float16, in 2^-14 .. 65504
        zero  = -low * (1 / scale), rounded to nearest even: an integer   x ~ (code - zero) * scale
        code  = x * (1 / scale), rounded to nearest even, + zero, in 0..15

All of it is float32 arithmetic (scales of int4: then float16), 1 / 448, 1 / 127 and 1 / 15 are
factors, and nothing is added to a product before it is rounded, which a GPU would fuse: so every
implementation can choose the same codes.
A zero is stored exactly, and a row, group or channel of zeros has the smallest scale. amax / 1024
serves groups that hardly vary: it keeps zero points within 1024, where float16 has every integer.
No value is off by more than half a scale (int4: and 0.01 of it, as the scale is rounded; beyond
+-480 000 it saturates; fp8: half the spacing that e4m3 has there).
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from kernels.kv_cache.layout import BlockTable, PagedKV

LARGEST = {"fp8": 448.0, "int8": 127.0}
"Code of the largest value of a row."
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"Of fp8 and int8."
INT4_SCALES = (2.0**-14, 65504.0)
"The smallest normal and the largest float16."
LARGEST_ZERO = 1024.0
"Of int4, either sign."


def encode_rows(x: Float[Tensor, "*rows d"], kind: str) -> tuple[Tensor, Float[Tensor, "*rows"]]:
    """Codes of each row in the dtype of `kind` ("fp8", "int8"), and its scale in float32."""
    x = x.float()
    scale = (x.abs().amax(-1) * (1 / LARGEST[kind])).clamp(min=SMALLEST_SCALE)
    code = x * (1 / scale)[..., None]
    if kind == "fp8":
        return code.to(torch.float8_e4m3fn), scale
    return code.clamp(-127, 127).round().to(torch.int8), scale


def decode_rows(
    code: Tensor, scale: Float[Tensor, "*rows"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows d"]:
    """What rows of fp8 or int8 stand for; exact in float64."""
    return code.to(dtype) * scale.to(dtype)[..., None]


def encode_int4(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 (uint8, shaped as x), and scale and zero point (float16) for all of `dim`, which
    is kept with size one."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    largest = torch.maximum(-low, high)
    scale = torch.maximum((high - low) * (1 / 15), largest / 1024).clamp(*INT4_SCALES).half()
    inverse = 1 / scale.float()
    zero = 0 - (low * inverse).clamp(-LARGEST_ZERO, LARGEST_ZERO).round()  # never -0.0
    code = torch.minimum(torch.maximum(x * inverse, -zero), 15 - zero).round() + zero
    return code.to(torch.uint8), scale, zero.half()


def decode_int4(
    code: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What codes 0..15 stand for; scale and zero broadcast to them. Exact in float64."""
    return (code.to(dtype) - zero.to(dtype)) * scale.to(dtype)


def pack(code: UInt8[Tensor, "*rows d"]) -> UInt8[Tensor, "*rows half"]:
    """Channel c in the low and channel c + d/2 in the high half of byte c."""
    low, high = code.chunk(2, dim=-1)
    return low | high << 4


def unpack(byte: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows d"]:
    """The inverse of `pack`."""
    return torch.cat([byte & 15, byte >> 4], dim=-1)


def encode_keys(
    keys: Float[Tensor, "*pages page kv d"],
) -> tuple[Tensor, Float[Tensor, "*pages kv d"], Float[Tensor, "*pages kv d"]]:
    """int4: bytes [*pages, page, kv, d/2] of whole pages, scales and zero points."""
    code, scale, zero = encode_int4(keys, dim=-3)
    return pack(code), scale.squeeze(-3), zero.squeeze(-3)


def decode_keys(byte: Tensor, scale: Tensor, zero: Tensor, dtype=torch.float32) -> Tensor:
    """The inverse of `encode_keys`."""
    return decode_int4(unpack(byte), scale.unsqueeze(-3), zero.unsqueeze(-3), dtype)


def encode_values(
    values: Float[Tensor, "*tokens kv d"], group: int
) -> tuple[Tensor, Float[Tensor, "*tokens kv groups"], Float[Tensor, "*tokens kv groups"]]:
    """int4: bytes [*tokens, kv, d/2], scales and zero points of each group of channels."""
    grouped = rearrange(values, "... kv (groups group) -> ... kv groups group", group=group)
    code, scale, zero = encode_int4(grouped, dim=-1)
    return pack(code.flatten(-2)), scale.squeeze(-1), zero.squeeze(-1)


def decode_values(byte: Tensor, scale: Tensor, zero: Tensor, dtype=torch.float32) -> Tensor:
    """The inverse of `encode_values`."""
    code = unpack(byte).unflatten(-1, (scale.shape[-1], -1))
    return decode_int4(code, scale[..., None], zero[..., None], dtype).flatten(-2)


def dequantise(
    cache: PagedKV, table: BlockTable
) -> list[tuple[Float[Tensor, "length kv d"], Float[Tensor, "length kv d"]]]:
    """Keys and values of each request as the cache holds them, exactly, in float64.

    One token after the other, through the block table; keys of an unfinished page of int4 come from
    the request's tail.
    """
    requests = []
    for i, length in enumerate(table.lengths.tolist()):
        keys = torch.empty(length, cache.kv, cache.d, dtype=torch.float64, device=cache.device)
        values = torch.empty_like(keys)
        for j in range(length):
            page, slot = int(table.pages[i, j // cache.page]), j % cache.page
            in_tail = cache.tail is not None and j >= length // cache.page * cache.page
            keys[j] = cache.tail[table.tails[i], slot] if in_tail else _key(cache, page, slot)
            values[j] = _value(cache, page, slot)
        requests.append((keys, values))
    return requests


def _key(cache: PagedKV, page: int, slot: int) -> Float[Tensor, "kv d"]:
    stored = cache.data[page, 0, slot]
    if cache.quant.kind == "none":
        return stored.double()
    if cache.quant.kind == "int4":
        scale, zero = cache.key_scales[page], cache.key_zeros[page]
        return decode_int4(unpack(stored), scale, zero, torch.float64)
    return decode_rows(stored, cache.scales[page, 0, slot], torch.float64)


def _value(cache: PagedKV, page: int, slot: int) -> Float[Tensor, "kv d"]:
    stored = cache.data[page, 1, slot]
    if cache.quant.kind == "none":
        return stored.double()
    if cache.quant.kind == "int4":
        scale, zero = cache.value_scales[page, slot], cache.value_zeros[page, slot]
        return decode_values(stored, scale, zero, torch.float64)
    return decode_rows(stored, cache.scales[page, 1, slot], torch.float64)
