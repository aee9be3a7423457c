"""TTT-E2E in torch reads what the jax model reads, learns what it learns, and has its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.language import ttt_e2e_torch as twin
from models.language.config import InnerOrder, TTTE2EConfig

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from models.language import ttt_e2e  # noqa: E402
from models.language.transformer_jax import to_torch  # noqa: E402

SETTINGS = {"vocab_size": 11, "d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
SETTINGS |= {"window": 8, "chunk": 4, "prime_layers": 2, "init_std": 0.3}


def pair(**changes) -> tuple[ttt_e2e.TTTE2E, twin.TTTE2E]:
    config = TTTE2EConfig(**{**SETTINGS, **changes})
    model = ttt_e2e.TTTE2E(config, rngs=nnx.Rngs(0))
    weights = {name: torch.from_numpy(np.array(w)) for name, w in to_torch(model).items()}
    return model, twin.TTTE2E(config, weights)


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(11, size=length + 1)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "inner_clip": None}])
@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_losses_and_states_agree_over_chunks(changes: dict, rate: float) -> None:
    model, other = pair(**changes)
    row = tokens(24)
    reading = nnx.jit(ttt_e2e.read)(model, jnp.asarray(row), ttt_e2e.initial_state(model), rate)
    losses, state = twin.read(other, torch.from_numpy(row), other.initial_state(), rate)
    np.testing.assert_allclose(losses, reading.losses, atol=1e-4)
    theirs = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(reading.state.fast)
    }
    assert theirs.keys() == state.fast.keys()
    for name, weight in state.fast.items():
        np.testing.assert_allclose(weight, theirs[name], atol=1e-4)
    for (k, v), memory in zip(state.memories, reading.state.memories, strict=True):
        np.testing.assert_allclose(k, memory.k, atol=1e-4)
        np.testing.assert_allclose(v, memory.v, atol=1e-4)


def test_second_order_gradients_agree() -> None:
    with jax.enable_x64(True):
        model, other = pair(num_layers=2, prime_layers=1)
        other = other.double()
        row = tokens(12)
        graph, params = nnx.split(model, nnx.Param)

        @jax.jit
        def loss(params):
            batch = jnp.asarray(row)[None]
            return ttt_e2e.losses(
                nnx.merge(graph, params), batch, 0.7, InnerOrder.second
            ).losses.mean()

        exact = jax.grad(loss)(params)
        named = {
            ".".join(map(str, path)): np.asarray(leaf[...])
            for path, leaf in nnx.to_flat_state(exact)
        }
    start = {name: p for name, p in other.named_parameters() if name in other.initial_state().fast}
    state = other.initial_state()._replace(fast=start)
    losses, _ = twin.read(other, torch.from_numpy(row), state, 0.7, create_graph=True)
    losses.mean().backward()
    for name, parameter in other.named_parameters():  # rotary tables are float32 in both
        np.testing.assert_allclose(parameter.grad, named[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_reading_on_from_a_state_is_reading_at_once() -> None:
    _, model = pair()
    row = torch.from_numpy(tokens(32))
    whole, end = twin.read(model, row, model.initial_state())
    first, middle = twin.read(model, row[:17], model.initial_state())
    rest, last = twin.read(model, row[16:], middle)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(last.fast, end.fast)


def test_the_model_itself_never_changes_and_lengths_are_checked() -> None:
    _, model = pair()
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin.read(model, torch.from_numpy(tokens(16)), model.initial_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    with pytest.raises(ValueError, match="10 tokens are no whole number of chunks"):
        twin.read(model, torch.from_numpy(tokens(10)), model.initial_state())
