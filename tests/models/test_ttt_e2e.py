"""TTT-E2E: what it computes, what its outer gradient is, what may change, how it goes on."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from models.language.config import InnerOrder, TTTE2EConfig

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from models.language.inference.ttt_e2e import Reader, generate  # noqa: E402
from models.language.transformer_jax import rotary, rotate  # noqa: E402
from models.language.ttt_e2e import (  # noqa: E402
    TTTE2E,
    PrimeBlock,
    initial_state,
    inner_step,
    matches_fast,
    read,
    scan,
)
from models.language.ttt_e2e import losses as eager_losses  # noqa: E402

losses = nnx.jit(eager_losses, static_argnums=(3, 4))
read = nnx.jit(read)
static = nnx.jit(TTTE2E.__call__)

V = 11


def build(seed: int = 0, **changes) -> TTTE2E:
    settings = {"d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "window": 8}
    settings |= {"chunk": 4, "prime_layers": 2, "init_std": 0.3, "vocab_size": V}
    return TTTE2E(TTTE2EConfig(**{**settings, **changes}), rngs=nnx.Rngs(seed))


def tokens(length: int, batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(V, size=(batch, length + 1))


@partial(nnx.jit, static_argnums=2)
def banded(model: TTTE2E, row: np.ndarray, window: int | None) -> jax.Array:
    """Logits by attention over the whole sequence at absolute positions, with a band mask."""
    t = len(row)
    cos, sin = rotary(model.config, t)
    age = np.arange(t)[:, None] - np.arange(t)
    mask = (age >= 0) & (age < (window or t))
    x = model.embed(row[None])[0]
    for block in model.blocks:
        a, y = block.attention, block.attention_norm(x)
        q, k, v = (p(y).reshape(t, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(a.q_norm(q), cos, sin), rotate(a.k_norm(k), cos, sin)
        out = jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask[None, None])[0]
        x = x + block.attention_post_norm(a.o_proj(out.reshape(t, -1)))
        if isinstance(block, PrimeBlock):
            x = x + block.prime_post_norm(block.prime(block.prime_norm(x)))
        x = x + block.mlp_post_norm(block.mlp(block.mlp_norm(x)))
    return model.norm(x) @ model.embed.weight.T


def outer(model: TTTE2E, row: np.ndarray, order: InnerOrder, rate: float = 0.7, group=None):
    """The outer loss as a function of the parameters, and the parameters."""
    graph, params = nnx.split(model, nnx.Param)
    return lambda p: eager_losses(
        nnx.merge(graph, p), row, rate, order, group
    ).losses.mean(), params


def relative(a, b) -> float:
    difference = sum(
        float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    return (difference / sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(b))) ** 0.5


@pytest.mark.parametrize("length", [4, 12, 32])
def test_without_a_rate_reading_in_chunks_is_sliding_attention_over_the_whole(length: int) -> None:
    model, rows = build(), tokens(length)
    reading = losses(model, rows, 0.0).losses
    for row, found in zip(rows, reading, strict=True):
        logits = banded(model, row[:-1], model.config.window)
        expected = -jax.nn.log_softmax(logits)[np.arange(length), row[1:]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    static = nnx.jit(lambda model: model.static_losses(jnp.asarray(rows)))(model)
    np.testing.assert_allclose(static, reading, atol=1e-5)


@pytest.mark.parametrize("length", [5, 8, 19])
def test_sliding_attention_in_blocks_is_that_with_a_band_mask_at_any_length(length: int) -> None:
    model, rows = build(), tokens(length)
    for row, found in zip(rows, static(model, rows), strict=True):
        np.testing.assert_allclose(found, banded(model, row, 8), atol=1e-5)


def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    rows = jnp.asarray(tokens(16))
    windowed, full = build(window=17), build(window=None)
    np.testing.assert_allclose(static(windowed, rows), static(full, rows), atol=5e-5)
    assert not np.allclose(static(build(), rows), static(full, rows), atol=1e-2)


def test_a_chunk_as_long_as_the_sequence_learns_nothing_that_is_scored() -> None:
    model, rows = build(chunk=8), tokens(8)
    np.testing.assert_allclose(
        losses(model, rows, 1.0, InnerOrder.first).losses,
        losses(model, rows, 1.0, InnerOrder.none).losses,
        atol=1e-6,
    )


def test_altering_a_token_changes_no_earlier_loss_and_some_later_one() -> None:
    model, rows = build(), tokens(24, batch=1)
    before = np.asarray(losses(model, rows).losses[0])
    for s in (1, 6, 12, 23):
        altered = rows.copy()
        altered[0, s] = (altered[0, s] + 1) % V
        after = np.asarray(losses(model, altered).losses[0])
        np.testing.assert_array_equal(before[: s - 1], after[: s - 1])
        assert before[s - 1] != after[s - 1]
    far = rows.copy()
    far[0, 1] = (far[0, 1] + 1) % V  # out of every window at the end: only fast weights remember
    windows = 3 * (model.config.window - 1)
    assert windows < 24 - 1 and losses(model, far).losses[0, -1] != before[-1]
    assert losses(model, far, 0.0).losses[0, -1] == losses(model, rows, 0.0).losses[0, -1]


def test_the_outer_gradient_is_the_derivative_through_the_inner_steps() -> None:
    with jax.enable_x64(True):
        model, rows = build(num_layers=2, prime_layers=1), jnp.asarray(tokens(12))
        loss, params = outer(model, rows, InnerOrder.second)
        exact = jax.jit(jax.grad(loss))(params)
        rough = jax.jit(jax.grad(outer(model, rows, InnerOrder.first)[0]))(params)
        direction = jax.tree.map(
            lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 60, params
        )

        def along(step: float) -> float:
            return float(loss(jax.tree.map(lambda p, d: p + step * d, params, direction)))

        h = 1e-5
        numeric = (along(h) - along(-h)) / (2 * h)
        analytic = sum(
            float(jnp.vdot(g, d))
            for g, d in zip(*map(jax.tree.leaves, (exact, direction)), strict=True)
        )
        assert numeric == pytest.approx(analytic, rel=1e-6)
        assert relative(rough, exact) > 1e-3


def test_first_and_second_order_on_a_quadratic_are_what_calculus_says() -> None:
    a, eta, w = 0.6, 0.5, 1.7

    def loss(w, stop):
        gradient = a * w
        stepped, _ = inner_step(w, jax.lax.stop_gradient(gradient) if stop else gradient, eta, None)
        return 0.5 * a * stepped**2

    assert jax.grad(loss)(w, False) == pytest.approx(a * (1 - eta * a) ** 2 * w)
    assert jax.grad(loss)(w, True) == pytest.approx(a * (1 - eta * a) * w)


def test_a_clipped_step_is_at_most_the_rate_and_is_differentiable_at_zero() -> None:
    gradient = {"a": jnp.full(3, 4.0), "b": jnp.full((2, 2), -3.0)}
    zero = jax.tree.map(jnp.zeros_like, gradient)
    stepped, norm = inner_step(zero, gradient, 0.5, 1.0)
    size = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(stepped)) ** 0.5
    assert norm == pytest.approx((48 + 36) ** 0.5, rel=1e-5)
    assert size == pytest.approx(0.5, rel=1e-5)
    small = jax.tree.map(lambda g: 0.01 * g, gradient)
    np.testing.assert_allclose(inner_step(zero, small, 0.5, 1.0)[0]["a"], -0.5 * 0.04, rtol=1e-6)
    slope = jax.grad(lambda g: jnp.sum(inner_step(zero, g, 1.0, 1.0)[0]["a"]))(zero)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("glob", ["blocks.*.prime.*.weight", "blocks.2.mlp.*", "*.prime_norm.*"])
def test_only_the_weights_that_the_glob_selects_change(glob: str) -> None:
    model = build(fast=glob)
    start = initial_state(model).fast
    state = read(model, jnp.asarray(tokens(8)[0]), initial_state(model), 1.0).state
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.fast)
    }
    names = [".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert sorted(flat) == sorted(n for n in names if matches_fast(model.config, n))
    for leaf, before in zip(jax.tree.leaves(state.fast), jax.tree.leaves(start), strict=True):
        assert not np.array_equal(leaf, before)


def test_fast_weights_stay_float32_under_bf16() -> None:
    model = build()
    graph, params = nnx.split(model, nnx.Param)
    narrow = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    reading = losses(narrow, tokens(16))
    assert {leaf.dtype for leaf in jax.tree.leaves(reading.state.fast)} == {jnp.dtype("float32")}
    assert {m.k.dtype for m in reading.state.memories} == {jnp.dtype("bfloat16")}
    assert reading.losses.dtype == jnp.float32
    np.testing.assert_allclose(reading.losses.mean(), losses(model, tokens(16)).losses.mean(), 0.05)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, rows = build(), tokens(16, batch=3)
    together = losses(model, rows)
    for i, row in enumerate(rows):
        alone = losses(model, row[None])
        np.testing.assert_allclose(together.losses[i], alone.losses[0], atol=1e-5)


def test_rematerialisation_changes_no_gradient() -> None:
    with jax.enable_x64(True):
        model, rows = build(num_layers=2, prime_layers=1), jnp.asarray(tokens(16))
        loss, params = outer(model, rows, InnerOrder.second)
        kept = jax.jit(jax.grad(loss))(params)
        again = jax.jit(jax.grad(outer(model, rows, InnerOrder.second, group=2)[0]))(params)
        assert relative(again, kept) < 1e-12


def test_rematerialisation_keeps_fewer_activations() -> None:
    model, rows = build(), jnp.asarray(tokens(64))

    def kept(group) -> int:
        loss, params = outer(model, rows, InnerOrder.second, group=group)
        _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(4) < 0.5 * kept(None)
    with pytest.raises(ValueError, match=r"recipe\.remat_group=3 does not divide the 4 chunks"):
        scan(lambda c, x: (c, x), 0, jnp.zeros(4), 3)


def test_reading_on_from_a_state_is_reading_at_once() -> None:
    model, row = build(), jnp.asarray(tokens(32)[0])
    whole = read(model, row, initial_state(model), 1.0)
    half = read(model, row[:17], initial_state(model), 1.0)
    rest = read(model, row[16:], half.state, 1.0)
    np.testing.assert_allclose(np.concatenate([half.losses, rest.losses]), whole.losses, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (rest.state, whole.state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_prime_output_the_block_is_the_plain_one() -> None:
    model, rows = build(fast="blocks.*.prime.gate_proj.weight"), jnp.asarray(tokens(8))
    for block in model.blocks[model.first_prime :]:
        block.prime.down_proj.weight.set_value(jnp.zeros_like(block.prime.down_proj.weight[...]))
    with_prime = static(model, rows)
    for block in model.blocks[model.first_prime :]:
        block.prime.gate_proj.weight.set_value(7 * block.prime.gate_proj.weight[...])
    np.testing.assert_array_equal(with_prime, static(model, rows))


@pytest.mark.parametrize("split", [(1, 20), (9, 12), (13, 8)])
def test_feeding_tokens_one_by_one_learns_what_reading_learns(split: tuple[int, int]) -> None:
    model, rows = build(), tokens(20)
    reader = Reader(model, len(rows))
    reader.extend(rows[:, : split[0]])
    for column in rows[:, split[0] :].T:
        reader.append(column)
    reading = losses(model, rows)
    for a, b in zip(*map(jax.tree.leaves, (reader.state, reading.state)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(reader.pending) == 1  # the last token, only a target so far
    state = jax.tree.map(lambda x: x[0], reader.state)
    longer = np.append(rows[0], [3, 1, 4, 1])
    after = read(model, jnp.asarray(longer[20:]), state, 1.0).losses[0]
    assert after == pytest.approx(-float(jax.nn.log_softmax(reader.logits[0])[3]), abs=1e-5)


def test_generation_learns_from_what_it_writes() -> None:
    model, prompt = build(), tokens(9)
    greedy = generate(model, prompt, 12, temperature=0)
    assert greedy.shape == (2, 22) and np.array_equal(greedy[:, :10], prompt)
    reader = Reader(model, 2)
    reader.extend(greedy[:, :-1])
    np.testing.assert_array_equal(np.argmax(reader.logits, axis=-1), greedy[:, -1])
    frozen = Reader(model, 2, inner_lr=0.0)
    frozen.extend(greedy[:, :-1])
    assert not np.allclose(frozen.logits, reader.logits, atol=1e-3)
    draw = partial(generate, model, prompt, 6, key=jax.random.key(0))
    np.testing.assert_array_equal(draw(), draw())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fast": "blocks.*.memory.*"}, "matches no weight; there are blocks.0.attention"),
        ({"fast": "blocks.0.mlp.*"}, "outside the last model.prime_layers=2 blocks"),
        ({"fast": "*"}, "outside the last model.prime_layers=2 blocks"),
        ({"fast": "blocks.2.*"}, "set model.fast_attention=true"),
        ({"window": 3}, "model.chunk=4 must be at least 1 and at most model.window=3"),
        ({"prime_layers": 4}, "model.prime_layers=4 must be between 1 and model.num_layers=3"),
        ({"inner_lr": float("nan")}, "model.inner_lr=nan must be at least 0"),
        ({"inner_clip": 0.0}, "model.inner_clip=0.0 above 0, or null"),
        ({"ngram_orders": [2]}, "no n-gram tables"),
    ],
)
def test_what_cannot_learn_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        build(**changes)


def test_a_length_that_is_no_whole_number_of_chunks_is_refused() -> None:
    for length in (3, 10):
        with pytest.raises(ValueError, match=f"{length} tokens are no whole number of chunks"):
            losses(build(), tokens(length))
    with pytest.raises(ValueError, match="full attention"):
        losses(build(window=None), tokens(8))
