"""Layers with fast weights: their equations, what they keep, and the decoder around them."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from models.language.config import Mixer, MixingConfig, TransformerConfig
from models.language.inference.cache import KVCache
from models.language.inference.generation import generate
from models.language.lact import LaCTState, gradients, lact, orthogonalised, swiglu
from models.language.titans import MemoryState, chunk_weights, remember
from models.language.transformer import Transformer, num_parameters

FRESH = torch.seed() % 2**31
FAST = [Mixer.ttt_linear, Mixer.ttt_mlp, Mixer.lact, Mixer.delta, Mixer.gated_delta, Mixer.titans]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(FRESH + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build(*pattern: Mixer, **changes) -> Transformer:
    mixing = MixingConfig(pattern=list(pattern), chunk=4, **changes.pop("mixing", {}))
    settings = {"vocab_size": 13, "d_model": 16, "num_layers": 2, "num_heads": 2, "window": 4}
    config = TransformerConfig(**{**settings, **changes}, mixing=mixing)
    model = Transformer(config, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():  # nothing at zero, where a wrong sign would not show
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
    return model


def tokens(t: int, b: int = 2) -> torch.Tensor:
    return torch.randint(13, (b, t), generator=torch.Generator().manual_seed(FRESH))


@pytest.mark.parametrize("mixer", FAST)
@pytest.mark.parametrize("t", [3, 21])
def test_altering_a_token_changes_no_earlier_output_and_every_chunk_after(
    mixer: Mixer, t: int
) -> None:
    model, given = build(mixer), tokens(t)
    before = model(given)
    s = t // 3
    altered = given.clone()
    altered[:, s] = (altered[:, s] + 1) % 13
    after = model(altered)
    torch.testing.assert_close(before[:, :s], after[:, :s], rtol=0, atol=1e-12)
    assert (before[:, s:] - after[:, s:]).abs().amax(dim=(0, 2)).min() > 0


INNER = {
    Mixer.ttt_linear: ("kernels.fast_weights.ttt.op", "dual"),
    Mixer.ttt_mlp: ("kernels.fast_weights.ttt.op", "dual"),
    Mixer.lact: ("models.language.lact", "lact"),
    Mixer.delta: ("kernels.fast_weights.gated_delta.op", "chunked"),
    Mixer.gated_delta: ("kernels.fast_weights.gated_delta.op", "chunked"),
    Mixer.titans: ("models.language.titans", "remember"),
}


@pytest.mark.parametrize("mixer", FAST)
def test_fast_weights_are_as_wide_as_they_are_under_autocast(
    mixer: Mixer, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = import_module(INNER[mixer][0]), INNER[mixer][1]
    inner, calls = getattr(module, name), []

    def spied(*given, **more):
        calls.append(torch.is_autocast_enabled("cpu"))
        return inner(*given, **more)

    monkeypatch.setattr(module, name, spied)
    with torch.autocast("cpu", torch.bfloat16):
        out = build(mixer).float()(tokens(9))
    assert calls and not any(calls) and out.isfinite().all()


@pytest.mark.parametrize("mixer", FAST)
def test_weights_in_bfloat16_give_what_rounding_leaves(mixer: Mixer) -> None:
    model, given = build(mixer), tokens(21)
    exact = model(given)
    rough = model.to(torch.bfloat16)(given)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("mixer", FAST)
def test_a_token_far_behind_the_window_is_remembered(mixer: Mixer) -> None:
    given = tokens(40)
    altered = given.clone()
    altered[:, 2] = (altered[:, 2] + 1) % 13
    gap = build(mixer)(given)[:, -1] - build(mixer)(altered)[:, -1]
    assert gap.abs().max() > 1e-9
    windowed = build(Mixer.sliding)
    torch.testing.assert_close(windowed(given)[:, -1], windowed(altered)[:, -1])


@pytest.mark.parametrize("mixer", FAST)
def test_sequences_of_a_batch_do_not_see_each_other(mixer: Mixer) -> None:
    model, given = build(mixer), tokens(18, b=3)
    alone = torch.cat([model(row[None]) for row in given])
    torch.testing.assert_close(model(given), alone)


@pytest.mark.parametrize("mixer", FAST)
def test_every_parameter_is_trained(mixer: Mixer) -> None:
    model = build(mixer)
    F.cross_entropy(model(tokens(20)).flatten(0, 1), tokens(20).flatten().flip(0)).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mixer", FAST)
def test_the_weights_are_those_of_a_build_on_meta(mixer: Mixer) -> None:
    config = build(mixer).config
    direct = Transformer(config, generator=torch.Generator().manual_seed(5))
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(model) == num_parameters(direct)
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(5))
    for (name, a), (_, b) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all(), name


def test_a_pattern_is_repeated_over_the_blocks() -> None:
    model = build(Mixer.sliding, Mixer.gated_delta, num_layers=4)
    kinds = [type(block.attention).__name__ for block in model.blocks]
    assert kinds == ["Attention", "GatedDeltaNet"] * 2
    assert model.blocks[0].attention.window == 4
    assert build(Mixer.full).blocks[0].attention.window is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": [Mixer.full] * 3}, "has 3 mixers, which do not divide model.num_layers=4"),
        ({"pattern": [Mixer.sliding], "window": None}, "needs a window: set model.window"),
        ({"pattern": [Mixer.lact], "window": 8}, "model.window=8 is smaller than model.mixing.ch"),
        ({"pattern": [Mixer.titans], "num_heads": 16}, "odd width"),
        ({"pattern": [Mixer.delta], "mixing_heads": 3}, "does not divide model.d_model=16"),
        ({"chunk": 0}, "at least 1"),
        ({"max_lr": 0.0}, "model.mixing.max_lr=0.0 must be > 0"),
    ],
)
def test_patterns_that_cannot_be_are_refused(changes: dict, said: str) -> None:
    own = {key: changes.pop(key) for key in ("chunk", "max_lr") if key in changes}
    heads = changes.pop("mixing_heads", None)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        mixing = MixingConfig(pattern=changes.pop("pattern", []), num_heads=heads, **own)
        TransformerConfig(
            **{"d_model": 16, "num_heads": 2, "window": 4, "head_dim": 8, **changes}, mixing=mixing
        )


def test_fast_weights_refuse_documents() -> None:
    model, given = build(Mixer.delta), tokens(6)
    with pytest.raises(ValueError, match=r"cannot take data\.document_mask"):
        model(given, segments=torch.zeros_like(given))


@torch.no_grad()
@pytest.mark.parametrize("mixer", FAST)
def test_a_sequence_cut_into_calls_anywhere_is_the_sequence(mixer: Mixer) -> None:
    model, given = build(mixer), tokens(40)
    whole = model(given)
    cuts = sorted({0, 40, *torch.randint(1, 40, (8,)).tolist()})
    cache = KVCache(model.config, batch=2, max_len=40)
    parts = [model(given[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-9)
    once = KVCache(model.config, batch=2, max_len=40)
    torch.testing.assert_close(model(given, cache=once), whole, rtol=0, atol=1e-9)
    for past, same in zip(cache.past, once.past, strict=True):
        assert past is not None and same is not None and past.pending == same.pending
        torch.testing.assert_close(leaves(past.state), leaves(same.state), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("mixer", FAST)
def test_what_a_cache_keeps_does_not_grow_and_is_what_is_said(mixer: Mixer) -> None:
    model, sizes = build(mixer).float(), []
    cache = KVCache(model.config, batch=1, max_len=64)
    for _ in range(64):
        model(tokens(1, b=1), cache=cache)
        sizes.append(sum(x.numel() for past in cache.past for x in leaves(past)))
    assert 4 * max(sizes[:32]) == 4 * max(sizes[32:]) == model.state_bytes(64)


@pytest.mark.parametrize("pattern", [[mixer] for mixer in FAST] + [[Mixer.sliding, Mixer.delta]])
def test_writing_goes_on_from_what_was_read(pattern: list[Mixer]) -> None:
    model, given = build(*pattern).float(), tokens(11)
    written = given
    for _ in range(9):
        written = torch.cat([written, model(written)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, given, 9, temperature=0), written)


def leaves(tree: object) -> list[torch.Tensor]:
    """Tensors of nested tuples and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for item in tree for x in leaves(item)] if isinstance(tree, tuple | list) else []


