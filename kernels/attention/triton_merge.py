"""The merge of partial attention, forward and backward, in Triton.

    outs [n, rows, d]   +------+------+------+     a program: BLOCK_M rows (a token and a head
    lses [n, rows]      |  1   |  2   | ...  | n   each) in registers, one state after the other
                        +------+------+------+

    m = max_i lse_i                                 over the lses alone
    l = sum_i exp(lse_i - m)                        then over the values
    out = sum_i exp(lse_i - m) out_i / l
    lse = m + log l

A sink (a logit per head whose value is zero) is one more state whose out is zero: it takes part in
m and in l. A state of weight zero is not read, so it may hold anything. A row that no state has
seen: out = 0, lse = -inf.

Backward, with p_i = exp(lse_i - m) / l:

    d out_i = p_i dout           d lse_i = p_i (dout . out_i - sum_j p_j dout . out_j + dlse)

Every program owns its rows of all states: no atomics, the same bits every time.

Dimensions: n states, t tokens, h heads, d head width; a row is a token and a head of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import LN2, LOG2E


@triton.jit
def places(rows, t, h):
    """Where the lse of each row is: [b, h, t], whereas the rows of out are ordered [b, t, h]."""
    token, head = rows // h, rows % h
    return (tl.cast(token // t, tl.int64) * h + head) * t + token % t


@triton.jit
def merge_forward(
    outs, lses, sinks, out, lse, states, t, h, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. Everything is contiguous; rows = b t h."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, inside = tl.arange(0, BLOCK_D), row < rows
    place = places(row, t, h)
    cells = row[:, None].to(tl.int64) * D + columns[None, :]
    within = inside[:, None] & (columns < D)[None, :]
    sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + row % h).to(tl.float32)
    m = sink
    for i in range(states):
        part = tl.load(lses + tl.cast(i, tl.int64) * rows + place, mask=inside, other=float("-inf"))
        m = tl.maximum(m, part)
    m = tl.where(m == float("-inf"), 0.0, m)
    # Subtracted before it is scaled by log2 e: the exponent is exact where it matters, near m.
    l = tl.exp2((sink - m) * LOG2E)
    merged = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(states):
        first = tl.cast(i, tl.int64) * rows
        part = tl.load(lses + first + place, mask=inside, other=float("-inf"))
        weight = tl.exp2((part - m) * LOG2E)
        x = tl.load(outs + first * D + cells, mask=within & (weight > 0)[:, None], other=0.0)
        merged += weight[:, None] * x.to(tl.float32)
        l += weight
    seen = l > 0
    l = tl.where(seen, l, 1.0)
    tl.store(lse + place, tl.where(seen, m + tl.log2(l) * LN2, float("-inf")), mask=inside)
    tl.store(out + cells, (merged / l[:, None]).to(out.dtype.element_ty), mask=within)


@triton.jit
def merge_backward(
    dout, dlse, outs, lses, douts, dlses, states, t, h, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows. Gradients of every state; STATES: a power of two, at least `states`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, state, inside = tl.arange(0, BLOCK_D), tl.arange(0, STATES), row < rows
    place = places(row, t, h)
    cells = row[:, None].to(tl.int64) * D + columns[None, :]
    within = inside[:, None] & (columns < D)[None, :]
    each = state[None, :].to(tl.int64) * rows + place[:, None]  # [BLOCK_M, STATES]
    given = inside[:, None] & (state < states)[None, :]
    parts = tl.load(lses + each, mask=given, other=float("-inf"))
    m = tl.max(parts, 1)
    weights = tl.exp2((parts - tl.where(m == float("-inf"), 0.0, m)[:, None]) * LOG2E)
    weights /= tl.where(m == float("-inf"), 1.0, tl.sum(weights, 1))[:, None]

    gradient = tl.load(dout + cells, mask=within, other=0.0).to(tl.float32)
    products = tl.zeros([BLOCK_M, STATES], tl.float32)  # dout . out_i
    for i in range(states):
        first = tl.cast(i, tl.int64) * rows * D
        weight = tl.sum(tl.where(state[None, :] == i, weights, 0.0), 1)
        x = tl.load(outs + first + cells, mask=within & (weight > 0)[:, None], other=0.0)
        product = tl.sum(gradient * x.to(tl.float32), 1)
        products = tl.where(state[None, :] == i, product[:, None], products)
        dx = (weight[:, None] * gradient).to(douts.dtype.element_ty)
        tl.store(douts + first + cells, dx, mask=within)
    rest = tl.load(dlse + place, mask=inside, other=0.0) - tl.sum(weights * products, 1)
    tl.store(dlses + each, weights * (products + rest[:, None]), mask=given)
