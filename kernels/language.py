"""Device functions that kernels share."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32. The interpreter multiplies the bits of bfloat16: upcast."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def soft_cap(s, scale, softcap):
    """softcap tanh(scale s / softcap); 2 sigmoid(2x) - 1 is tanh, which Triton lacks."""
    return softcap * (2.0 * tl.sigmoid(2.0 * scale / softcap * s) - 1.0)


@triton.jit
def load_rows(source, start, rows, stride, columns, limit, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows start + rows of a matrix [limit, D], as a tile; what lies outside of it reads as zero.

    MASKED: the rows may pass `limit`. Columns pass D where D is no power of two.
    """
    pointers = (
        source + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    )
    if MASKED:
        inside = (start + rows < limit)[:, None] & (columns < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if columns.shape[0] == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def place(program, h):
    """Row of the batch and head of a program, as 64-bit offsets."""
    return (program // h).to(tl.int64), (program % h).to(tl.int64)


@triton.jit
def matrix(
    base, rows, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """What `load_tile` reads tiles [BLOCK, BLOCK_D] of: a descriptor (TMA), or the pointer."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(base, [rows, D], [stride, 1], [BLOCK, BLOCK_D])
    else:
        return base


@triton.jit
def load_tile(
    source, start, rows, stride, columns, limit, D: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows start + rows of a `matrix`, zero outside of it. Arguments as in `load_rows`."""
    if DESCRIPTORS:
        return source.load([start, 0])
    else:
        return load_rows(source, start, rows, stride, columns, limit, D, MASKED)
