"""Attention over pages, in Triton: one kernel for decoding, chunked prefill and cascades.

PagedAttention (Kwon et al., 2023, arXiv:2309.06180) with the online softmax of FlashAttention-2
(Dao, 2023, arXiv:2307.08691), the keys split over programs (Flash-Decoding: Dao et al., 2023) and
the query heads of one key/value head packed into the rows of a tile, as in vLLM's Triton kernel
("The Anatomy of a Triton Attention Kernel", Ringlein et al., 2025, arXiv:2511.11581):

    block table of request i    | 7 | 2 | 9 | . |       rows of request i, BLOCK_M in a block:
                                  |   |   |
               +------------------+   |   +-----+         row = query * GROUP + head of the group
               v                      v         v
             page 7                page 2     page 9      (its last block has rows to spare)
          +-----------+        +-----------+-----------+
    keys  | | | | | | |        | | | | | | | | | |     |  BLOCK_N at a time, from one page or from
          +-----------+        +-----------+-----------+  several
          '-- split 0 ----------------'-- split 1 --'     merged by `triton_merge`

    program = (block of rows, key/value head) x split of the keys:
        find the request of the block            bisection: how many blocks come before each
        for each tile of its share of the keys   share = tiles of the request / number of splits
            page ids through the block table, keys and values through the page ids
            S, m, l, O as in `kernels.attention.triton`
        O / l and m + log l                      final, or float32 parts, one for each split

Only tokens that some row of the block sees are read, and no table entries beyond them.

Quantised caches are dequantised in registers, and as little as possible for each element:

    fp8, int8   S = (Q codes_k^T) scale_k            O += (P scale_v) codes_v
    int4        x = (code - 8) scale - (zero - 8) scale: the first part is a matrix product, the
                second a sum over rows, in float32
                keys, scale of a channel:    S = Q' (codes_k - 8)^T - sum_c Q' (zero - 8),
                values, scale of a token     O += P' (codes_v - 8) - sum_j P' (zero - 8),
                and group of channels:       Q' = Q scale, P' = P scale
                A byte holds channels c and c + d/2: Q and O are kept in halves (O by groups of
                channels, too), and each byte is read once for both. Keys of an unfinished page are
                not quantised yet: a sweep of its own reads them from the request's tail.

What meets codes is rounded to bfloat16, whose range holds P * scale whatever the scale.

Dimensions: n queries, r requests, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.triton import interval, tile_ranges
from kernels.language import INTERPRETED, LN2, LOG2E, dot, soft_cap


@triton.jit
def locate(
    block, cu_seqlens, requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, PACKED: tl.constexpr
):
    """Request of a block of rows, the block's number in it, the request's first query, how many.

    PACKED: request i begins with block cu_seqlens[i] * GROUP // BLOCK_M + i, which leaves it at
    least the blocks that it needs; those beyond find no row. Else every request has one query.
    """
    if PACKED:
        request, above = tl.full([], 0, tl.int32), requests
        while above - request > 1:
            middle = (request + above) // 2
            begin = tl.load(cu_seqlens + middle) * GROUP // BLOCK_M + middle
            request = tl.where(begin <= block, middle, request)
            above = tl.where(begin <= block, above, middle)
        start = tl.load(cu_seqlens + request)
        count = tl.load(cu_seqlens + request + 1) - start
        return request, block - start * GROUP // BLOCK_M - request, start, count
    else:
        blocks: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
        return block // blocks, block % blocks, block // blocks, 1


@triton.jit
def look_up(pages, start, lowest, limit, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of tokens from `start` on (one for all if a tile lies in one page), and their slots."""
    j = start + tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        page = tl.load(pages + start // PAGE)
    else:
        page = tl.load(pages + j // PAGE, mask=(j >= lowest) & (j < limit), other=0)
    return page.to(tl.int64), j % PAGE


@triton.jit
def load_tokens(source, offsets, read, columns, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """A tile: WIDTH channels of the tokens at `offsets`, zero beyond them and where not `read`."""
    pointers = source + offsets[:, None] + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=read[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if columns.shape[0] == WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """x as an operand of `dot`: float32 in the interpreter, which cannot convert to bfloat16."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x.to(DTYPE)


@triton.jit
def centred(byte, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The codes in the low (SHIFT 0) or high (4) halves of bytes, less 8."""
    return operand(((byte >> SHIFT) & 15).to(tl.int8) - 8, DTYPE)


@triton.jit
def weigh(s, m, l, unit, j, first, last, MASKED: tl.constexpr):
    """One step of online softmax: weights of a tile of scores, factor of what was before, m, l."""
    if MASKED:
        seen = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * unit)
    shift = m_new
    if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0), not exp2(-inf + inf)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * unit - shift[:, None])
    rescale = tl.exp2(m - shift)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def sweep(
    accumulator, m, l, q, keys, values, key_scales, value_scales, pages,
    page_stride, token_stride, scales_page, scales_token,
    begin, end, first, last, lowest, limit, scale, softcap,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    QUANTISED: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The loop above over tokens begin <= j < end, for caches of rows: floats, fp8, int8.

    MASKED: compare with first and last, and read only lowest <= j < limit.
    """
    within, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    weights_dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.bfloat16
    for start in tl.range(begin, end, BLOCK_N):
        page, slot = look_up(pages, start, lowest, limit, PAGE, BLOCK_N)
        j = start + within
        read = (j >= lowest) & (j < limit)
        tokens, rows = page * page_stride + slot * token_stride, 0
        k = load_tokens(keys, tokens, read, columns, D, MASKED)
        if QUANTISED:
            rows = page * scales_page + slot * scales_token
            k = operand(k, q.dtype)
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        if QUANTISED:
            s *= tl.load(key_scales + rows, mask=read, other=0.0)[None, :]
        unit = scale
        if SOFTCAP:
            s, unit = soft_cap(s, scale, softcap), LOG2E
        p, rescale, m, l = weigh(s, m, l, unit, j, first, last, MASKED)
        v = load_tokens(values, tokens, read, columns, D, MASKED)
        if QUANTISED:
            p *= tl.load(value_scales + rows, mask=read, other=0.0)[None, :]
            v = operand(v, weights_dtype)
        accumulator = dot(p.to(v.dtype), v, accumulator * rescale[:, None], PRECISION)
    return accumulator, m, l


@triton.jit
def sweep_int4(
    accumulators, m, l, q_low, q_high, keys, values, tail, key_scales, key_zeros,
    value_scales, value_zeros, pages,
    page_stride, token_stride, tail_token, channels_page, groups_page, groups_token,
    begin, end, first, last, lowest, limit, scale, softcap,
    D: tl.constexpr, PAGE: tl.constexpr, VALUE_GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    TAIL: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for int4; with TAIL the keys are those of the unfinished page.

    accumulators: of WIDTH columns each, all in one group of channels; low half, then high half.
    """
    HALF: tl.constexpr = D // 2
    BLOCKS: tl.constexpr = HALF // WIDTH
    within, half, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_W)
    dtype: tl.constexpr = tl.float32 if q_low.dtype == tl.float32 else tl.bfloat16
    for start in tl.range(begin, end, BLOCK_N):
        page, slot = look_up(pages, start, lowest, limit, PAGE, BLOCK_N)
        j = start + within
        read = (j >= lowest) & (j < limit)
        tokens = page * page_stride + slot * token_stride
        s = tl.zeros([q_low.shape[0], BLOCK_N], tl.float32)
        if TAIL:
            unfinished = slot * tail_token
            k = load_tokens(tail, unfinished, read, half, HALF, True)
            s = dot(q_low, tl.trans(k), s, PRECISION)
            k = load_tokens(tail + HALF, unfinished, read, half, HALF, True)
            s = dot(q_high, tl.trans(k), s, PRECISION)
        else:
            channels, exist = page * channels_page + half, half < HALF
            byte = load_tokens(keys, tokens, read, half, HALF, True)
            unit_low = tl.load(key_scales + channels, mask=exist, other=0.0).to(tl.float32)
            zero_low = tl.load(key_zeros + channels, mask=exist, other=0.0).to(tl.float32)
            unit_high = tl.load(key_scales + HALF + channels, mask=exist, other=0.0).to(tl.float32)
            zero_high = tl.load(key_zeros + HALF + channels, mask=exist, other=0.0).to(tl.float32)
            low = q_low.to(tl.float32) * unit_low[None, :]
            high = q_high.to(tl.float32) * unit_high[None, :]
            s = dot(operand(low, dtype), tl.trans(centred(byte, 0, dtype)), s, PRECISION)
            s = dot(operand(high, dtype), tl.trans(centred(byte, 4, dtype)), s, PRECISION)
            offset = tl.sum(low * (zero_low - 8)[None, :] + high * (zero_high - 8)[None, :], 1)
            s -= offset[:, None]
        unit = scale
        if SOFTCAP:
            s, unit = soft_cap(s, scale, softcap), LOG2E
        p, rescale, m, l = weigh(s, m, l, unit, j, first, last, True)
        groups = page * groups_page + slot * groups_token
        lows, highs = (), ()
        for block in tl.static_range(BLOCKS):
            byte = load_tokens(values + block * WIDTH, tokens, read, columns, WIDTH, True)
            low = add_values(
                accumulators[block] * rescale[:, None], p, centred(byte, 0, dtype),
                value_scales, value_zeros, groups + block * WIDTH // VALUE_GROUP, read, PRECISION,
            )  # fmt: skip
            high = add_values(
                accumulators[BLOCKS + block] * rescale[:, None], p, centred(byte, 4, dtype),
                value_scales, value_zeros, groups + (HALF + block * WIDTH) // VALUE_GROUP, read,
                PRECISION,
            )  # fmt: skip
            lows += (low,)
            highs += (high,)
        accumulators = lows + highs
    return accumulators, m, l


@triton.jit
def add_values(accumulator, p, codes, scales, zeros, groups, read, PRECISION: tl.constexpr):
    """accumulator + P (codes - zero) scale for codes, less 8, of one group of channels."""
    unit = tl.load(scales + groups, mask=read, other=0.0).to(tl.float32)
    zero = tl.load(zeros + groups, mask=read, other=0.0).to(tl.float32)
    weights = p * unit[None, :]
    accumulator -= tl.sum(weights * (zero - 8)[None, :], 1)[:, None]
    return dot(operand(weights, codes.dtype), codes, accumulator, PRECISION)


@triton.jit
def paged_attention(
    q, cu_seqlens, ahead, sinks, data, scales, key_scales, key_zeros, value_scales, value_zeros,
    tail, pages, lengths, tails, out, lse,
    requests, q_n, q_h, data_page, data_side, data_token, data_h, scales_page, scales_side,
    scales_token, scales_h, channels_page, channels_h, groups_page, groups_token, groups_h,
    tail_slot, tail_token, tail_h, pages_r, out_split, out_n, out_h, lse_split, lse_h,
    before, after, scale, softcap,
    KIND: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    VALUE_GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows times KV, splits. Strides are in elements; channels are dense.

    The queries of a request are its last positions, or with AHEAD `ahead` tokens, their own among
    them, follow the keys. scale: of q k^T, with log2 e unless SOFTCAP. before, after: reach.
    BLOCK_D, BLOCK_W: widths of the tiles of q (int4: of its halves) and of the parts of out, each
    WIDTH channels: one of D, for int4 several.
    """
    kv_head = tl.program_id(0) % KV
    # Under causality later blocks see more: they start first.
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV
    request, block, start, count = locate(block, cu_seqlens, requests, GROUP, BLOCK_M, PACKED)
    if block * BLOCK_M >= count * GROUP:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < count * GROUP
    row = tl.minimum(row, count * GROUP - 1)  # rows to spare repeat the last and are not stored
    query = (start + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP

    length = tl.load(lengths + request)
    token = row // GROUP
    if AHEAD:  # no further ahead than it sees back: lest the interval begins beyond the keys
        token = count + tl.minimum(tl.load(ahead + query) - 1, before)
    first, last = interval(token, lengths, count, length, before, after, False)
    begin, full_begin, full_end, limit = tile_ranges(first, last, BLOCK_N)
    lowest = tl.min(first, 0)
    share = tl.cdiv(tl.cdiv(limit - begin, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    begin += tl.program_id(1) * share
    end = tl.minimum(begin + share, limit)

    q += query * q_n + head * q_h
    keys, pages = data + kv_head * data_h, pages + request.to(tl.int64) * pages_r
    values = keys + data_side
    columns = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        m, l = tl.load(sinks + head).to(tl.float32) * LOG2E, l + 1.0
    if KIND == "int4":
        HALF: tl.constexpr = D // 2
        low = load_rows(q, columns, HALF)
        high = load_rows(q + HALF, columns, HALF)
        parts = ()
        for _ in tl.static_range(D // WIDTH):
            parts += (tl.zeros([BLOCK_M, BLOCK_W], tl.float32),)
        slot = tl.cast(tl.load(tails + request), tl.int64)
        tail += slot * tail_slot + kv_head * tail_h
        key_scales, key_zeros = key_scales + kv_head * channels_h, key_zeros + kv_head * channels_h
        value_scales += kv_head * groups_h
        value_zeros += kv_head * groups_h
        whole = length // PAGE * PAGE  # tokens in finished pages
        parts, m, l = sweep_int4(
            parts, m, l, low, high, keys, values, tail, key_scales, key_zeros, value_scales,
            value_zeros, pages, data_page, data_token, tail_token, channels_page, groups_page,
            groups_token, begin, tl.minimum(end, whole), first, last, lowest, limit, scale, softcap,
            D, PAGE, VALUE_GROUP, WIDTH, BLOCK_N, BLOCK_D, BLOCK_W, False, SOFTCAP, PRECISION,
        )  # fmt: skip
        parts, m, l = sweep_int4(
            parts, m, l, low, high, keys, values, tail, key_scales, key_zeros, value_scales,
            value_zeros, pages, data_page, data_token, tail_token, channels_page, groups_page,
            groups_token, tl.maximum(begin, whole), end, first, last, lowest, limit, scale, softcap,
            D, PAGE, VALUE_GROUP, WIDTH, BLOCK_N, BLOCK_D, BLOCK_W, True, SOFTCAP, PRECISION,
        )  # fmt: skip
    else:
        QUANTISED: tl.constexpr = KIND != "none"
        queries = load_rows(q, columns, D)
        accumulator = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
        if QUANTISED:
            scales += kv_head * scales_h
        value_scales = scales + scales_side if QUANTISED else scales
        # Few rows: reading takes the time, and one loop keeps its pipeline full. Many: masks do.
        NARROW: tl.constexpr = BLOCK_M < 64
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
        if NARROW or WINDOW:
            accumulator, m, l = sweep(
                accumulator, m, l, queries, keys, values, scales, value_scales, pages,
                data_page, data_token, scales_page, scales_token,
                begin, end if NARROW else full_begin, first, last, lowest, limit, scale, softcap,
                D, PAGE, BLOCK_N, BLOCK_D, QUANTISED, True, SOFTCAP, PRECISION,
            )  # fmt: skip
        if not NARROW:
            accumulator, m, l = sweep(
                accumulator, m, l, queries, keys, values, scales, value_scales, pages,
                data_page, data_token, scales_page, scales_token,
                full_begin, full_end, first, last, lowest, limit, scale, softcap,
                D, PAGE, BLOCK_N, BLOCK_D, QUANTISED, False, SOFTCAP, PRECISION,
            )  # fmt: skip
            accumulator, m, l = sweep(
                accumulator, m, l, queries, keys, values, scales, value_scales, pages,
                data_page, data_token, scales_page, scales_token,
                full_end, end, first, last, lowest, limit, scale, softcap,
                D, PAGE, BLOCK_N, BLOCK_D, QUANTISED, True, SOFTCAP, PRECISION,
            )  # fmt: skip
        parts = (accumulator,)

    seen = l > 0
    l = tl.where(seen, l, 1.0)
    split = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)
    cells = (out + split * out_split + query * out_n + head * out_h)[:, None] + columns[None, :]
    for part in tl.static_range(D // WIDTH):
        x = (parts[part] / l[:, None]).to(out.dtype.element_ty)
        tl.store(cells + part * WIDTH, x, mask=inside[:, None] & (columns < WIDTH)[None, :])
    logsum = tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf"))
    tl.store(lse + split * lse_split + head * lse_h + query, logsum, mask=inside)


@triton.jit
def load_rows(pointers, columns, WIDTH: tl.constexpr):
    """WIDTH channels of each row, zero beyond them."""
    if columns.shape[0] == WIDTH:
        return tl.load(pointers[:, None] + columns[None, :])
    return tl.load(pointers[:, None] + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)
