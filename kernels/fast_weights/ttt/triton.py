"""TTT-Linear in its dual form, in Triton.

As in Learning to (Learn at Test Time) (2024, arXiv:2407.04620, section 2.5). For a mini-batch of C
tokens that begins at the model W, b, with rows of Q, K, V for its tokens, o the elementwise
product, LN(z) = gamma u + beta and u = (z - mean z) i, i = 1 / sqrt(variance + EPS):

    ttt_states      Z = K W + b,  G = d/dZ 1/2 |LN(Z) - (V - K)|^2       mini-batch after mini-batch
                    W' = W - (last o K)^T G,  b' = b - sum last o G
    ttt_outputs     E = eta o (Q K^T + 1),  Y = Q W + b - E G            all mini-batches at once
                    out = Q + LN(Y)

eta_ts = position_t rate_s for s <= t, else 0; last_s = position_C rate_s. Backwards, given dout and
dW', db' of what follows, with m(x) = x - mean x - u mean(x u), all means over the width of a head:

    ttt_dreads      dY = i m(gamma dout) of LN(Y)                       all mini-batches at once
                    dA = eta o D,  D = -dY G^T,  dQ = dout + dY W^T + dA K
                    dK = dA^T Q,  dG = -E^T dY,  deta = D o (Q K^T + 1)
    ttt_dstates     B = K dW' + db',  dG -= last o B,  dZ of dG         mini-batch before mini-batch
                    dW = dW' + Q^T dY + K^T dZ,  db = db' + sum dY + sum dZ
    ttt_dwrites     dlast = -sum_d G o B,  dV, dgamma, dbeta of G       all mini-batches at once
                    dK += dZ W^T - dV - last o (G dW'^T)

With s = gamma (gamma u + beta - V + K) the gradient is G = i m(s), and what it passes on is

    ds = i m(dG),  du = gamma^2 ds - i (dG mean(s u) + s mean(dG u))
    dZ = i m(du) - i^2 u mean(dG m(s)),  dV = -gamma ds
    dgamma = sum ds (2 gamma u + beta - V + K),  dbeta = sum ds gamma

Tiles hold tokens as columns: a mini-batch is narrow, and the wide side of a product is the one that
its warps share. W, b and dW', db' are kept for every mini-batch. Nothing is summed by atomics.
Tokens past the end have a rate of zero and no gradients, so they change nothing.

Dimensions: b batch, t tokens, h heads, d their width, n mini-batches, C tokens of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.language import dot, place

EPS = tl.constexpr(1e-6)


@triton.jit
def load_tokens(source, begin, i, stride, of_d, end, D: tl.constexpr):
    """Tokens begin + i of a matrix of rows, [d, C]; zero from `end` on."""
    pointers = source + (begin + i).to(tl.int64)[None, :] * stride + of_d[:, None]
    return tl.load(pointers, mask=(begin + i < end)[None, :] & (of_d < D)[:, None], other=0.0)


@triton.jit
def store_tokens(target, begin, i, stride, of_d, end, D: tl.constexpr, values):
    pointers = target + (begin + i).to(tl.int64)[None, :] * stride + of_d[:, None]
    inside = (begin + i < end)[None, :] & (of_d < D)[:, None]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_model(source, of_d, D: tl.constexpr):
    """The transpose of W, [d, d]: its rows are outputs."""
    inside = (of_d < D)[:, None] & (of_d < D)[None, :]
    return tl.load(source + of_d[None, :] * D + of_d[:, None], mask=inside, other=0.0)


@triton.jit
def store_model(target, of_d, D: tl.constexpr, values):
    inside = (of_d < D)[:, None] & (of_d < D)[None, :]
    pointers = target + of_d[None, :] * D + of_d[:, None]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(source, of_d, D: tl.constexpr):
    """A vector of the head's width, [d, 1]."""
    return tl.load(source + of_d, mask=of_d < D, other=0.0).to(tl.float32)[:, None]


@triton.jit
def store_vector(target, of_d, D: tl.constexpr, values):
    tl.store(target + of_d[:, None], values, mask=(of_d < D)[:, None])


@triton.jit
def load_rates(rate, begin, i, stride, end):
    """Rates of the tokens begin + i, zero from `end` on."""
    pointers = rate + (begin + i).to(tl.int64) * stride
    return tl.load(pointers, mask=begin + i < end, other=0.0).to(tl.float32)


@triton.jit
def step_sizes(factor, rates, i):
    """eta^T: position_t rate_s for s <= t, else 0; s is the row."""
    return tl.where(i[:, None] <= i[None, :], rates[:, None] * factor[None, :], 0.0)


