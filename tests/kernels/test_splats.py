"""Rasterising in plain torch: against its definition, closed forms, what must not change it, and
bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels import rasterize
from kernels.parity.splats import draw, with_gradients
from kernels.splats import constants, reference
from kernels.splats.harmonics import harmonics
from kernels.splats.project import rotations

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


def one(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A round Gaussian on the axis of a camera of 32 x 32."""
    given = {
        "means": torch.tensor([[0.0, 0.0, 2.0]]),
        "quats": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "scales": torch.full((1, 3), 0.1),
        "opacities": torch.tensor([0.8]),
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[40.0, 0, 16], [0, 40, 16], [0, 0, 1]]]),
        "colors": torch.tensor([[1.0, 0.5, 0.25]]),
    }
    return {name: x.double() for name, x in (given | changes).items()}


@pytest.mark.parametrize("tile", [8, 16])
def test_images_and_gradients_are_those_of_the_definition(tile: int) -> None:
    for seed in range(FRESH, FRESH + 12):
        inputs, options = draw("small", seed)
        exact = with_gradients(reference.rasterize, inputs, options)
        found = with_gradients(rasterize, inputs, options, impl="torch", tile=tile)
        for name, value in exact.items():
            scale = value.abs().max().clamp_min(1)
            worst = (found[name] - value).abs().max() / scale
            assert worst < 1e-9, (seed, name, worst)


def test_one_gaussian_is_a_closed_form() -> None:
    seen = rasterize(**one(), width=32, height=32)
    variance = (40 * 0.1 / 2) ** 2 + constants.BLUR
    y, x = torch.meshgrid(*[torch.arange(32).double() + 0.5 - 16] * 2, indexing="ij")
    alpha = 0.8 * torch.exp(-(x**2 + y**2) / (2 * variance))
    alpha = torch.where(alpha >= constants.ALPHA_LEAST, alpha, 0)
    torch.testing.assert_close(seen.alpha[0], alpha)
    torch.testing.assert_close(seen.color[0], alpha[..., None] * one()["colors"][0])
    torch.testing.assert_close(seen.depth[0], torch.where(alpha > 0, 2.0, 0.0).double())


def test_gradients_are_those_of_finite_differences() -> None:
    inputs, options = draw("small", FRESH)
    few = {k: x[:5] if k not in ("viewmats", "Ks", "background") else x for k, x in inputs.items()}
    few |= {"viewmats": inputs["viewmats"][:1], "Ks": inputs["Ks"][:1]}
    if "colors" in few:
        few["colors"] = inputs["colors"].reshape(-1, *inputs["colors"].shape[-2:])[0][:5]
    if "background" in few:
        few["background"] = few["background"].reshape(-1, few["background"].shape[-1])[0]
    names = list(few)

    def images(*given: torch.Tensor):
        seen = rasterize(**dict(zip(names, given, strict=True)), **options)
        return seen.color, seen.alpha

    leaves = [x.detach().requires_grad_() for x in few.values()]
    assert torch.autograd.gradcheck(images, leaves, eps=1e-7, atol=1e-4, rtol=1e-4, nondet_tol=0)


def test_nothing_changes_with_order_or_sign_or_units_or_the_frame_of_the_world() -> None:
    for seed in range(FRESH, FRESH + 5):
        inputs, options = draw("small", seed)
        n = len(inputs["means"])
        if "sh" in inputs:  # colours would turn with the world
            inputs["colors"] = inputs.pop("sh")[:, 0].abs()
        seen = rasterize(**inputs, **options)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(n, generator=generator)
        shuffled = {k: x[order] for k, x in inputs.items() if x.shape[0] == n and k in (
            "means", "quats", "scales", "opacities")}  # fmt: skip
        shuffled["colors"] = inputs["colors"][..., order, :]
        turn = torch.eye(4, dtype=torch.float64)
        turn[:3, :3] = rotations(torch.tensor([[0.5, -0.1, 0.7, 0.2]]).double())[0]
        turn[:3, 3] = torch.tensor([0.3, -2.0, 1.0])
        moved = inputs["means"] @ turn[:3, :3].T + turn[:3, 3]
        quats = times(torch.tensor([0.5, -0.1, 0.7, 0.2]).double(), inputs["quats"])
        larger = {"means": 7 * inputs["means"], "scales": 7 * inputs["scales"],
                  "viewmats": inputs["viewmats"].clone(), "near": 7 * constants.NEAR}  # fmt: skip
        larger["viewmats"][:, :3, 3] *= 7
        for changes in (
            shuffled,
            {"quats": -3 * inputs["quats"]},
            {"means": moved, "quats": quats, "viewmats": inputs["viewmats"] @ turn.inverse()},
            larger,
        ):
            other = rasterize(**(inputs | changes), **options)
            torch.testing.assert_close(other.color, seen.color, rtol=0, atol=1e-9)
            torch.testing.assert_close(other.alpha, seen.alpha, rtol=0, atol=1e-9)


