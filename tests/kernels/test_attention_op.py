"""Attention: every implementation against the definition, the definition against its meaning."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kernels.attention import op, reference

# Sums of at most 64 terms reordered; a few units of 2^-52, 2^-23, 2^-8 on values of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def draw(seed: int, dtype: torch.dtype = torch.float64):
    """Random shapes and options; t <= s, and documents of random length."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, kv, d = rng.randint(1, 3), rng.choice([1, 2, 3]), rng.choice([2, 8, 16])
    s = rng.randint(1, 40)
    t = s if rng.random() < 0.5 else rng.randint(1, s)
    h = kv * rng.choice([1, 2, 4])
    q = torch.randn(b, t, h, d, generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, b, s, kv, d, generator=generator, dtype=torch.float64).to(dtype)
    causal = rng.random() < 0.8
    options = {
        "causal": causal,
        "window": rng.randint(1, s + 3) if causal and rng.random() < 0.5 else None,
        "segments": None,
        "scale": rng.choice([None, 0.3]),
    }
    if rng.random() < 0.5:
        options["segments"] = torch.randint(0, 3, (b, s), generator=generator).sort(dim=1).values
    return q, k, v, options


@pytest.mark.parametrize("impl", ["torch", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_implementations_agree_with_the_reference(impl, dtype):
    for seed in range(40):
        q, k, v, options = draw(seed, dtype)
        expected = reference.attention(q.double(), k.double(), v.double(), **options)
        out = op.attention(q, k, v, impl=impl, **options)
        assert out.dtype == dtype and out.shape == q.shape
        error = (out.double() - expected).abs().max().item()
        assert error < TOLERANCE[dtype], (seed, options)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_gradients_agree_with_the_reference(impl):
    for seed in range(12):
        q, k, v, options = draw(seed)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).double()
        expected = torch.autograd.grad(
            (reference.attention(*inputs, **options) * weights).sum(), inputs
        )
        got = torch.autograd.grad(
            (op.attention(*inputs, impl=impl, **options) * weights).sum(), inputs
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_torch_implementation_has_second_derivatives():
    q, k, v = torch.randn(
        3, 1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *x: op.attention(*x, window=2, impl="torch"), inputs)


def test_reference_equals_a_loop_over_queries():
    q, k, v, _ = draw(3)
    b, t, h, d = q.shape
    s, kv = k.shape[1:3]
    window, segments = 4, torch.arange(s).div(5, rounding_mode="floor").expand(b, s)
    out = reference.attention(q, k, v, window=window, segments=segments)
    for n, i, head in itertools.product(range(b), range(t), range(h)):
        position, group = s - t + i, head // (h // kv)
        keys = [
            j
            for j in range(s)
            if position - window < j <= position and segments[n, j] == segments[n, position]
        ]
        weights = (k[n, keys, group] @ q[n, i, head] / d**0.5).softmax(0)
        torch.testing.assert_close(out[n, i, head], weights @ v[n, keys, group])


def test_cross_attention_may_have_more_queries_than_keys():
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 3, 2, 4)
    expected = reference.attention(q, k, k, causal=False)
    for impl in ("torch", "sdpa"):
        torch.testing.assert_close(op.attention(q, k, k, causal=False, impl=impl), expected)


def test_non_contiguous_inputs():
    q, k, v = torch.randn(3, 2, 2, 9, 4).transpose(2, 3)  # [b, t, h, d] strided
    expected = reference.attention(q, k, v, window=3)
    for impl in ("torch", "sdpa"):
        torch.testing.assert_close(op.attention(q, k, v, window=3, impl=impl), expected)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
def test_traces_into_one_graph(impl, window):
    def loss(q, k, v, segments):
        return op.attention(q, k, v, window=window, segments=segments, impl=impl).square().sum()

    q = torch.randn(2, 6, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 9, 2, 8)
    segments = torch.arange(9).div(4, rounding_mode="floor").expand(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for documents in (None, segments):
        (got,) = torch.autograd.grad(compiled(q, k, v, documents), q)
        (expected,) = torch.autograd.grad(loss(q, k, v, documents), q)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_runs_on_meta(impl):
    q, k = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(2, 5, 2, 8, device="meta")
    out = op.attention(q, k, k, window=2, impl=impl)
    assert out.is_meta and out.shape == q.shape


def test_resolve_reports_what_runs():
    assert op.resolve("torch") == "torch"
    assert op.resolve("auto") in op.IMPLEMENTATIONS and op.resolve("auto") != "auto"


q4, k2 = torch.zeros(1, 3, 4, 8), torch.zeros(1, 5, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((q4, k2, k2), {"impl": "flash"}, "impl='flash' is unknown: use auto, torch, sdpa"),
        ((q4[0], k2, k2), {}, r"expects q \[b, t, h, d\]"),
        ((q4, k2, k2[:, :4]), {}, "of one shape"),
        ((q4, k2[..., :4], k2[..., :4]), {}, "batch and head width"),
        ((q4[:, :, :3], k2, k2), {}, "2 key/value heads do not divide 3 query heads"),
        ((k2, q4[:, :, :2], q4[:, :, :2]), {}, "5 queries cannot be the last of 3 keys"),
        ((q4.double(), k2, k2), {}, "one float dtype"),
        ((q4, k2, k2), {"window": 0}, "a window is >= 1"),
        ((q4, k2, k2), {"window": 2, "causal": False}, "needs causal=True"),
        ((q4, k2, k2), {"segments": torch.zeros(1, 3)}, r"\[b, s\] = \[1, 5\], got \[1, 3\]"),
    ],
)
def test_bad_input_says_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        op.attention(*arguments, **options)
