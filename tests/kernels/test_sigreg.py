"""The characteristic function: against its definition, closed forms, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import characteristic_function
from kernels.parity.sigreg import draw
from kernels.sigreg import reference


def test_the_torch_path_agrees_with_the_definition() -> None:
    for seed in range(30):
        h, step, knots = draw("small", seed, torch.float64)
        found = characteristic_function(h, step, knots)
        torch.testing.assert_close(
            found, reference.characteristic_function(h, step, knots), rtol=0, atol=1e-13
        )


def test_of_normal_samples_it_is_the_normal_one() -> None:
    h = torch.randn(200_000, 3, dtype=torch.float64)
    cos, sin = characteristic_function(h, 0.25, 9)
    t = 0.25 * torch.arange(9, dtype=torch.float64)
    normal = torch.exp(-t.square() / 2)[:, None].expand(-1, 3)
    torch.testing.assert_close(cos, normal, rtol=0, atol=0.015)
    assert sin.abs().max() < 0.015


def test_of_one_point_it_goes_round_a_circle() -> None:
    cos, sin = characteristic_function(torch.full((7, 1), 2.0, dtype=torch.float64), 0.5, 4)
    assert cos[:, 0].tolist() == pytest.approx([math.cos(j) for j in range(4)])
    assert sin[:, 0].tolist() == pytest.approx([math.sin(j) for j in range(4)])


def test_gradients_of_the_torch_path() -> None:
    h = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    f = lambda x: characteristic_function(x, 0.3, 5, impl="torch")  # noqa: E731
    assert torch.autograd.gradcheck(f, h) and torch.autograd.gradgradcheck(f, h)


@pytest.mark.parametrize(
    ("h", "step", "knots", "message"),
    [
        (torch.zeros(3), 0.1, 4, r"h must be \[..., n, k\]"),
        (torch.zeros(0, 3), 0.1, 4, "at least one sample"),
        (torch.zeros(2, 3, dtype=torch.int32), 0.1, 4, "float dtype"),
        (torch.zeros(2, 3), 0.0, 4, "step=0.0"),
        (torch.zeros(2, 3), float("nan"), 4, "step=nan"),
        (torch.zeros(2, 3), 0.1, 0, "knots=0"),
        (torch.zeros(2, 3), 0.1, 65, "knots=65"),
    ],
)
def test_bad_input_is_refused(h, step, knots, message) -> None:
    with pytest.raises(ValueError, match=message):
        characteristic_function(h, step, knots)


def test_the_kernels_are_not_replaced_where_they_cannot_run() -> None:
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        characteristic_function(torch.zeros(2, 3), 0.1, 4, impl="triton")
