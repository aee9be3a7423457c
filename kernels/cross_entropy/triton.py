"""The softmax of a linear head without its logits, in Triton.

Online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867) over the vocabulary, as Cut Your
Losses (Wijmans et al., 2024, arXiv:2411.09009) and Liger Kernel (Hsu et al., 2024,
arXiv:2410.10989) have it for cross-entropy:

                split 0                split 1                 weight^T [d, vocab]
            +------+------+------+ +------+------+---
    hidden  | X    | X    | X    | | X    | X    |             BLOCK_N rows, BLOCK_V tokens at a
    [n, d]  +------+------+------+ +------+------+---          time; X is summed BLOCK_D at a time
            ----------------------> ------------->

    linear_logsumexp, for each tile:               X = hidden weight^T   softcap: X = c tanh(X / c)
        Z = X / temperature
        m' = max(m, rowmax Z),  a = exp(m - m')
        P = exp(Z - m')
        u = a (u + (m - m') l) + rowsum P (Z - m')      for the entropy
        l = a l + rowsum P
      of each split: LSE = m + log l,  H = log l - u / l;  `launch.py` merges the splits
    linear_selected: Z of the k tokens that were asked for, as dot products
    linear_dlogits: a tile X again, and from it, of log p = Z - LSE,
        dZ = P dLSE - P (log p + H) dH + sum_j (token j == column) dlogp_j
        dX = dZ (1 - (X / c)^2)                       1 / temperature is left to `launch.py`
      in the dtype of `hidden`, for cuBLAS to multiply with weight and hidden

Nothing is summed by atomics: the same bits every time. Exponentials are of base 2. GROUP blocks of
rows sweep several splits or tiles side by side, so that what they share is read from the L2 cache.

Dimensions: n tokens (rows), d width of the hidden states, k selected tokens of a row, c softcap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import LN2, LOG2E, dot, matrix, soft_cap

LOWEST = tl.constexpr(-1e30)
"Logit of a column past the vocabulary: finite, so that 0 times it is 0."


@triton.jit
def place(program, rows, columns, GROUP: tl.constexpr):
    """Block of rows and of columns of a program: column by column within GROUP blocks of rows."""
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def load_block(
    source, start, rows, stride, column, columns, limit, D: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Rows start + rows and columns column + columns of a matrix [limit, D]; outside of it, 0."""
    if DESCRIPTORS:
        return source.load([start, column])
    else:
        pointers = source + tl.cast(start, tl.int64) * stride + rows[:, None] * stride
        inside = (start + rows < limit)[:, None] & (column + columns < D)[None, :]
        return tl.load(pointers + (column + columns)[None, :], mask=inside, other=0.0)


@triton.jit
def multiply(
    hidden, weight, row, column, hidden_n, weight_v, n, vocab, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """hidden weight^T of the tile that begins at (row, column), float32."""
    rows, columns, width = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        h = load_block(hidden, row, rows, hidden_n, start, width, n, D, DESCRIPTORS)
        w = load_block(weight, column, columns, weight_v, start, width, vocab, D, DESCRIPTORS)
        x = dot(h, tl.trans(w), x, PRECISION)
    return x


@triton.jit
def linear_logsumexp(
    hidden, weight, lse, entropy, hidden_n, weight_v, n, vocab, splits, share, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows times splits. lse, entropy: [splits, n] float32.

    scale: 1 / temperature. share: columns of a split, whole tiles; none is empty.
    """
    block, split = place(tl.program_id(0), tl.cdiv(n, BLOCK_N), splits, GROUP)
    hidden = matrix(hidden, n, hidden_n, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    weight = matrix(weight, vocab, weight_v, D, BLOCK_V, BLOCK_D, DESCRIPTORS)
    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    for column in tl.range(split * share, tl.minimum((split + 1) * share, vocab), BLOCK_V):
        x = multiply(
            hidden, weight, block * BLOCK_N, column, hidden_n, weight_v, n, vocab,
            D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        if SOFTCAP:
            x = soft_cap(x, 1.0, softcap)
        inside = column + tl.arange(0, BLOCK_V) < vocab
        z = tl.where(inside[None, :], x * (scale * LOG2E), LOWEST)
        m_new = tl.maximum(m, tl.max(z, 1))
        z = z - m_new[:, None]
        p = tl.exp2(z)
        rescale = tl.exp2(m - m_new)
        if ENTROPY:
            u = rescale * (u + (m - m_new) * l) + tl.sum(p * z, 1)
        l = rescale * l + tl.sum(p, 1)
        m = m_new
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.cast(split, tl.int64) * n + rows
    tl.store(lse + offset, (m + tl.log2(l)) * LN2, mask=rows < n)
    if ENTROPY:
        tl.store(entropy + offset, (tl.log2(l) - u / l) * LN2, mask=rows < n)


@triton.jit
def linear_selected(
    hidden, weight, tokens, logits, hidden_n, weight_v, n, k, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows, k. tokens, logits: [n, k]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    offset = rows.to(tl.int64) * k + tl.program_id(1)
    token = tl.load(tokens + offset, mask=inside, other=0).to(tl.int64)
    hidden += rows[:, None].to(tl.int64) * hidden_n
    weight += token[:, None] * weight_v
    x = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        h = tl.load(hidden + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        x += tl.sum(h * w, 1)
    if SOFTCAP:
        x = soft_cap(x, 1.0, softcap)
    tl.store(logits + offset, x * scale, mask=inside)


@triton.jit
def linear_dlogits(
    hidden, weight, tokens, lse, entropy, dselected, dlse, dentropy, dlogits,
    hidden_n, weight_v, dlogits_n, n, vocab, first, width, k, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows times blocks of columns. dlogits: dX, columns first to first + width.

    dlse: less the sum of dlogp, as log p = Z - LSE. tokens: [n, k].
    dselected: dlogp [n, k], already times 1 - (X / c)^2 of its token.
    """
    block, tile = place(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(width, BLOCK_V), GROUP)
    hidden = matrix(hidden, n, hidden_n, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    weight = matrix(weight, vocab, weight_v, D, BLOCK_V, BLOCK_D, DESCRIPTORS)
    begin = first + tile * BLOCK_V
    x = multiply(
        hidden, weight, block * BLOCK_N, begin, hidden_n, weight_v, n, vocab,
        D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    if SOFTCAP:
        x = soft_cap(x, 1.0, softcap)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    logsum = tl.load(lse + rows, mask=inside, other=0.0)
    logp = x * (scale * LOG2E) - (logsum * LOG2E)[:, None]
    p = tl.exp2(logp)
    slope = tl.load(dlse + rows, mask=inside, other=0.0)[:, None]
    if ENTROPY:
        h = tl.load(entropy + rows, mask=inside, other=0.0)[:, None]
        dh = tl.load(dentropy + rows, mask=inside, other=0.0)[:, None]
        slope = slope - (logp * LN2 + h) * dh
    dx = p * slope
    if SOFTCAP:
        dx *= 1.0 - (x / softcap) * (x / softcap)
    columns = begin + tl.arange(0, BLOCK_V)
    for j in tl.range(0, k):
        offset = rows.to(tl.int64) * k + j
        token = tl.load(tokens + offset, mask=inside, other=-1)
        d = tl.load(dselected + offset, mask=inside, other=0.0)
        dx += tl.where(token[:, None] == columns[None, :], d[:, None], 0.0)
    pointers = dlogits + rows[:, None].to(tl.int64) * dlogits_n + (columns - first)[None, :]
    tl.store(
        pointers,
        dx.to(dlogits.dtype.element_ty),
        mask=inside[:, None] & (columns < first + width)[None, :],
    )
