"""The ray tracer: distances in closed form, normals, ids, shadows; the table and its cameras."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.envs.ray_tracer import (
    NOTHING,
    Lamp,
    Scene,
    Solid,
    intrinsics,
    look_at,
    render,
    rotations,
)
from training.envs.tabletop import LOOKED_AT, RADIUS, cameras_around, tabletop
from training.seeding import numpy_rng

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
SIZE = 33  # odd: a pixel's middle is the image's


def seen(
    *solids: Solid, eye: tuple[float, float, float] = (0.0, -5.0, 0.0), lamp: Lamp | None = None
):
    """From `eye`, towards the origin, z being up."""
    viewmats = look_at(torch.tensor([eye], dtype=torch.float64), torch.zeros(1, 3).double())
    Ks = intrinsics(30.0, SIZE, SIZE).double()[None]
    return render(Scene(solids, lamp or Lamp()), viewmats, Ks, SIZE, SIZE, samples=1)


QUARTER = (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0)  # about x: z to -y


@pytest.mark.parametrize(
    ("solid", "distance"),
    [
        (Solid("sphere", (0.5,)), 4.5),
        (Solid("box", (0.4, 0.7, 0.3)), 4.3),
        (Solid("capsule", (0.2, 0.6)), 4.8),
        (Solid("capsule", (0.2, 0.6), rotation=QUARTER), 4.2),
        (Solid("cylinder", (0.2, 0.6)), 4.8),
        (Solid("cylinder", (0.2, 0.6), rotation=QUARTER), 4.4),
        (Solid("disc", (0.5,), rotation=QUARTER), 5.0),
        (Solid("sphere", (0.5,), position=(0.0, 1.0, 0.0)), 5.5),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)
def test_the_middle_is_as_far_as_it_should_be_and_faces_the_eye(
    solid: Solid, distance: float
) -> None:
    view, middle = seen(solid), SIZE // 2
    assert view.depth[0, middle, middle].item() == pytest.approx(distance)
    assert view.normal[0, middle, middle].tolist() == pytest.approx([0, -1, 0], abs=1e-6)
    assert view.id[0, middle, middle] == 0 and view.id[0, 0, 0] == NOTHING
    assert view.depth[0, 0, 0] == math.inf and (view.normal[0, 0, 0] == 0).all()


def surface(kind: str, size: tuple[float, ...], own: torch.Tensor) -> torch.Tensor:
    """How far places of its own frame are outside of a solid."""
    radius, z = own[:, :2].norm(dim=-1), own[:, 2].abs()
    if kind == "sphere":
        return own.norm(dim=-1) - size[0]
    if kind == "box":
        return (own.abs() - own.new_tensor(size)).amax(-1)
    if kind == "capsule":
        return torch.hypot(radius, (z - size[-1]).clamp_min(0)) - size[0]
    if kind == "cylinder":
        return torch.maximum(radius - size[0], z - size[-1])
    return own[:, 2]


def test_all_of_a_surface_lies_on_the_solid() -> None:
    """What is told of depth, brought back into the world, satisfies each solid's equation."""
    rng = np.random.default_rng(FRESH)
    for kind, size in (("sphere", (0.6,)), ("box", (0.5, 0.3, 0.4)), ("capsule", (0.3, 0.5)),
                       ("cylinder", (0.3, 0.5)), ("disc", (0.8,))):  # fmt: skip
        for _ in range(20):  # a disc may be seen from its edge: then it is turned otherwise
            q = rng.normal(size=4)
            solid = Solid(kind, size, rotation=tuple(q / np.linalg.norm(q)))
            view = seen(solid, eye=(1.0, -3.0, 1.5))
            if (view.id[0] == 0).sum() > 20:
                break
        viewmat = look_at(torch.tensor([[1.0, -3.0, 1.5]]).double(), torch.zeros(1, 3).double())[0]
        y, x = torch.meshgrid(*[torch.arange(SIZE).double() + 0.5 - SIZE / 2] * 2, indexing="ij")
        there = view.id[0] == 0
        assert there.sum() > 20
        d = view.depth[0][there]
        camera = torch.stack([x[there] / 30 * d, y[there] / 30 * d, d], dim=-1)
        world = (camera - viewmat[:3, 3]) @ viewmat[:3, :3]
        own = world @ rotations(torch.tensor([solid.rotation]).double())[0]
        off = surface(kind, size, own)
        assert off.abs().max() < 1e-8, kind
        facing = (view.normal[0][there] * (world - torch.tensor([1.0, -3.0, 1.5]))).sum(-1)
        assert (facing < 1e-9).all(), kind


