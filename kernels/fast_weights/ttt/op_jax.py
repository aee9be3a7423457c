"""TTT-Linear in its dual form, in jax: the function of `op.py`, its names, arguments and shapes.

The equations are there. What differs here: a scan over mini-batches in jax's operators,
differentiable to any order, under jit and on any device; there is no `impl`, and nothing is checked
but what the shapes would not show.

Dimensions: b batch, t tokens, h heads, d their width, n mini-batches, c tokens of one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

EPS = 1e-6
"Added to the variance inside the norm."

Model = tuple[Array, Array]  # weight [b, h, d, d], bias [b, h, 1, d]


def ttt_linear(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    rate: Float[Array, "b t h"],
    position: Float[Array, " c"],
    weight: Float[Array, "b h d d"],
    bias: Float[Array, "b h d"],
    norm_weight: Float[Array, "h d"],
    norm_bias: Float[Array, "h d"],
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h d d"], Float[Array, "b h d"]]:
    """Outputs of a linear model per head that is trained on the sequence as it reads it.

    Arguments and results as in `op.ttt_linear`. Raises ValueError if there is no token.
    """
    wide, c, t = jnp.promote_types(q.dtype, jnp.float32), len(position), q.shape[1]
    if t == 0:
        raise ValueError("ttt_linear: there are no tokens")
    norm = norm_weight.astype(wide)[:, None], norm_bias.astype(wide)[:, None]  # [h, 1, d]
    tokens = [x.astype(wide) for x in (q, k, v, rate[..., None])]

    def step(model: Model, batch: list[Array]) -> tuple[Model, Array]:
        return mini_batch(model, *batch, position.astype(wide), norm)

    model = weight.astype(wide), bias.astype(wide)[:, :, None]
    out, whole = [], t - t % c
    if whole:
        batches = [rearrange(x[:, :whole], "b (n c) h d -> n b h c d", c=c) for x in tokens]
        model, found = jax.lax.scan(step, model, batches)
        out.append(rearrange(found, "n b h c d -> b (n c) h d"))
    if whole < t:
        model, found = step(model, [rearrange(x[:, whole:], "b c h d -> b h c d") for x in tokens])
        out.append(rearrange(found, "b h c d -> b c h d"))
    return jnp.concatenate(out, axis=1).astype(v.dtype), model[0], model[1][:, :, 0]


def mini_batch(
    model: Model,
    q: Float[Array, "b h c d"],
    k: Float[Array, "b h c d"],
    v: Float[Array, "b h c d"],
    rate: Float[Array, "b h c 1"],
    position: Float[Array, " n"],
    norm: tuple[Array, Array],
) -> tuple[Model, Float[Array, "b h c d"]]:
    """The model after a mini-batch, and what its queries read."""
    w, b = model
    eta = jnp.tril(position[: q.shape[2], None] * rate.mT)  # [b, h, c, c]
    grad = norm_loss_gradient(k @ w + b, v - k, *norm)
    read = q @ w + b - (eta * (q @ k.mT)) @ grad - eta @ grad
    last = eta[:, :, -1, :, None]
    stepped = w - (last * k).mT @ grad, b - (last * grad).sum(axis=2, keepdims=True)
    return stepped, q + layer_norm(read, *norm)


def layer_norm(x: Array, gamma: Array, beta: Array) -> Array:
    """(x - mean) / sqrt(variance + EPS) gamma + beta over the last dimension."""
    return unit(x)[0] * gamma + beta


def norm_loss_gradient(z: Array, target: Array, gamma: Array, beta: Array) -> Array:
    """d/dz of 1/2 |LN(z) - target|^2, over the last dimension."""
    normed, inverse = unit(z)
    slope = (normed * gamma + beta - target) * gamma  # d loss / d normed
    along = (slope * normed).mean(axis=-1, keepdims=True)
    return inverse * (slope - slope.mean(axis=-1, keepdims=True) - normed * along)


def unit(x: Array) -> tuple[Array, Array]:
    """x with mean 0 and variance 1 over the last dimension, and 1 / sqrt(variance + EPS)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + EPS)
    return centred * inverse, inverse
