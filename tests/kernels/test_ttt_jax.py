"""The jax twin of TTT-Linear computes what the torch function does, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels.fast_weights.ttt.op import ttt_linear
from kernels.fast_weights.ttt.op_jax import ttt_linear as twin

FRESH = torch.seed() % 2**31


def inputs(t: int, c: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b, h, d = 2, 3, 6
    tokens = [normal(b, t, h, d) for _ in range(3)]
    rate, position = 0.2 * normal(b, t, h).sigmoid(), 1 / torch.arange(1.0, c + 1).double()
    start = [0.3 * normal(b, h, d, d), 0.1 * normal(b, h, d)]
    return [*tokens, rate, position, *start, 1 + 0.2 * normal(h, d), 0.2 * normal(h, d)]


@pytest.mark.parametrize(("t", "c"), [(8, 4), (11, 4), (3, 8), (5, 1)])
def test_outputs_models_and_gradients_are_those_of_torch(t: int, c: int) -> None:
    leaves = [x.requires_grad_() for x in inputs(t, c)]
    found = ttt_linear(*leaves)
    slopes = torch.autograd.grad(sum(x.square().sum() for x in found), leaves)

    with jax.enable_x64(True):
        given = [jnp.asarray(x.detach().numpy()) for x in leaves]
        other = jax.jit(twin)(*given)

        def total(*arguments: jax.Array) -> jax.Array:
            return sum(jnp.square(x).sum() for x in twin(*arguments))

        gradients = jax.grad(total, argnums=tuple(range(len(given))))(*given)
        for a, b in zip([*found, *slopes], [*other, *gradients], strict=True):
            np.testing.assert_allclose(np.asarray(b), a.detach().numpy(), rtol=1e-9, atol=1e-9)


def test_no_tokens_are_refused() -> None:
    given = [jnp.asarray(x.numpy()) for x in inputs(1, 2)]
    with pytest.raises(ValueError, match="there are no tokens"):
        twin(*(x[:, :0] for x in given[:4]), *given[4:])
