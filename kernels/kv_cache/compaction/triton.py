"""The Triton kernels of KV compaction.

Window attention (SnapKV: Li et al., 2024, arXiv:2404.14469). A key's score is a column sum of the
softmax of w queries over s keys, which is never stored. One program has BLOCK_N keys of one head in
registers and passes over the w queries of all query heads of its group, BLOCK_M at a time; keys are
read twice, once by each kernel:

              w queries of head 0   of head 1   ...
             +---+---+---+---+    +---+---+
    BLOCK_N  |   |   |   |///|    |   |   |     S = K Q^T * scale, masked where a key comes after
    keys     +---+---+---+---+    +---+---+         the query: only inside the window
              BLOCK_M at a time

    window_lse       log sum exp of each column of the tile        -> partial [b, tiles, h, w]
                     (then torch: lse = logsumexp over the tiles)
    window_scores    rowsum exp(S - lse) over all columns          -> scores [b, kv, s]

Expected attention (Devoto et al., 2025, arXiv:2510.00636), with the same tiles of keys:

    expected_logits  scale mu^T k + scale^2 k^T Sigma k / 2        -> logits [b, h, s]

    K Sigma is computed BLOCK_C columns at a time, multiplied by the same columns of K and summed.

Gather: one program moves BLOCK kept tokens of one (request, head) row, inside of data:

    from token j = tokens[row, rank]   page j // page, slot j % page of [pages, 2, page, kv, d]
    to its rank                        page rank // page, slot rank % page of
                                       [pages * kv, 2, page, 1, d]: the same memory

    The pool of pages gives out only free ones, so no program writes what another one reads.

Nothing is accumulated across programs: the same bits every time.

Dimensions: b batch, w queries of the window, s keys, h query heads, kv key/value heads, d head
width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import LN2, LOG2E, dot, load_rows


@triton.jit
def window_tile(
    keys, key, q, q_t, begin, w, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K Q^T for the queries from `begin` on, and which of it is seen: [keys, BLOCK_M] both."""
    within = tl.arange(0, BLOCK_M)
    queries = load_rows(q, begin, within, q_t, tl.arange(0, BLOCK_D), w, D, True)
    zeros = tl.zeros([keys.shape[0], BLOCK_M], tl.float32)
    s = dot(keys, tl.trans(queries), zeros, PRECISION)
    query = begin + within
    # The window ends at the last key; a query before the first one, or past w, sees nothing.
    position = tl.where(query < w, length - w + query, -1)
    return s, key[:, None] <= position[None, :]


@triton.jit
def first_query(start, w, length, BLOCK_M: tl.constexpr):
    """Where the blocks of queries begin that see a key from `start` on."""
    return tl.maximum(start - (length - w), 0) // BLOCK_M * BLOCK_M


