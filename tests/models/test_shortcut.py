"""Shortcuts: who knows the way makes no error, steps are those of the formula, and many small ones
keep what one large one loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.worlds.video.shortcut import (
    between,
    draw_levels,
    flow_loss,
    jump_loss,
    powers,
    slope,
    travel,
    two_halves,
)

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
MOST = 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(FRESH + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def levels(*shape: int, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH + 9)
    return draw_levels(torch.rand(*shape, 2, generator=generator), MOST, least)


def test_levels_lie_on_the_grid_of_their_own_step_and_all_of_them_are_drawn() -> None:
    tau, d = levels(4000)
    assert (tau % d == 0).all() and (tau + d <= MOST).all()
    found = set(zip(tau.tolist(), d.tolist(), strict=True))
    assert found == {(t, s) for s in powers(MOST) for t in range(0, MOST, s)}
    assert levels(400, least=2)[1].min() == 2
    with pytest.raises(ValueError, match="most=6 must be a power of two"):
        draw_levels(torch.rand(3, 2), 6)


def test_who_knows_what_is_there_has_no_error_at_any_level() -> None:
    x_0, x_1 = noise(50, 6, 3), noise(50, 6, 3, seed=1)
    tau, d = levels(50, 6, least=2)
    assert flow_loss(lambda z, tau, d: x_1, x_0, x_1, tau, MOST).max() < 1e-20
    assert jump_loss(lambda z, tau, d: x_1, x_0, x_1, tau, d, MOST).max() < 1e-20
    for steps in powers(MOST):
        torch.testing.assert_close(travel(lambda z, tau, d: x_1, x_0, steps, MOST), x_1)


def test_errors_are_those_of_the_formulas() -> None:
    x_0, x_1 = noise(20, 5, 2), noise(20, 5, 2, seed=1)
    tau, d = levels(20, 5, least=2)

    def tell(z: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z) * (1 + tau[..., None] / MOST) + d[..., None] / MOST

    flow = flow_loss(tell, x_0, x_1, tau, MOST)
    jump = jump_loss(tell, x_0, x_1, tau, d, MOST)
    for i in range(20):
        for t in range(5):
            a, s = tau[i, t].item() / MOST, d[i, t].item() / MOST
            z = (1 - a) * x_0[i, t] + a * x_1[i, t]

            def f(z: torch.Tensor, a: float, s: float) -> torch.Tensor:
                return torch.tanh(z) * (1 + a) + s

            weight = 0.9 * a + 0.1
            wanted = weight * (f(z, a, 1 / MOST) - x_1[i, t]).square().mean()
            assert flow[i, t].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-9)
            b1 = (f(z, a, s / 2) - z) / (1 - a)
            z2 = z + b1 * s / 2
            b2 = (f(z2, a + s / 2, s / 2) - z2) / (1 - a - s / 2)
            away = (f(z, a, s) - z) / (1 - a) - (b1 + b2) / 2
            wanted = weight * (1 - a) ** 2 * away.square().mean()
            assert jump[i, t].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-9)


def test_errors_of_slopes_are_those_of_velocities_and_weigh_each_level_alike() -> None:
    x_0, x_1 = noise(20, 5, 2), noise(20, 5, 2, seed=1)
    tau, d = levels(20, 5, least=2)

    def v(z: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z) + d[..., None] / MOST

    def tell(z: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return z + (1 - tau[..., None] / MOST) * v(z, d)

    weight, z = 0.9 * tau / MOST + 0.1, between(x_0, x_1, tau, MOST)
    wanted = weight * (v(z, torch.ones_like(d)) - (x_1 - x_0)).square().mean(-1)
    found = flow_loss(tell, x_0, x_1, tau, MOST, slopes=True)
    torch.testing.assert_close(found, wanted, check_dtype=False)
    first = v(z, d // 2)
    second = v(z + first * (d / 2 / MOST)[..., None], d // 2)
    wanted = weight * (v(z, d) - (first + second) / 2).square().mean(-1)
    found = jump_loss(tell, x_0, x_1, tau, d, MOST, slopes=True)
    torch.testing.assert_close(found, wanted, check_dtype=False)


def test_no_gradient_flows_through_the_two_halves() -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x_0, tau, d = noise(4, 3, 2), torch.zeros(4, 3, dtype=torch.long), torch.full((4, 3), 4)
    assert not two_halves(lambda z, tau, d: weight * z, x_0, tau, d, MOST).requires_grad
    calls: list[bool] = []

    def tell(z: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return weight * z

    jump_loss(tell, x_0, noise(4, 3, 2, seed=1), tau, d, MOST).sum().backward()
    assert calls == [True, False, False] and weight.grad is not None


def gaussian(z: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """E[x_1 | z] where x_1 is normal: tau z / ((1 - tau)^2 + tau^2)."""
    a = tau.to(z)[..., None] / MOST
    return a * z / ((1 - a) ** 2 + a**2)


@pytest.mark.parametrize("steps", powers(MOST))
def test_the_spread_of_what_plain_steps_reach_is_the_product_of_their_factors(steps: int) -> None:
    """One step from noise tells the mean of all; more keep more of the spread, towards 1."""
    z = noise(4000, 2, 3)
    reached = travel(gaussian, z, steps, MOST)
    factor, size = 1.0, 1 / steps
    for k in range(steps):
        a = k * size
        told = a / ((1 - a) ** 2 + a**2)
        factor *= 1 + size * (told - 1) / (1 - a)
    torch.testing.assert_close(reached, factor * z)
    assert (factor == 0) == (steps == 1)
    if steps == MOST:
        assert 0.7 < factor < 1


def test_a_step_on_the_way_is_the_slope_times_its_length() -> None:
    z, told = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    tau = torch.full((2, 3), 2)
    torch.testing.assert_close(slope(told, z, tau, MOST), (told - z) / 0.75)
    x_0, x_1 = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    along = between(x_0, x_1, tau, MOST)
    torch.testing.assert_close(slope(x_1, along, tau, MOST), x_1 - x_0)
    with pytest.raises(ValueError, match=r"steps=3 must be one of \[1, 2, 4, 8\]"):
        travel(gaussian, z, 3, MOST)
