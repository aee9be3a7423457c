"""TTT layers: the dual form is gradient descent token by token, and sequences continue."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kernels import ttt_linear, ttt_mlp
from kernels.fast_weights.ttt import reference
from kernels.fast_weights.ttt.op import dual

FRESH = torch.seed() % 2**31


def inputs(t: int, c: int, mlp: bool = False, b: int = 2, h: int = 2, d: int = 6):
    """q, k, v, rate, position, state, norm scale and shift."""
    generator = torch.Generator().manual_seed(FRESH)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rate = 0.3 * normal(b, t, h).sigmoid()
    position = 1 / torch.arange(1, c + 1, dtype=torch.float64) + 0.1 * normal(c).abs()
    widths = [d, 2 * d, d] if mlp else [d, d]
    state = []
    for a, z in pairwise(widths):
        state += [0.3 * normal(b, h, a, z), 0.1 * normal(b, h, z)]
    norm = 1 + 0.2 * normal(h, d), 0.2 * normal(h, d)
    return [*(normal(b, t, h, d) for _ in range(3)), rate, position, state, *norm]


SIZES = [(1, 4), (8, 4), (11, 4), (16, 16), (5, 16), (9, 1)]


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
@pytest.mark.parametrize(("t", "c"), SIZES)
def test_the_dual_form_is_gradient_descent_token_by_token(t: int, c: int, mlp: bool) -> None:
    given = inputs(t, c, mlp)
    out, state = dual(*given)
    expected, expected_state = reference.ttt(*given)
    for found, wanted in zip([out, *state], [expected, *expected_state], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_outer_gradients_go_through_the_inner_steps(mlp: bool) -> None:
    q, k, v, rate, position, state, *norm = inputs(7, 3, mlp, b=1)
    leaves = [x.requires_grad_() for x in (q, k, v, rate, position, *state, *norm)]
    found = []
    for rule in (dual, reference.ttt):
        out, last = rule(q, k, v, rate, position, state, *norm)
        total = out.square().sum() + sum(x.square().sum() for x in last)
        found.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_a_sequence_continues_after_whole_mini_batches(mlp: bool) -> None:
    q, k, v, rate, position, state, *norm = inputs(14, 4, mlp)
    whole, end = dual(q, k, v, rate, position, state, *norm)
    first, middle = dual(*(x[:, :8] for x in (q, k, v, rate)), position, state, *norm)
    rest, last = dual(*(x[:, 8:] for x in (q, k, v, rate)), position, middle, *norm)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(last, end)


def test_a_rate_of_zero_reads_the_initial_model() -> None:
    q, k, v, rate, position, state, *norm = inputs(6, 4)
    out, *after = ttt_linear(q, k, v, 0 * rate, position, *state, *norm)
    torch.testing.assert_close(after, state)
    other, *_ = ttt_linear(q, -k, v + 1, 0 * rate, position, *state, *norm)
    torch.testing.assert_close(out, other)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_steps_lower_the_loss_they_descend(mlp: bool) -> None:
    q, k, v, rate, position, state, *norm = inputs(16, 16, mlp)
    _, stepped = dual(q, k, v, 0.2 * rate, position, state, *norm)

    def loss(state: list[torch.Tensor]) -> torch.Tensor:
        x = k
        for layer in range(0, len(state), 2):
            x = torch.nn.functional.gelu(x, approximate="tanh") if layer else x
            x = torch.einsum("bthd,bhde->bthe", x, state[layer]) + state[layer + 1][:, None]
        unit = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=reference.EPS)
        return (unit * norm[0] + norm[1] - (v - k)).square().sum()

    assert loss(stepped) < loss(state)


def test_shapes_that_contradict_each_other_are_refused() -> None:
    q, k, v, rate, position, state, *norm = inputs(6, 4)
    with pytest.raises(ValueError, match=r"rate must be \[2, 6, 2\], got \[2, 5, 2\]"):
        ttt_linear(q, k, v, rate[:, 1:], position, *state, *norm)
    with pytest.raises(ValueError, match=r"weight must be \[2, 2, 6, 6\]"):
        ttt_linear(q, k, v, rate, position, state[0][0], state[1], *norm)
    with pytest.raises(ValueError, match=r"position must be \[c\] with c >= 1"):
        ttt_linear(q, k, v, rate, position[:0], *state, *norm)
    with pytest.raises(ValueError, match="q, k and v must be"):
        ttt_linear(q, k[:, 1:], v, rate, position, *state, *norm)
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        ttt_linear(q, k, v, rate, position, *state, *norm, impl="triton")
    mlp = inputs(6, 4, mlp=True)[5]
    with pytest.raises(ValueError, match=r"W2 must be \[2, 2, 12, 6\]"):
        ttt_mlp(q, k, v, rate, position, [*mlp[:2], mlp[2].mT, mlp[3]], *norm)
