"""Terms against collapse: values that are known, what they punish, what they cannot see."""

from __future__ import annotations

import math

import pytest
import torch

from models.worlds.jepa.diagnostics import alarm, diagnose, rank_me, spectrum
from models.worlds.jepa.quadrature import KNOTS, quadrature
from models.worlds.jepa.regularizers import (
    hinge_std,
    inverse_dynamics,
    moments,
    off_diagonal,
    straightness,
    time_similarity,
)
from models.worlds.jepa.sigreg import directions, sigreg


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    print("seed", torch.seed())


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(("n", "hinge"), [(64, 0.0368), (256, 0.0182), (2048, 0.0061)])
def test_normal_latents_have_the_values_of_sampling_error(n: int, hinge: float) -> None:
    found = [moments(normal(n, 128)) for _ in range(40)]
    std = torch.stack([hinge_std(c) for c in found]).mean().item()
    cov = torch.stack([off_diagonal(c) for c in found]).mean().item()
    assert abs(std - hinge) < 0.12 * hinge
    assert abs(cov * (n - 1) - 1) < 0.05


def test_collapse_is_seen_by_the_standard_deviation_alone() -> None:
    point = moments(normal(1, 32).expand(100, -1))
    assert abs(hinge_std(point).item() - 0.99) < 1e-4
    assert off_diagonal(point).item() < 1e-9
    line = moments(normal(4096, 1).expand(-1, 32))
    assert hinge_std(line) < 0.05 and abs(off_diagonal(line).item() - 1) < 0.15


def test_moments_are_torchs() -> None:
    z = normal(50, 7).double() * 3 + 5
    torch.testing.assert_close(moments(z), torch.cov(z.T))
    assert moments(z.bfloat16()).dtype == torch.float32


def test_moments_of_several_processes_are_those_of_all_rows() -> None:
    z = normal(2, 30, 5).double()
    means: list[torch.Tensor] = []

    def first_pass(x: torch.Tensor) -> torch.Tensor:
        means.append(x)
        return x

    mean = z.mean((0, 1))
    parts = []
    for half in z:
        calls = iter([lambda _: mean, first_pass])
        parts.append(moments(half, lambda x, calls=calls: next(calls)(x), world=2))
    torch.testing.assert_close(sum(parts) / 2, torch.cov(z.flatten(0, 1).T))


def test_time_similarity_and_inverse_dynamics() -> None:
    z = normal(3, 1, 4) + torch.arange(5.0)[:, None] * torch.tensor([1.0, 0, 0, 2])
    assert abs(time_similarity(z).item() - 5 / 4) < 1e-5
    assert abs(straightness(z).item() - 1) < 1e-5
    actions = z[:, 1:, :2] - z[:, :-1, :2]
    assert inverse_dynamics(actions, actions) == 0
    assert abs(inverse_dynamics(-actions, actions).item() - 2) < 1e-4


# SIGReg


def statistic(z: torch.Tensor, count: int = 512, **kwargs) -> float:
    return sigreg(z, directions(z.shape[-1], count, torch.Generator().manual_seed(3)), **kwargs)


def of_normal(scale: float, n: int) -> float:
    """The expected statistic of N(0, scale^2) in closed form."""
    total = 0.0
    for t, weight in zip(*quadrature(), strict=True):
        apart = math.exp(-((scale * t) ** 2) / 2) - math.exp(-(t**2) / 2)
        total += weight * (n * apart**2 + 1 - math.exp(-((scale * t) ** 2)))
    return total


def test_normal_latents_have_the_published_statistic() -> None:
    assert abs(of_normal(1.0, 10**9) - 1.052464) < 1e-5 and len(quadrature()[0]) == KNOTS
    for n in (64, 256):
        draws = [statistic(normal(n, 192)).item() for _ in range(50)]
        assert abs(sum(draws) / 50 - 1.0525) < 0.06, n
    for scale in (0.5, 1.5):
        draws = [statistic(scale * normal(128, 192)).item() for _ in range(20)]
        assert abs(sum(draws) / 20 / of_normal(scale, 128) - 1) < 0.1
        assert of_normal(scale, 128) > 2 * of_normal(1.0, 128)


def test_a_point_has_the_published_statistic() -> None:
    for n in (128, 512):
        assert abs(statistic(torch.zeros(n, 16)).item() - 0.4020475 * n) < 1e-4 * n


def test_the_factor_n_is_a_switch() -> None:
    z = normal(100, 8)
    ratio = statistic(z) / statistic(z, scale_by_n=False)
    assert abs(ratio.item() - 100) < 1e-3


def test_shifts_and_low_rank_are_punished() -> None:
    z = normal(512, 64)
    base = statistic(z)
    assert statistic(z + 0.5) > 5 * base
    assert statistic(z[:, :1].expand(-1, 64)) > 20 * base
    assert statistic(normal(512, 8) @ normal(8, 64) / 8**0.5) > 2 * base


def test_blind_spots_are_as_documented() -> None:
    """Uniform coordinates and a sphere pass; so do trajectories that stand still."""
    uniform = (torch.rand(512, 192) - 0.5) * 12**0.5
    sphere = torch.nn.functional.normalize(normal(512, 192), dim=-1) * 192**0.5
    assert statistic(uniform) < 1.6 and statistic(sphere) < 1.6
    still = normal(1, 256, 64).expand(10, -1, -1)  # [t, n, d]: one latent for all of a walk
    assert statistic(still) < 1.6
    assert statistic(still.transpose(0, 1)) > 2, "pooled over time it would be seen"


