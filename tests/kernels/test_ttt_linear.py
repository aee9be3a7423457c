"""TTT-Linear: the dual form is gradient descent token by token, and sequences continue."""

from __future__ import annotations

import pytest
import torch

from kernels import ttt_linear
from kernels.fast_weights.ttt_linear import reference

FRESH = torch.seed() % 2**31


def inputs(t: int, c: int, b: int = 2, h: int = 2, d: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rate = 0.3 * normal(b, t, h).sigmoid()
    position = 1 / torch.arange(1, c + 1, dtype=torch.float64) + 0.1 * normal(c).abs()
    weight, bias = 0.3 * normal(b, h, d, d), 0.1 * normal(b, h, d)
    norm = 1 + 0.2 * normal(h, d), 0.2 * normal(h, d)
    qkv = [normal(b, t, h, d) for _ in range(3)]
    return [*qkv, rate, position, weight, bias, *norm]


@pytest.mark.parametrize(("t", "c"), [(1, 4), (8, 4), (11, 4), (16, 16), (5, 16), (9, 1)])
def test_the_dual_form_is_gradient_descent_token_by_token(t: int, c: int) -> None:
    given = inputs(t, c)
    for found, expected in zip(ttt_linear(*given), reference.ttt_linear(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_outer_gradients_go_through_the_inner_steps() -> None:
    given = inputs(7, 3, b=1)
    leaves = [x.requires_grad_() for x in given]
    found = []
    for rule in (ttt_linear, reference.ttt_linear):
        out, weight, bias = rule(*leaves)
        total = out.square().sum() + weight.square().sum() + bias.sum()
        found.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_a_sequence_continues_after_whole_mini_batches() -> None:
    q, k, v, rate, position, weight, bias, *norm = inputs(14, 4)
    whole, last_weight, last_bias = ttt_linear(q, k, v, rate, position, weight, bias, *norm)
    head = [x[:, :8] for x in (q, k, v, rate)]
    tail = [x[:, 8:] for x in (q, k, v, rate)]
    first, *state = ttt_linear(*head, position, weight, bias, *norm)
    rest, *end = ttt_linear(*tail, position, *state, *norm)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(end, [last_weight, last_bias])


def test_a_rate_of_zero_reads_the_initial_model() -> None:
    q, k, v, rate, position, weight, bias, *norm = inputs(6, 4)
    out, *state = ttt_linear(q, k, v, 0 * rate, position, weight, bias, *norm)
    torch.testing.assert_close(state, [weight, bias])
    other, *_ = ttt_linear(q, -k, v + 1, 0 * rate, position, weight, bias, *norm)
    torch.testing.assert_close(out, other)


def test_steps_lower_the_loss_they_descend() -> None:
    q, k, v, rate, position, weight, bias, *norm = inputs(16, 16)
    _, stepped, shift = ttt_linear(q, k, v, rate, position, weight, bias, *norm)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        z = torch.einsum("bthd,bhde->bthe", k, weight) + bias[:, None]
        unit = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=reference.EPS)
        return (unit * norm[0] + norm[1] - (v - k)).square().sum()

    assert loss(stepped, shift) < loss(weight, bias)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    q, k, v, rate, position, weight, bias, *norm = inputs(6, 4)
    with pytest.raises(ValueError, match=r"rate must be \[2, 6, 2\], got \[2, 5, 2\]"):
        ttt_linear(q, k, v, rate[:, 1:], position, weight, bias, *norm)
    with pytest.raises(ValueError, match=r"weight must be \[2, 2, 6, 6\]"):
        ttt_linear(q, k, v, rate, position, weight[0], bias, *norm)
    with pytest.raises(ValueError, match=r"position must be \[c\] with c >= 1"):
        ttt_linear(q, k, v, rate, position[:0], weight, bias, *norm)
    with pytest.raises(ValueError, match="q, k and v must be"):
        ttt_linear(q, k[:, 1:], v, rate, position, weight, bias, *norm)
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        ttt_linear(q, k, v, rate, position, weight, bias, *norm, impl="triton")
