"""The gated delta rule in chunks, in Triton.

As in Parallelizing Linear Transformers with the Delta Rule (2024, arXiv:2406.06484) and Gated Delta
Networks (2024, arXiv:2412.06464). For a chunk of C tokens that begins at the state S, with rows of
Q, K, V for its tokens, c the sum of log decays within the chunk, D_ij = exp(c_i - c_j) for j <= i:

    delta_solve       X = (I + A)^-1,  A = strictly lower part of beta_i D_ij (k_i . k_j)
    delta_states      R = beta (V - e^c K S),  U = X R                       chunk after chunk
                      S' = e^(c_C) S + K^T (e^(c_C - c) U)
    delta_outputs     O = scale (e^c Q S + P U),  P = D o Q K^T             all chunks at once

and backwards, given dO (times scale) and dS' of what follows:

    delta_dstates     dU = P^T dO + e^(c_C - c) K dS',  dR = X^T dU          chunk before chunk
                      dS = e^(c_C) dS' + Q^T (e^c dO) - K^T (beta e^c dR)
    delta_dqueries    dP = tril(dO U^T),  dQ = e^c dO S^T + (D o dP) K      all chunks at once
    delta_dkeys       dK = (D o dP)^T Q + e^(c_C - c) U dS'^T               all chunks at once
    delta_dvalues     dA = -stril(dR U^T),  M_ij = beta_i D_ij dA_ij        all chunks at once
                      dK += (M + M^T) K - beta e^c dR S^T,  dV = beta dR
                      dbeta and dc: row sums of the same products

X is found by substitution, a row at a time: powers of A would be shorter, but where keys repeat
they grow without bound. States are kept for every chunk. Nothing is summed by atomics.

Log decays come in units of log 2, summed within each chunk. Tokens past the end have beta = 0 and
no decay, so they change nothing.

Dimensions: b batch, t tokens, h heads, dk width of keys, dv of values, n chunks, C tokens of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import dot, load_rows, place


@triton.jit
def store_rows(target, start, rows, stride, columns, limit, D: tl.constexpr, values):
    """Rows start + rows of a matrix [limit, D]; what lies outside of it is not written."""
    pointers = (
        target + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    )
    inside = (start + rows < limit)[:, None] & (columns < D)[None, :]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def decays(c, STRICT: tl.constexpr):
    """exp(c_i - c_j) below the diagonal, and 1 on it unless STRICT; 0 above it."""
    i = tl.arange(0, c.shape[0])
    earlier = i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]
    # Above the diagonal the difference is positive and its exponential may be infinite.
    span = tl.where(earlier, c[:, None] - c[None, :], 0.0)
    return tl.where(earlier, tl.exp2(span), 0.0)


@triton.jit
def later(c, STRICT: tl.constexpr):
    """The transpose of `decays`: exp(c_j - c_i) above the diagonal."""
    i = tl.arange(0, c.shape[0])
    after = i[:, None] < i[None, :] if STRICT else i[:, None] <= i[None, :]
    span = tl.where(after, c[None, :] - c[:, None], 0.0)
    return tl.where(after, tl.exp2(span), 0.0)


@triton.jit
def load_state(state, of_v, of_k, DV: tl.constexpr, DK: tl.constexpr):
    """Columns of a state [dk, dv], transposed: [dv, dk]."""
    inside = (of_v < DV)[:, None] & (of_k < DK)[None, :]
    return tl.load(state + of_k[None, :] * DV + of_v[:, None], mask=inside, other=0.0)


@triton.jit
def load_last(since, BLOCK_C: tl.constexpr):
    """The sum of log decays of the whole chunk."""
    return tl.load(since + BLOCK_C - 1)


@triton.jit
def delta_solve(
    k, beta, since, solved, k_b, k_t, k_h, beta_b, beta_t, beta_h, t, h, n,
    DK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. solved: X, [b, h, n, C, C]. since: [b, h, n, C] float32."""
    chunk = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, columns = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    matrix = tl.program_id(1).to(tl.int64) * n + chunk
    c = tl.load(since + matrix * BLOCK_C + i)
    tokens = chunk * BLOCK_C + i
    step = tl.load(beta + row * beta_b + head * beta_h + tokens * beta_t, tokens < t, other=0.0)
    keys = load_rows(k + row * k_b + head * k_h, chunk * BLOCK_C, i, k_t, columns, t, DK, True)
    gram = dot(keys, tl.trans(keys), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    a = step.to(tl.float32)[:, None] * decays(c, True) * gram
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, BLOCK_C):
        of_row = tl.sum(tl.where(i[:, None] == r, a, 0.0), 0)  # [C], zero from r on
        found = tl.sum(of_row[:, None] * x, 0)
        x = tl.where(i[:, None] == r, x - found[None, :], x)
    pointers = solved + matrix * BLOCK_C * BLOCK_C + i[:, None] * BLOCK_C + i[None, :]
    tl.store(pointers, x.to(solved.dtype.element_ty))


