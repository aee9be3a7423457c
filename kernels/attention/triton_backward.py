"""Attention backward, in Triton, without atomics: the same bits every time.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 2), as separate sweeps. With the scores S,
probabilities P and log-sum-exp LSE of the forward pass, recomputed tile by tile, and the gradients
dO and dLSE of both results:

    delta = rowsum(O dO) - dLSE                     attention_delta, once per query
    P = exp(S - LSE)
    dV = P^T dO                                     attention_dk_dv: one program per tile of keys
    dS = P (dO V^T - delta)                           sweeps the queries that see it, over all
    dK = dS^T Q * scale                               query heads of its group
    dQ = dS K * scale                               attention_dq: one program per tile of queries

                 queries that see key j (`intervals.transposed`)
           +------------------------------+
    keys   |             mask             |   BLOCK_N keys; S^T is computed, so that P^T feeds dV
           +------------------------------+

The prefix's gradients are sums over the batch: attention_prefix_dk_dv gives each program a slice of
the batch, and the slices' float32 sums are added afterwards in a fixed order. A softcap multiplies
dS by 1 - (S / c)^2. Dimensions as in `triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.triton import interval, tile_ranges
from kernels.language import LOG2E, dot, load_rows, load_tile, matrix, soft_cap


@triton.jit
def attention_delta(
    out, dout, dlse, delta, out_b, out_t, out_h, dout_b, dout_t, dout_h, t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries, h, b."""
    head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    start, within, columns = (
        tl.program_id(0) * BLOCK_M,
        tl.arange(0, BLOCK_M),
        tl.arange(0, BLOCK_D),
    )
    o = load_rows(out + batch * out_b + head * out_h, start, within, out_t, columns, t, D, True)
    do = load_rows(
        dout + batch * dout_b + head * dout_h, start, within, dout_t, columns, t, D, True
    )
    rows = start + within
    offset = (batch * tl.num_programs(1) + head) * t + rows
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    total -= tl.load(dlse + offset, mask=rows < t, other=0.0)
    tl.store(delta + offset, total, mask=rows < t)


