"""The gated delta rule: chunks are the recurrence, sequences continue, bad keys are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import gated_delta_rule, record
from kernels.fast_weights.gated_delta import reference

FRESH = torch.seed() % 2**31


def inputs(t: int, b: int = 2, h: int = 3, dk: int = 8, dv: int = 5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(FRESH)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(b, t, h, dk), F.normalize(normal(b, t, h, dk), dim=-1), normal(b, t, h, dv)
    beta, g = 2 * normal(b, t, h).sigmoid(), -normal(b, t, h).abs()
    return [x.to(dtype) for x in (q, k, v, beta, g, normal(b, h, dk, dv))]


@pytest.mark.parametrize("t", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_chunks_are_the_recurrence(t: int, gated: bool) -> None:
    q, k, v, beta, g, state = inputs(t)
    arguments = (q, k, v, beta, g if gated else None)
    for begin in (None, state):
        out, last = gated_delta_rule(*arguments, state=begin)
        expected, expected_last = reference.gated_delta_rule(*arguments, state=begin)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_the_recurrence() -> None:
    leaves = [x.requires_grad_() for x in inputs(70)]
    weight = torch.randn(2, 70, 3, 5, dtype=torch.float64)
    found = []
    for rule in (gated_delta_rule, reference.gated_delta_rule):
        out, last = rule(*leaves[:5], state=leaves[5])
        found.append(torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_fast_decay_does_not_overflow() -> None:
    q, k, v, beta, g, _ = inputs(130, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, beta, 40 * g)]
    out, last = gated_delta_rule(*leaves)
    (out.sum() + last.sum()).backward()
    for x in (out, last, *(leaf.grad for leaf in leaves)):
        assert x.isfinite().all()
    expected, _ = reference.gated_delta_rule(*leaves)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)  # sums of g reach -2000


def test_a_sequence_continues_from_its_state() -> None:
    q, k, v, beta, g, state = inputs(100)
    whole, last = gated_delta_rule(q, k, v, beta, g, state=state)
    first, middle = gated_delta_rule(*(x[:, :37] for x in (q, k, v, beta, g)), state=state)
    rest, end = gated_delta_rule(*(x[:, 37:] for x in (q, k, v, beta, g)), state=middle)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(end, last)


def test_with_full_steps_and_orthogonal_keys_it_is_a_dictionary() -> None:
    keys = torch.eye(6, dtype=torch.float64)[None, :, None].expand(1, 6, 1, 6)
    values = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    ones = torch.ones(1, 6, 1, dtype=torch.float64)
    out, state = gated_delta_rule(keys, keys, values, ones, scale=1.0)
    torch.testing.assert_close(out, values)
    new = torch.randn(1, 1, 1, 4, dtype=torch.float64)  # a key that comes again is overwritten
    _, state = gated_delta_rule(keys[:, :1], keys[:, :1], new, ones[:, :1], state=state)
    torch.testing.assert_close(state[0, 0], torch.cat([new[0, :, 0], values[0, 1:, 0]]))


def test_what_would_explode_or_contradicts_itself_is_refused() -> None:
    q, k, v, beta, g, state = inputs(9)
    with pytest.raises(ValueError, match=r"longest key has norm .*: normalise k"):
        gated_delta_rule(q, 2 * k, v, beta, g)
    with pytest.raises(ValueError, match="expected <= 0: a memory that grows"):
        gated_delta_rule(q, k, v, beta, -g)
    with pytest.raises(ValueError, match=r"beta must be \[b, t, h\] = \[2, 9, 3\], got \[2, 9\]"):
        gated_delta_rule(q, k, v, beta[..., 0], g)
    with pytest.raises(ValueError, match=r"state must be \[b, h, dk, dv\]"):
        gated_delta_rule(q, k, v, beta, g, state=state.mT)
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        gated_delta_rule(q, k, v, beta, g, impl="triton")
    with record() as choices:
        gated_delta_rule(q, k, v, beta, g)
    assert [(choice.op, choice.impl) for choice in choices] == [("gated_delta_rule", "torch")]
