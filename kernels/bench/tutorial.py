"""A peer: FlashAttention-2 in Triton as in Triton's tutorial 06 ("Fused Attention"), our own code.

It is what a reader of the tutorial has: dense multi-head attention on contiguous [b, h, n, d], n a
multiple of the tiles, a fixed tile, pointer loads. Forward: one loop over the keys up to the
diagonal, with the causal mask inside of it. Backward: delta = rowsum(O dO) first; then one kernel
whose program computes dK, dV of a block of keys and after that dQ of the block of queries with the
same number, the diagonal first and in half-size steps. No grouped heads, windows,
prefixes, variable lengths. Dao, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.language import LOG2E, dot
from kernels.launch import launch
from kernels.tiles import Tile


@triton.jit
def tutorial_forward(
    q, k, v, out, logsum, n, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: n / BLOCK_M, b * h. scale carries log2 e; logsum is of base 2."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, within, columns = (
        block * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_N),
        tl.arange(0, D),
    )
    here = matrix * n * D
    queries = tl.load(q + here + rows[:, None] * D + columns[None, :])
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, D], tl.float32)
    end = n
    if CAUSAL:
        end = (block + 1) * BLOCK_M
    for start in range(0, end, BLOCK_N):
        j = start + within
        keys = tl.load(k + here + j[None, :] * D + columns[:, None])
        s = dot(queries, keys, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), "ieee") * scale
        if CAUSAL:
            s = tl.where(rows[:, None] >= j[None, :], s, -1.0e6)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
        rescale = tl.math.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 1)
        values = tl.load(v + here + j[:, None] * D + columns[None, :])
        accumulator = dot(p.to(values.dtype), values, accumulator * rescale[:, None], "ieee")
        m = m_new
    accumulator = accumulator / l[:, None]
    tl.store(
        out + here + rows[:, None] * D + columns[None, :], accumulator.to(out.dtype.element_ty)
    )
    tl.store(logsum + matrix * n + rows, m + tl.math.log2(l))


@triton.jit
def tutorial_delta(out, dout, delta, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Grid: b * h * n / BLOCK_M."""
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at = rows[:, None].to(tl.int64) * D + columns[None, :]
    o, do = tl.load(out + at).to(tl.float32), tl.load(dout + at).to(tl.float32)
    tl.store(delta + rows, tl.sum(o * do, 1))