# LaCT


def lact_inputs(t: int = 11):
    b, h, hd, f = 2, 2, 6, 8
    q, k = (F.normalize(normal(b, t, h, hd, seed=i), dim=-1) for i in (1, 2))
    weights = normal(b, h, f, hd, seed=3), normal(b, h, hd, f, seed=4), normal(b, h, f, hd, seed=5)
    rates, momentum = normal(3, b, h, t, seed=6).exp(), normal(b, t, h, seed=7).sigmoid()
    return q, k, normal(b, t, h, hd, seed=8), rates, momentum, weights


def test_lact_gradients_are_those_of_autograd() -> None:
    _, k, v, rates, _, weights = lact_inputs()
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    found = gradients(k, v, rates, weights)
    for index in range(3):
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        loss = -(rates[index, ..., None] * swiglu(k, tuple(leaves)) * v).sum()
        expected = -torch.autograd.grad(loss, leaves[index])[0]
        torch.testing.assert_close(found[index], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("muon", [True, False])
def test_lact_keeps_the_norm_of_every_row_and_reads_before_it_learns(muon: bool) -> None:
    q, k, v, rates, momentum, weights = lact_inputs()
    out, (after, *_) = lact(q, k, v, rates, momentum, LaCTState.at(weights), 4, muon=muon)
    for w, begun in zip(after, weights, strict=True):
        torch.testing.assert_close(w.norm(dim=-1), begun.norm(dim=-1), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(w, begun, atol=1e-2)
    unlearned = swiglu(q.transpose(1, 2), weights).transpose(1, 2)
    torch.testing.assert_close(out[:, :4], unlearned[:, :4])
    assert not torch.allclose(out[:, 4:], unlearned[:, 4:], atol=1e-3)


def test_with_muon_only_the_ratios_of_the_rates_matter() -> None:
    q, k, v, rates, momentum, weights = lact_inputs()
    once, _ = lact(q, k, v, rates, momentum, LaCTState.at(weights), 4)
    scaled, _ = lact(q, k, v, 7 * rates, momentum, LaCTState.at(weights), 4)
    torch.testing.assert_close(once, scaled, rtol=1e-5, atol=1e-6)
    plain, _ = lact(q, k, v, 7 * rates, momentum, LaCTState.at(weights), 4, muon=False)
    assert not torch.allclose(
        plain, lact(q, k, v, rates, momentum, LaCTState.at(weights), 4, muon=False)[0]
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_newton_schulz_sets_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(normal(1, 2, *shape), full_matrices=False)
    m = 30 * u @ torch.diag(torch.linspace(1, 0.2, min(shape), dtype=torch.float64)) @ v
    values = torch.linalg.svdvals(orthogonalised(m))
    assert values.min() > 0.7 and values.max() < 1.3
    zero = torch.zeros(1, 1, *shape, dtype=torch.float64, requires_grad=True)
    orthogonalised(zero).sum().backward()
    assert not orthogonalised(zero).any() and zero.grad.isfinite().all()


# Titans


def titans_inputs(t: int = 10):
    b, h, hd, f = 2, 2, 6, 8
    q, k, v = (normal(b, t, h, hd, seed=i) for i in (1, 2, 3))
    eta, theta, alpha = (normal(b, h, t, seed=i).sigmoid() for i in (4, 5, 6))
    state = MemoryState(
        (0.4 * normal(b, h, hd, f, seed=7), 0.4 * normal(b, h, f, hd, seed=8)),
        (0.1 * normal(b, h, hd, f, seed=9), 0.1 * normal(b, h, f, hd, seed=10)),
    )
    norm = 1 + 0.1 * normal(h, 1, hd, seed=11), 0.1 * normal(h, 1, hd, seed=12)
    return q, k, v, eta, theta, alpha, state, norm


def remember_token_by_token(q, k, v, eta, theta, alpha, state, norm, chunk):
    """The recurrences as the paper writes them, gradients by autograd where the chunk began."""
    out, ends = (
        torch.zeros_like(v),
        MemoryState(
            tuple(torch.zeros_like(w) for w in state.weights),
            tuple(torch.zeros_like(w) for w in state.momentum),
        ),
    )
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):

            def memory(x, m, head=head):
                z = F.gelu(x @ m[0], approximate="tanh") @ m[1]
                return x + F.layer_norm(z, z.shape, norm[0][head, 0], norm[1][head, 0], 1e-6)

            m = [w[row, head] for w in state.weights]
            s = [w[row, head] for w in state.momentum]
            for t in range(q.shape[1]):
                begun = list(m) if t % chunk == 0 else begun
                out[row, t, head] = memory(q[row, t, head], begun)

                def loss(m, t=t, row=row, head=head, memory=memory):
                    return 0.5 * (memory(k[row, t, head], m) - v[row, t, head]).square().sum()

                grad = torch.func.grad(loss)(begun)
                size = sum(g.square().sum() for g in grad).sqrt().clamp(min=1.0)
                e, a = eta[row, head, t], alpha[row, head, t]
                s = [e * x - theta[row, head, t] * g / size for x, g in zip(s, grad, strict=True)]
                m = [(1 - a) * x + y for x, y in zip(m, s, strict=True)]
            for index in range(2):
                ends.weights[index][row, head] = m[index]
                ends.momentum[index][row, head] = s[index]
    return out, ends


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_the_memory_in_closed_form_is_the_recurrence(chunk: int) -> None:
    given = titans_inputs()
    out, state = remember(*given, chunk)
    expected, end = remember_token_by_token(*given, chunk)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    for found, wanted in zip((*state[0], *state[1]), (*end[0], *end[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_a_memory_continues_from_its_state() -> None:
    q, k, v, eta, theta, alpha, state, norm = titans_inputs(12)
    whole, end = remember(q, k, v, eta, theta, alpha, state, norm, 4)
    halves, middle = [], state
    for part in (slice(0, 8), slice(8, 12)):
        tokens_, rates = (
            (x[:, part] for x in (q, k, v)),
            (x[..., part] for x in (eta, theta, alpha)),
        )
        out, middle = remember(*tokens_, *rates, middle, norm, 4)
        halves.append(out)
    torch.testing.assert_close(torch.cat(halves, dim=1), whole)
    torch.testing.assert_close(middle, end)


def test_gates_that_close_make_no_nan() -> None:
    eta = torch.tensor([[[0.0, 1e-30, 0.5]]], requires_grad=True)
    alpha = torch.tensor([[[1.0, 0.3, 0.0]]], requires_grad=True)
    kept = chunk_weights(eta, torch.ones(1, 1, 3), alpha)
    sum(x.sum() for x in kept).backward()
    assert all(x.isfinite().all() for x in (*kept, eta.grad, alpha.grad))