@triton.jit
def mean(x, D: tl.constexpr):
    """Over the width of the head, [1, C]."""
    return tl.sum(x, 0)[None, :] / D


@triton.jit
def normalised(z, inside, D: tl.constexpr):
    """u [d, C], zero outside of the head's width, and i = 1 / sqrt(variance + EPS), [1, C]."""
    centred = tl.where(inside, z - mean(z, D), 0.0)
    inverse = 1.0 / tl.sqrt_rn(mean(centred * centred, D) + EPS)
    return centred * inverse, inverse


@triton.jit
def project(x, u, inside, D: tl.constexpr):
    """m(x) = x - mean x - u mean(x u), zero outside of the head's width."""
    return tl.where(inside, x - mean(x, D) - u * mean(x * u, D), 0.0)


@triton.jit
def inner_model(keys, values, w, b, scale, shift, inside, D: tl.constexpr, PRECISION: tl.constexpr):
    """u, i, gamma u + beta - V + K and m(s) for the keys of a mini-batch."""
    z = dot(w, keys, tl.zeros(keys.shape, tl.float32), PRECISION) + b
    u, inverse = normalised(z, inside, D)
    error = scale * u + shift - values.to(tl.float32) + keys.to(tl.float32)
    return u, inverse, error, project(scale * error, u, inside, D)