def test_half_batches_whose_functions_are_averaged_are_the_whole_batch() -> None:
    z, axes = normal(2, 40, 8), directions(8, 32, torch.Generator().manual_seed(0))
    whole = sigreg(z.flatten(0, 1), axes)
    kept: list[list[torch.Tensor]] = []
    for half in z:
        kept.append([])
        sigreg(half, axes, all_mean=lambda x, into=kept[-1]: into.append(x) or x, world=2)
    means = [torch.stack(pair).mean(0) for pair in zip(*kept, strict=True)]
    calls = iter(means)
    found = sigreg(z[0], axes, all_mean=lambda _: next(calls), world=2)
    torch.testing.assert_close(found, whole)
    wrong = (sigreg(z[0], axes) + sigreg(z[1], axes)) / 2
    assert (wrong - whole).abs() > 1e-3, "averaging the statistics is something else"


def test_statistics_are_in_single_precision_under_autocast() -> None:
    z, axes = 30 * normal(64, 16), directions(16, 64, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found, covariance = sigreg(z, axes), moments(z)
    torch.testing.assert_close(found, sigreg(z, axes))
    torch.testing.assert_close(covariance, moments(z))


# Diagnostics


def test_ranks_of_known_latents() -> None:
    z = normal(2048, 192)
    assert abs(diagnose(z)["rank"] - 189.7) < 1
    low = normal(2048, 8) @ torch.linalg.qr(normal(192, 8)).Q.T
    assert abs(diagnose(low)["rank"] - 8) < 0.1 and diagnose(low)["participation"] < 8.1
    assert rank_me(torch.zeros(4)) == 0.0
    z = z.double()
    wanted = torch.linalg.svdvals(z - z.mean(0)) / 2047**0.5
    torch.testing.assert_close(spectrum(z), wanted)


def test_the_statistic_of_sigreg_is_seen_whatever_trains() -> None:
    assert 0.3 < diagnose(normal(4096, 64))["sigreg"] * 4096 < 2.2, "1.05 on average"
    assert abs(diagnose(torch.zeros(20_000, 8))["sigreg"] - 0.40205) < 1e-4
    assert diagnose(normal(4096, 64) * 1.3)["sigreg"] > 0.01


def test_the_alarm_names_what_is_wrong() -> None:
    healthy = diagnose(normal(1000, 32))
    assert alarm(healthy) is None and alarm({**healthy, "action_use": 3.0}) is None
    assert "actions are ignored" in str(alarm({**healthy, "action_use": 1.1}))
    noise_around_a_point = diagnose(5 + 1e-4 * normal(1000, 32))
    assert noise_around_a_point["rank_centred"] > 30, "looks full-rank once it is centred"
    assert "collapse" in str(alarm(noise_around_a_point))
    assert "recipe.regularizer" in str(alarm(noise_around_a_point))
    line = diagnose(normal(1000, 1) * torch.ones(32) + 1e-3 * normal(1000, 32))
    assert "dimensional collapse" in str(alarm(line))


# The jax twin


def test_the_jax_twin_says_the_same() -> None:
    jnp = pytest.importorskip("jax.numpy")
    from models.worlds.jepa import regularizers, regularizers_jax, sigreg_jax

    z, axes = 1.3 * normal(4, 50, 16) + 0.2, directions(16, 64, torch.Generator().manual_seed(1))
    rows, jz = z.flatten(0, 1), jnp.asarray(z.numpy())
    covariance = moments(rows)
    jax_covariance = regularizers_jax.moments(jz.reshape(-1, 16))
    pairs = {
        "moments": (covariance, jax_covariance),
        **{
            name: (
                getattr(regularizers, name)(covariance),
                getattr(regularizers_jax, name)(jax_covariance),
            )
            for name in ("hinge_std", "off_diagonal")
        },
        **{
            name: (getattr(regularizers, name)(z), getattr(regularizers_jax, name)(jz))
            for name in ("time_similarity", "straightness")
        },
        "inverse_dynamics": (
            inverse_dynamics(z[0], z[1]),
            regularizers_jax.inverse_dynamics(jz[0], jz[1]),
        ),
        "sigreg": (sigreg(z, axes), sigreg_jax.sigreg(jz, jnp.asarray(axes.numpy()))),
        "sigreg, no n": (
            sigreg(z, axes, scale_by_n=False),
            sigreg_jax.sigreg(jz, jnp.asarray(axes.numpy()), scale_by_n=False),
        ),
    }
    for name, (ours, twin) in pairs.items():
        twin = torch.tensor(jnp.asarray(twin).tolist())
        assert torch.allclose(ours, twin, rtol=1e-5, atol=1e-5), (name, ours, twin)


def test_the_jax_twin_has_the_same_gradients() -> None:
    jax = pytest.importorskip("jax")
    from models.worlds.jepa import sigreg_jax

    z, axes = normal(3, 20, 8), directions(8, 16, torch.Generator().manual_seed(1))
    z.requires_grad_()
    (ours,) = torch.autograd.grad(sigreg(z, axes), z)
    twin = jax.grad(sigreg_jax.sigreg)(jax.numpy.asarray(z.detach().numpy()), axes.numpy())
    torch.testing.assert_close(ours, torch.tensor(twin.tolist()), rtol=1e-4, atol=1e-6)
