"""Where things are in frames of a game: known from its memory, read off pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.data.config_episodes import AtariConfig
from training.distributed import Processes
from training.evaluation import frame_reader
from training.evaluation.frame_reader import Reader, misplaced, read, taught
from training.recipes import diamond

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
NAMES = "ball_x", "ball_y", "plate_x"


def drawn(count: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright ball and a bar at the bottom, and where they are on a screen of 160 x 80."""
    rng = np.random.default_rng(FRESH)
    frames, places = torch.zeros(count, 3, size, size), np.zeros((count, 3))
    for row in range(count):
        x, y, plate = rng.integers(size - 1), rng.integers(size - 4), rng.integers(size - 3)
        frames[row, :, y : y + 2, x : x + 2] = 1
        frames[row, :2, size - 1, plate : plate + 4] = 1
        places[row] = 160 * (x + 1) / size, 80 * (y + 1) / size, 160 * (plate + 2) / size
    return frames, torch.from_numpy(places).float()


def test_a_reader_finds_what_it_was_shown_and_minds_nothing_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame_reader, "STEPS", 200)
    frames, places = drawn(400)
    hidden = places.clone()
    hidden[::3, :2] = torch.nan
    reader = taught(frames[:300], hidden[:300], NAMES, 160, 80)
    off = (read(reader, frames[300:, None])[:, 0] - places[300:]).abs()
    assert (off.median(0).values < torch.tensor([4.0, 2.0, 4.0])).all(), off.median(0).values
    monkeypatch.setattr(frame_reader, "STEPS", 3)
    one, two = (read(taught(frames, hidden, NAMES, 160, 80), frames[:4, None]) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, read(reader, frames[:4, None]))


def test_places_are_means_over_a_map_in_units_of_the_screen() -> None:
    reader = Reader(("plate_x", "ball_y", "ball_x"), width=160, height=80)
    for parameter in reader.parameters():
        parameter.data.zero_()
    told = reader(torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(told, torch.tensor([[80.0, 40.0, 80.0]]).expand(2, 3))


def test_errors_are_those_of_balls_that_are_in_the_picture_at_both_ends() -> None:
    true = torch.tensor([
        [[0, 0, 5], [3, 4, 5], [6, 8, 5]],
        [[0, 0, 5], [3, 4, 5], [torch.nan, torch.nan, 7]],
    ])  # fmt: skip
    told = true[:, 1:].nan_to_num(99.0)
    told[0, 1] += torch.tensor([0.0, 5.0, -2.0])
    found = misplaced(told, true[:, 1:].nan_to_num(), true, NAMES, (1, 2, 5), (2,))
    assert found == pytest.approx(
        {
            "error/1": 0, "parser/1": 0, "copy/1": 5, "over_copy/1": 0,
            "error/2": 5, "parser/2": 0, "copy/2": 10, "over_copy/2": 0.5, "over_copy/worst": 0.5,
            "plate/1": 0, "plate/2": 1,
        }
    )  # fmt: skip
    nowhere = torch.full_like(true, torch.nan)
    assert misplaced(told, told, nowhere, NAMES, (1, 2), (2,)) == {}


def test_the_memory_of_breakout_says_where_ball_and_paddle_are() -> None:
    pytest.importorskip("ale_py")
    from training.data.atari import HEIGHT, WIDTH, AtariData, machine, places

    config = AtariConfig(frames=200)
    ale = machine(config, FRESH)
    actions, rng, seen = ale.getMinimalActionSet(), np.random.default_rng(FRESH), 0
    for count in range(300):
        ale.act(actions[1 if count % 40 == 0 else rng.integers(len(actions))])
        x, y, _ = places("breakout", ale.getRAM())
        red = (ale.getScreenRGB()[93:188, 8:152] == [200, 72, 72]).all(-1)
        rows, columns = np.nonzero(red)
        if len(rows) == 8 and np.isfinite(x):  # the whole of it, below the bricks
            assert (columns.mean() + 8, rows.mean() + 93) == (x, y)
            seen += 1
        if not np.isfinite(x):
            assert len(rows) < 8
    assert seen > 20
    data = AtariData(config, seed=1)
    assert data.known == NAMES and data.screen == (WIDTH, HEIGHT)
    states = data.states(data.spread(9, 3, held=False), 3)
    assert states.shape == (9, 3, 3) and np.isfinite(states[..., 2]).all()
    assert AtariData(AtariConfig(game="pong", frames=2000), seed=1).known == ()


def test_a_dream_of_breakout_is_judged_by_where_the_ball_should_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ale_py")
    monkeypatch.setattr(frame_reader, "STEPS", 2)
    small = [o for o in (*SMALL_PINFALL["diamond"], *SMALL_WORLD) if not o.startswith(
        ("data.worlds", "data.length"))]  # fmt: skip
    sets = [*small, "data=atari", "data.frames=400", "recipe.splits=[]", "recipe.horizon=5"]
    made = diamond.build(compose(sets), Processes(), torch.device("cpu"))
    found = made.evaluate(final=True)
    assert {"eval/error/5", "eval/parser/5", "eval/over_copy/worst", "eval/plate/5"} <= {*found}
    assert found["eval/one_step/error/5"] > 0
