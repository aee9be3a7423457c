"""Prefixes: what a context leaves behind stands for it exactly, wherever it goes."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_cache.layout import QuantSpec
from models.language.config import MixingConfig, TransformerConfig
from models.language.inference.cache import KVCache
from models.language.prefix import Prefix, Reading, join, no_prefix, read
from models.language.transformer import Transformer

VARIANTS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "gqa_qk_norm": {"num_kv_heads": 1, "qk_norm": True},
}


def build(seed: int = 0, **options) -> Transformer:
    config = TransformerConfig(**{"vocab_size": 41, "d_model": 32, "num_layers": 3} | options)
    return Transformer(config, generator=torch.Generator().manual_seed(seed))


def random_tokens(b: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(41, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Transformer:
    return build(**request.param)


@torch.no_grad()
def test_the_keys_and_values_of_a_context_stand_for_it(model):
    context, question = random_tokens(3, 20), random_tokens(3, 7, seed=1)
    expected = model(torch.cat([context, question], dim=1))[:, 20:]
    tolerance = 1e-5 * expected.abs().max().item()
    prefix = read(model, context).prefix()
    assert prefix.position == 20 and prefix.rows == 20
    assert prefix.num_bytes == model.state_bytes(20) * 3
    assert (model(question, cache=prefix) - expected).abs().max() < tolerance
    off = Prefix(prefix.layers, 21)
    assert (model(question, cache=off) - expected).abs().max() > 100 * tolerance

    one = read(model, context[:1]).prefix().map(lambda x: x[0])  # the same rows for everybody
    shared = model(torch.cat([context[:1].expand(3, -1), question], dim=1))[:, 20:]
    assert (model(question, cache=one) - shared).abs().max() < tolerance


@torch.no_grad()
def test_a_cache_that_begins_with_a_prefix_goes_on_token_by_token(model):
    context, question = random_tokens(2, 20), random_tokens(2, 7, seed=1)
    expected = model(torch.cat([context, question], dim=1))[:, 20:]
    cache = KVCache(model.config, 2, 7, page=16, prefix=read(model, context).prefix())
    steps = [model(question[:, i : i + 1], cache=cache) for i in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert cache.position == 27 and cache.length == 7

    fewer = read(model, context).prefix().map(lambda x: x[:, 10:])  # rows are not positions
    cache = KVCache(model.config, 2, 7, page=16, prefix=fewer)
    torch.testing.assert_close(
        model(question, cache=cache), model(question, cache=fewer), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["none", "int4"])
@torch.no_grad()
def test_sequences_share_the_pages_of_a_prefix_that_fills_them(kind, model):
    context, question = random_tokens(1, 48), random_tokens(5, 7, seed=1)
    rows = read(model, context).prefix()
    options = {"page": 16, "quant": QuantSpec(kind)}
    shared = KVCache(model.config, 5, 7, prefix=rows.map(lambda x: x[0]), **options)
    copied = KVCache(
        model.config, 5, 7, prefix=rows.map(lambda x: x.expand(5, -1, -1, -1)), **options
    )
    assert (shared.shared, copied.shared) == (3, 0)
    assert shared.num_bytes * (5 * 4) == copied.num_bytes * (3 + 5)
    for i in range(7):
        token = question[:, i : i + 1]
        found, expected = model(token, cache=shared), model(token, cache=copied)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    odd = KVCache(model.config, 5, 7, prefix=rows.map(lambda x: x[0, 1:]), **options)
    assert odd.shared == 0, "a page that is not full would be written by all"


@torch.no_grad()
def test_a_context_read_in_two_parts_leaves_what_it_leaves_in_one(model):
    context = random_tokens(2, 20)
    whole = read(model, context).prefix()
    first = read(model, context[:, :12]).prefix()
    both = join([first, read(model, context[:, 12:], first).prefix()], 20)
    for parts, expected in zip(both.layers, whole.layers, strict=True):
        torch.testing.assert_close(parts, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_distances_between_positions_matter(model):
    tokens = random_tokens(2, 12)
    base = model(tokens)
    torch.testing.assert_close(
        model(tokens, positions=torch.arange(12) + 500), base, atol=2e-4, rtol=1e-4
    )
    gap = torch.arange(12) + 8 * (torch.arange(12) >= 6)
    jumped = model(tokens, positions=gap)
    torch.testing.assert_close(jumped[:, :6], base[:, :6])
    assert (jumped[:, 6:] - base[:, 6:]).abs().max() > 1e-2


def test_gradients_reach_the_rows(model):
    model = model.double()
    with torch.no_grad():
        prefix = read(model, random_tokens(1, 4)).prefix().map(lambda x: x[0])
    rows = [x.clone().requires_grad_() for layer in prefix.layers for x in layer]
    question = random_tokens(2, 3, seed=1)

    def loss(*rows: torch.Tensor) -> torch.Tensor:
        layers = tuple(zip(rows[::2], rows[1::2], strict=True))
        return model(question, cache=Prefix(layers, 4)).square().mean()

    value = loss(*rows)
    value.backward()
    step = 1e-6
    for x in rows:
        at = tuple(int(i) for i in torch.unravel_index(x.grad.abs().argmax(), x.shape))
        with torch.no_grad():
            x[at] += step
            above = loss(*rows)
            x[at] -= 2 * step
            slope = (above - loss(*rows)) / (2 * step)
            x[at] += step
        torch.testing.assert_close(slope, x.grad[at], rtol=1e-5, atol=1e-9)


def test_no_rows_are_no_context(model):
    tokens = random_tokens(2, 5)
    empty = no_prefix(model.config, model.embed.weight)
    torch.testing.assert_close(model(tokens, cache=empty), model(tokens))


def test_what_does_not_fit_is_refused(model):
    prefix = read(build(**VARIANTS["mha"], seed=1), random_tokens(1, 4)).prefix()
    for other in (build(num_layers=2), build(num_kv_heads=2)):
        with pytest.raises(ValueError, match="made for another model"):
            other(random_tokens(1, 2), cache=prefix)
    for config in ({"window": 4}, {"mixing": MixingConfig(pattern=["gated_delta"])}):
        with pytest.raises(ValueError, match="nothing else"):
            build(**config)(random_tokens(1, 2), cache=prefix)
    reading = Reading()
    model(random_tokens(1, 2), cache=reading)
    with pytest.raises(ValueError, match="one call"):
        model(random_tokens(1, 2), cache=reading)
    with pytest.raises(ValueError, match="positions must be"):
        model(random_tokens(1, 2), positions=torch.arange(3))
