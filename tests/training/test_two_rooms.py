"""Two rooms: exact contacts, walks that obey them, floors as published."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from training.data.config_worlds import TwoRoomsConfig, Wall
from training.data.two_rooms import TwoRoomsData, Walks, layouts, walk
from training.envs.two_rooms import (
    HIGH,
    LOW,
    Contact,
    Rooms,
    blocks,
    geodesic,
    image_size,
    is_solid,
    move,
    render,
    side_of,
    statistics,
)
from training.evaluation.planning import Policies, draw_episodes, evaluate_policies
from training.recipes.config_worlds import PlanningConfig

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def rooms(count: int = 1, wall: float = 32.0, door: float = 18.0) -> Rooms:
    return Rooms(torch.full((count,), wall), torch.full((count,), door))


def some_walks(count: int = 400, **changes) -> tuple[Walks, Rooms]:
    config = TwoRoomsConfig(wall=Wall.random, **changes)
    found = walk(config, np.random.default_rng(FRESH), count)
    return found, Rooms(torch.from_numpy(found.wall), torch.from_numpy(found.door))


def after(x: float, y: float, dx: float, dy: float, **kwargs) -> tuple[float, float]:
    found = move(torch.tensor([[x, y]]), torch.tensor([[dx, dy]]), rooms(), **kwargs)
    return tuple(found[0].tolist())


def test_a_blocked_dot_stays_and_a_free_one_moves() -> None:
    assert after(20, 20, 1, -2) == (21, 18)
    assert after(30, 40, 1.5, 0) == (30, 40), "the wall"
    assert after(30, 18, 1.5, 0.5) == (31.5, 18.5), "the door"
    assert after(32, 21.5, 0, 1) == (32, 21.5), "its jamb"
    assert after(30.5, 21.75, 1, 0.5) == (30.5, 21.75), "past the jamb into the wall"
    assert after(5, 30, -1, 0) == (5, 30) and after(5, 59, 0, 1) == (5, 59), "touching a border"
    assert after(30, 10, 2.4, 2.4) == (30, 10)
    assert after(29, 30, 6, 0) == (29, 30), "no step is long enough to jump over"


def test_a_bouncing_dot_lies_where_it_met_something() -> None:
    pushed = after(30, 40, 2, 1, contact=Contact.bounce, noise=torch.tensor([[-2.0, 1.0]]))
    assert pushed == (30, 41), "back by |noise| along the normal, either way along the wall"
    less = torch.tensor([[0.125, 0.0]])
    assert after(30, 40, 2, 1, contact=Contact.bounce, noise=less) == (30.9375, 40.5)
    assert after(58, 30, 6, 0, contact=Contact.bounce, noise=less)[0] == pytest.approx(59.7)
    assert after(20, 20, 1, -2, contact=Contact.bounce, noise=torch.ones(1, 2)) == (21, 18)
    with pytest.raises(ValueError, match="needs noise"):
        after(20, 20, 1, 1, contact=Contact.bounce)


@pytest.mark.parametrize("contact", list(Contact))
def test_nothing_ever_gets_into_a_wall_or_over_it(contact: Contact) -> None:
    """A thousand dots that push hard: a change of rooms leads through the door."""
    rng = torch.Generator().manual_seed(FRESH)
    wall, door = (torch.from_numpy(x) for x in layouts(Wall.random))
    r = Rooms(wall, door)
    position = torch.stack([wall - 5, door], -1)
    for _ in range(150):
        action = 3 * torch.randn(len(wall), 2, generator=rng)
        noise = torch.randn(len(wall), 2, generator=rng)
        there = move(position, action, r, contact, noise)
        assert (there > LOW).all() and (there < HIGH).all() and not is_solid(there, r).any()
        changed = side_of(position, r) * side_of(there, r) < 0
        assert not (blocks(position, there, r) & changed).any()
        position = there
    assert (side_of(position, r) > 0).float().mean() > 0.2


def test_walks_obey_the_rules() -> None:
    walks, r = some_walks()
    positions, actions = torch.from_numpy(walks.positions), torch.from_numpy(walks.actions)
    told = move(positions[:, :-1], actions, r[:, None])
    torch.testing.assert_close(told, positions[:, 1:], atol=1e-5, rtol=0)


def test_walks_have_the_published_statistics() -> None:
    """Measured on the authors' generator: norm .996, std .350, 26.9 % blocked, 33.5 % in both."""
    walks, _ = some_walks(3000)
    norm = np.linalg.norm(walks.actions, axis=-1)
    assert abs(norm.mean() - 0.996) < 0.01 and abs(norm.std() - 0.350) < 0.01
    assert norm.min() >= 0.2 - 1e-6 and norm.max() <= 1.8 + 1e-6
    blocked = (walks.positions[:, 1:] == walks.positions[:, :-1]).all(-1).mean()
    assert abs(blocked - 0.269) < 0.03
    side = np.sign(walks.positions[..., 0] - walks.wall[:, None])
    both = ((side > 0).any(1) & (side < 0).any(1)).mean()
    assert 0.335 - 0.05 < both < 0.335 + 0.1
    none, _ = some_walks(1000, crossing=0.0)
    side = np.sign(none.positions[..., 0] - none.wall[:, None])
    assert ((side > 0).any(1) & (side < 0).any(1)).mean() < 0.15, "few pass without being led"
    assert len(layouts(Wall.random)[0]) == 1125