@triton.jit
def window_lse(
    q, k, lengths, partial, q_b, q_t, q_h, k_b, k_s, k_h, w, s, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of keys, kv, b. scale carries log2 e."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    length = tl.minimum(tl.load(lengths + batch), s) if RAGGED else s
    start, within, columns = tile * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys = load_rows(k + batch * k_b + kv_head * k_h, start, within, k_s, columns, length, D, True)
    row = (batch * tl.num_programs(0) + tile) * (tl.num_programs(1) * GROUP) + kv_head * GROUP
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for begin in tl.range(0, w, BLOCK_M):
            scores, seen = window_tile(
                keys, start + within, q + batch * q_b + head * q_h, q_t, begin, w, length,
                D, BLOCK_D, BLOCK_M, PRECISION,
            )  # fmt: skip
            scores = tl.where(seen, scores * scale, float("-inf"))
            m = tl.max(scores, 0)
            any_seen = m > float("-inf")
            total = tl.sum(tl.exp2(scores - tl.where(any_seen, m, 0.0)[None, :]), 0)
            logsum = (m + tl.log2(tl.where(any_seen, total, 1.0))) * LN2
            query = begin + tl.arange(0, BLOCK_M)
            tl.store(partial + (row + member) * w + query, logsum, mask=query < w)


@triton.jit
def window_scores(
    q, k, lengths, lse, scores, q_b, q_t, q_h, k_b, k_s, k_h, w, s, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of keys, kv, b. Sums over queries and heads of the group; 0 past the length."""
    tile, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    length = tl.minimum(tl.load(lengths + batch), s) if RAGGED else s
    start, within, columns = tile * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    keys = load_rows(k + batch * k_b + kv_head * k_h, start, within, k_s, columns, length, D, True)
    total = tl.zeros([BLOCK_N], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        row = (batch * tl.num_programs(1) * GROUP + head) * w
        for begin in tl.range(first_query(start, w, length, BLOCK_M), w, BLOCK_M):
            logits, seen = window_tile(
                keys, start + within, q + batch * q_b + head * q_h, q_t, begin, w, length,
                D, BLOCK_D, BLOCK_M, PRECISION,
            )  # fmt: skip
            query = begin + tl.arange(0, BLOCK_M)
            logsum = tl.load(lse + row + query, mask=query < w, other=0.0) * LOG2E
            p = tl.exp2(logits * scale - logsum[None, :])
            total += tl.sum(tl.where(seen, p, 0.0), 1)
    key = start + within
    tl.store(scores + (batch * tl.num_programs(1) + kv_head) * s + key, total, mask=key < s)


@triton.jit
def expected_logits(
    mean, covariance, k, lengths, logits, k_b, k_s, k_h, s, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr,
    COVARIANCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of keys, kv, b. mean float32 [b, h, d], covariance [b, h, d, d], contiguous."""
    kv_head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    length = tl.minimum(tl.load(lengths + batch), s) if RAGGED else s
    start, within, columns = (
        tl.program_id(0) * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    )  # fmt: skip
    k += batch * k_b + kv_head * k_h
    keys = load_rows(k, start, within, k_s, columns, length, D, True)
    for member in range(GROUP):
        row = batch * tl.num_programs(1) * GROUP + kv_head * GROUP + member
        total = tl.zeros([BLOCK_N], tl.float32)
        for first in tl.range(0, D, BLOCK_C):
            some = first + tl.arange(0, BLOCK_C)
            part = load_rows(k, start, within, k_s, some, length, D, True).to(tl.float32)
            mu = tl.load(mean + row * D + some, mask=some < D, other=0.0)
            product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) + mu[None, :]
            if COVARIANCE:
                inside = (columns < D)[:, None] & (some < D)[None, :]
                pointers = covariance + (row * D + columns[:, None]) * D + some[None, :]
                sigma = tl.load(pointers, mask=inside, other=0.0)
                zeros = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
                product += dot(keys, sigma, zeros, PRECISION) * (0.5 * scale)
            total += tl.sum(product * part, 1)
        key = start + within
        tl.store(logits + row * s + key, total * scale, mask=key < s)


@triton.jit
def gather_kept(
    data, scales, pages, tokens, counts, head_pages, cos, sin, most_pages, most, most_head_pages,
    KV: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, SCALES: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows = r * kv, blocks of kept tokens. All is contiguous; cos, sin [positions, d].

    BLOCK_D, HALF: powers of two not below d and d/2.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    request, head = row // KV, row % KV
    rank = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = rank < tl.load(counts + row)
    token = tl.load(tokens + row * most + rank, mask=kept, other=0)
    page = tl.load(pages + request * most_pages + token // PAGE, mask=kept, other=0)
    target = tl.load(head_pages + row * most_head_pages + rank // PAGE, mask=kept, other=0)
    # Of the token's key, in rows of d; its value is a page of keys further.
    source = (page.to(tl.int64) * (2 * PAGE) + token % PAGE) * KV + head
    target = target.to(tl.int64) * (2 * PAGE) + rank % PAGE

    columns = tl.arange(0, BLOCK_D)
    inside = kept[:, None] & (columns < D)[None, :]
    values = tl.load(
        data + (source + PAGE * KV)[:, None] * D + columns[None, :], mask=inside, other=0
    )
    tl.store(data + (target + PAGE)[:, None] * D + columns[None, :], values, mask=inside)
    if ROTATE:
        halves = tl.arange(0, HALF)
        inside = kept[:, None] & (halves < D // 2)[None, :]
        first = data + source[:, None] * D + halves[None, :]
        a = tl.load(first, mask=inside, other=0).to(tl.float32)
        b = tl.load(first + D // 2, mask=inside, other=0).to(tl.float32)
        turn = (token - rank).to(tl.int64)[:, None] * D + halves[None, :]
        c = tl.load(cos + turn, mask=inside, other=0.0)
        s = tl.load(sin + turn + D // 2, mask=inside, other=0.0)  # the first half is negated
        turned = data + target[:, None] * D + halves[None, :]
        tl.store(turned, (a * c + b * s).to(data.dtype.element_ty), mask=inside)
        tl.store(turned + D // 2, (b * c - a * s).to(data.dtype.element_ty), mask=inside)
    else:
        keys = tl.load(data + source[:, None] * D + columns[None, :], mask=inside, other=0)
        tl.store(data + target[:, None] * D + columns[None, :], keys, mask=inside)
    if SCALES:
        tl.store(scales + target, tl.load(scales + source, mask=kept, other=0.0), mask=kept)
        of_value = tl.load(scales + source + PAGE * KV, mask=kept, other=0.0)
        tl.store(scales + target + PAGE, of_value, mask=kept)
