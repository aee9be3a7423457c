"""Objects that are pushed: equivariances, causality, and Gaussians that go with their object."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.splats.harmonics import harmonics
from kernels.splats.op import rasterize
from kernels.splats.project import rotations
from models.worlds.splats.config import MroGwmConfig
from models.worlds.splats.mro_gwm import MroGwm, PushHistory, carried, mean_pose
from models.worlds.splats.objects import divided, farthest
from models.worlds.splats.rigid import inverse_pose, moved, turned_harmonics
from training.envs.ray_tracer import intrinsics, look_at

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(FRESH)


def poses(*shape: int) -> torch.Tensor:
    return torch.cat([torch.randn(*shape, 3), F.normalize(torch.randn(*shape, 4), dim=-1)], -1)


def scene(n: int, degree: int = 0) -> dict[str, torch.Tensor]:
    return {
        "means": 0.3 * torch.randn(n, 3), "quats": F.normalize(torch.randn(n, 4), dim=-1),
        "scales": 0.05 + 0.1 * torch.rand(n, 3), "opacities": 0.6 + 0.3 * torch.rand(n),
        "sh": 0.5 * torch.randn(n, (degree + 1) ** 2, 3),
    }  # fmt: skip


def model() -> MroGwm:
    made = MroGwm(MroGwmConfig(width=16, layers=2, members=2))
    made.initialise(torch.Generator().manual_seed(FRESH), 0.2 * torch.randn(3, 8, 3))
    for member in made.members:
        torch.nn.init.normal_(member.head.weight, std=0.1)
    return made.requires_grad_(False)


def seen(b: int) -> PushHistory:
    return PushHistory(poses(b, 3, 3), torch.randn(b, 3, 2))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_turning_a_scene_and_its_camera_changes_no_image(degree: int) -> None:
    """What is seen of a rigid body that was moved is what a camera that moved with it sees."""
    one, pose = scene(12, degree), poses(1)[0]
    eye = look_at(torch.tensor([[1.5, -1.0, 0.8]]), torch.zeros(1, 3))
    motion = torch.eye(4)
    motion[:3, :3], motion[:3, 3] = rotations(pose[3:]), pose[:3]
    K = intrinsics(40.0, 32, 32)[None]
    before = rasterize(**one, viewmats=eye, Ks=K, width=32, height=32).color
    there = eye @ torch.linalg.inv(motion)
    after = rasterize(**moved(one, pose), viewmats=there, Ks=K, width=32, height=32).color
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)


def test_harmonics_are_turned_with_what_they_are_on() -> None:
    sh, R = torch.randn(5, 16, 3), rotations(torch.randn(4))
    d = F.normalize(torch.randn(20, 3), dim=-1)
    basis, turned = (torch.stack(harmonics(*x.unbind(-1), 3), -1) for x in (d, d @ R.T))
    told = torch.einsum("sk,nkc->nsc", turned, turned_harmonics(sh, R))
    torch.testing.assert_close(told, torch.einsum("sk,nkc->nsc", basis, sh), atol=1e-4, rtol=1e-4)


def test_gradients_of_turned_colours_reach_the_turn() -> None:
    sh, q = torch.randn(3, 9, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    q.requires_grad_()
    weights = torch.randn(3, 9, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q: (turned_harmonics(sh, rotations(q)) * weights).sum(), q, atol=1e-4
    )


def test_a_pose_and_its_inverse_are_nothing() -> None:
    one, pose = scene(6, 1), poses(1)[0]
    back = moved(moved(one, pose), inverse_pose(pose))
    torch.testing.assert_close(back["means"], one["means"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rotations(back["quats"]), rotations(one["quats"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(back["sh"], one["sh"], atol=1e-4, rtol=1e-4)


def test_a_scene_that_was_divided_is_whole_again_where_it_was_and_only_what_moves_moves() -> None:
    one, owner, at = scene(30), torch.randint(-1, 3, (30,)), poses(2)
    parts = divided(one, owner, at)
    order = torch.cat([torch.where(owner < 1)[0], *(torch.where(owner == i)[0] for i in (1, 2))])
    torch.testing.assert_close(parts.at(at)["means"], one["means"][order], atol=1e-5, rtol=1e-4)
    elsewhere = at.clone()
    elsewhere[1, :3] += torch.tensor([1.0, 2.0, 3.0])
    change = parts.at(elsewhere)["means"] - parts.at(at)["means"]
    expected = torch.tensor([1.0, 2.0, 3.0]) * (owner[order] == 2)[:, None]
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def test_anchors_are_far_from_each_other_and_opaque() -> None:
    one = scene(200)
    one["opacities"][:100] = 0.1
    chosen = farthest(one, 8)
    opaque = one["means"][100:]
    apart = (chosen[:, None] - opaque).norm(dim=-1)  # [8 100]
    assert (apart.min(1).values == 0).all()
    assert F.pdist(chosen).min() >= apart.min(0).values.max() - 1e-6  # none is further from all
    with pytest.raises(ValueError, match="3 opaque Gaussians, and 8"):
        farthest({name: x[197:] for name, x in one.items()}, 8)


def test_places_are_as_exact_where_numbers_are_cast() -> None:
    points, at = torch.randn(3, 8, 3), poses(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = carried(points, at)
    assert torch.equal(cast, carried(points, at))
    R = rotations(at[..., 3:])
    expected = torch.einsum("bmij,maj->bmai", R, points) + at[..., None, :3]
    torch.testing.assert_close(cast, expected, atol=1e-5, rtol=1e-5)


def test_the_table_is_the_same_everywhere() -> None:
    """Moving everything, pusher too, moves what is told as much."""
    made, history, action = model(), seen(4), torch.rand(4, 2)
    by = torch.tensor([0.7, -0.4, 0.0])
    there = PushHistory(history.poses.clone(), history.pusher + by[:2])
    there.poses[..., :3] += by
    told, elsewhere = (made(0, h, action) for h in (history, there))
    torch.testing.assert_close(elsewhere[..., :3], told[..., :3] + by, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(elsewhere[..., 3:], told[..., 3:], atol=1e-5, rtol=1e-4)


def test_what_is_done_later_changes_nothing_before() -> None:
    made, history, actions = model(), seen(2), torch.rand(2, 5, 2)
    pusher = history.pusher[:, -1:] + 0.05 * actions.cumsum(1)
    changed, went = actions.clone(), pusher.clone()
    changed[:, 3], went[:, 3:] = -1.0, went[:, 3:] - 0.1
    a, b = made.rollout(0, history, actions, pusher), made.rollout(0, history, changed, went)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3], b[:, 3])


def test_steps_one_after_the_other_are_a_rollout() -> None:
    made, history, actions = model(), seen(2), torch.rand(2, 3, 2)
    pusher = torch.randn(2, 3, 2)
    whole, now = made.rollout(1, history, actions, pusher), history
    for t in range(3):
        told = made(1, now, actions[:, t])
        torch.testing.assert_close(told, whole[:, t])
        now = now.then(told, pusher[:, t])
        assert torch.equal(now.poses[:, -1], told) and torch.equal(now.pusher[:, -1], pusher[:, t])


def test_members_that_are_one_agree_and_others_do_not() -> None:
    made, history = model(), seen(3)
    given = torch.rand(3, 4, 2), torch.randn(3, 4, 2)
    _, apart = made.imagine(history, *given)
    assert apart.shape == (3, 4, 3) and apart.min() > 0
    made.members[1].load_state_dict(made.members[0].state_dict())
    same, none = made.imagine(history, *given)
    assert none.max() < 1e-5
    torch.testing.assert_close(
        carried(made.anchors, same), carried(made.anchors, made.rollout(0, history, *given)),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_at_first_nothing_moves() -> None:
    made = MroGwm(MroGwmConfig(width=16, layers=1))
    made.initialise(torch.Generator().manual_seed(0), torch.randn(3, 8, 3))
    history = seen(2)
    told = made(0, history, torch.rand(2, 2))
    torch.testing.assert_close(told, history.poses[:, -1], atol=1e-6, rtol=1e-5)


def test_the_mean_of_poses_knows_no_sign_of_quaternions() -> None:
    one = poses(5)
    near = torch.stack([one, one])
    near[1, :, 3:] *= -1
    torch.testing.assert_close(mean_pose(near), one)


def test_configurations_that_make_no_model_are_refused() -> None:
    for key, value in (("members", 0), ("heads", 5), ("history", 0)):
        with pytest.raises(ValueError, match=f"model.{key}={value}"):
            MroGwmConfig(**{key: value})