def times(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Quaternions wxyz: the turn r, then q."""
    w, x, y, z = q.unbind(-1)
    a, b, c, d = r.unbind(-1)
    return torch.stack([
        w * a - x * b - y * c - z * d, w * b + x * a + y * d - z * c,
        w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a,
    ], dim=-1)  # fmt: skip


def test_thin_gaussians_do_not_vanish_along_their_ridge() -> None:
    """In float32 the exponent of a needle is a difference of much larger numbers."""
    turn = math.radians(45) / 2
    needle = one(
        quats=torch.tensor([[math.cos(turn), 0, 0, math.sin(turn)]]),
        scales=torch.tensor([[3.0, 1e-6, 1e-6]]), opacities=torch.tensor([0.9]),
    )  # fmt: skip
    exact = rasterize(**needle, width=32, height=32).alpha
    found = rasterize(**{k: x.float() for k, x in needle.items()}, width=32, height=32).alpha
    assert exact[0].diagonal().min() > 0.8
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)


def test_what_is_narrower_than_a_pixel_covers_as_much_less_if_antialiased() -> None:
    small = one(scales=torch.full((1, 3), 0.005))
    plain = rasterize(**small, width=32, height=32).alpha.sum()
    less = rasterize(**small, width=32, height=32, antialiased=True).alpha.sum()
    own = (40 * 0.005 / 2) ** 2
    assert (less / plain).item() == pytest.approx(own / (own + constants.BLUR), rel=0.1)


def test_probes_learn_the_sizes_of_what_centres_learn() -> None:
    """The same where all gradients have one sign; more where they cancel."""
    given, leaf = one(), torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    given["means"].requires_grad_()
    seen = rasterize(**given, width=32, height=32, probe=leaf)
    seen.projected.centers.retain_grad()
    seen.alpha[0, :, :16].sum().backward()  # the left half pulls to the left
    assert leaf.grad is not None and seen.projected.centers.grad is not None
    left, up = seen.projected.centers.grad[0, 0].abs()
    sizes = leaf.grad[0, 0]
    torch.testing.assert_close(sizes[0], left)
    assert up < 1e-9 and sizes[1] > 0.5


def test_harmonics_are_orthonormal() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(8)
    angles = (np.arange(16) + 0.5) * 2 * np.pi / 16
    z, phi = (torch.from_numpy(x).flatten() for x in np.meshgrid(nodes, angles))
    area = torch.from_numpy(np.tile(weights, (16, 1))).flatten() * 2 * np.pi / 16
    x, y = (1 - z**2).sqrt() * phi.cos(), (1 - z**2).sqrt() * phi.sin()
    basis = torch.stack(harmonics(x, y, z, 3))
    torch.testing.assert_close((basis * area) @ basis.T, torch.eye(16).double(), atol=1e-9, rtol=0)


def test_nothing_there_is_the_background() -> None:
    nothing = {k: x[:0] if k in ("means", "quats", "scales", "opacities", "colors") else x
               for k, x in one().items()}  # fmt: skip
    for given in (nothing, one(means=torch.tensor([[0.0, 0, -2]])), one(opacities=torch.zeros(1))):
        light = torch.tensor([0.2, 0.4, 0.6]).double()
        given["means"].requires_grad_()
        seen = rasterize(**given, width=20, height=9, background=light)
        (slope,) = torch.autograd.grad((seen.color.sum() + seen.depth.sum()), given["means"])
        assert (slope == 0).all()
        assert seen.pairs == 0 and (seen.alpha == 0).all() and (seen.depth == 0).all()
        assert (seen.color == light).all()


def test_a_camera_inside_of_gaussians_sees_finite_things() -> None:
    inputs, options = draw("small", FRESH)
    inputs["viewmats"][:, :3, 3] = 0
    inputs["scales"] = inputs["scales"] + 0.5
    found = with_gradients(rasterize, {k: x.float() for k, x in inputs.items()}, options)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"means": torch.zeros(1, 2)}, r"means must be \[1, 3\], got \[1, 2\]"),
        ({"scales": torch.zeros(2, 3)}, r"scales must be \[1, 3\], got \[2, 3\]"),
        ({"means": torch.full((1, 3), math.nan)}, "means has infinite or undefined values"),
        ({"scales": torch.full((1, 3), math.inf)}, "scales has infinite or undefined values"),
        ({"colors": torch.full((1, 3), math.inf)}, "colors has infinite or undefined values"),
        ({"quats": torch.zeros(1, 4)}, "a quaternion of length 0"),
        ({"scales": torch.full((1, 3), -1.0)}, "a scale below 0"),
        ({"opacities": torch.tensor([1.5])}, "an opacity outside of 0 to 1"),
        ({"Ks": torch.zeros(1, 3, 3)}, "a focal length that is not above 0"),
        ({"viewmats": torch.zeros(0, 4, 4), "Ks": torch.zeros(0, 3, 3)}, "has no camera"),
        ({"background": torch.zeros(4)}, r"background must be \[3\] or \[1, 3\], got \[4\]"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rasterize(**one(**changes), width=32, height=32)


def test_bad_options_are_refused() -> None:
    for options, says in (
        ({"tile": 12}, "tile=12 is unknown: use 8 or 16"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
        ({"impl": "triton"}, "impl='triton' cannot run here"),
        ({"sh": torch.zeros(1, 4, 3).double()}, "give either colors or sh"),
        ({"width": 0}, "an image of 0 x 32 pixels has none"),
    ):
        with pytest.raises(ValueError, match=says):
            rasterize(**({"width": 32, "height": 32} | one() | options))
    other = {k: x.float() if k == "quats" else x for k, x in one().items()}
    with pytest.raises(ValueError, match=r"quats is torch.float32 on cpu, means torch.float64"):
        rasterize(**other, width=32, height=32)
