"""merge_states: against its definition, against attention over all keys, and its derivatives."""

from __future__ import annotations

import pytest
import torch

from kernels import attention, merge_states
from kernels.attention import merge_reference
from kernels.parity.merge import draw

INF = float("inf")


def states(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random states in float64, with sets that queries saw nothing of."""
    outs, lses = draw("small", seed, torch.float64)
    return [(out, lse.double()) for out, lse in zip(outs, lses, strict=True)]


def test_agrees_with_the_definition_whatever_an_empty_state_holds():
    for seed in range(40):
        given = states(seed)
        out, lse = merge_states(given)
        expected, expected_lse = merge_reference.merge_states(given)
        assert out.isfinite().all() and (out[0, 0, 0] == 0).all() and (lse[0, 0, 0] == -INF).all()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


def test_definition_equals_a_softmax_over_all_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64)  # 3 sets of 5 keys
    values = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    parts = [
        ((s.softmax(0) @ v)[None, None], s.logsumexp(0)[None, None])  # t = h = 1
        for s, v in zip(scores, values, strict=True)
    ]
    out, lse = merge_reference.merge_states(parts)
    torch.testing.assert_close(out[0, 0], scores.flatten().softmax(0) @ values.flatten(0, 1))
    torch.testing.assert_close(lse[0, 0], scores.flatten().logsumexp(0))


def test_order_and_nesting_do_not_matter():
    a, b, c = next(found for found in map(states, range(99)) if len(found) == 3)
    flat = merge_states([a, b, c])
    for other in (merge_states([c, a, b]), merge_states([merge_states([a, b]), c])):
        torch.testing.assert_close(other, flat, rtol=0, atol=1e-13)


def whole_and_parts(cuts: list[int], drop_dlse: bool = False):
    """Values, LSE and gradients of attention over all keys, and over pieces of them, merged."""
    generator = torch.Generator().manual_seed(3)
    t, s, h, kv, d = 4, 23, 4, 2, 8
    q = torch.randn(2, t, h, d, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, s, kv, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, t, h, d, generator=generator, dtype=torch.float64)
    weight_lse = torch.randn(2, h, t, generator=generator, dtype=torch.float64)

    def results(function):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = function(*leaves)
        loss = (out * weight).sum() + (lse * weight_lse).sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    def merged(q, k, v):
        pieces = []
        for begin, end in zip([0, *cuts], [*cuts, s], strict=True):
            options = {"causal": False, "return_lse": True, "impl": "torch"}
            out, lse = attention(q, k[:, begin:end], v[:, begin:end], **options)
            pieces.append((out, lse.detach() if drop_dlse else lse))
        return merge_states(pieces)

    whole = results(lambda *x: attention(*x, causal=False, return_lse=True, impl="torch"))
    return whole, results(merged)


@pytest.mark.parametrize("cuts", [[10], [1, 2], [7, 7, 16], [0]])
def test_any_split_of_the_keys_equals_the_whole_in_values_and_gradients(cuts):
    whole, parts = whole_and_parts(cuts)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_without_the_gradient_of_the_lse_the_gradients_are_wrong():
    whole, parts = whole_and_parts([10], drop_dlse=True)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-12)
    assert (parts[2] - whole[2]).abs().max() > 0.1 and (parts[3] - whole[3]).abs().max() > 0.1


def test_gradients_are_exact_and_finite_at_empty_states():
    outs, lses = zip(
        *next(found for found in map(states, range(99)) if len(found) == 4), strict=True
    )
    leaves = [x.clone().requires_grad_() for x in (*outs, *lses)]

    def loss(*leaves):
        out, lse = merge_states(list(zip(leaves[: len(outs)], leaves[len(outs) :], strict=True)))
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()

    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for gradient in gradients:
        assert gradient.isfinite().all()
    for lse, gradient in zip(lses, gradients[len(outs) :], strict=True):
        assert lse.isinf().any() and (gradient[lse.isinf()] == 0).all()
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    assert all(x.isfinite().all() for x in second)


def test_derivatives_of_first_and_second_order():
    generator = torch.Generator().manual_seed(5)
    outs = [torch.randn(2, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    lses = [torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    leaves = [x.requires_grad_() for x in (*outs, *lses)]

    def function(*leaves):
        return merge_states(list(zip(leaves[:3], leaves[3:], strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_low_precision_states_merge_in_float32():
    given = [(out.bfloat16(), lse.float()) for out, lse in states(12)]
    out, lse = merge_states(given)
    expected, _ = merge_reference.merge_states([(o.double(), s.double()) for o, s in given])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8)


x, y = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "at least one"),
        (
            [(x, y.mT)],
            {},
            r"expects out \[..., t, h, d\] and lse \[..., h, t\], got \[1, 2, 3, 4\]",
        ),
        ([(x, y), (x[:, :1], y[..., :1])], {}, "state 1 is"),
        ([(x, y), (x.half(), y)], {}, "one dtype"),
        ([(x, y.double())], {}, "must be torch.float32, got torch.float64"),
        ([(x.int(), y)], {}, "float dtype of 16 bits"),
        ([(x, y)], {"impl": "sdpa"}, "impl='sdpa' is unknown"),
        ([(x, y)], {"impl": "triton"}, "not on a GPU"),
    ],
)
def test_bad_input_says_what_was_expected(given, options, message):
    with pytest.raises(ValueError, match=message):
        merge_states(given, **options)
