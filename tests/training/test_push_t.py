"""Push-T: the disc obeys its equation, contacts turn with the table, pictures show the state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers import SMALL_PUSH_T
from training.config import compose
from training.data.config_worlds import Pushing, PushTConfig
from training.data.push_t import PushTData, walk
from training.distributed import Processes
from training.envs.push_t import CANVAS, PushT, distance, reached, render
from training.errors import UserError
from training.evaluation.goals import draw_episodes, judge, play
from training.recipes import lewm
from training.recipes.acted_worlds import PushTActed

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
MIDDLE = (CANVAS - 1) / 2  # of the walls


def data(**fields) -> PushTData:
    config = PushTConfig(image_size=32, batch_size=8, walks=6, walk=31, **fields)
    return PushTData(config, seed=1)


def state(agent: tuple[float, float], block: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    return np.array([[*agent, *block, angle, 0, 0]], np.float32)


def test_a_free_disc_obeys_its_equation_and_nothing_stops_it() -> None:
    table = PushT(state((40, 400), (250, 100)))
    p, v = np.array([40.0, 400.0]), np.zeros(2)
    for action in np.random.default_rng(FRESH).uniform(-1, 0.2, (12, 2)):
        target = p + 100 * action
        for _ in range(10):
            v = v + 0.01 * (100 * (target - p) - 20 * v)
            p = p + 0.01 * v
        found = table.step(action[None])[0]
        np.testing.assert_allclose(found[[0, 1, 5, 6]], [*p, *v], rtol=1e-4, atol=1e-2)
    assert p[0] < 0, "walls do not stop it"
    np.testing.assert_allclose(found[2:5], [250, 100, 0], atol=1e-3)


def test_the_block_moves_only_while_it_is_pushed() -> None:
    table = PushT(state((256, 160), (256, 200)))
    moved = [table.step(np.array([[0.0, 1.0]], np.float32))[0, 3] for _ in range(3)]
    assert 200 < moved[0] < moved[1] < moved[2], "a push through its middle, straight down"
    found = table.states[0]
    assert found[2] == pytest.approx(256, abs=1) and math.cos(found[4]) > 0.999
    for _ in range(3):
        table.step(np.array([[0.0, -1.0]], np.float32))
    rest = table.states[0, 2:5]
    table.step(np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(table.states[0, 2:5], rest, atol=1e-4)


def test_a_push_beside_the_middle_turns_it() -> None:
    for side in (-1, 1):
        table = PushT(state((256 + 50 * side, 160), (256, 200)))
        for _ in range(3):
            table.step(np.array([[0.0, 1.0]], np.float32))
        assert side * math.sin(table.states[0, 4]) > 0.2


def turned(states: np.ndarray) -> np.ndarray:
    """A quarter turn about the middle of the table."""
    x, y = (states[..., i : i + 1] - MIDDLE for i in (0, 1))
    bx, by = (states[..., i : i + 1] - MIDDLE for i in (2, 3))
    parts = [-y, x, -by, bx]
    angle = states[..., 4:5] + math.pi / 2
    velocity = [-states[..., 6:7], states[..., 5:6]]
    return np.concatenate([*(p + MIDDLE for p in parts), angle, *velocity], axis=-1)


def test_what_happens_on_a_turned_table_is_what_happens_turned() -> None:
    rng = np.random.default_rng(FRESH)
    config, worst = PushTConfig(walk=14, seq_len=2), []
    for _ in range(30):
        made = walk(config, rng)
        start = made.states[0]
        other = PushT(turned(start[None]).astype(np.float32))
        for action in made.actions:
            found = other.step(np.array([[-action[1], action[0]]], np.float32))[0]
        gap = found - turned(made.states[-1])
        gap[4] = math.remainder(gap[4], 2 * math.pi)
        worst.append(abs(gap[:5]).max())
    assert np.median(worst) < 0.05, "contacts of corners may fall either way, in few"


def test_a_goal_is_disc_and_block_together_and_the_angle() -> None:
    goal = torch.tensor([100.0, 100, 200, 200, 6.2, 0, 0])
    there = lambda *change: bool(reached(goal + torch.tensor([*change, 50.0, 0]), goal))  # noqa: E731
    assert there(14, 0, 14, 0, 0) and not there(15, 0, 15, 0, 0)
    assert there(0, 0, 0, 0, 0.34) and not there(0, 0, 0, 0, 0.36), "round the circle, too"
    assert distance(goal + 3, goal).item() == pytest.approx(6)


@pytest.mark.parametrize("pushing", list(Pushing))
def test_walks_push_the_block_over_the_table(pushing: Pushing) -> None:
    rng = np.random.default_rng(FRESH)
    walks = [walk(PushTConfig(pushing=pushing), rng) for _ in range(30)]
    states = np.stack([w.states for w in walks])
    assert np.isfinite(states).all() and states.shape == (30, 101, 7)
    assert (abs(states[..., 2:4] - MIDDLE) < MIDDLE + 10).mean() > 0.9
    moved = np.linalg.norm(states[:, 25:, 2:4] - states[:, :-25, 2:4], axis=-1)
    assert (moved > 20).mean() > 0.5
    if pushing == Pushing.weak:
        from_block = abs(states[:, :-1, :2] + 100 * np.stack([w.actions for w in walks])
                         - states[:, :-1, 2:4])  # fmt: skip
        near = abs(states[:, :-1, :2] - states[:, :-1, 2:4]).max(axis=-1) < 100
        assert from_block[near].max() < 100 + 1e-2


def test_doing_again_what_was_done_leads_to_the_goal_and_nothing_else_does() -> None:
    made, count = data(), 60
    world = PushTActed(made, torch.device("cpu"))
    episodes = draw_episodes(made, np.random.default_rng(FRESH), count, 20)
    knows = judge(world, play(world.oracle(episodes), world, episodes.start, 25), episodes.goal)
    assert knows["ever"] > 0.85 and knows["distance"] < 20
    still = lambda states, left: torch.zeros(count, 5, 2)  # noqa: E731
    assert judge(world, play(still, world, episodes.start, 25), episodes.goal)["ever"] < 0.1


def test_images_show_the_state_at_any_size() -> None:
    rng = np.random.default_rng(FRESH)
    for size in (64, 224):
        angle = rng.uniform(0, 2 * math.pi)
        seen = torch.tensor([90.0, 110, 300, 280, angle, 0, 0])
        image = render(seen, size)
        assert image.shape == (3, size, size) and image.min() >= 0 and image.max() <= 1
        axis = (torch.arange(size) + 0.5) * CANVAS / size
        table = render(torch.tensor([-900.0, 0, -900, 0, 0, 0, 0]), size)
        only = render(torch.tensor([-900.0, 0, 300, 280, angle, 0, 0]), size)
        ink = (table - only)[0] / (1 - 143 / 255)
        area = ink.sum() * (CANVAS / size) ** 2
        assert area.item() == pytest.approx(120 * 30 + 30 * 90, rel=0.02)
        x, y = ((ink.sum(d) * axis).sum() / ink.sum() for d in (0, 1))
        down = (3600 * 15 + 2700 * 75) / 6300  # its middle, below the bar's edge
        assert x.item() == pytest.approx(300 - down * math.sin(angle), abs=1.5)
        assert y.item() == pytest.approx(280 + down * math.cos(angle), abs=1.5)
        blue = (only - image)[0].clamp(min=0)
        assert ((blue.sum(0) * axis).sum() / blue.sum()).item() == pytest.approx(90, abs=1)
        assert ((blue.sum(1) * axis).sum() / blue.sum()).item() == pytest.approx(110, abs=1)


def test_a_step_has_one_batch_and_walks_are_made_once() -> None:
    made = data()
    whole = made.batch(3)
    assert whole["states"].shape == (8, 4, 7) and whole["actions"].shape == (8, 3, 10)
    halves = [PushTData(made.config, seed=1, rank=r, world=2).batch(3) for r in range(2)]
    for name, rows in whole.items():
        assert np.array_equal(rows, np.concatenate([half[name] for half in halves]))
    assert made.one("data/push_t", 2).states is made.one("data/push_t", 2).states
    held = made.heldout(6).states
    assert not any(np.array_equal(held[i], made.one("data/push_t", i).states) for i in range(6))


def test_an_evaluation_asks_probes_and_plays_every_policy(tmp_path) -> None:
    made = lewm.build(compose(SMALL_PUSH_T), Processes(), torch.device("cpu"))
    made.step(made.data.batch(0))
    metrics = made.evaluate(final=True)
    assert {"eval/model", "eval/random", "eval/surprise/teleport", "eval/surprise/teleport_agent",
            "eval/probe/block/linear/rms", "eval/probe/angle/mlp/r2"} <= metrics.keys()  # fmt: skip
    assert metrics["eval/oracle"] > 0.6 and metrics["eval/zero"] <= metrics["eval/oracle"]
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    assert "goal" in (tmp_path / "figures" / "plans.svg").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe.policies=[model,true_dynamics]", r"leave true_dynamics out"),
        ("data.seq_len=30", r"data\.seq_len=30 .*data\.skip=5 apart, of data\.walk=31"),
        ("data.walks=0", r"data\.walks=0 must be at least 1"),
        ("recipe.goal_steps=31", r"recipe\.goal_steps=31 must be fewer than data\.walk=31"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config = compose([*SMALL_PUSH_T, override])
        lewm.build(config, Processes(), torch.device("cpu"))
