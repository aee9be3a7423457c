"""The torch decoder: what each position may see, the cache, initialisation, training, bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.language.config import RopeScaling, TransformerConfig, flops_per_token
from models.language.inference.cache import KVCache
from models.language.transformer import Transformer, ngram_rows, num_parameters

VARIANTS = {
    "plain": {},
    "gqa_qk_norm": {"num_kv_heads": 2, "qk_norm": True},
    "window": {"window": 4, "num_kv_heads": 1},
    "ngram_untied": {"ngram_orders": [2, 3], "ngram_buckets": 53, "tie_embeddings": False},
    "llama31_wide_heads": {"head_dim": 12, "rope_scaling": RopeScaling(original_context=16)},
}


def build(seed: int = 0, **options) -> Transformer:
    config = TransformerConfig(**{"vocab_size": 41, "d_model": 32, "num_layers": 2} | options)
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    for table in model.ngram_tables:  # zero at the start: give them something to leak
        torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(seed))
    return model


def random_tokens(b: int = 2, t: int = 12, vocab: int = 41, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request) -> Transformer:
    return build(**request.param)


def test_a_token_changes_only_its_own_and_later_logits(model):
    tokens = random_tokens()
    base = model(tokens)
    for position in (0, 5, 11):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 41
        difference = (model(changed) - base).abs().amax(dim=(0, 2))
        assert (difference[:position] == 0).all()
        assert difference[position] > 1e-4


def test_documents_do_not_leak_into_each_other(model):
    first, second = random_tokens(t=5, seed=1), random_tokens(t=7, seed=2)
    segments = torch.tensor([0] * 5 + [1] * 7).expand(2, 12)
    packed = model(torch.cat([first, second], dim=1), segments=segments)
    other = model(torch.cat([(first + 1) % 41, second], dim=1), segments=segments)
    torch.testing.assert_close(packed[:, :5], model(first))
    assert torch.equal(packed[:, 5:], other[:, 5:])


def test_positions_are_relative():
    """A document that starts later in a packed row gets the logits it gets on its own."""
    model, second = build(), random_tokens(t=7, seed=2)
    packed = torch.cat([random_tokens(t=5), second], dim=1)
    segments = torch.tensor([0] * 5 + [1] * 7).expand(2, 12)
    torch.testing.assert_close(
        model(packed, segments=segments)[:, 5:], model(second), rtol=0, atol=1e-5
    )


def test_window_counts_the_token_itself():
    model, window = build(window=3, num_layers=1), 3
    tokens = random_tokens(b=1)
    base = model(tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 41
    touched = (model(changed) - base).abs().amax(dim=(0, 2)) > 0
    assert touched.nonzero().flatten().tolist() == list(range(4, 4 + window))


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]])
def test_cached_logits_equal_recomputed_ones(model, chunks):
    tokens = random_tokens()
    cache = KVCache(model.config, batch=2, max_len=12)
    with torch.no_grad():
        cached = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(cached, dim=1), model(tokens), rtol=0, atol=1e-5)
    assert cache.length == 12


def test_meta_build_gives_the_weights_of_a_direct_build(model):
    fresh = Transformer(model.config, generator=torch.Generator().manual_seed(7))
    with torch.device("meta"):
        late = Transformer(model.config)
    assert all(p.is_meta for p in late.parameters())
    assert num_parameters(late) == num_parameters(fresh)
    late.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(7))
    for (name, a), b in zip(fresh.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(fresh(random_tokens()), late(random_tokens()))


def test_state_is_exactly_the_parameters(model):
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_initial_logits_and_residual_stream_have_unit_scale():
    model = build(vocab_size=512, d_model=128, num_layers=8)
    tokens = random_tokens(b=4, t=64, vocab=512)
    assert model(tokens).std().item() == pytest.approx(1.0, abs=0.3)
    x = model.embed(tokens)
    assert x.std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_gradient_reaches_every_parameter(model):
    tokens = random_tokens()
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_recomputing_activations_changes_nothing(model):
    tokens, gradients = random_tokens(), []
    for flag in (False, True):
        model.checkpoint_blocks = flag
        model.zero_grad()
        model(tokens).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_overfits_one_batch(model):
    tokens = random_tokens(b=4, t=13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_traces_into_one_graph(model):
    tokens = random_tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.slow
def test_inductor_agrees():
    model, tokens = build(window=4, num_kv_heads=2, ngram_orders=[2]), random_tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-5)


def test_dtypes_follow_the_parameters():
    model = build(qk_norm=True)
    expected = model(random_tokens())
    assert model.to(torch.bfloat16)(random_tokens()).dtype == torch.bfloat16
    model = build(qk_norm=True).double()
    assert model(random_tokens()).dtype == torch.float64
    torch.testing.assert_close(model(random_tokens()).float(), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert build(qk_norm=True)(random_tokens()).dtype == torch.bfloat16


def test_ngram_rows_are_the_hash_of_the_last_tokens_only():
    tokens = torch.tensor([[7, 3, 3, 9, 7, 3, 3, 9]])
    rows = ngram_rows(tokens, order=3, buckets=10**6)
    assert rows[0, 2:4].tolist() == rows[0, 6:8].tolist()  # same three tokens
    assert len({*rows[0, :6].tolist()}) == 6  # shorter at the start: 7 and ..37 differ
    assert ngram_rows(tokens, 2, 10**6)[0, 0] != rows[0, 0]
    big = torch.tensor([[2**31 - 2] * 4])
    assert ((ngram_rows(big, 4, 977) >= 0) & (ngram_rows(big, 4, 977) < 977)).all()


def test_zero_ngram_tables_change_nothing():
    plain = build()
    config = TransformerConfig(vocab_size=41, d_model=32, num_layers=2, ngram_orders=[2])
    with_tables = Transformer(config, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(random_tokens()), with_tables(random_tokens()))


def test_parameters_and_flops_of_llama_8b():
    """Llama-3.1-8B: 8,030,261,248 parameters (its model card)."""
    config = TransformerConfig(
        vocab_size=128256, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14336,
        tie_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
        assert model(torch.empty(1, 8, dtype=torch.int64)).shape == (1, 8, 128256)
    assert num_parameters(model) == 8_030_261_248
    matmul = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert flops_per_token(config, 2048) == 6 * matmul + 12 * 32 * 4096 * 2048
    model.embed.requires_grad_(False)
    assert num_parameters(model, trainable_only=True) == 8_030_261_248 - 128256 * 4096
    config.window = 1024
    assert flops_per_token(config, 2048) == 6 * matmul + 12 * 32 * 4096 * 1024


def test_bad_input_says_what_was_expected():
    model, tokens = build(), random_tokens()
    with pytest.raises(ValueError, match=r"tokens must be \[b, t\] with b, t >= 1, got \[12\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"got \[2, 0\]"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"segments must be \[b, t\] = \[2, 12\], got \[2, 11\]"):
        model(tokens, segments=tokens[:, 1:])
    with pytest.raises(ValueError, match=r"2, 10\] \[b, max_len\] tokens, 0 used: \[2, 12\] more"):
        model(tokens, cache=KVCache(model.config, 2, 10))
    with pytest.raises(ValueError, match="do not fit"):
        model(tokens, cache=KVCache(model.config, 1, 12))
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, segments=tokens, cache=KVCache(model.config, 2, 12))
    with pytest.raises(ValueError, match="vocab_size is null"):
        Transformer(TransformerConfig())
    model.blocks[0].attention.impl = "flash"
    with pytest.raises(ValueError, match="impl='flash' is unknown"):
        model(tokens)


def test_annotations_hold():
    """Every public signature of models/, checked at run time by beartype."""
    code = """