@triton.jit
def add_dk_dv(
    dk, dv, keys, values, q, dout, logsum, delta, j, begin, steps, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `steps` blocks of queries from `begin` on contribute to keys j."""
    within, columns = tl.arange(0, BLOCK), tl.arange(0, D)
    for step in range(steps):
        i = begin + step * BLOCK + within
        at = i[:, None] * D + columns[None, :]
        queries, do = tl.load(q + at), tl.load(dout + at)
        zeros = tl.zeros([keys.shape[0], BLOCK], tl.float32)
        st = dot(keys, tl.trans(queries), zeros, "ieee") * scale
        pt = tl.math.exp2(st - tl.load(logsum + i)[None, :])
        if MASKED:
            pt = tl.where(i[None, :] >= j[:, None], pt, 0.0)
        dv = dot(pt.to(do.dtype), do, dv, "ieee")
        dpt = dot(values, tl.trans(do), zeros, "ieee")
        dst = pt * (dpt - tl.load(delta + i)[None, :])
        dk = dot(dst.to(queries.dtype), queries, dk, "ieee")
    return dk, dv


@triton.jit
def add_dq(
    dq, queries, do, logsum, delta, k, v, i, begin, steps, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `steps` blocks of keys from `begin` on contribute to queries i."""
    within, columns = tl.arange(0, BLOCK), tl.arange(0, D)
    for step in range(steps):
        j = begin + step * BLOCK + within
        at = j[None, :] * D + columns[:, None]
        keys, values = tl.load(k + at), tl.load(v + at)  # transposed: d x BLOCK
        zeros = tl.zeros([queries.shape[0], BLOCK], tl.float32)
        p = tl.math.exp2(dot(queries, keys, zeros, "ieee") * scale - logsum[:, None])
        if MASKED:
            p = tl.where(i[:, None] >= j[None, :], p, 0.0)
        ds = p * (dot(do, values, zeros, "ieee") - delta[:, None])
        dq = dot(ds.to(keys.dtype), tl.trans(keys), dq, "ieee")
    return dq


@triton.jit
def tutorial_backward(
    q, k, v, dout, logsum, delta, dq, dk, dv, n, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M1: tl.constexpr, BLOCK_N1: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr,
):  # fmt: skip
    """Grid: n / BLOCK_N1, b * h. BLOCK_M1 x BLOCK_N1 for dK, dV; BLOCK_M2 x BLOCK_N2 for dQ."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns, here, line = tl.arange(0, D), matrix * n * D, matrix * n
    q, k, v, dout = q + here, k + here, v + here, dout + here
    logsum, delta = logsum + line, delta + line
    base2 = scale * LOG2E

    start = block * BLOCK_N1
    j = start + tl.arange(0, BLOCK_N1)
    at = j[:, None] * D + columns[None, :]
    keys, values = tl.load(k + at), tl.load(v + at)
    dk_tile, dv_tile = (tl.zeros([BLOCK_N1, D], tl.float32), tl.zeros([BLOCK_N1, D], tl.float32))
    begin = 0
    if CAUSAL:
        dk_tile, dv_tile = add_dk_dv(
            dk_tile, dv_tile, keys, values, q, dout, logsum, delta, j, start,
            BLOCK_N1 // (BLOCK_M1 // 2), base2, D, BLOCK_M1 // 2, True,
        )  # fmt: skip
        begin = start + BLOCK_N1
    dk_tile, dv_tile = add_dk_dv(
        dk_tile, dv_tile, keys, values, q, dout, logsum, delta, j, begin,
        (n - begin) // BLOCK_M1, base2, D, BLOCK_M1, False,
    )  # fmt: skip
    tl.store(dk + here + at, (dk_tile * scale).to(dk.dtype.element_ty))
    tl.store(dv + here + at, dv_tile.to(dv.dtype.element_ty))

    start = block * BLOCK_M2
    i = start + tl.arange(0, BLOCK_M2)
    at = i[:, None] * D + columns[None, :]
    queries, do = tl.load(q + at), tl.load(dout + at)
    dq_tile = tl.zeros([BLOCK_M2, D], tl.float32)
    l, d = tl.load(logsum + i), tl.load(delta + i)
    end = n
    if CAUSAL:
        dq_tile = add_dq(
            dq_tile, queries, do, l, d, k, v, i, start,
            BLOCK_M2 // (BLOCK_N2 // 2), base2, D, BLOCK_N2 // 2, True,
        )  # fmt: skip
        end = start
    dq_tile = add_dq(
        dq_tile, queries, do, l, d, k, v, i, 0, end // BLOCK_N2, base2, D, BLOCK_N2, False
    )
    tl.store(dq + here + at, (dq_tile * scale).to(dq.dtype.element_ty))


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d] and the base-2 log-sum-exp [b, h, n] of contiguous q, k, v."""
    b, h, n, d = q.shape
    out, logsum = torch.empty_like(q), q.new_empty(b, h, n, dtype=torch.float32)
    launch(
        tutorial_forward,
        (n // tile.blocks["BLOCK_M"], b * h),
        tile,
        q=q, k=k, v=v, out=out, logsum=logsum, n=n, scale=scale * LOG2E.value, D=d, CAUSAL=causal,
    )  # fmt: skip
    return out, logsum


def backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dout: Tensor,
    causal: bool,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; saved: q, k, v, out, logsum."""
    q, k, v, out, logsum = saved
    b, h, n, d = q.shape
    if tile.blocks["BLOCK_N1"] != tile.blocks["BLOCK_M2"]:
        raise ValueError(f"one program takes equal blocks of keys and queries, got {tile.blocks}")
    dout = dout.contiguous()
    delta, dq, dk, dv = torch.empty_like(logsum), *(torch.empty_like(x) for x in (q, k, v))
    rows = min(128, n)
    launch(
        tutorial_delta,
        (b * h * n // rows,),
        Tile(MappingProxyType({"BLOCK_M": rows}), 4, 1),
        out=out, dout=dout, delta=delta, D=d,
    )  # fmt: skip
    launch(
        tutorial_backward,
        (n // tile.blocks["BLOCK_N1"], b * h),
        tile,
        q=q, k=k, v=v, dout=dout, logsum=logsum, delta=delta, dq=dq, dk=dk, dv=dv, n=n, scale=scale,
        D=d, CAUSAL=causal,
    )  # fmt: skip
    return dq, dk, dv


class TutorialAttention(torch.autograd.Function):
    """apply(q, k, v, causal, scale, forward tile, backward tile) -> out, all [b, h, n, d]."""

    @staticmethod
    def forward(ctx: Any, q, k, v, causal, scale, forward_tile, backward_tile) -> Tensor:
        n, blocks = q.shape[2], (forward_tile.blocks, backward_tile.blocks)
        sizes = {size for tile in blocks for size in tile.values()}
        if not q.shape == k.shape == v.shape or any(n % size for size in sizes):
            raise ValueError(
                f"the tutorial's kernel takes equal q, k, v whose length its tiles {sorted(sizes)} "
                f"divide, got {list(q.shape)}, {list(k.shape)}"
            )
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, logsum = forward(q, k, v, causal, scale, forward_tile)
        ctx.save_for_backward(q, k, v, out, logsum)
        ctx.options = causal, scale, backward_tile
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        return (*backward(ctx.saved_tensors, dout, *ctx.options), None, None, None, None)