def test_images_have_the_published_statistics() -> None:
    wall, door = (torch.from_numpy(x) for x in layouts(Wall.random))
    mean, std = statistics(Rooms(wall, door))
    # Published: each image is stretched to [0, 1] first, which raises those of the dot by 4 %.
    assert mean.flatten().tolist() == pytest.approx([0.0026, 0.0989], rel=0.05)
    assert std.flatten().tolist() == pytest.approx([0.0369, 0.2986], rel=0.05)


def test_pooled_images_are_means_of_the_canvas() -> None:
    rng = np.random.default_rng(FRESH)
    position = torch.from_numpy(rng.uniform(LOW, HIGH, (3, 2, 2)).astype(np.float32))
    r = Rooms(torch.tensor([20.0, 32.0, 44.0]), torch.tensor([10.0, 18.0, 54.0]))
    whole = torch.nn.functional.pad(render(position, r), (0, 1, 0, 1))
    pooled = render(position, r, pool=3)
    assert pooled.shape == (3, 2, 2, 22, 22) and image_size(3) == 22
    wanted = torch.nn.functional.avg_pool2d(whole.flatten(0, 1), 3).view_as(pooled)
    torch.testing.assert_close(pooled, wanted, atol=1e-6, rtol=0)
    dot = render(torch.tensor([[[10.0, 40.0]]]), rooms())[0, 0, 0]
    assert divmod(dot.argmax().item(), 65) == (40, 10), "rows are y"
    walls = render(torch.tensor([[[10.0, 40.0]]]), rooms())[0, 0, 1]
    assert walls[30, 32] == 1 and walls[18, 32] == 0 and walls[4].min() == 1 and walls[0, 1] == 0


def test_one_state_always_looks_the_same() -> None:
    image = render(torch.tensor([[[20.25, 41.5]]]), rooms())
    quantised = (image * 255).to(torch.uint8).numpy()
    assert hashlib.sha256(quantised.tobytes()).hexdigest()[:16] == "145055cfde298dd2"


def test_shortest_paths_go_round_the_corners_of_the_door() -> None:
    r = rooms()
    point = lambda x, y: torch.tensor([[float(x), float(y)]])  # noqa: E731
    assert geodesic(point(10, 10), point(20, 50), r).item() == pytest.approx(41.2311, rel=1e-5)
    assert geodesic(point(20, 18), point(40, 18), r).item() == pytest.approx(20)
    below = geodesic(point(20, 50), point(44, 50), r).item()  # by (31, 22) and (33, 22)
    assert below == pytest.approx(2 * np.hypot(11, 28) + 2, rel=1e-5)
    assert geodesic(point(44, 50), point(20, 50), r).item() == pytest.approx(below, rel=1e-5)
    slanted = geodesic(point(20, 12), point(44, 40), r).item()
    assert np.hypot(24, 28) < slanted < np.hypot(24, 28) + 6


def test_shortest_paths_agree_with_a_search_on_a_grid() -> None:
    """Dijkstra over points 0.5 apart, moves up to 5 cells, is longer by a few per cent only."""
    from heapq import heappop, heappush

    step, n = 0.5, 113
    r, rng = rooms(1, 30.0, 40.0), np.random.default_rng(FRESH)
    axis = LOW + step * np.arange(n)
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).astype(np.float32))
    free = ~is_solid(grid, r).numpy()
    moves = [(a, b) for a in range(-3, 4) for b in range(-3, 4) if np.gcd(a, b) == 1]
    start = (int(rng.integers(20, 100)), int(rng.integers(5, 45)))  # y, x in the left room
    best = {start: 0.0}
    queue = [(0.0, start)]
    open_ = {}
    for a, b in moves:
        there = grid + torch.tensor([b * step, a * step])
        open_[a, b] = ~blocks(grid, there, r).numpy()
    while queue:
        far, here = heappop(queue)
        if far > best[here]:
            continue
        for a, b in moves:
            to = (here[0] + a, here[1] + b)
            if not (0 <= to[0] < n and 0 <= to[1] < n) or not free[to] or not open_[a, b][here]:
                continue
            length = far + step * float(np.hypot(a, b))
            if length < best.get(to, np.inf):
                best[to] = length
                heappush(queue, (length, to))
    goals = [(int(y), int(x)) for y, x in rng.integers(1, n - 1, (200, 2)) if free[int(y), int(x)]]
    exact = geodesic(
        grid[start][None].expand(len(goals), -1), torch.stack([grid[g] for g in goals]), r
    )
    ratio = np.array([best[g] for g in goals]) / exact.clamp(min=1e-6).numpy()
    assert ratio.min() > 0.999 and ratio.max() < 1.06


