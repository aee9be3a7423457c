"""Prefixes in 2, 4 or 8 bits: keys per channel, values per token (KIVI, 2024, arXiv:2402.02750).

    scale = (max - min) / (2^bits - 1)        zero = min         x ~ code * scale + zero

Keys have channels of large values, so a scale and a zero belong to one channel of a group of
tokens; values have none, so theirs belong to one token and a group of channels. Both are float16.
The last `residual` tokens, and those that fill no group, stay as they are, as in the paper.

Bytes are exact: packed codes, scales, zeros and the tokens that stay. What the model attends to is
the dequantised prefix, made for the call; the paged cache (`kernels/kv_cache`) reads int8 and int4
codes directly.

Dimensions: b sequences, p rows, kv key/value heads, hd head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from models.language.prefix import Prefix

BITS = (2, 4, 8)


@dataclass(frozen=True)
class Codes:
    """A tensor of numbers in few bits."""

    packed: UInt8[Tensor, ...]
    scale: Float[Tensor, ...]
    zero: Float[Tensor, ...]
    bits: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed, self.scale, self.zero


@dataclass(frozen=True)
class QuantisedPrefix:
    """Keys and values of every layer as codes, and the last tokens as they are."""

    keys: tuple[Codes, ...]
    values: tuple[Codes, ...]
    recent: Prefix

    @property
    def num_bytes(self) -> int:
        """Of codes, scales, zeros and recent tokens."""
        codes = (*self.keys, *self.values)
        coded = sum(x.numel() * x.itemsize for part in codes for x in part.tensors)
        return coded + self.recent.num_bytes

    def prefix(self) -> Prefix:
        """What it stands for, in the dtype of the recent tokens."""
        layers = []
        for key, value, (k, v) in zip(self.keys, self.values, self.recent.layers, strict=True):
            keys = rearrange(decode(key), "... n group kv hd -> ... (n group) kv hd")
            values = decode(value).flatten(-2)
            layers.append(
                (torch.cat([keys.to(k), k], dim=-3), torch.cat([values.to(v), v], dim=-3))
            )
        return Prefix(tuple(layers), self.recent.position)


def quantise(prefix: Prefix, bits: int, *, group: int = 32, residual: int = 32) -> QuantisedPrefix:
    """The codes of a prefix whose layers have as many rows in every head.

    Args:
        bits: 2, 4 or 8.
        group: tokens of a channel of keys, or channels of a token's values, that share a scale; the
            whole head, if it is narrower.
        residual: last tokens that stay as they are.
    Raises:
        ValueError: other bits, a group that does not divide the head, or heads with different rows.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits} must be one of {', '.join(map(str, BITS))}")
    if prefix.counts is not None:
        raise ValueError("quantise takes a prefix with as many rows in every head")
    if group < 1 or residual < 0:
        raise ValueError(f"group={group} must be at least 1 and residual={residual} at least 0")
    keys, values, recent = [], [], []
    for k, v in prefix.layers:
        p, hd = k.shape[-3], k.shape[-1]
        channels = min(group, hd)
        if hd % channels or channels * bits % 8:
            raise ValueError(
                f"group={group} must divide the head width {hd} and fill whole bytes of {bits} bits"
            )
        coded = max(0, p - residual) // group * group
        k_coded = rearrange(
            k[..., :coded, :, :], "... (n group) kv hd -> ... n group kv hd", group=group
        )
        v_coded = v[..., :coded, :, :].unflatten(-1, (-1, channels))
        keys.append(encode(k_coded, bits, dim=-3))
        values.append(encode(v_coded, bits, dim=-1))
        recent.append((k[..., coded:, :, :], v[..., coded:, :, :]))
    return QuantisedPrefix(tuple(keys), tuple(values), Prefix(tuple(recent), prefix.position))


def encode(x: Tensor, bits: int, dim: int) -> Codes:
    """Codes of x, packed along its last dimension; scale and zero belong to all of `dim`."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.half()
    smallest = torch.finfo(torch.float16).tiny
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(min=smallest).half()
    code = ((x - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    each = 8 // bits
    parts = code.unflatten(-1, (-1, each))
    packed = parts[..., 0].clone()
    for i in range(1, each):
        packed |= parts[..., i] << bits * i
    return Codes(packed, scale, zero, bits)


def decode(codes: Codes) -> Float[Tensor, ...]:
    """What codes stand for, in float32."""
    each, bits = 8 // codes.bits, codes.bits
    parts = [(codes.packed >> bits * i) & (2**bits - 1) for i in range(each)]
    code = torch.stack(parts, dim=-1).flatten(-2)
    return code * codes.scale.float() + codes.zero.float()
