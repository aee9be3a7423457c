"""The empirical characteristic function and its gradient in Triton.

    h [g, n, k]    a program of the forward: BLOCK_K directions of a group, all of its samples,
                   BLOCK_N at a time; of the backward: BLOCK_N samples of BLOCK_K directions

One sine and one cosine per number: the knots are equally spaced, so that the others follow by
turning the angle on (c, s are of t_j h):

    c_j+1 = c_j c_1 - s_j s_1               s_j+1 = s_j c_1 + c_j s_1

Backward, with dcos and dsin of the averages:

    dh_n = 1/n sum_j t_j (dsin_j cos(t_j h_n) - dcos_j sin(t_j h_n))

Nothing of size n k j is ever in memory. Every program owns its results: no atomics, the same bits
every time.

Dimensions: g groups, n samples, k directions, KNOTS knots.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cos_sin(x):
    """Both to float32's accuracy for |x| up to about 8000.

    The library's functions keep a table in local memory for huge arguments, which spills. Here the
    argument is brought into [-pi/4, pi/4] with pi/2 in three parts (Cody and Waite, 1980), where
    the polynomials of Cephes (S. Moshier, 1989) hold.
    """
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - quarter * 1.5703125
    r = r - quarter * 4.837512969970703125e-4
    r = r - quarter * 7.54978995489188216e-8
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    c = c - 0.5 * z + 1.0
    turn = quarter.to(tl.int32) & 3
    odd = (turn & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((turn == 1) | (turn == 2), -cos, cos)
    sin = tl.where(turn >= 2, -sin, sin)
    return cos, sin


@triton.jit
def ecf_forward(
    h, cosines, sines, step, n, k,
    KNOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of directions, groups. cosines, sines [g, KNOTS, k]; PADDED: a power of two."""
    column, group = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(1)
    row, knot, inside = tl.arange(0, BLOCK_N), tl.arange(0, PADDED), column < k
    first = tl.cast(group, tl.int64) * n * k
    cos_sum = tl.zeros([PADDED, BLOCK_K], tl.float32)
    sin_sum = tl.zeros([PADDED, BLOCK_K], tl.float32)
    for start in range(0, n, BLOCK_N):
        there = (start + row < n)[:, None] & inside[None, :]
        cells = (start + row).to(tl.int64)[:, None] * k + column[None, :]
        x = tl.load(h + first + cells, mask=there, other=0.0).to(tl.float32) * step
        c1, s1 = cos_sin(x)
        # What lies beyond the samples must not count: its cosine would be 1.
        c, s = tl.where(there, 1.0, 0.0), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for j in tl.static_range(KNOTS):
            here = (knot == j)[:, None]
            cos_sum += tl.where(here, tl.sum(c, 0)[None, :], 0.0)
            sin_sum += tl.where(here, tl.sum(s, 0)[None, :], 0.0)
            turned = c * c1 - s * s1
            s = s * c1 + c * s1
            c = turned
    place = (tl.cast(group, tl.int64) * KNOTS + knot)[:, None] * k + column[None, :]
    within = (knot < KNOTS)[:, None] & inside[None, :]
    tl.store(cosines + place, cos_sum / n, mask=within)
    tl.store(sines + place, sin_sum / n, mask=within)


@triton.jit
def ecf_backward(
    dcosines, dsines, h, dh, step, n, k,
    KNOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of samples, blocks of directions, groups."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column, group = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(2)
    inside = column < k
    there = (row < n)[:, None] & inside[None, :]
    cells = tl.cast(group, tl.int64) * n * k + row.to(tl.int64)[:, None] * k + column[None, :]
    x = tl.load(h + cells, mask=there, other=0.0).to(tl.float32) * step
    c1, s1 = cos_sin(x)
    c, s = c1, s1  # of the first knot that is not zero
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for j in tl.static_range(1, KNOTS):
        place = (tl.cast(group, tl.int64) * KNOTS + j) * k + column
        dcos = tl.load(dcosines + place, mask=inside, other=0.0)
        dsin = tl.load(dsines + place, mask=inside, other=0.0)
        total += j * (dsin[None, :] * c - dcos[None, :] * s)
        turned = c * c1 - s * s1
        s = s * c1 + c * s1
        c = turned
    tl.store(dh + cells, (total * (step / n)).to(dh.dtype.element_ty), mask=there)