def test_batches_are_functions_of_the_step_and_shared_between_processes() -> None:
    config = TwoRoomsConfig(walks=16, batch_size=12, seq_len=25)
    data = TwoRoomsData(config, seed=4)
    far, near = data.batch(9), data.batch(0)
    again = TwoRoomsData(config, seed=4)
    assert all(np.array_equal(again.batch(9)[k], far[k]) for k in far)
    assert far["positions"].shape == (12, 25, 2) and far["actions"].shape == (12, 24, 2)
    halves = [TwoRoomsData(config, seed=4, rank=i, world=2).batch(0) for i in (0, 1)]
    assert all(np.array_equal(np.concatenate([h[k] for h in halves]), near[k]) for k in near)
    other = TwoRoomsData(config, seed=5).batch(0)
    assert not np.array_equal(other["positions"], near["positions"])
    seen = {data.batch(s)["positions"].tobytes() for s in range(8)}
    assert len(seen) == 8
    assert not any(
        np.array_equal(x, y) for x in data.heldout(5, 25).positions for y in near["positions"]
    )


def test_windows_are_parts_of_walks() -> None:
    config = TwoRoomsConfig(walks=16, batch_size=12, seq_len=25)
    batch = TwoRoomsData(config, seed=FRESH).batch(3)
    r = Rooms(torch.from_numpy(batch["wall"]), torch.from_numpy(batch["door"]))[:, None]
    positions, actions = torch.from_numpy(batch["positions"]), torch.from_numpy(batch["actions"])
    torch.testing.assert_close(
        move(positions[:, :-1], actions, r), positions[:, 1:], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seq_len": 1}, "seq_len"),
        ({"seq_len": 92}, "seq_len"),
        ({"batch_size": 0}, "batch_size"),
        ({"crossing": 1.5}, "crossing"),
        ({"pool": 0}, "pool"),
        ({"walks": 3}, "walks"),
    ],
)
def test_bad_configurations_are_refused(change: dict, key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}="):
        TwoRoomsConfig(**change)


# Floors of planning


def floors(kind: Wall, names: list[str], count: int, steps: int, norm: float) -> dict:
    episodes = draw_episodes(kind, np.random.default_rng(FRESH), count)
    config = PlanningConfig(max_norm=norm)
    return evaluate_policies(
        None, None, episodes, config, names, ["block", "bounce"], steps, lambda name: FRESH
    )[0]


def test_floors_are_as_measured() -> None:
    """Fixed wall: greedy 12.1 and 33.2, random 0.2; random walls, bouncing: greedy 48.5 (n 200)."""
    fixed = floors(Wall.fixed, ["random", "zero", "greedy", "oracle"], 600, 80, 1.8)
    block, bounce = fixed["block"], fixed["bounce"]
    assert abs(block["greedy"]["final"] - 0.121) < 0.06
    assert abs(bounce["greedy"]["final"] - 0.36) < 0.09
    for rule in (block, bounce):
        assert rule["oracle"]["final"] >= 0.99 and rule["oracle"]["steps_to_goal"] < 35
        assert rule["zero"]["ever"] == 0 and rule["random"]["final"] < 0.02
    moving = floors(Wall.random, ["greedy", "oracle"], 600, 200, 2.45)
    assert abs(moving["bounce"]["greedy"]["final"] - 0.45) < 0.1
    assert moving["block"]["greedy"]["final"] < moving["bounce"]["greedy"]["final"]
    assert moving["block"]["oracle"]["final"] >= 0.99 <= moving["bounce"]["oracle"]["final"]


def test_distances_are_looked_up_where_the_dot_is() -> None:
    """With latents that are places, the table says how far the goal is."""

    class Places:
        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            return frames

    for kind in Wall:
        episodes = draw_episodes(kind, np.random.default_rng(FRESH), 3)
        policies = Policies(episodes, Places(), lambda p, _: p, PlanningConfig(), torch.Generator())
        table = policies.latent_distances()
        places = LOW + (HIGH - LOW) * torch.rand(3, 5, 7, 2)
        exact = (places - episodes.goal[:, None, None]).square().mean(-1)
        found = policies.tabulated(table)(places)
        torch.testing.assert_close(found, exact, atol=0.1, rtol=0)


def test_goals_lie_in_the_other_room() -> None:
    episodes = draw_episodes(Wall.random, np.random.default_rng(FRESH), 500)
    sides = side_of(episodes.start, episodes.rooms), side_of(episodes.goal, episodes.rooms)
    assert (sides[0] == -sides[1]).all() and 0.3 < (sides[0] > 0).float().mean() < 0.7


@pytest.mark.slow
def test_true_dynamics_with_a_straight_distance_solve_but_a_part() -> None:
    found = floors(Wall.fixed, ["true_dynamics"], 60, 80, 1.8)
    assert 0.35 < found["block"]["true_dynamics"]["final"] < 0.85
