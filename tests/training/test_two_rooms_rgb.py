"""The coloured rooms: nothing passes the wall but by the door, floors as measured by others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.data.config_worlds import TwoRoomsRGBConfig
from training.data.two_rooms_rgb import TwoRoomsRGBData, free, walk
from training.envs.two_rooms_rgb import (
    DOOR,
    LEAST,
    LEFT,
    MOST,
    NEAR,
    PASS,
    RIGHT,
    SPEED,
    WALL,
    move,
    render,
    towards,
)
from training.evaluation.goals import draw_episodes, judge, play
from training.recipes.acted_worlds import RoomsActed

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def data(**fields) -> TwoRoomsRGBData:
    return TwoRoomsRGBData(TwoRoomsRGBConfig(image_size=32, batch_size=8, **fields), seed=1)


def step(x: float, y: float, dx: float, dy: float) -> list[float]:
    return move(torch.tensor([x, y]), torch.tensor([dx, dy])).tolist()


def test_steps_end_at_walls_and_pass_the_door() -> None:
    assert step(60, 100, 0.5, -1) == [62.5, 95], "free"
    assert step(60, 100, 9, 0) == [65, 100], "no action is longer than one"
    assert step(98, 150, 1, 0) == [LEFT, 150] and step(126, 150, -1, 0) == [RIGHT, 150]
    assert step(98, DOOR, 1, 0) == [103, DOOR], "the door"
    assert step(112, DOOR + 10, 0, 1) == [112, DOOR + PASS], "its jamb"
    assert step(23, 22, -1, -1) == [LEAST, LEAST] and step(200, 200, 1, 1) == [MOST, MOST]


def test_no_walk_is_ever_inside_a_wall() -> None:
    rng = np.random.default_rng(FRESH)
    positions = walk(rng, 300, 93).states
    x, y = positions[..., 0], positions[..., 1]
    within = (x > LEFT) & (x < RIGHT)
    assert within.any(), "some pass the door"
    assert (abs(y[within] - DOOR) <= PASS + 1e-3).all()
    assert positions.min() >= LEAST and positions.max() <= MOST
    assert (np.diff(positions, axis=1).__abs__() <= SPEED + 1e-3).all()
    sides = x < WALL
    crossed = (sides != sides[:, :1]).any(axis=1).mean()
    assert 0.2 < crossed < 0.9


def test_one_who_knows_the_way_gets_everywhere() -> None:
    rng = np.random.default_rng(FRESH)
    position, goal = (torch.from_numpy(free(rng, 2000)) for _ in range(2))
    for _ in range(120):
        position = move(position, towards(position, goal))
    assert (position - goal).norm(dim=-1).max() < 1e-3


def test_goals_are_as_near_as_others_found_and_random_actions_reach_a_quarter() -> None:
    """le-wm#101: median 41 pixels, 9 % begin there, random actions reach 26 %."""
    made, count = data(), 3000
    episodes = draw_episodes(made, np.random.default_rng(FRESH), count, 25)
    distance = (episodes.start - episodes.goal).norm(dim=-1)
    assert 36 < distance.median() < 50
    assert 0.05 < (distance < NEAR).float().mean() < 0.12
    generator = torch.Generator().manual_seed(FRESH)

    def act(position: torch.Tensor, left: int) -> torch.Tensor:
        return 2 * torch.rand(count, 5, 2, generator=generator) - 1

    world = RoomsActed(made, torch.device("cpu"))
    random = judge(world, play(act, world, episodes.start, 50), episodes.goal)
    assert 0.18 < random["ever"] < 0.31
    assert random["at_start"] == pytest.approx((distance < NEAR).float().mean().item())
    still = play(lambda p, _: torch.zeros(count, 5, 2), world, episodes.start, 50)
    assert judge(world, still, episodes.goal)["ever"] == pytest.approx(random["at_start"])
    knows = play(world.oracle(episodes), world, episodes.start, 50)
    assert judge(world, knows, episodes.goal)["ever"] > 0.99


def test_images_show_the_dot_the_walls_and_the_door_at_any_size() -> None:
    for size in (56, 224):
        image = render(torch.tensor([60.0, 150.0]), size)
        assert image.shape == (3, size, size) and image.min() >= 0 and image.max() <= 1
        at = lambda x, y, image=image, size=size: image[:, int(y * size / 224), int(x * size / 224)]  # noqa: E731
        assert at(60, 150)[0] > 0.95 and at(60, 150)[1] < 0.1, "red"
        assert at(112, 150).max() < 0.1 and at(112, 49).min() > 0.95, "a wall, and a door in it"
        assert at(180, 60).min() > 0.95 and at(12, 100).max() < 0.6
    empty, image = render(torch.full((2,), -1e3), 224), render(torch.tensor([60.0, 150.0]), 224)
    ink = empty[1] - image[1]
    axis = torch.arange(224) + 0.5
    assert ((ink.sum(0) * axis).sum() / ink.sum()).item() == pytest.approx(60, abs=0.3)
    assert ((ink.sum(1) * axis).sum() / ink.sum()).item() == pytest.approx(150, abs=0.3)


def test_windows_are_of_walks_and_blocks_are_their_actions() -> None:
    made = data()
    walks = made.heldout(6)
    first = np.arange(6)
    windows = made.windows(walks, first)
    assert windows.states.shape == (6, 4, 2) and windows.actions.shape == (6, 3, 10)
    raw = windows.actions.reshape(6, 15, 2) * made.action_std + made.action_mean
    position = torch.from_numpy(windows.states[:, 0])
    for i in range(15):
        position = move(position, torch.from_numpy(raw[:, i]))
    np.testing.assert_allclose(position.numpy(), windows.states[:, 3], atol=1e-2)
    assert np.allclose(made.action_std, data().action_std)
    normal = made.blocks(made.heldout(400).actions[:, :90])
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.03


def test_a_step_has_one_batch_and_processes_share_it() -> None:
    whole = data().batch(3)
    config = data().config
    halves = [TwoRoomsRGBData(config, seed=1, rank=r, world=2).batch(3) for r in range(2)]
    for name, rows in whole.items():
        assert np.array_equal(rows, np.concatenate([half[name] for half in halves]))
    with pytest.raises(ValueError, match=r"data\.seq_len=30 .*data\.skip=5 apart"):
        TwoRoomsRGBConfig(seq_len=30)
