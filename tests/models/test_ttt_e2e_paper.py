"""TTT-E2E at the paper's sizes: the configurations compose, build abstractly, and match."""

from __future__ import annotations

import dataclasses

import pytest

from models.language.config import TTTE2EConfig
from training.config import compose

jax = pytest.importorskip("jax")
from flax import nnx  # noqa: E402

from models.language.ttt_e2e import TTTE2E, losses, num_parameters  # noqa: E402

VOCAB = 128_256  # Llama 3
FACTS = {  # width, blocks, heads, prime blocks, parameters without the tied embedding, in millions
    "125m": (768, 12, 12, 3, 86),
    "350m": (1024, 24, 16, 6, 313),
    "760m": (1536, 24, 16, 6, 687),
    "1b": (2048, 24, 32, 6, 1228),
    "3b": (2560, 32, 32, 8, 2569),
}


def config_of(size: str) -> TTTE2EConfig:
    found = compose(["experiment=ttt_e2e/dclm", "scale=paper", f"model=ttt_e2e/{size}"]).model
    assert isinstance(found, TTTE2EConfig)
    return dataclasses.replace(found, vocab_size=VOCAB)


@pytest.mark.parametrize("size", FACTS)
def test_sizes_are_those_of_the_paper(size: str) -> None:
    width, blocks, heads, prime, millions = FACTS[size]
    config = config_of(size)
    assert (config.d_model, config.num_layers, config.num_heads) == (width, blocks, heads)
    assert (config.prime_layers, config.window, config.chunk) == (prime, 8192, 1024)
    assert prime == blocks // 4
    model = nnx.eval_shape(lambda: TTTE2E(config, rngs=nnx.Rngs(0)))
    inner = num_parameters(model) - VOCAB * width
    assert inner == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(("size", "plain"), [("125m", 2048), ("3b", 6912)])
def test_prime_mlps_are_paid_for_by_narrower_ones(size: str, plain: int) -> None:
    """The published widths: the decoder without prime MLPs has as many parameters, within 2 %."""
    config = config_of(size)
    ours = 3 * config.d_model * config.resolved_d_ff * (config.num_layers + config.prime_layers)
    theirs = 3 * config.d_model * plain * config.num_layers
    assert ours == pytest.approx(theirs, rel=0.02)


def test_the_state_of_the_largest_is_as_large_as_published() -> None:
    """Eight prime MLPs of 3 x 2560 x 5632: 346 M values for every sequence."""
    config = config_of("3b")
    fast = config.prime_layers * 3 * config.d_model * config.resolved_prime_d_ff
    assert fast == pytest.approx(346e6, rel=0.001)


@pytest.mark.parametrize("length", [8192, 32768])
def test_a_meta_gradient_has_the_right_shapes(length: int) -> None:
    config = config_of("125m")
    model = nnx.eval_shape(lambda: TTTE2E(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    tokens = jax.ShapeDtypeStruct((2, length + 1), "int32")

    def loss(params, tokens):
        return losses(nnx.merge(graph, params), tokens, remat_group=2).losses.mean()

    gradient = jax.eval_shape(jax.grad(loss), params, tokens)
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (gradient, params)]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])


@pytest.mark.parametrize("name", ["ttt_e2e/dclm", "ttt_e2e/pg19"])
def test_the_batches_are_half_a_million_or_a_million_tokens(name: str) -> None:
    config = compose([f"experiment={name}", "scale=paper"])
    data, million = config.data, 2**20
    assert data.batch_size * data.seq_len == (million // 2 if name.endswith("dclm") else million)
    assert data.batch_size % (config.optim.accumulate * config.scale.devices) == 0