@triton.jit
def probabilities(s, lse, seen, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """exp(S - LSE), and dS / d(q k^T) up to `scale`. s, lse (base 2) and seen broadcast."""
    slope = 1.0
    if SOFTCAP:
        capped = soft_cap(s, scale, softcap)
        slope = 1.0 - (capped / softcap) * (capped / softcap)
        p = tl.exp2(capped * LOG2E - lse)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def accumulate_dk_dv(
    dk, dv, keys, values, q, dout, lse, delta, q_t, dout_t, begin, end, first, last, t,
    scale, softcap,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add what queries begin <= i < end contribute. first, last: the queries that see each key.

    One sweep that masks every tile, not three: registers are what this loop is short of.
    """
    within, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_M):
        rows = start + within
        row = tl.minimum(rows, t - 1)  # not seen by any key if it is another
        queries = load_tile(q, start, within, q_t, columns, t, D, True, DESCRIPTORS)
        do = load_tile(dout, start, within, dout_t, columns, t, D, True, DESCRIPTORS)
        seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
        zeros = tl.zeros([keys.shape[0], BLOCK_M], tl.float32)
        d = tl.load(delta + row)
        if SOFTCAP:
            logsum = tl.load(lse + row) * LOG2E
            st = dot(keys, tl.trans(queries), zeros, PRECISION)
            pt, slope = probabilities(st, logsum[None, :], seen, scale, softcap, True, True)
            dv = dot(pt.to(do.dtype), do, dv, PRECISION)
            dst = pt * slope * dot(values, tl.trans(do), zeros - d[None, :], PRECISION)
        else:  # S - LSE and dP - delta come out of the products: their sums start there
            logsum = tl.load(lse + row) / scale
            st = dot(keys, tl.trans(queries), zeros - logsum[None, :], PRECISION)
            pt = tl.where(seen, tl.exp2(st * (scale * LOG2E)), 0.0).to(do.dtype)
            dv = dot(pt, do, dv, PRECISION)
            dst = pt.to(tl.float32) * dot(values, tl.trans(do), zeros - d[None, :], PRECISION)
        dk = dot(dst.to(queries.dtype), queries, dk, PRECISION)
    return dk, dv


@triton.jit
def attention_dk_dv(
    q, k, v, dout, lse, delta, intervals, dk, dv,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_t, dout_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h, intervals_b, t, s, before, after, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of keys, kv, b. intervals: the queries that see each key [b, 2, s]; without
    them before and after are the reach of a key: those of a query, exchanged."""
    start = tl.program_id(0) * BLOCK_N
    kv_head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    heads = tl.num_programs(1) * GROUP
    within, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row = tl.minimum(start + within, s - 1)  # rows past the end repeat the last; not stored
    first, last = interval(
        row, intervals + batch * intervals_b if INTERVALS else intervals,
        s, t, before, after, INTERVALS,
    )  # fmt: skip
    begin, _, _, end = tile_ranges(first, last, BLOCK_M)

    keys = load_rows(k + batch * k_b + kv_head * k_h, start, within, k_s, columns, s, D, True)
    values = load_rows(v + batch * v_b + kv_head * v_h, start, within, v_s, columns, s, D, True)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = matrix(q + batch * q_b + head * q_h, t, q_t, D, BLOCK_M, BLOCK_D, DESCRIPTORS)
        dout_head = matrix(
            dout + batch * dout_b + head * dout_h, t, dout_t, D, BLOCK_M, BLOCK_D, DESCRIPTORS
        )
        lse_head, delta_head = lse + (batch * heads + head) * t, delta + (batch * heads + head) * t
        dk_tile, dv_tile = accumulate_dk_dv(
            dk_tile, dv_tile, keys, values, q_head, dout_head, lse_head, delta_head, q_t, dout_t,
            begin, end, first, last, t, scale, softcap,
            D, BLOCK_M, BLOCK_D, SOFTCAP, PRECISION, DESCRIPTORS,
        )  # fmt: skip

    inside = (start + within < s)[:, None] & (columns < D)[None, :]
    rows = (start + within)[:, None].to(tl.int64)
    dk_rows = dk + batch * dk_b + kv_head * dk_h + rows * dk_s + columns[None, :]
    dv_rows = dv + batch * dv_b + kv_head * dv_h + rows * dv_s + columns[None, :]
    tl.store(dk_rows, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv_rows, dv_tile.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def attention_prefix_dk_dv(
    q, prefix_k, prefix_v, dout, lse, delta, dk, dv,
    q_b, q_t, q_h, pk_p, pk_h, pv_p, pv_h, dout_b, dout_t, dout_h, b, t, p, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of prefix rows, kv, slices. A slice takes every slices-th sequence of the batch
    and writes its sums to dk, dv float32 [slices, p, kv, d], contiguous."""
    start = tl.program_id(0) * BLOCK_N
    kv_head, piece, pieces = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    within, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys = load_rows(prefix_k + kv_head * pk_h, start, within, pk_p, columns, p, D, True)
    values = load_rows(prefix_v + kv_head * pv_h, start, within, pv_p, columns, p, D, True)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, last = within * 0, within * 0 + t  # every query sees every row
    for index in range(piece, b, pieces):
        batch = tl.cast(index, tl.int64)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_head = matrix(q + batch * q_b + head * q_h, t, q_t, D, BLOCK_M, BLOCK_D, DESCRIPTORS)
            dout_head = matrix(
                dout + batch * dout_b + head * dout_h, t, dout_t, D, BLOCK_M, BLOCK_D, DESCRIPTORS
            )
            row = (batch * heads + head) * t
            dk_tile, dv_tile = accumulate_dk_dv(
                dk_tile, dv_tile, keys, values, q_head, dout_head, lse + row, delta + row,
                q_t, dout_t, 0, t, first, last, t, scale, softcap,
                D, BLOCK_M, BLOCK_D, SOFTCAP, PRECISION, DESCRIPTORS,
            )  # fmt: skip

    inside = (start + within < p)[:, None] & (columns < D)[None, :]
    rows = ((tl.cast(piece, tl.int64) * p + start + within) * tl.num_programs(1) + kv_head)[:, None]
    tl.store(dk + rows * D + columns[None, :], dk_tile * scale, mask=inside)
    tl.store(dv + rows * D + columns[None, :], dv_tile, mask=inside)


@triton.jit
def accumulate_dq(
    dq, queries, do, logsum, d, k, v, k_stride, v_stride, begin, end, first, last, limit,
    scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add what keys begin <= j < end contribute. first, last: the keys each query sees."""
    within, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        keys = load_tile(k, start, within, k_stride, columns, limit, D, MASKED, DESCRIPTORS)
        values = load_tile(v, start, within, v_stride, columns, limit, D, MASKED, DESCRIPTORS)
        j = start + within
        seen = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
        zeros = tl.zeros([queries.shape[0], BLOCK_N], tl.float32)
        s = dot(queries, tl.trans(keys), zeros, PRECISION)
        p, slope = probabilities(s, logsum[:, None], seen, scale, softcap, MASKED, SOFTCAP)
        dp = dot(do, tl.trans(values), zeros, PRECISION)
        ds = p * (dp - d[:, None]) * slope
        dq = dot(ds.to(keys.dtype), keys, dq, PRECISION)
    return dq


@triton.jit
def attention_dq(
    q, k, v, prefix_k, prefix_v, dout, lse, delta, intervals, dq,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, pk_p, pk_h, pv_p, pv_h, dout_b, dout_t, dout_h,
    dq_b, dq_t, dq_h, intervals_b, t, s, p, before, after, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PREFIX: tl.constexpr, INTERVALS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries, h, b. The sweeps are those of `attention_forward`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    kv_head, start = head // GROUP, block * BLOCK_M
    within, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = tl.minimum(start + within, t - 1)
    first, last = interval(
        row, intervals + batch * intervals_b if INTERVALS else intervals,
        t, s, before, after, INTERVALS,
    )  # fmt: skip
    queries = load_rows(q + batch * q_b + head * q_h, start, within, q_t, columns, t, D, True)
    do = load_rows(
        dout + batch * dout_b + head * dout_h, start, within, dout_t, columns, t, D, True
    )
    flat = (batch * tl.num_programs(1) + head) * t + row
    logsum, d = tl.load(lse + flat) * LOG2E, tl.load(delta + flat)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if PREFIX:
        pk = matrix(prefix_k + kv_head * pk_h, p, pk_p, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
        pv = matrix(prefix_v + kv_head * pv_h, p, pv_p, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
        whole = p // BLOCK_N * BLOCK_N
        dq_tile = accumulate_dq(
            dq_tile, queries, do, logsum, d, pk, pv, pk_p, pv_p, 0, whole, first, last, p,
            scale, softcap, D, BLOCK_N, BLOCK_D, False, SOFTCAP, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        dq_tile = accumulate_dq(
            dq_tile, queries, do, logsum, d, pk, pv, pk_p, pv_p, whole, p, first * 0, first * 0 + p,
            p, scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS,
        )  # fmt: skip

    k = matrix(k + batch * k_b + kv_head * k_h, s, k_s, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v = matrix(v + batch * v_b + kv_head * v_h, s, v_s, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    begin, full_begin, full_end, end = tile_ranges(first, last, BLOCK_N)
    if WINDOW or INTERVALS:
        dq_tile = accumulate_dq(
            dq_tile, queries, do, logsum, d, k, v, k_s, v_s, begin, full_begin, first, last, s,
            scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    dq_tile = accumulate_dq(
        dq_tile, queries, do, logsum, d, k, v, k_s, v_s, full_begin, full_end, first, last, s,
        scale, softcap, D, BLOCK_N, BLOCK_D, False, SOFTCAP, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    dq_tile = accumulate_dq(
        dq_tile, queries, do, logsum, d, k, v, k_s, v_s, full_end, end, first, last, s,
        scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS,
    )  # fmt: skip

    inside = (start + within < t)[:, None] & (columns < D)[None, :]
    pointers = dq + batch * dq_b + head * dq_h + (start + within)[:, None].to(tl.int64) * dq_t
    tl.store(pointers + columns[None, :], (dq_tile * scale).to(dq.dtype.element_ty), mask=inside)
