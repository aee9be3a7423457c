"""The jax twin of regularizers.py: same names, arguments and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def moments(z: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """Covariance matrix of the rows, in fp32 at least."""
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    z = z - z.mean(axis=0)
    return jnp.matmul(z.T, z, precision="highest") / (len(z) - 1)


def hinge_std(covariance: Float[Array, "d d"]) -> Float[Array, ""]:
    """How far features fall short of a standard deviation of 1: 0.99 where all are constant."""
    std = jnp.sqrt(jnp.diagonal(covariance) + 1e-4)
    return jax.nn.relu(1 - std).mean()


def off_diagonal(covariance: Float[Array, "d d"]) -> Float[Array, ""]:
    """Mean square of the covariances of different features: 1 where all features are one."""
    d = len(covariance)
    if d < 2:
        return jnp.zeros((), covariance.dtype)
    apart = covariance * (1 - jnp.eye(d, dtype=covariance.dtype))
    return jnp.square(apart).sum() / (d * (d - 1))


def time_similarity(z: Float[Array, "b t d"]) -> Float[Array, ""]:
    """Mean square of a step in latent space."""
    return jnp.square(z[:, 1:] - z[:, :-1]).mean()


def inverse_dynamics(
    told: Float[Array, "b t-1 a"], actions: Float[Array, "b t-1 a"]
) -> Float[Array, ""]:
    """Error of what was told of the actions between latents."""
    return jnp.square(told - actions).mean()


def straightness(z: Float[Array, "b t d"]) -> Float[Array, ""]:
    """Mean cosine between a step in latent space and the next: 1 on straight lines."""
    steps = z[:, 1:] - z[:, :-1]
    a, b = steps[:, 1:], steps[:, :-1]
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return ((a * b).sum(axis=-1) / jnp.maximum(norms, 1e-8)).mean()
