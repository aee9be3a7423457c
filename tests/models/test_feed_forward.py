"""Models that see a scene once: rays, the sweep, attention without places, pixels' Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.worlds.splats.config import LvsmConfig, MvSplatConfig
from models.worlds.splats.lvsm import Lvsm
from models.worlds.splats.mvsplat import LARGEST, SMALLEST, MvSplat
from models.worlds.splats.rays import directions, plucker, points_at, sampled
from training.envs.ray_tracer import intrinsics, look_at

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
SIZE = 16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(FRESH)


def cameras(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Anywhere at a distance of three, looking at the middle."""
    count = int(np.prod(shape))
    eyes = 3 * torch.nn.functional.normalize(torch.randn(count, 3), dim=-1)
    viewmats = look_at(eyes, 0.2 * torch.randn(count, 3)).view(*shape, 4, 4)
    return viewmats, intrinsics(1.1 * SIZE, SIZE, SIZE).expand(*shape, 3, 3)


def test_a_ray_goes_through_what_its_pixel_sees() -> None:
    """(d, m) holds of every point p of the ray: p x d = m."""
    viewmats, Ks = cameras(4)
    rays = plucker(viewmats, Ks, SIZE, SIZE)
    p = points_at(1 + torch.rand(4, SIZE, SIZE), viewmats, Ks)
    d, m = rays.split(3, dim=-1)
    torch.testing.assert_close(torch.linalg.cross(p, d), m, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(4, SIZE, SIZE))


def test_points_are_sampled_where_they_are_seen() -> None:
    viewmats, Ks = cameras(3)
    image = torch.rand(3, 5, SIZE, SIZE)
    own = points_at(1 + torch.rand(3, SIZE, SIZE), viewmats, Ks)
    found, there = sampled(image, own, viewmats, Ks)
    torch.testing.assert_close(found, image, atol=1e-3, rtol=1e-3)
    assert there.all()
    behind = points_at(-torch.ones(3, SIZE, SIZE), viewmats, Ks)
    found, there = sampled(image, behind, viewmats, Ks)
    assert not there.any() and not found.any()


def test_depth_is_along_z() -> None:
    viewmats, Ks = cameras(2)
    depth = 1 + torch.rand(2, SIZE, SIZE)
    p = points_at(depth, viewmats, Ks)
    z = torch.einsum("bj,bhwj->bhw", viewmats[:, 2, :3], p) + viewmats[:, 2, 3, None, None]
    torch.testing.assert_close(z, depth, atol=1e-5, rtol=1e-5)
    assert directions(Ks, SIZE, SIZE)[..., 2].eq(1).all()


def lvsm() -> Lvsm:
    made = Lvsm(LvsmConfig(width=16, layers=2, heads=2))
    made.initialise(torch.Generator().manual_seed(FRESH))
    for block in made.blocks:  # large enough that what is given matters
        torch.nn.init.normal_(block.out.weight)
        torch.nn.init.normal_(block.down.weight)
    torch.nn.init.normal_(made.color.weight)
    return made.requires_grad_(False)


def test_views_have_no_order_but_their_cameras() -> None:
    made, (viewmats, Ks) = lvsm(), cameras(2, 3)
    images = torch.rand(2, 2, SIZE, SIZE, 3)
    told = made(images, viewmats, Ks)
    swapped = viewmats[:, [1, 0, 2]]
    torch.testing.assert_close(made(images.flip(1), swapped, Ks), told, atol=1e-4, rtol=1e-4)
    mixed = made(images, swapped, Ks)  # images with the cameras of each other
    assert (mixed - told).abs().max() > 1e-3
    elsewhere = torch.cat([viewmats[:, :2], cameras(2, 1)[0]], dim=1)
    assert (made(images, elsewhere, Ks) - told).abs().max() > 1e-3
    assert told.shape == (2, SIZE, SIZE, 3) and told.min() >= 0 and told.max() <= 1


def test_patches_come_out_where_they_are_asked_for() -> None:
    """Of layers that add nothing, each square of four pixels is a function of its own rays."""
    made, (viewmats, Ks) = lvsm(), cameras(2, 3)
    for block in made.blocks:
        block.out.weight.zero_()
        block.down.weight.zero_()
        block.down.bias.zero_()
    told = made(torch.rand(2, 2, SIZE, SIZE, 3), viewmats, Ks)
    rays = plucker(viewmats, Ks, SIZE, SIZE)[:, 2]
    for i in range(0, SIZE, 4):
        for j in range(0, SIZE, 4):
            token = made.asked(rays[:, i : i + 4, j : j + 4].reshape(2, 96))
            colors = made.color(made.norm_out(made.norm_in(token))).sigmoid()
            expected = colors.reshape(2, 4, 4, 3)
            torch.testing.assert_close(told[:, i : i + 4, j : j + 4], expected, atol=1e-4, rtol=0)


def mvsplat(**keys) -> MvSplat:
    made = MvSplat(MvSplatConfig(width=8, blocks=1, **keys))
    made.initialise(torch.Generator().manual_seed(FRESH))
    return made.requires_grad_(False)


def test_the_sweep_is_best_where_both_views_show_the_same() -> None:
    """Features that are a function of the place that is seen: of a plane at one of the depths."""
    made = mvsplat(depths=8, near=2.0, far=4.0)
    eyes = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.1, 0.0]])
    viewmats = torch.eye(4).repeat(2, 1, 1)
    viewmats[:, :3, 3] = -eyes
    size, k = 48, 3  # planes are a pixel apart
    Ks = intrinsics(1.1 * size, size, size).expand(2, 3, 3)
    depth = made.planes[k].expand(2, size, size)
    places = points_at(depth, viewmats, Ks)
    waves = torch.randn(3, 4) * 6
    seen = torch.cat([(places @ waves).sin(), (places @ waves).cos()], dim=-1)  # unit on pairs
    costs = made.costs(seen.permute(0, 3, 1, 2)[None], viewmats[None], Ks[None])[0]
    inner = costs[:, :, 12:-12, 14:-14]
    assert (inner.argmax(1) == k).float().mean() > 0.9


