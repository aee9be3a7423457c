"""Attention forward, in Triton.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithm 1) with the online softmax of Milakov and
Gimelshein (2018, arXiv:1805.02867). One program computes BLOCK_M queries of one head:

               prefix rows       keys of the sequence, first <= j < last
             +--------------+  +----+--------------------+----+
    queries  |   no mask    |  |mask|      no mask       |mask|   BLOCK_M rows, kept in registers
             +--------------+  +----+--------------------+----+
              BLOCK_N at a time ------------------------------>

    for each tile of keys:                         (S, P: BLOCK_M x BLOCK_N, float32)
        S = Q K^T * scale                          softcap: S = c tanh(S / c)
        m' = max(m, rowmax S)
        P = exp(S - m'),  a = exp(m - m')
        l = a l + rowsum P,  O = a O + P V
    O = O / l,  LSE = m + log l                    a query that sees nothing: O = 0, LSE = -inf

Exponentials are of base 2: the scale carries log2 e, and is applied after the row maximum. A sink
(a logit of its own per head, whose value is zero; gpt-oss, 2025, arXiv:2508.10925) is where m and l
start. Which keys a query sees is an interval (`intervals.py`); only tiles at its ends are masked.
Later blocks of queries, which see more under causality, start first.

Dimensions: b batch, t queries, s keys, p prefix rows, h query heads, kv key/value heads, d head
width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import LN2, LOG2E, dot, load_tile, matrix, soft_cap


@triton.jit
def interval(rows, table, t, s, before, after, TABLE: tl.constexpr):
    """First key each of `rows` (of t) sees, and the one after its last. For t keys and s queries,
    with `before` and `after` exchanged: the queries that see each key."""
    if TABLE:
        return tl.load(table + rows), tl.load(table + t + rows)
    position = rows + (s - t)
    first = tl.maximum(position - before, 0)
    return first, tl.maximum(tl.minimum(position + after + 1, s), first)


@triton.jit
def tile_ranges(first, last, BLOCK: tl.constexpr):
    """Where a tile's masked, unmasked and again masked keys begin, and where they end."""
    begin = tl.min(first, 0) // BLOCK * BLOCK
    end = tl.max(last, 0)
    full_begin = tl.minimum(tl.cdiv(tl.max(first, 0), BLOCK) * BLOCK, tl.cdiv(end, BLOCK) * BLOCK)
    full_end = tl.maximum(tl.min(last, 0) // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def attend(
    accumulator, m, l, q, k, v, k_stride, v_stride, begin, end, first, last, limit, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One sweep of the loop above over keys begin <= j < end.

    MASKED: compare with first and last, and with `limit`, the number of rows that k and v have.
    """
    within, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        keys = load_tile(k, start, within, k_stride, columns, limit, D, MASKED, DESCRIPTORS)
        s = dot(q, tl.trans(keys), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        unit = scale
        if SOFTCAP:
            s, unit = soft_cap(s, scale, softcap), LOG2E
        if MASKED:
            j = start + within
            seen = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        shift = m_new
        if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0), not exp2(-inf + inf)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * unit - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, 1)
        values = load_tile(v, start, within, v_stride, columns, limit, D, MASKED, DESCRIPTORS)
        accumulator = dot(p.to(values.dtype), values, accumulator * rescale[:, None], PRECISION)
        m = m_new
    return accumulator, m, l


@triton.jit
def attention_forward(
    q, k, v, prefix_k, prefix_v, sinks, intervals, out, lse,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h, pk_p, pk_h, pv_p, pv_h, out_b, out_t, out_h,
    intervals_b, t, s, p, before, after, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PREFIX: tl.constexpr, SINKS: tl.constexpr, INTERVALS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of queries, h, b. Strides are in elements; rows of d elements are dense.

    scale: of q k^T, with log2 e unless SOFTCAP. before, after: reach, if not INTERVALS.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    kv_head = head // GROUP
    columns = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, t - 1)  # rows past the end repeat the last one and are not stored
    first, last = interval(
        row, intervals + batch * intervals_b if INTERVALS else intervals,
        t, s, before, after, INTERVALS,
    )  # fmt: skip

    q = matrix(q + batch * q_b + head * q_h, t, q_t, D, BLOCK_M, BLOCK_D, DESCRIPTORS)
    queries = load_tile(
        q, block * BLOCK_M, tl.arange(0, BLOCK_M), q_t, columns, t, D, True, DESCRIPTORS
    )
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINKS:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        l = tl.zeros([BLOCK_M], tl.float32) + 1.0
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)

    if PREFIX:
        pk = matrix(prefix_k + kv_head * pk_h, p, pk_p, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
        pv = matrix(prefix_v + kv_head * pv_h, p, pv_p, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
        whole = p // BLOCK_N * BLOCK_N
        accumulator, m, l = attend(
            accumulator, m, l, queries, pk, pv, pk_p, pv_p, 0, whole, first, last, p,
            scale, softcap, D, BLOCK_N, BLOCK_D, False, SOFTCAP, PRECISION, DESCRIPTORS, False,
        )  # fmt: skip
        accumulator, m, l = attend(
            accumulator, m, l, queries, pk, pv, pk_p, pv_p, whole, p, first * 0, first * 0 + p, p,
            scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS, False,
        )  # fmt: skip

    k = matrix(k + batch * k_b + kv_head * k_h, s, k_s, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v = matrix(v + batch * v_b + kv_head * v_h, s, v_s, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    begin, full_begin, full_end, end = tile_ranges(first, last, BLOCK_N)
    if WARP_SPECIALIZE:  # Triton splits the warps of a single loop only: every tile is masked
        accumulator, m, l = attend(
            accumulator, m, l, queries, k, v, k_s, v_s, begin, end, first, last, s,
            scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    else:
        if WINDOW or INTERVALS:
            accumulator, m, l = attend(
                accumulator, m, l, queries, k, v, k_s, v_s, begin, full_begin, first, last, s,
                scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
        accumulator, m, l = attend(
            accumulator, m, l, queries, k, v, k_s, v_s, full_begin, full_end, first, last, s,
            scale, softcap, D, BLOCK_N, BLOCK_D, False, SOFTCAP, PRECISION, DESCRIPTORS, False,
        )  # fmt: skip
        accumulator, m, l = attend(
            accumulator, m, l, queries, k, v, k_s, v_s, full_end, end, first, last, s,
            scale, softcap, D, BLOCK_N, BLOCK_D, True, SOFTCAP, PRECISION, DESCRIPTORS, False,
        )  # fmt: skip

    seen = l > 0
    accumulator = accumulator / tl.where(seen, l, 1.0)[:, None]
    inside = rows < t
    pointers = out + batch * out_b + head * out_h + rows[:, None].to(tl.int64) * out_t
    tl.store(
        pointers + columns[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=inside[:, None] & (columns < D)[None, :],
    )
    logsum = tl.where(seen, (m + tl.log2(tl.where(seen, l, 1.0))) * LN2, float("-inf"))
    tl.store(lse + (batch * tl.num_programs(1) + head) * t + rows, logsum, mask=inside)