from jaxtyping import install_import_hook
with install_import_hook("models", "beartype.beartype"):
    from models.language.config import TransformerConfig
    from models.language.inference.generation import generate
    from models.language.transformer import Transformer
    from models.language import huggingface
import tempfile, torch
options = dict(num_kv_heads=2, qk_norm=True, window=4, ngram_orders=[2])
for extra in ({}, options):
    model = Transformer(TransformerConfig(vocab_size=41, d_model=32, num_layers=2, **extra))
    tokens = torch.randint(41, (2, 7))
    model(tokens, segments=torch.zeros(2, 7, dtype=torch.int64)).sum().backward()
    generate(model, tokens, 3, temperature=0.7, top_k=5, top_p=0.9, stop_token=1)
    generate(model, tokens, 3, temperature=0.0)
model = Transformer(TransformerConfig(vocab_size=41, d_model=32, num_layers=1))
with tempfile.TemporaryDirectory() as directory:
    huggingface.save_pretrained(model, directory)
    huggingface.from_pretrained(directory)
try:
    model(tokens.float())
except Exception as error:
    assert "tokens" in str(error), error
else:
    raise SystemExit("float tokens passed the check")
import jax
with install_import_hook("models", "beartype.beartype"):
    from models.language import transformer_jax
from flax import nnx
twin = transformer_jax.Transformer(
    TransformerConfig(vocab_size=41, d_model=32, num_layers=2, **options), rngs=nnx.Rngs(0)
)
twin(jax.numpy.zeros((2, 7), int), segments=jax.numpy.zeros((2, 7), int))
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
