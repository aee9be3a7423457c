"""The jax twin is the torch decoder: same names, shapes, logits and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.language.config import RopeScaling, TransformerConfig
from models.language.transformer import Transformer, ngram_rows, num_parameters

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from models.language import transformer_jax as twin  # noqa: E402

VARIANTS = {
    "plain": {},
    "gqa_qk_norm": {"num_kv_heads": 2, "qk_norm": True},
    "window_untied": {"window": 4, "num_kv_heads": 1, "tie_embeddings": False},
    "ngram": {"ngram_orders": [2, 3], "ngram_buckets": 53},
    "everything": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "head_dim": 12,
        "window": 5,
        "tie_embeddings": False,
        "ngram_orders": [2, 4],
        "ngram_buckets": 53,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling(original_context=16),
    },
}
ATOL = 1e-5  # float32, values of order one


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request):
    config = TransformerConfig(vocab_size=41, d_model=32, num_layers=2, **request.param)
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # nothing left at zero or one, where a swap would not show
        for name, parameter in model.named_parameters():
            if "norm" in name or "ngram" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    state = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return model, twin.from_torch(config, state), state


def batch(t: int = 13):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(41, (2, t), generator=generator)
    segments = torch.randint(3, (2, t), generator=generator).sort(dim=1).values
    return tokens, segments


def test_forward_and_gradients_agree(pair):
    model, other, _ = pair
    packed = model.config.num_heads != model.config.resolved_kv_heads  # some variants of each kind
    tokens, segments = batch()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    segments = segments[:, :-1] if packed else None

    logits = model(inputs, segments=segments)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def step(other, inputs, targets, segments):
        logits = other(inputs, segments=segments)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -chosen.mean(), logits

    arrays = [None if x is None else jnp.asarray(x.numpy()) for x in (inputs, targets, segments)]
    (other_loss, other_logits), gradients = step(other, *arrays)
    np.testing.assert_allclose(other_logits, logits.detach().numpy(), rtol=0, atol=ATOL)
    np.testing.assert_allclose(other_loss, loss.item(), rtol=0, atol=ATOL)
    flat = {".".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(gradients)}
    assert flat.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(flat[name], parameter.grad, rtol=0, atol=ATOL, err_msg=name)


def test_weights_convert_both_ways_unchanged(pair):
    model, other, state = pair
    back = twin.to_torch(other)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
    assert twin.num_parameters(other) == num_parameters(model)


def test_shapes_without_values(pair):
    model = pair[0]
    abstract = nnx.eval_shape(lambda: twin.Transformer(model.config, rngs=nnx.Rngs(0)))
    assert twin.num_parameters(abstract) == num_parameters(model)
    assert isinstance(abstract.embed.weight.get_value(), jax.ShapeDtypeStruct)


def test_recomputing_activations_changes_nothing():
    config = TransformerConfig(vocab_size=41, d_model=32, num_layers=1)
    other, tokens = twin.Transformer(config, rngs=nnx.Rngs(0)), jnp.asarray(batch()[0].numpy())
    gradients = []
    for flag in (False, True):
        other.checkpoint_blocks = flag
        gradient = nnx.jit(nnx.grad(lambda model: jnp.square(model(tokens)).mean()))(other)
        gradients.append(jax.tree.leaves(gradient))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_initial_weights_have_the_distributions_of_the_torch_model():
    config = TransformerConfig(
        vocab_size=512, d_model=128, num_layers=3, qk_norm=True, ngram_orders=[2],
        ngram_buckets=64, tie_embeddings=False,
    )  # fmt: skip
    ours = twin.to_torch(twin.Transformer(config, rngs=nnx.Rngs(0)))
    for name, parameter in Transformer(config).named_parameters():
        assert ours[name].mean() == pytest.approx(parameter.mean().item(), abs=3e-3), name
        assert ours[name].std() == pytest.approx(parameter.std().item(), rel=0.05), name


def test_ngram_hash_is_the_same_integer():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2**31 - 1, (4, 50), generator=generator)
    segments = torch.randint(3, (4, 50), generator=generator).sort(dim=1).values
    for order in (2, 3, 7):
        for buckets in (1, 97, 16384):
            for documents in (None, segments):
                expected = ngram_rows(tokens, order, buckets, documents).numpy()
                documents = None if documents is None else jnp.asarray(documents.numpy())
                got = twin.ngram_rows(jnp.asarray(tokens.numpy()), order, buckets, documents)
                np.testing.assert_array_equal(got, expected)


def test_bad_input_says_what_was_expected(pair):
    model, other, state = pair
    with pytest.raises(ValueError, match=r"tokens must be \[b, t\]"):
        other(jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"segments must be \[b, t\] = \[2, 3\], got \[2, 2\]"):
        other(jnp.zeros((2, 3), int), segments=jnp.zeros((2, 2), int))
    renamed = {"norm.gain" if n == "norm.weight" else n: x for n, x in state.items()}
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\], unexpected \['norm.gain'\]"):
        twin.from_torch(model.config, renamed)
    with pytest.raises(
        ValueError, match=r"norm.weight has shape \[31\], the config asks for \[32\]"
    ):
        twin.from_torch(model.config, state | {"norm.weight": np.ones(31, np.float32)})