def test_without_a_sweep_no_view_knows_of_the_other() -> None:
    (viewmats, Ks), images = cameras(1, 2), torch.rand(1, 2, SIZE, SIZE, 3)
    other = torch.stack([images[:, 0], torch.rand(1, SIZE, SIZE, 3)], dim=1)
    for sweep in (False, True):
        made = mvsplat(sweep=sweep)
        with torch.no_grad():
            told, changed = (made.scenes(x, viewmats, Ks)[1][:, 0] for x in (images, other))
        assert torch.equal(told, changed) != sweep


def test_every_pixel_has_a_gaussian_on_its_ray() -> None:
    made, (viewmats, Ks) = mvsplat(), cameras(3, 2)
    images = torch.rand(3, 2, SIZE, SIZE, 3)
    scenes, depth = made.scenes(images, viewmats, Ks)
    count = 2 * SIZE * SIZE
    assert scenes["means"].shape == (3, count, 3) and scenes["sh"].shape == (3, count, 1, 3)
    rays = plucker(viewmats, Ks, SIZE, SIZE).flatten(1, 3)
    d, m = rays.split(3, dim=-1)
    torch.testing.assert_close(torch.linalg.cross(scenes["means"], d), m, atol=1e-3, rtol=1e-3)
    near, far = made.config.near, made.config.far
    assert near - 1e-3 <= depth.min() and depth.max() <= far + 1e-3
    pixel = (depth / Ks[:, :, 0, 0, None, None]).flatten(1)[..., None]
    share = scenes["scales"] / pixel
    assert share.min() >= SMALLEST and share.max() <= LARGEST


def test_scenes_of_a_batch_know_nothing_of_each_other() -> None:
    made, (viewmats, Ks), images = mvsplat(), cameras(2, 3), torch.rand(2, 2, SIZE, SIZE, 3)
    scenes, depth = made.scenes(images, viewmats[:, :2], Ks[:, :2])
    seen = made(images, viewmats, Ks)
    for i in range(2):
        one, alone = made.scenes(images[i : i + 1], viewmats[i : i + 1, :2], Ks[i : i + 1, :2])
        torch.testing.assert_close(alone[0], depth[i], atol=1e-4, rtol=1e-4)
        for name, x in one.items():
            torch.testing.assert_close(x[0], scenes[name][i], atol=1e-4, rtol=1e-4, msg=name)
        own = made(images[i : i + 1], viewmats[i : i + 1], Ks[i : i + 1])[0]
        assert ((own - seen[i]).abs() < 1e-3).float().mean() > 0.98


def test_it_is_the_last_camera_that_looks() -> None:
    """And the first sees, in the middle, about what it has shown."""
    made, (viewmats, Ks) = mvsplat(), cameras(1, 2)
    images = torch.rand(1, 2, SIZE, SIZE, 3)
    images[:, 1] = images[:, 0] = torch.nn.functional.avg_pool2d(
        images[:, 0].permute(0, 3, 1, 2), 5, 1, 2
    ).permute(0, 2, 3, 1)
    viewmats[:, 1] = viewmats[:, 0]
    back = torch.eye(4)
    back[2, 3] = 40.0  # so far away that nothing is seen
    away = torch.cat([viewmats, (back @ viewmats[:, 0])[:, None]], dim=1)
    same = torch.cat([viewmats, viewmats[:, :1]], dim=1)
    lenses = Ks[:, [0, 1, 0]]
    assert (made(images, away, lenses)[:, 4:-4, :4] - 1).abs().max() < 0.05
    seen = made(images, same, lenses)
    assert (seen - images[:, 0])[:, 3:-3, 3:-3].abs().mean() < 0.15


def test_gradients_of_the_view_reach_everything_that_learns() -> None:
    made, (viewmats, Ks) = mvsplat().requires_grad_(True), cameras(1, 3)
    seen = made(torch.rand(1, 2, SIZE, SIZE, 3), viewmats, Ks)
    assert seen.shape == (1, SIZE, SIZE, 3)
    (seen - torch.rand_like(seen)).square().mean().backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, missing


@pytest.mark.parametrize("name", ["lvsm", "mvsplat"])
def test_autocast_leaves_places_as_they_are(name: str) -> None:
    """Networks are rounded to bf16, rays and Gaussians' places are not."""
    made, (viewmats, Ks) = lvsm() if name == "lvsm" else mvsplat(), cameras(1, 3)
    images = torch.rand(1, 2, SIZE, SIZE, 3)
    rays = plucker(viewmats, Ks, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plucker(viewmats, Ks, SIZE, SIZE), rays)
        made(images, viewmats, Ks)
        if isinstance(made, MvSplat):
            scenes, _ = made.scenes(images, viewmats[:, :2], Ks[:, :2])
            d, m = rays[:, :2].flatten(1, 3).split(3, dim=-1)
            off = torch.linalg.cross(scenes["means"], d) - m
            assert off.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(LvsmConfig, "heads", 3), (LvsmConfig, "patch", 0), (MvSplatConfig, "depths", 1),
     (MvSplatConfig, "near", 7.0), (MvSplatConfig, "tile", 5), (MvSplatConfig, "width", 0)],
)  # fmt: skip
def test_configurations_that_make_no_model_are_refused(config, key: str, value) -> None:
    with pytest.raises(ValueError, match=f"model.{key}={value}"):
        config(**{key: value})
