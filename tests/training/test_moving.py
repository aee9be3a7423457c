"""Things that move by themselves: reflections and collisions exact, images where things are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.data.config_worlds import Movers, MovingConfig
from training.data.moving import MovingData
from training.envs.discs import scatter
from training.envs.moving import collide, draw_discs, draw_sprites, drift
from training.evaluation.detection import average_precision, detector, grid_of

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
SIZE = 32.0


def balls(n: int = 32, k: int = 4, seed: int = FRESH):
    rng = np.random.default_rng(seed)
    radius = rng.uniform(2, 4, (n, k))
    return scatter(rng, radius, SIZE, SIZE), rng.normal(0, 2, (n, k, 2)), radius


def test_what_drifts_is_reflected_as_step_by_step() -> None:
    rng = np.random.default_rng(FRESH)
    start, speed = rng.uniform(6, 26, (20, 2, 2)), rng.uniform(-9, 9, (20, 2, 2))
    radius = np.full((20, 2), 6.0)
    found = drift(start, speed, radius, 30, SIZE)
    x, v = start.copy(), speed.copy()
    for frame in range(30):
        np.testing.assert_allclose(found[:, frame], x, atol=1e-9)
        x = x + v
        for _ in range(3):  # as often as a step can be reflected
            low, high = x < 6, x > 26
            x = np.where(low, 12 - x, np.where(high, 52 - x, x))
            v = np.where(low | high, -v, v)


def test_energy_is_kept_and_nothing_overlaps() -> None:
    x, v, radius = balls()
    positions, speed = collide(x, v, radius, 60, SIZE)
    energy = (speed**2).sum(axis=(2, 3))
    np.testing.assert_allclose(energy, np.repeat(energy[:, :1], 60, axis=1), rtol=1e-9)
    gaps = np.linalg.norm(positions[:, :, :, None] - positions[:, :, None], axis=-1)
    reach = (radius[:, :, None] + radius[:, None])[:, None]
    assert (gaps - reach + 1e9 * np.eye(4)).min() > -1e-6
    edge = radius[:, None, :, None]
    assert (positions >= edge - 1e-6).all() and (positions <= SIZE - edge + 1e-6).all()


def test_time_told_backwards_leads_back() -> None:
    x, v, radius = balls()
    positions, speed = collide(x, v, radius, 15, SIZE)
    back, _ = collide(positions[:, -1].copy(), -speed[:, -1], radius, 15, SIZE)
    np.testing.assert_allclose(back[:, -1], x, atol=1e-5)


def test_two_balls_that_meet_head_on_exchange_their_velocities_and_momentum_is_kept() -> None:
    x = np.array([[[10.0, 16.0], [20.0, 16.0]]])
    v = np.array([[[2.0, 0.0], [-1.0, 0.0]]])
    radius = np.full((1, 2), 2.0)
    positions, speed = collide(x, v, radius, 4, SIZE)
    # They touch after 2 frames: 6 pixels apart, closing at 3.
    np.testing.assert_allclose(positions[0, 3], [[13.0, 16.0], [20.0, 16.0]], atol=1e-9)
    np.testing.assert_allclose(speed[0, 3], v[0, ::-1])
    aslant = np.array([[[10.0, 15.0], [20.0, 16.0]]])
    _, speed = collide(aslant, v, radius, 4, SIZE)
    np.testing.assert_allclose(speed[0, 3].sum(0), v[0].sum(0), atol=1e-9)
    assert abs(speed[0, 3, 0, 1]) > 0.1


def test_images_show_things_where_they_are() -> None:
    places = torch.tensor([[[[8.0, 20.0], [25.0, 6.0]], [[9.5, 20.0], [25.0, 6.0]]]])
    discs = draw_discs(places, torch.full((1, 2), 3.0), 32)
    assert discs.shape == (1, 2, 1, 32, 32)
    area = discs[0, 0, 0].sum().item()
    assert area == pytest.approx(2 * np.pi * 9, rel=0.06)
    alone = draw_discs(places[:, :, :1], torch.full((1, 1), 3.0), 32)[0, :, 0]
    axis = torch.arange(32) + 0.5
    for frame, (x, y) in zip(alone, ((8.0, 20.0), (9.5, 20.0)), strict=True):
        assert ((frame.sum(0) * axis).sum() / frame.sum()).item() == pytest.approx(x, abs=0.05)
        assert ((frame.sum(1) * axis).sum() / frame.sum()).item() == pytest.approx(y, abs=0.05)
    sprites = torch.rand(1, 2, 6, 6)
    shown = draw_sprites(places[:, :1], sprites, 32)[0, 0, 0]
    torch.testing.assert_close(shown[17:23, 5:11], sprites[0, 0])
    assert shown[:3].abs().sum() < 1e-4 and shown[30:].abs().sum() < 1e-4


@pytest.mark.parametrize("movers", list(Movers))
def test_a_step_has_one_batch_and_what_is_held_out_is_of_other_digits(movers: Movers) -> None:
    config = MovingConfig(movers=movers, image_size=32, digit_size=14, batch_size=8)
    if movers == Movers.balls:
        config.radius, config.objects = [2.0, 3.0], 3
    data = MovingData(config, seed=1)
    whole = data.batch(5)
    halves = [MovingData(config, seed=1, rank=r, world=2).batch(5) for r in range(2)]
    for name, rows in whole.items():
        assert np.array_equal(rows, np.concatenate([half[name] for half in halves]))
    assert whole["positions"].shape == (8, 10, config.objects, 2)
    if movers == Movers.digits:
        assert whole["sprite"].max() < data.trained <= data.heldout(64, 4).sprite.min()
    speed = np.linalg.norm(np.diff(whole["positions"], axis=1), axis=-1)
    assert speed.max() < 5.0 * (1 if movers == Movers.digits else 3)


def test_a_detector_finds_what_is_there_and_not_what_is_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(300, 1, 2, 2, generator=generator) * 32
    truth = grid_of(places, 8, 32.0)[:, 0]
    assert truth.sum(dim=(1, 2)).max() == 2
    maps = draw_discs(places, torch.full((300, 2), 2.0), 32)[:, 0]
    find = detector(maps[:200], truth[:200], generator)
    assert average_precision(find(maps[200:]), truth[200:]) > 0.8
    assert average_precision(find(maps[200:].flip(0)), truth[200:]) < 0.15


def test_average_precision_by_hand() -> None:
    scores, truth = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 0]).bool()
    assert average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.zeros(8), torch.tensor([1, 0] * 4).bool()) == 0.5
    assert average_precision(-scores, truth) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.radius=.*room for data\.objects=9 balls"):
        MovingConfig(movers=Movers.balls, objects=9, radius=[8.0, 9.0])
    with pytest.raises(ValueError, match=r"data\.digit_size=80 .*below data\.image_size=64"):
        MovingConfig(digit_size=80)
    with pytest.raises(ValueError, match=r"data\.seq_len=2"):
        MovingConfig(seq_len=2)
