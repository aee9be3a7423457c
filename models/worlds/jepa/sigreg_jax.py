"""The jax twin of sigreg.py: same names, arguments and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.worlds.jepa.quadrature import quadrature


def directions(dim: int, count: int, key: jax.Array) -> Float[Array, "d k"]:
    """`count` random unit vectors, in fp32."""
    drawn = jax.random.normal(key, (dim, count))
    return drawn / jnp.linalg.norm(drawn, axis=0)


def sigreg(
    z: Float[Array, "... n d"], directions: Float[Array, "d k"], *, scale_by_n: bool = True
) -> Float[Array, ""]:
    """Mean of the statistic over directions, and over what stands before n (views, time steps).

    Args:
        scale_by_n: times N, as in LeJEPA and LeWM; eb_jepa leaves the factor out.
    """
    t, weight = (jnp.asarray(x, jnp.float32) for x in quadrature())
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    h = jnp.matmul(wide, directions, precision="highest")  # [..., n, k]
    angle = h[..., None] * t  # [..., n, k, knots]
    cos, sin = jnp.cos(angle).mean(axis=-3), jnp.sin(angle).mean(axis=-3)
    apart = jnp.square(cos - jnp.exp(-jnp.square(t) / 2)) + jnp.square(sin)
    statistic = (apart * weight).sum(axis=-1).mean()
    return statistic * z.shape[-2] if scale_by_n else statistic
