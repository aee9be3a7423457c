"""Appending to a paged cache, in Triton: one pass over what is new.

A program takes BLOCK_T tokens of one head; rows are read as two tiles, channels c and c + d/2: what
a rotation pairs, and what a byte of int4 holds:

    k, v, q [n, heads, d]                     pages of the cache
    token  +-----------+-----------+
      t    | c         | c + d/2   |  ---->   page pages[owner, j / page], slot j % page
     ...   |           |           |            owner: the request with cu_seqlens[owner] <= t
           +-----------+-----------+            j = lengths[owner] - cu_seqlens[owner + 1] + t

    x = x / sqrt(mean x^2 + eps) * weight     RMSNorm, where asked for (2019, arXiv:1910.07467)
    (a, b) = (a cos - b sin, b cos + a sin)   RoPE (RoFormer, 2021, arXiv:2104.09864)
    x in the model's dtype
    codes of x, and their scales              as `kernels/kv_cache/quantise.py` defines them

All of it is a single read of k, v and q and a single write; heads vary fastest among programs, so
that the rows of cos and sin that they share stay in the cache of the chip.

Keys of int4 have a scale for each channel of a page, so a page is encoded when it is full and its
keys are kept in the request's tail until then (KIVI: Liu et al., 2024, arXiv:2402.02750). A program
of `append_int4_keys` takes BLOCK_C pairs of channels of one head of one page:

    before the append     |xxxxxxxx|xxx.....|            |    x held, . free, n new
    after                 |xxxxxxxx|xxxnnnnn|nnnnnnnn|nn......|
                                    first    middle   last touched page
                                    reads             writes
                                    the tail          the tail

The first r items are requests: such a program does the first touched page and then the last, in
this order, since both use the tail. The others are for middle pages: these are whole, so each holds
exactly one token whose number in k is a multiple of the page size, and item r + m takes the middle
page of token m * page, if there is one. So the grid of r + ceil(n / page) items needs no lengths.

Dimensions: n new tokens of r requests, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import INTERPRETED

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: floats of this size are whole numbers
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def nearest(x):
    """Rounded to whole numbers, ties to even; |x| < 2^22. x is no product: a GPU would fuse it."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 in `dtype`, rounded to nearest even. The interpreter cuts bfloat16 off, and loses the
    carry of fp8 (1.99 becomes 1): there x is rounded before it is cast."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = keep_leading_bits(x, 16)
    if INTERPRETED and dtype == tl.float8e4nv:
        x = tl.where(tl.abs(x) < 2.0**-6, nearest(x * 512.0) / 512.0, keep_leading_bits(x, 12))
    return x.to(dtype)