@triton.jit
def ttt_states(
    k, v, rate, position, weight, bias, gamma, beta, states, biases, gradients, last_w, last_b,
    k_b, k_t, k_h, v_b, v_t, v_h, rate_b, rate_t, rate_h, t, h, n,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: b h. weight [b, h, d, d], bias [b, h, d], gamma, beta [h, d], position [C]: float32.

    states, biases: W, b of every mini-batch, [b, h, n, d, d] and [b, h, n, d] float32; gradients:
    G, [b, h, t, d]; last_w, last_b: after the last token, float32.
    """
    row, head = place(tl.program_id(0), h)
    i, of_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    pair, inside = tl.program_id(0).to(tl.int64), (of_d < D)[:, None]
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    rate += row * rate_b + head * rate_h
    scale, shift = load_vector(gamma + head * D, of_d, D), load_vector(beta + head * D, of_d, D)
    w, b = load_model(weight + pair * D * D, of_d, D), load_vector(bias + pair * D, of_d, D)
    for batch in range(n):
        begin, model = batch * C, pair * n + batch
        end = tl.minimum(begin + C, t)
        store_model(states + model * D * D, of_d, D, w)
        store_vector(biases + model * D, of_d, D, b)
        keys = load_tokens(k, begin, i, k_t, of_d, end, D)
        values = load_tokens(v, begin, i, v_t, of_d, end, D)
        _, inverse, _, projected = inner_model(
            keys, values, w.to(keys.dtype), b, scale, shift, inside, D, PRECISION
        )
        g = inverse * projected
        store_tokens(gradients + pair * t * D, begin, i, D, of_d, end, D, g)
        last = tl.load(position + end - begin - 1) * load_rates(rate, begin, i, rate_t, end)
        step = -last[None, :] * g
        w = dot(step.to(keys.dtype), tl.trans(keys), w, PRECISION)
        b += tl.sum(step, 1)[:, None]
    store_model(last_w + pair * D * D, of_d, D, w)
    store_vector(last_b + pair * D, of_d, D, b)


@triton.jit
def ttt_outputs(
    q, k, rate, position, gamma, beta, states, biases, gradients, out,
    q_b, q_t, q_h, k_b, k_t, k_h, rate_b, rate_t, rate_h, out_b, out_t, out_h, t, h, n,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h."""
    batch = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    pair = tl.program_id(1).to(tl.int64)
    begin, model = batch * C, pair * n + batch
    end = tl.minimum(begin + C, t)
    queries = load_tokens(q + row * q_b + head * q_h, begin, i, q_t, of_d, end, D)
    keys = load_tokens(k + row * k_b + head * k_h, begin, i, k_t, of_d, end, D)
    g = load_tokens(gradients + pair * t * D, begin, i, D, of_d, end, D)
    rates = load_rates(rate + row * rate_b + head * rate_h, begin, i, rate_t, end)
    factor = tl.load(position + i, mask=i < C, other=0.0)
    w, b = load_model(states + model * D * D, of_d, D), load_vector(biases + model * D, of_d, D)
    scores = dot(tl.trans(keys), queries, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    e = step_sizes(factor, rates, i) * (scores + 1.0)
    y = dot(w, queries, tl.zeros([BLOCK_D, BLOCK_C], tl.float32), PRECISION) + b
    y = dot(g, (-e).to(g.dtype), y, PRECISION)
    u, _ = normalised(y, (of_d < D)[:, None], D)
    scale, shift = load_vector(gamma + head * D, of_d, D), load_vector(beta + head * D, of_d, D)
    read = queries.to(tl.float32) + scale * u + shift
    store_tokens(out + row * out_b + head * out_h, begin, i, out_t, of_d, end, D, read)


@triton.jit
def ttt_dreads(
    q, k, rate, position, gamma, states, biases, gradients, dout,
    dreads, dq, dkeys, dgradients, drate, dposition, dgamma, dbeta,
    q_b, q_t, q_h, k_b, k_t, k_h, rate_b, rate_t, rate_h, dout_b, dout_t, dout_h, t, h, n,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. Of what the queries read: dreads dY, dq [b, h, t, d]; in float32 dkeys,
    dgradients likewise, drate [b, h, t], dposition [b, h, n, C], dgamma, dbeta [b, h, n, d]."""
    batch = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    pair, inside = tl.program_id(1).to(tl.int64), (of_d < D)[:, None]
    begin, model = batch * C, pair * n + batch
    end = tl.minimum(begin + C, t)
    flat = pair * t * D
    queries = load_tokens(q + row * q_b + head * q_h, begin, i, q_t, of_d, end, D)
    keys = load_tokens(k + row * k_b + head * k_h, begin, i, k_t, of_d, end, D)
    g = load_tokens(gradients + flat, begin, i, D, of_d, end, D)
    rates = load_rates(rate + row * rate_b + head * rate_h, begin, i, rate_t, end)
    factor = tl.load(position + i, mask=i < C, other=0.0)
    w, b = load_model(states + model * D * D, of_d, D), load_vector(biases + model * D, of_d, D)
    scores = dot(tl.trans(keys), queries, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    eta, scores = step_sizes(factor, rates, i), scores + 1.0
    e = (-eta * scores).to(g.dtype)
    zero = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    y = dot(g, e, dot(w, queries, zero, PRECISION) + b, PRECISION)
    u, inverse = normalised(y, inside, D)
    do = load_tokens(dout + row * dout_b + head * dout_h, begin, i, dout_t, of_d, end, D)
    do = do.to(tl.float32)
    store_vector(dgamma + model * D, of_d, D, tl.sum(do * u, 1)[:, None])
    store_vector(dbeta + model * D, of_d, D, tl.sum(do, 1)[:, None])
    scale = load_vector(gamma + head * D, of_d, D)
    dy = (inverse * project(scale * do, u, inside, D)).to(g.dtype)
    store_tokens(dreads + flat, begin, i, D, of_d, end, D, dy)
    deta = -dot(tl.trans(g), dy, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), PRECISION)
    da = (eta * deta).to(keys.dtype)
    of_q = dot(keys, da, dot(tl.trans(w), dy, do, PRECISION), PRECISION)
    store_tokens(dq + flat, begin, i, D, of_d, end, D, of_q)
    of_k = dot(queries, tl.trans(da), zero, PRECISION)
    store_tokens(dkeys + flat, begin, i, D, of_d, end, D, of_k)
    of_g = dot(dy, tl.trans(e), zero, PRECISION)
    store_tokens(dgradients + flat, begin, i, D, of_d, end, D, of_g)
    deta = tl.where(i[:, None] <= i[None, :], deta * scores, 0.0)
    tl.store(drate + pair * t + begin + i, tl.sum(deta * factor[None, :], 1), begin + i < end)
    tl.store(dposition + model * C + i, tl.sum(deta * rates[:, None], 0), mask=i < C)


@triton.jit
def ttt_dstates(
    q, k, v, rate, position, gamma, beta, states, biases, dreads, dgradients, dlast_w, dlast_b,
    dstates, dbiases, dsteps, dweight, dbias,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, rate_b, rate_t, rate_h, t, h, n,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: b h; from the last mini-batch to the first. dstates, dbiases: dW', db' of every
    mini-batch; dsteps: dZ, [b, h, t, d]; dweight [b, h, d, d], dbias [b, h, d] float32."""
    row, head = place(tl.program_id(0), h)
    i, of_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    pair, inside = tl.program_id(0).to(tl.int64), (of_d < D)[:, None]
    q += row * q_b + head * q_h
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    rate += row * rate_b + head * rate_h
    flat = pair * t * D
    scale, shift = load_vector(gamma + head * D, of_d, D), load_vector(beta + head * D, of_d, D)
    dw, db = load_model(dlast_w + pair * D * D, of_d, D), load_vector(dlast_b + pair * D, of_d, D)
    for back in range(n):
        batch = n - 1 - back
        begin, model = batch * C, pair * n + batch
        end = tl.minimum(begin + C, t)
        store_model(dstates + model * D * D, of_d, D, dw)
        store_vector(dbiases + model * D, of_d, D, db)
        keys = load_tokens(k, begin, i, k_t, of_d, end, D)
        values = load_tokens(v, begin, i, v_t, of_d, end, D)
        w = load_model(states + model * D * D, of_d, D)
        b = load_vector(biases + model * D, of_d, D)
        u, inverse, error, projected = inner_model(
            keys, values, w, b, scale, shift, inside, D, PRECISION
        )
        last = tl.load(position + end - begin - 1) * load_rates(rate, begin, i, rate_t, end)
        zero = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
        moved = dot(dw.to(keys.dtype), keys, zero, PRECISION) + db
        dg = load_tokens(dgradients + flat, begin, i, D, of_d, end, D) - last[None, :] * moved
        dg = tl.where(inside, dg, 0.0)
        # G = i m(s), s = gamma error.
        slope = scale * error
        du = scale * scale * project(dg, u, inside, D)
        du -= dg * mean(slope * u, D) + slope * mean(dg * u, D)
        dz = inverse * inverse * (project(du, u, inside, D) - mean(dg * projected, D) * u)
        dz = dz.to(keys.dtype)
        store_tokens(dsteps + flat, begin, i, D, of_d, end, D, dz)
        queries = load_tokens(q, begin, i, q_t, of_d, end, D)
        dy = load_tokens(dreads + flat, begin, i, D, of_d, end, D)
        dw = dot(dy, tl.trans(queries), dw, PRECISION)
        dw = dot(dz, tl.trans(keys), dw, PRECISION)
        db += tl.sum(dy.to(tl.float32) + dz.to(tl.float32), 1)[:, None]
    store_model(dweight + pair * D * D, of_d, D, dw)
    store_vector(dbias + pair * D, of_d, D, db)


@triton.jit
def ttt_dwrites(
    k, v, rate, position, gamma, beta, states, biases, dstates, dbiases, dsteps, dkeys, dgradients,
    dk, dv, dlast, dgamma, dbeta, k_b, k_t, k_h, v_b, v_t, v_h, rate_b, rate_t, rate_h, t, h, n,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: n, b h. dk, dv [b, h, t, d]; dlast [b, h, t], dgamma, dbeta [b, h, n, d] float32."""
    batch = tl.program_id(0)
    row, head = place(tl.program_id(1), h)
    i, of_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    pair, inside = tl.program_id(1).to(tl.int64), (of_d < D)[:, None]
    begin, model = batch * C, pair * n + batch
    end = tl.minimum(begin + C, t)
    flat = pair * t * D
    keys = load_tokens(k + row * k_b + head * k_h, begin, i, k_t, of_d, end, D)
    values = load_tokens(v + row * v_b + head * v_h, begin, i, v_t, of_d, end, D)
    rates = load_rates(rate + row * rate_b + head * rate_h, begin, i, rate_t, end)
    scale, shift = load_vector(gamma + head * D, of_d, D), load_vector(beta + head * D, of_d, D)
    w, b = load_model(states + model * D * D, of_d, D), load_vector(biases + model * D, of_d, D)
    u, inverse, error, projected = inner_model(
        keys, values, w, b, scale, shift, inside, D, PRECISION
    )
    g, dw = inverse * projected, load_model(dstates + model * D * D, of_d, D)
    zero = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    moved = dot(dw, keys, zero, PRECISION) + load_vector(dbiases + model * D, of_d, D)
    tl.store(dlast + pair * t + begin + i, -tl.sum(g * moved, 0), mask=begin + i < end)
    last = (tl.load(position + end - begin - 1) * rates)[None, :]
    dg = load_tokens(dgradients + flat, begin, i, D, of_d, end, D) - last * moved
    ds = inverse * project(tl.where(inside, dg, 0.0), u, inside, D)
    store_vector(dgamma + model * D, of_d, D, tl.sum(ds * (error + scale * u), 1)[:, None])
    store_vector(dbeta + model * D, of_d, D, tl.sum(ds * scale, 1)[:, None])
    store_tokens(dv + flat, begin, i, D, of_d, end, D, -scale * ds)
    of_k = load_tokens(dkeys + flat, begin, i, D, of_d, end, D) + scale * ds
    of_k = dot(tl.trans(dw), (-last * g).to(keys.dtype), of_k, PRECISION)
    dz = load_tokens(dsteps + flat, begin, i, D, of_d, end, D)
    of_k = dot(tl.trans(w), dz, of_k, PRECISION)
    store_tokens(dk + flat, begin, i, D, of_d, end, D, of_k)