@triton.jit
def delta_states(
    k, v, beta, since, solved, first, states, corrections, last,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, t, h, n,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of values, b h. first: [b, h, dk, dv] float32, or None for zero.

    states: S of every chunk, [b, h, n, dk, dv]; corrections: U, [b, h, t, dv]; last: [b, h, dk, dv]
    float32.
    """
    row, head = place(tl.program_id(1), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    of_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    pair = tl.program_id(1).to(tl.int64)
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    beta += row * beta_b + head * beta_h
    inside = (of_k < DK)[:, None] & (of_v < DV)[None, :]
    place_s = of_k[:, None] * DV + of_v[None, :]
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if first is not None:
        s = tl.load(first + pair * DK * DV + place_s, mask=inside, other=0.0)
    for chunk in range(n):
        matrix = pair * n + chunk
        tl.store(states + matrix * DK * DV + place_s, s.to(states.dtype.element_ty), mask=inside)
        keys = load_rows(k, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)
        values = load_rows(v, chunk * BLOCK_C, i, v_t, of_v, t, DV, True)
        x = tl.load(solved + matrix * BLOCK_C * BLOCK_C + i[:, None] * BLOCK_C + i[None, :])
        c = tl.load(since + matrix * BLOCK_C + i)
        end = load_last(since + matrix * BLOCK_C, BLOCK_C)
        tokens = chunk * BLOCK_C + i
        step = tl.load(beta + tokens * beta_t, tokens < t, other=0.0).to(tl.float32)
        known = dot(keys, s.to(keys.dtype), tl.zeros([BLOCK_C, BLOCK_V], tl.float32), PRECISION)
        error = step[:, None] * (values.to(tl.float32) - tl.exp2(c)[:, None] * known)
        u = dot(x, error.to(x.dtype), tl.zeros([BLOCK_C, BLOCK_V], tl.float32), PRECISION)
        store_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, u)
        u = (tl.exp2(end - c)[:, None] * u).to(keys.dtype)
        s = dot(tl.trans(keys), u, tl.exp2(end) * s, PRECISION)
    tl.store(last + pair * DK * DV + place_s, s, mask=inside)


@triton.jit
def delta_outputs(
    q, k, since, states, corrections, out, q_b, q_t, q_h, k_b, k_t, k_h, out_b, out_t, out_h,
    t, h, n, scale, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, blocks of values, b h."""
    chunk = tl.program_id(0)
    row, head = place(tl.program_id(2), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    of_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    pair = tl.program_id(2).to(tl.int64)
    matrix = pair * n + chunk
    queries = load_rows(q + row * q_b + head * q_h, chunk * BLOCK_C, i, q_t, of_k, t, DK, True)
    keys = load_rows(k + row * k_b + head * k_h, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)
    c = tl.load(since + matrix * BLOCK_C + i)
    inside = (of_k < DK)[:, None] & (of_v < DV)[None, :]
    place_s = of_k[:, None] * DV + of_v[None, :]
    s = tl.load(states + matrix * DK * DV + place_s, mask=inside, other=0.0)
    u = load_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
    scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    scores = scores * decays(c, False)
    o = dot(queries, s, tl.zeros([BLOCK_C, BLOCK_V], tl.float32), PRECISION)
    o = dot(scores.to(u.dtype), u, tl.exp2(c)[:, None] * o, PRECISION)
    store_rows(out + row * out_b + head * out_h, chunk * BLOCK_C, i, out_t, of_v, t, DV, scale * o)


@triton.jit
def delta_dstates(
    q, k, beta, since, solved, dout, dlast, dstates, derrors, dfirst,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, dout_b, dout_t, dout_h,
    t, h, n, scale, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of values, b h; from the last chunk to the first.

    dlast: [b, h, dk, dv] float32. dstates: dS' of every chunk, [b, h, n, dk, dv]; derrors: dR,
    [b, h, t, dv]; dfirst: [b, h, dk, dv] float32.
    """
    row, head = place(tl.program_id(1), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    of_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    pair = tl.program_id(1).to(tl.int64)
    q += row * q_b + head * q_h
    k += row * k_b + head * k_h
    beta += row * beta_b + head * beta_h
    dout += row * dout_b + head * dout_h
    inside = (of_k < DK)[:, None] & (of_v < DV)[None, :]
    place_s = of_k[:, None] * DV + of_v[None, :]
    ds = tl.load(dlast + pair * DK * DV + place_s, mask=inside, other=0.0)
    for back in range(n):
        chunk = n - 1 - back
        matrix = pair * n + chunk
        tl.store(dstates + matrix * DK * DV + place_s, ds.to(dstates.dtype.element_ty), mask=inside)
        queries = load_rows(q, chunk * BLOCK_C, i, q_t, of_k, t, DK, True)
        keys = load_rows(k, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)
        do = load_rows(dout, chunk * BLOCK_C, i, dout_t, of_v, t, DV, True)
        x = tl.load(solved + matrix * BLOCK_C * BLOCK_C + i[:, None] * BLOCK_C + i[None, :])
        c = tl.load(since + matrix * BLOCK_C + i)
        end = load_last(since + matrix * BLOCK_C, BLOCK_C)
        tokens = chunk * BLOCK_C + i
        step = tl.load(beta + tokens * beta_t, tokens < t, other=0.0).to(tl.float32)
        scores = dot(keys, tl.trans(queries), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
        scores = scores * later(c, False)  # P^T
        du = dot(keys, ds.to(keys.dtype), tl.zeros([BLOCK_C, BLOCK_V], tl.float32), PRECISION)
        do = (scale * do.to(tl.float32)).to(do.dtype)
        du = dot(scores.to(do.dtype), do, tl.exp2(end - c)[:, None] * du, PRECISION)
        dr = dot(tl.trans(x), du.to(x.dtype), tl.zeros([BLOCK_C, BLOCK_V], tl.float32), PRECISION)
        store_rows(derrors + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, dr)
        grown = tl.exp2(c)
        ds = tl.exp2(end) * ds
        read = (grown[:, None] * do.to(tl.float32)).to(keys.dtype)
        ds = dot(tl.trans(queries), read, ds, PRECISION)
        wrong = (-(step * grown)[:, None] * dr).to(keys.dtype)
        ds = dot(tl.trans(keys), wrong, ds, PRECISION)
    tl.store(dfirst + pair * DK * DV + place_s, ds, mask=inside)


@triton.jit
def delta_dqueries(
    q, k, since, states, corrections, dout, dq, dsince,
    q_b, q_t, q_h, k_b, k_t, k_h, dout_b, dout_t, dout_h,
    t, h, n, scale, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. dq: [b, h, t, dk]; dsince: of c_i in what token i reads, [b, h, n, C] float32,
    in natural units."""
    chunk = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    matrix = pair * n + chunk
    dout += row * dout_b + head * dout_h
    c = tl.load(since + matrix * BLOCK_C + i)
    dp = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)  # dO U^T
    from_read = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)  # dO S^T
    for start in range(0, DV, BLOCK_V):
        of_v = start + tl.arange(0, BLOCK_V)
        s = load_state(states + matrix * DK * DV, of_v, of_k, DV, DK)
        u = load_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
        do = load_rows(dout, chunk * BLOCK_C, i, dout_t, of_v, t, DV, True)
        dp = dot(do, tl.trans(u), dp, PRECISION)
        from_read = dot(do, s, from_read, PRECISION)
    queries = load_rows(q + row * q_b + head * q_h, chunk * BLOCK_C, i, q_t, of_k, t, DK, True)
    keys = load_rows(k + row * k_b + head * k_h, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)
    scores = dot(queries, tl.trans(keys), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    dp = scale * dp * decays(c, False)
    from_read = (scale * tl.exp2(c))[:, None] * from_read
    dc = tl.sum(queries.to(tl.float32) * from_read, 1) + tl.sum(dp * scores, 1)
    of_q = dot(dp.to(keys.dtype), keys, from_read, PRECISION)
    store_rows(dq + pair * t * DK, chunk * BLOCK_C, i, DK, of_k, t, DK, of_q)
    tl.store(dsince + matrix * BLOCK_C + i, dc)


@triton.jit
def delta_dkeys(
    q, k, since, states, dstates, corrections, dout, dkeys, dsince, dwritten, dend,
    q_b, q_t, q_h, k_b, k_t, k_h, dout_b, dout_t, dout_h,
    t, h, n, scale, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. dkeys: of K in what was read and written, [b, h, t, dk] float32; dsince: of c
    likewise, but for what dwritten [b, h, n, C] and dend [b, h, n, dk] add to the last c."""
    chunk = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    matrix = pair * n + chunk
    dout += row * dout_b + head * dout_h
    c = tl.load(since + matrix * BLOCK_C + i)
    end = load_last(since + matrix * BLOCK_C, BLOCK_C)
    left = tl.exp2(end - c)
    keys = load_rows(k + row * k_b + head * k_h, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)

    # As written: S' = e^(c_C) S + K^T (e^(c_C - c) U).
    from_write = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)  # U dS'^T
    of_end = tl.zeros([BLOCK_K], tl.float32)  # S . dS'
    for start in range(0, DV, BLOCK_V):
        of_v = start + tl.arange(0, BLOCK_V)
        s = load_state(states + matrix * DK * DV, of_v, of_k, DV, DK)
        ds = load_state(dstates + matrix * DK * DV, of_v, of_k, DV, DK)
        u = load_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
        from_write = dot(u, ds, from_write, PRECISION)
        of_end += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)
    from_write = left[:, None] * from_write
    written = tl.sum(keys.to(tl.float32) * from_write, 1)
    # Both also change c_C. Summed to one number by the launcher: on sm_100 Triton cannot.
    tl.store(dwritten + matrix * BLOCK_C + i, written)
    tl.store(dend + matrix * DK + of_k, tl.exp2(end) * of_end, mask=of_k < DK)
    dc = -written

    # As read: P = D o Q K^T. Column j of its gradient is row j here.
    dp = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)  # U dO^T
    for start in range(0, DV, BLOCK_V):
        of_v = start + tl.arange(0, BLOCK_V)
        u = load_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
        do = load_rows(dout, chunk * BLOCK_C, i, dout_t, of_v, t, DV, True)
        dp = dot(u, tl.trans(do), dp, PRECISION)
    queries = load_rows(q + row * q_b + head * q_h, chunk * BLOCK_C, i, q_t, of_k, t, DK, True)
    scores = dot(keys, tl.trans(queries), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    dp = scale * dp * later(c, False)
    dc -= tl.sum(dp * scores, 1)
    gradient = dot(dp.to(keys.dtype), queries, from_write, PRECISION)
    store_rows(dkeys + pair * t * DK, chunk * BLOCK_C, i, DK, of_k, t, DK, gradient)
    tl.store(dsince + matrix * BLOCK_C + i, dc)


@triton.jit
def delta_dvalues(
    k, v, beta, since, states, corrections, derrors, dkeys, dk, dv, dbeta, dsince,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    t, h, n, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. dk: all of it, [b, h, t, dk]; dv: [b, h, t, dv], dbeta: [b, h, t] float32;
    dsince: of c in what was corrected."""
    chunk = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    matrix = pair * n + chunk
    tokens = chunk * BLOCK_C + i
    v += row * v_b + head * v_h
    c = tl.load(since + matrix * BLOCK_C + i)
    step = tl.load(beta + row * beta_b + head * beta_h + tokens * beta_t, tokens < t, other=0.0)
    step = step.to(tl.float32)

    # R = beta (V - e^c K S), U = X R; the gradient of A is -dR U^T below the diagonal, and its
    # transpose -U dR^T above it.
    da = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)  # dR U^T
    turned = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)  # U dR^T
    from_error = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)  # dR S^T
    of_value = tl.zeros([BLOCK_C], tl.float32)  # dR . V
    for start in range(0, DV, BLOCK_V):
        of_v = start + tl.arange(0, BLOCK_V)
        s = load_state(states + matrix * DK * DV, of_v, of_k, DV, DK)
        u = load_rows(corrections + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
        dr = load_rows(derrors + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, True)
        values = load_rows(v, chunk * BLOCK_C, i, v_t, of_v, t, DV, True)
        da = dot(dr, tl.trans(u), da, PRECISION)
        turned = dot(u, tl.trans(dr), turned, PRECISION)
        from_error = dot(dr, s, from_error, PRECISION)
        wide = dr.to(tl.float32)
        of_value += tl.sum(wide * values.to(tl.float32), 1)
        store_rows(dv + pair * t * DV, chunk * BLOCK_C, i, DV, of_v, t, DV, step[:, None] * wide)
    keys = load_rows(k + row * k_b + head * k_h, chunk * BLOCK_C, i, k_t, of_k, t, DK, True)
    from_error = tl.exp2(c)[:, None] * from_error
    of_error = tl.sum(keys.to(tl.float32) * from_error, 1)
    gram = dot(keys, tl.trans(keys), tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    da = -da * decays(c, True)
    turned = -turned * later(c, True) * step[None, :]
    by_step = tl.sum(da * gram, 1)
    dc = step * (by_step - of_error) - tl.sum(turned * gram, 1)
    gradient = load_rows(dkeys + pair * t * DK, chunk * BLOCK_C, i, DK, of_k, t, DK, True)
    gradient -= step[:, None] * from_error
    gradient = dot((step[:, None] * da + turned).to(keys.dtype), keys, gradient, PRECISION)
    store_rows(dk + pair * t * DK, chunk * BLOCK_C, i, DK, of_k, t, DK, gradient)

    tl.store(dbeta + pair * t + tokens, of_value - of_error + by_step, mask=tokens < t)
    tl.store(dsince + matrix * BLOCK_C + i, dc)