@triton.jit
def keep_leading_bits(x, BITS: tl.constexpr):
    """float32 rounded to nearest even in the first BITS of its 32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += (1 << (31 - BITS)) - 1 + ((bits >> (32 - BITS)) & 1)
    return (bits >> (32 - BITS) << (32 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def owner_of(tokens, cu_seqlens, r, steps):
    """The request of each token: the last one that begins at or before it, by bisection."""
    low, high = tokens * 0, tokens * 0 + r
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) <= tokens
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return low


@triton.jit
def load_pair(rows, columns, inside, HALF: tl.constexpr, D: tl.constexpr):
    """Channels `columns` and HALF + columns of rows of d, in float32; zero where not inside."""
    a = tl.load(
        rows[:, None] + columns[None, :],
        mask=inside[:, None] & (columns < HALF)[None, :],
        other=0.0,
    )
    b = tl.load(
        rows[:, None] + columns[None, :] + HALF,
        mask=inside[:, None] & (columns < D - HALF)[None, :],
        other=0.0,
    )
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pair(rows, columns, a, b, inside, HALF: tl.constexpr, D: tl.constexpr):
    tl.store(rows[:, None] + columns[None, :], a, mask=inside[:, None] & (columns < HALF)[None, :])
    tl.store(
        rows[:, None] + columns[None, :] + HALF,
        b,
        mask=inside[:, None] & (columns < D - HALF)[None, :],
    )


@triton.jit
def turn(
    a, b, square, weight, cos, sin, position, table_rows, columns, eps,
    HALF: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """A pair of tiles normalised (square: the sum of squares of each row) and rotated, in float32
    but rounded to `dtype`. Positions outside of the tables give NaN."""
    if NORM:
        inverse = tl.rsqrt(square * (1.0 / D) + eps)[:, None]
        first = tl.load(weight + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        second = tl.load(weight + HALF + columns, mask=columns < D - HALF, other=0.0)
        a = a * inverse * first[None, :]
        b = b * inverse * second.to(tl.float32)[None, :]
    if ROPE:
        known = (position >= 0) & (position < table_rows)
        at = position.to(tl.int64)[:, None] * D + columns[None, :]
        mask = known[:, None] & (columns < HALF)[None, :]
        c = tl.where(known[:, None], tl.load(cos + at, mask=mask, other=0.0), float("nan"))
        s = tl.load(sin + at + HALF, mask=mask, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    if NORM or ROPE:
        a, b = narrow(a, dtype).to(tl.float32), narrow(b, dtype).to(tl.float32)
    return a, b


@triton.jit
def squares(a, b):
    """Sum of the squares of each row of a pair."""
    return tl.sum(a * a, 1) + tl.sum(b * b, 1)


@triton.jit
def row_codes(a, b, KIND: tl.constexpr):
    """Codes of a pair of tiles (fp8 or int8) and the scale of each row."""
    amax = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
    scale = tl.maximum(amax * (1 / 448 if KIND == "fp8" else 1 / 127), SMALLEST_SCALE)
    inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)[:, None]
    a, b = a * inverse, b * inverse
    if KIND == "fp8":
        return narrow(a, tl.float8e4nv), narrow(b, tl.float8e4nv), scale
    else:
        a = nearest(tl.minimum(tl.maximum(a, -127.0), 127.0))
        b = nearest(tl.minimum(tl.maximum(b, -127.0), 127.0))
        return a.to(tl.int8), b.to(tl.int8), scale


@triton.jit
def int4_scale(low, high):
    """Scale and zero point (float16), and 1 / scale in float32, for values low..high."""
    span = tl.maximum((high - low) * (1 / 15), tl.maximum(-low, high) * (1 / 1024))
    scale = tl.minimum(tl.maximum(span, 2.0**-14), 65504.0).to(tl.float16)
    inverse = tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale.to(tl.float32))
    zero = 0.0 - nearest(tl.minimum(tl.maximum(low * inverse, -1024.0), 1024.0))
    return scale, zero, inverse


@triton.jit
def int4_code(x, inverse, zero):
    return (nearest(tl.minimum(tl.maximum(x * inverse, -zero), 15.0 - zero)) + zero).to(tl.int32)


@triton.jit
def store_int4_values(
    a, b, columns, inside, codes, scales, zeros,
    HALF: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Encode and store a pair of tiles of values; codes, scales, zeros point to their rows."""
    inverse_a, zero_a = a * 0.0, a * 0.0
    inverse_b, zero_b = b * 0.0, b * 0.0
    for group in tl.static_range(D // GROUP):
        in_a = ((columns // GROUP == group) & (columns < HALF))[None, :]
        in_b = ((columns + HALF) // GROUP == group)[None, :] & (columns < HALF)[None, :]
        low = tl.full([a.shape[0]], float("inf"), tl.float32)
        high = -low
        if group * GROUP < HALF:
            low = tl.minimum(low, tl.min(tl.where(in_a, a, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(in_a, a, float("-inf")), 1))
        if (group + 1) * GROUP > HALF:
            low = tl.minimum(low, tl.min(tl.where(in_b, b, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(in_b, b, float("-inf")), 1))
        scale, zero, inverse = int4_scale(low, high)
        if group * GROUP < HALF:
            inverse_a = tl.where(in_a, inverse[:, None], inverse_a)
            zero_a = tl.where(in_a, zero[:, None], zero_a)
        if (group + 1) * GROUP > HALF:
            inverse_b = tl.where(in_b, inverse[:, None], inverse_b)
            zero_b = tl.where(in_b, zero[:, None], zero_b)
        tl.store(scales + group, scale, mask=inside)
        tl.store(zeros + group, zero.to(tl.float16), mask=inside)
    byte = int4_code(a, inverse_a, zero_a) | (int4_code(b, inverse_b, zero_b) << 4)
    tl.store(
        codes[:, None] + columns[None, :],
        byte.to(tl.uint8),
        mask=inside[:, None] & (columns < HALF)[None, :],
    )


@triton.jit
def append_rows(
    q, k, v, turned, q_norm, k_norm, cos, sin, positions, cu_seqlens, pages, lengths,
    data, scales, value_scales, value_zeros,
    q_n, q_h, k_n, k_h, v_n, v_h, pages_r, data_p, data_w, data_s, data_h,
    scales_p, scales_w, scales_s, scales_h, values_p, values_s, values_h,
    n, r, steps, table_rows, eps,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, ROPE: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Everything but the keys of int4. Grid: blocks of tokens x heads (values, keys, queries).

    Strides are in elements: of tokens _n, heads _h, pages _p, slots _s, values after keys _w.
    steps: of the bisection among r requests. table_rows: positions that cos and sin have.
    """
    cached: tl.constexpr = KV if KIND == "int4" else 2 * KV
    head, block = tl.program_id(0) % (cached + H), tl.program_id(0) // (cached + H)
    tokens, columns = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    given = tokens < n
    owner = owner_of(tokens, cu_seqlens, r, steps)
    length = tl.load(lengths + owner)
    index = length - tl.load(cu_seqlens + owner + 1) + tokens
    position = index
    if POSITIONS:
        position = tl.load(positions + tokens, mask=given, other=0)
    token = tokens.to(tl.int64)

    if head >= cached:
        if H > 0:
            head -= cached
            a, b = load_pair(q + token * q_n + head * q_h, columns, given, HALF, D)
            a, b = turn(
                a, b, squares(a, b), q_norm, cos, sin, position, table_rows, columns, eps,
                HALF, D, Q_NORM, ROPE, q.dtype.element_ty,
            )  # fmt: skip
            store_pair(turned + (token * H + head) * D, columns, a, b, given, HALF, D)
    else:
        values, head = head < KV, head % KV
        inside = given & (index >= 0) & (index < length)
        page = tl.load(pages + owner * pages_r + index // PAGE, mask=inside, other=0).to(tl.int64)
        slot = index % PAGE
        rows = data + page * data_p + values * data_w + slot * data_s + head * data_h
        if values:
            a, b = load_pair(v + token * v_n + head * v_h, columns, given, HALF, D)
        else:
            a, b = load_pair(k + token * k_n + head * k_h, columns, given, HALF, D)
            a, b = turn(
                a, b, squares(a, b), k_norm, cos, sin, position, table_rows, columns, eps,
                HALF, D, K_NORM, ROPE, k.dtype.element_ty,
            )  # fmt: skip
        if KIND == "int4":
            at = page * values_p + slot * values_s + head * values_h
            store_int4_values(
                a, b, columns, inside, rows, value_scales + at, value_zeros + at, HALF, D, GROUP
            )
        elif KIND == "none":
            store_pair(rows, columns, a, b, inside, HALF, D)
        else:
            low, high, scale = row_codes(a, b, KIND)
            store_pair(rows, columns, low, high, inside, HALF, D)
            at = page * scales_p + values * scales_w + slot * scales_s + head * scales_h
            tl.store(scales + at, scale, mask=inside)


@triton.jit
def append_int4_keys(
    k, k_norm, cos, sin, positions, cu_seqlens, pages, lengths, tails,
    data, key_scales, key_zeros, tail,
    k_n, k_h, pages_r, data_p, data_s, data_h, keys_p, keys_h, tail_p, tail_s, tail_h,
    n, r, steps, table_rows, eps,
    KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, ROPE: tl.constexpr,
    K_NORM: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: items (requests, then blocks of PAGE tokens) x heads x blocks of channels."""
    blocks: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) % blocks
    # At most 8 channels a thread, though a store could take 16 bytes of int4: what a channel needs
    # is worked out by each thread that holds rows of it, so the fewer hold more rows, the better.
    columns = tl.max_contiguous(block * BLOCK_C + tl.arange(0, BLOCK_C), 8)
    head = tl.program_id(0) // blocks % KV
    item = tl.program_id(0) // (blocks * KV)
    token = (item - r) * PAGE  # of an item that stands for a middle page
    owner = item
    if item >= r:
        owner = owner_of(token, cu_seqlens, r, steps)
    begin, length = tl.load(cu_seqlens + owner), tl.load(lengths + owner)
    held = length - (tl.load(cu_seqlens + owner + 1) - begin)
    first, last = held // PAGE, (length - 1) // PAGE
    step = tl.maximum(last - first, 1)
    start, end = first, last + 1
    if item >= r:
        start = (held - begin + token) // PAGE
        end = start + ((start > first) & (start < last)).to(tl.int32)
    if (held < 0) | (held == length):  # nothing that fits, nothing new
        end = start

    slots = tl.arange(0, PAGE)
    tails_at = tail + tl.load(tails + owner).to(tl.int64) * tail_p + head * tail_h + slots * tail_s
    for number in tl.range(start, end, step, num_stages=1):
        index = number * PAGE + slots
        tokens = (begin - held + index).to(tl.int64)
        new = (index >= held) & (index < length) & (tokens < n)
        position = index
        if POSITIONS:
            position = tl.load(positions + tokens, mask=new, other=0)
        source = k + tokens * k_n + head * k_h
        a, b = load_pair(source, columns, new, HALF, D)
        square = slots * 0.0
        if K_NORM:
            square = squares(a, b)
            for other in range(1, blocks):
                elsewhere = (block + other) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
                c, d = load_pair(source, elsewhere, new, HALF, D)
                square += squares(c, d)
        a, b = turn(
            a, b, square, k_norm, cos, sin, position, table_rows, columns, eps,
            HALF, D, K_NORM, ROPE, k.dtype.element_ty,
        )  # fmt: skip
        if (number + 1) * PAGE <= length:
            old = index < held
            c, d = load_pair(tails_at, columns, old, HALF, D)
            a, b = tl.where(old[:, None], c, a), tl.where(old[:, None], d, b)
            page = tl.load(pages + owner * pages_r + number).to(tl.int64)
            # One row of the tile stores what its columns share: no other layout, no work twice.
            at = (page * keys_p + head * keys_h + slots * 0)[:, None] + columns[None, :]
            once = (slots == 0)[:, None] & (columns < HALF)[None, :]
            scale_a, zero_a, inverse_a = int4_scale(tl.min(a, 0)[None, :], tl.max(a, 0)[None, :])
            scale_b, zero_b, inverse_b = int4_scale(tl.min(b, 0)[None, :], tl.max(b, 0)[None, :])
            tl.store(key_scales + at, scale_a, mask=once)
            tl.store(key_scales + at + HALF, scale_b, mask=once)
            tl.store(key_zeros + at, zero_a.to(tl.float16), mask=once)
            tl.store(key_zeros + at + HALF, zero_b.to(tl.float16), mask=once)
            byte = int4_code(a, inverse_a, zero_a) | (int4_code(b, inverse_b, zero_b) << 4)
            rows = data + page * data_p + head * data_h + slots * data_s
            inside = (slots >= 0)[:, None] & (columns < HALF)[None, :]
            tl.store(rows[:, None] + columns[None, :], byte.to(tl.uint8), mask=inside)
        else:
            store_pair(tails_at, columns, a, b, new, HALF, D)
        tl.debug_barrier()  # the tail has been read before the last page is written to it
