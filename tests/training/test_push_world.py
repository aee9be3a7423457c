"""PushWorld3D: physics, what is seen of it, episodes, the task, and its interface for agents."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy.spatial.transform import Rotation

from models.worlds.splats.config import MroGwmConfig
from models.worlds.splats.mro_gwm import MroGwm, carried
from training.data.config_scenes import PushTableConfig, PushWorldConfig
from training.data.push_table import PushTableData
from training.data.push_world import PushWorldData
from training.envs.push_goals import NEAR, T, apart, drawn
from training.envs.push_gym import PushEnv
from training.envs.push_world import (
    BAR_AT,
    HALF,
    LIMIT,
    REACHES,
    SPEED,
    PushState,
    PushWorld,
    moved,
    on,
    placed,
    push_scene,
    pushes,
)
from training.envs.push_worlds import LearnedWorld, TrueWorld
from training.envs.ray_tracer import intrinsics, look_at, render

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
ANCHORS = np.random.default_rng(0).uniform(-0.2, 0.2, (3, 8, 3))


def rng() -> np.random.Generator:
    return np.random.default_rng(FRESH)


def alone(place: tuple[float, float], pusher: tuple[float, float]) -> PushState:
    """The box somewhere, everything else far from it."""
    poses = np.zeros((3, 7))
    poses[:, :3] = (*place, HALF), (2.5, 2.0, HALF), (2.5, -2.0, HALF)
    poses[:, 3] = 1.0
    return PushState(poses, np.array(pusher))


def test_what_is_pushed_moves_and_what_is_not_stays() -> None:
    world = PushWorld(alone((0.0, 0.0), (-0.6, 0.0)))
    for _ in range(3):
        still = world.step(np.array([1.0, 0.0]))
    assert abs(still.poses[0, 0]) < 1e-3, "not reached yet"
    for _ in range(7):
        state = world.step(np.array([1.0, 0.0]))
    assert state.pusher[0] == pytest.approx(-0.6 + 10 * SPEED * 0.1)
    assert state.poses[0, 0] > 0.3 and abs(state.poses[0, 1]) < 0.02
    assert np.abs(state.poses[1:, :2] - [[2.5, 2.0], [2.5, -2.0]]).max() < 1e-3


def test_a_push_beside_the_middle_turns_a_thing() -> None:
    turns = []
    for side in (-0.1, 0.1):
        world = PushWorld(alone((0.0, 0.0), (-0.35, side)))
        for _ in range(5):
            state = world.step(np.array([1.0, 0.0]))
        turns.append(Rotation.from_quat(state.poses[0, 3:], scalar_first=True).as_euler("zyx")[0])
    assert turns[0] > 0.1 and turns[1] < -0.1  # pushed at its right it turns to the left


def test_physics_is_the_same_every_time() -> None:
    a, b = (pushes(rng(), placed(rng()), 8) for _ in "ab")
    for one, other in zip(a[0], b[0], strict=True):
        assert np.array_equal(one.poses, other.poses)


def test_the_pusher_stays_on_the_table_and_goes_no_faster_than_it_can() -> None:
    at = np.array([[0.99, 0.0], [0.0, 0.0]])
    after = moved(at, np.array([[1.0, 0.0], [5.0, -5.0]]))
    assert np.linalg.norm(after[0]) == pytest.approx(LIMIT)
    np.testing.assert_allclose(after[1], np.array([1, -1]) * SPEED * 0.1 * 0.5**0.5)


def test_things_are_placed_apart_and_seen_where_they_are() -> None:
    state = placed(rng())
    places = state.poses[:, :2]
    for i in range(3):
        for j in range(i):
            assert np.linalg.norm(places[i] - places[j]) > REACHES[i] + REACHES[j]
    scene = push_scene(state)
    bar = next(s for s in scene.solids if s.id == 3)
    R = Rotation.from_quat(state.poses[2, 3:], scalar_first=True).as_matrix()
    np.testing.assert_allclose(bar.position, state.poses[2, :3] + R @ BAR_AT, atol=1e-12)
    above = look_at(torch.tensor([[0.0, -0.01, 3.0]]), torch.zeros(1, 3))
    ids = render(scene, above, intrinsics(90.0, 96, 96)[None], 96, 96, 1).id[0]
    assert set(ids.unique().tolist()) == {-1, 0, 1, 2, 3, 4} or -1 not in ids
    for thing in (1, 2, 4):  # the T's middle is not the middle of what is seen of it
        v, u = (x.float().mean() + 0.5 for x in torch.where(ids == thing))
        place = places[thing - 1] if thing < 4 else state.pusher
        seen = np.array([(u - 48) / 90 * 2.85, -(v - 48) / 90 * 2.85])
        assert np.linalg.norm(seen - place) < 0.12, thing


def test_places_of_a_things_own_frame_are_where_rotations_take_them() -> None:
    q = Rotation.random(random_state=FRESH)
    at, middle = rng().normal(size=3), rng().normal(size=3)
    pose = tuple(middle), tuple(q.as_quat(scalar_first=True))
    np.testing.assert_allclose(on(pose, tuple(at)), middle + q.apply(at), atol=1e-12)


SMALL = PushWorldConfig(episodes=12, heldout=3, steps=12, batch_size=40)


@pytest.fixture(scope="module")
def data() -> PushWorldData:
    return PushWorldData(SMALL, seed=FRESH, length=5)


def test_windows_are_turned_as_the_world_would_be(data: PushWorldData) -> None:
    """Distances between all points stay, and actions lead the pusher as they did."""
    batch = data.batch(3)
    poses, pusher = (torch.from_numpy(batch[k]) for k in ("poses", "pusher"))
    assert poses.shape == (40, 5, 3, 7) and batch["actions"].shape == (40, 4, 2)
    went = moved(batch["pusher"][:, 0].astype(np.float64), batch["actions"][:, 0])
    np.testing.assert_allclose(went, batch["pusher"][:, 1], atol=1e-5)
    known = data.train
    angles = np.linspace(0, 6, 12)
    turned = known.turned(angles)
    anchors = torch.from_numpy(np.float32(ANCHORS))
    found = []
    for one in (known, turned):
        p = carried(anchors, torch.from_numpy(one.poses[:, 5])).flatten(1, 2)
        x = torch.nn.functional.pad(torch.from_numpy(one.pusher[:, 5]), (0, 1))
        x = torch.cat([p, x[:, None]], dim=1)
        found.append((x[:, :, None] - x[:, None]).norm(dim=-1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    z = Rotation.from_euler("z", angles[7]).as_matrix()
    places = known.poses[7, :, :, :3] @ z.T
    np.testing.assert_allclose(turned.poses[7, ..., :3], places, atol=1e-5)
    assert torch.isfinite(poses).all() and torch.isfinite(pusher).all()


def test_as_many_windows_as_configured_have_something_that_moves(data: PushWorldData) -> None:
    def share(config: PushWorldConfig) -> float:
        made = PushWorldData.__new__(PushWorldData)
        made.__dict__.update(data.__dict__ | {"config": config})
        gone = [np.linalg.norm(b["poses"][..., :2] - b["poses"][:, :1, :, :2], axis=-1).max((1, 2))
                for b in map(made.batch, range(5))]  # fmt: skip
        return float((np.concatenate(gone) > 0.01).mean())

    assert share(dataclasses.replace(SMALL, moving=1.0)) == 1.0
    assert share(dataclasses.replace(SMALL, moving=0.0)) == 0.0


def test_pushers_of_others_come_with_their_actions_from_the_same_windows(
    data: PushWorldData,
) -> None:
    made = PushWorldData.__new__(PushWorldData)
    confused = dataclasses.replace(SMALL, shuffled_pushers=True)
    made.__dict__.update(data.__dict__ | {"config": confused})
    right, wrong = data.batch(1), made.batch(1)
    assert np.array_equal(right["poses"], wrong["poses"])
    a, b = (np.concatenate([x["actions"], x["pusher"]], axis=1).reshape(40, -1)
            for x in (right, wrong))  # fmt: skip
    assert not np.array_equal(a, b) and sorted(map(tuple, a)) == sorted(map(tuple, b))


def test_processes_share_the_windows_of_a_step(data: PushWorldData) -> None:
    parts = []
    for rank in range(2):
        made = PushWorldData.__new__(PushWorldData)
        made.__dict__.update(data.__dict__ | {"rank": rank, "world": 2})
        parts.append(made.batch(4)["poses"])
    whole = data.batch(4)["poses"]
    assert np.array_equal(whole[0::2], parts[0]) and np.array_equal(whole[1::2], parts[1])


def test_the_task_is_to_bring_the_t_near() -> None:
    anchors = torch.from_numpy(np.float32(ANCHORS))
    for i in range(20):
        state, goal = drawn(np.random.default_rng([FRESH, i]))
        a, b = (torch.from_numpy(np.float32(x)) for x in (state.poses[T], goal))
        assert 0.2 < float(apart(a, b, anchors)) < 0.8 and np.linalg.norm(goal[:2]) < 0.75
        assert float(apart(b, b, anchors)) < 1e-6 and goal[4] == goal[5] == 0
        shifted = b + torch.tensor([0.05, 0, 0, 0, 0, 0, 0])
        assert float(apart(shifted, b, anchors)) == pytest.approx(0.05, abs=1e-5)


def model() -> MroGwm:
    made = MroGwm(MroGwmConfig(width=16, layers=1, members=2))
    made.initialise(torch.Generator().manual_seed(0), torch.from_numpy(np.float32(ANCHORS)))
    return made.requires_grad_(False)


@pytest.mark.parametrize("world", ["true", "learned"])
def test_agents_act_in_both_worlds_by_one_interface(world: str) -> None:
    made = TrueWorld() if world == "true" else LearnedWorld(model())
    env = PushEnv(made, ANCHORS, draw=lambda state: np.zeros((8, 8, 3), np.uint8))
    check_env(env, skip_render_check=True)
    seen, info = env.reset(seed=FRESH)
    again, _ = env.reset(seed=FRESH)
    assert np.array_equal(seen["state"], again["state"]) and info["distance"] > NEAR
    left, total = info["distance"], 0.0
    for _ in range(4):
        seen, reward, done, _, info = env.step(np.array([0.3, -1.0]))
        total += reward - done
    assert total == pytest.approx(left - info["distance"], abs=1e-5)
    assert env.render().shape == (8, 8, 3)
    with pytest.raises(ValueError, match="two finite numbers"):
        env.step(np.array([math.nan, 0.0]))


def test_reaching_the_goal_is_rewarded_and_ends() -> None:
    env = PushEnv(TrueWorld(), ANCHORS)
    env.reset(seed=FRESH)
    env.goal = env.state.poses[T].copy()
    env.left = env.distance()
    _, reward, done, _, info = env.step(np.zeros(2))
    assert done and reward > 0.99 and info["distance"] < 0.01
    with pytest.raises(ValueError, match="draw="):
        env.render()


def test_a_learned_world_that_has_learned_nothing_moves_only_the_pusher() -> None:
    world, state = LearnedWorld(model()), placed(rng())
    world.begin(state)
    after = world.step(np.array([0.5, 0.5]))
    np.testing.assert_allclose(after.poses, state.poses, atol=1e-5)
    np.testing.assert_allclose(after.pusher, moved(state.pusher, np.array([0.5, 0.5])), atol=1e-6)


def test_the_table_is_seen_before_anything_is_pushed() -> None:
    config = PushTableConfig(image_size=32, views=12, heldout=2, samples=1)
    made = PushTableData(config, seed=FRESH)
    assert set(np.unique(made.train.ids)) == {-1, 0, 1, 2, 3, 4}
    assert 3 not in made.without(3).ids
    with pytest.raises(ValueError, match=r"data\.things=3"):
        PushTableConfig(things=3)