def test_what_is_nearer_hides_what_is_behind_whatever_the_order() -> None:
    near, far = (
        Solid("sphere", (0.3,), (0, -1, 0), id=4),
        Solid("box", (1, 0.1, 1), (0, 1, 0), id=7),
    )
    for solids in ((near, far), (far, near)):
        ids = seen(*solids).id[0]
        assert ids[SIZE // 2, SIZE // 2] == 4 and set(ids.unique().tolist()) == {NOTHING, 4, 7}


def test_a_shadow_leaves_the_lamps_ambient_share_and_nothing_shines_in_it() -> None:
    floor = Solid("disc", (3.0,), color=(0.5, 0.5, 0.5), shine=0.9)
    ball = Solid("sphere", (0.4,), (0.0, 0.0, 1.0))
    lamp = Lamp(towards=(0.0, 0.0, 1.0), ambient=0.25)
    lit = seen(floor, eye=(0.0, -4.0, 3.0), lamp=lamp).color[0]
    shaded = seen(floor, ball, eye=(0.0, -4.0, 3.0), lamp=lamp)
    below = shaded.id[0] == 0
    dark = (shaded.color[0] - 0.25 * 0.5).abs().amax(-1) < 1e-6
    assert (dark & (shaded.depth[0] < 9)).sum() > 5 and (dark & below).sum() < 0.5 * below.sum()
    assert lit[SIZE // 2, SIZE // 2].min() >= 0.5 - 1e-6


def test_a_pixel_is_the_mean_of_its_rays() -> None:
    solids = [Solid("disc", (3.0,), pattern="checker", width=0.3)]
    viewmats = look_at(torch.tensor([[0.0, -3.0, 2.0]]), torch.zeros(1, 3))
    fine = render(Scene(solids), viewmats, intrinsics(60.0, 60, 60)[None], 60, 60, samples=1).color
    coarse = render(
        Scene(solids), viewmats, intrinsics(20.0, 20, 20)[None], 20, 20, samples=3
    ).color
    means = fine.view(1, 20, 3, 20, 3, 3).mean((2, 4))
    torch.testing.assert_close(coarse, means, atol=1e-5, rtol=0)


def test_tables_are_set_anew_for_every_seed_and_nothing_overlaps() -> None:
    for seed in range(FRESH, FRESH + 20):
        scene = tabletop(numpy_rng(seed, "scene"))
        assert scene.solids == tabletop(numpy_rng(seed, "scene")).solids
        things = scene.solids[1:]
        assert [s.id for s in scene.solids] == list(range(9))
        for i, one in enumerate(things):
            assert math.hypot(*one.position[:2]) < RADIUS
            for other in things[:i]:
                apart = math.dist(one.position[:2], other.position[:2])
                assert apart > 0.3 * (one.size[0] + other.size[0])
    first, second = (tabletop(numpy_rng(seed, "scene")).solids for seed in (FRESH, FRESH + 1))
    assert first != second


def test_things_stand_on_the_table() -> None:
    """Seen from the side, nothing reaches below it."""
    scene = tabletop(numpy_rng(FRESH, "scene"))
    lowered = Scene(scene.solids[1:], scene.lamp)
    viewmats = look_at(torch.tensor([[0.0, -4.0, 0.0]]), torch.zeros(1, 3))
    ids = render(lowered, viewmats, intrinsics(40.0, 64, 64)[None], 64, 64, samples=1).id[0]
    assert (ids[33:] == NOTHING).all() and (ids[:31] != NOTHING).any()


def test_cameras_look_at_the_middle_from_as_far_as_they_should() -> None:
    viewmats = cameras_around(numpy_rng(FRESH, "cameras"), 12)
    middle = viewmats @ torch.tensor([*LOOKED_AT, 1.0])
    torch.testing.assert_close(
        middle[:, :3], torch.tensor([[0.0, 0.0, 3.2]]).expand(12, 3), atol=1e-5, rtol=0
    )
    up = viewmats[:, 1, 2]  # the image's y falls as z grows
    assert (up < 0).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Solid("cone", (1.0,)), "kind='cone' is unknown"),
        (lambda: Solid("box", (1.0,)), r"size=\(1.0,\) of a box must be 3 number"),
        (lambda: Solid("sphere", (-1.0,)), "above 0"),
        (lambda: Solid("sphere", (1.0,), pattern="dots"), "pattern='dots' is unknown"),
        (lambda: Solid("sphere", (1.0,), rotation=(0, 0, 0, 0)), "a quaternion of length 0"),
        (lambda: seen(), "at least one solid"),
        (lambda: tabletop(numpy_rng(0, "scene"), 40), "there is no place on the table"),
        (lambda: look_at(torch.tensor([[0.0, 0, 3]]), torch.zeros(1, 3)), "looks along `up`"),
    ],
)
def test_what_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
