"""Discs: energy and momentum are kept, contacts are where they should be, time can be turned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.envs.discs import Discs, Frame, Plate, draw, energy, fly, landing, scatter

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
SIZE = 32.0


def discs(n: int = 16, k: int = 4, seed: int = FRESH) -> Discs:
    rng = np.random.default_rng(seed)
    radius = rng.uniform(1, 3, (n, k))
    parts = scatter(rng, radius, SIZE, SIZE), rng.normal(0, 2, (n, k, 2)), radius
    return Discs(*(torch.from_numpy(part) for part in parts))


def one(x: float, y: float, vx: float, vy: float, radius: float = 2.0) -> Discs:
    double = torch.float64
    return Discs(
        torch.tensor([[[x, y]]], dtype=double),
        torch.tensor([[[vx, vy]]], dtype=double),
        torch.tensor([[radius]], dtype=double),
    )


@pytest.mark.parametrize("gravity", [0.0, 0.05])
def test_energy_is_kept_over_ten_thousand_frames_and_nothing_overlaps(gravity: float) -> None:
    state, frame = discs(4, 3), Frame(SIZE, SIZE, gravity)
    before = energy(state, frame)
    for _ in range(10_000):
        state = fly(state, frame).discs
    assert ((energy(state, frame) / before - 1).abs() < 1e-9).all()
    gaps = (state.x[:, :, None] - state.x[:, None]).norm(dim=-1) + 1e9 * torch.eye(3)
    assert (gaps >= state.radius[:, :, None] + state.radius[:, None] - 1e-9).all()
    edge = state.radius[..., None]
    assert (state.x >= edge - 1e-9).all() and (state.x <= SIZE - edge + 1e-9).all()


def test_momentum_is_kept_between_discs_of_different_mass() -> None:
    state = discs(64, 5)
    wide = Frame(1e9, 1e9)
    state = state._replace(x=state.x + 5e8)  # far from any side
    mass = state.radius.square()[..., None]
    before = (mass * state.v).sum(1)
    after = state
    for _ in range(30):
        after = fly(after, wide).discs
    torch.testing.assert_close((mass * after.v).sum(1), before, atol=1e-6, rtol=1e-9)
    assert not torch.equal(after.v, state.v), "some met"


def test_head_on_contacts_are_those_of_the_textbook() -> None:
    """v1' = ((m1 - m2) v1 + 2 m2 v2) / (m1 + m2), and the same with the other."""
    x = torch.tensor([[[8.0, 16.0], [24.0, 16.0]]], dtype=torch.float64)
    v = torch.tensor([[[3.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    radius = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    state = Discs(x, v, radius)
    for _ in range(4):
        state = fly(state, Frame(SIZE, SIZE)).discs
    (m1, m2), (v1, v2) = (1.0, 4.0), (3.0, -1.0)
    told = [((m1 - m2) * v1 + 2 * m2 * v2) / (m1 + m2), ((m2 - m1) * v2 + 2 * m1 * v1) / (m1 + m2)]
    np.testing.assert_allclose(state.v[0, :, 0], told, atol=1e-12)
    alike = fly(Discs(x, v, radius), Frame(SIZE, SIZE, alike=True)).discs
    for _ in range(3):
        alike = fly(alike, Frame(SIZE, SIZE, alike=True)).discs
    np.testing.assert_allclose(alike.v[0, :, 0], [v2, v1], atol=1e-12)


def test_a_thrown_disc_flies_along_its_parabola_and_comes_back_to_its_height() -> None:
    g, state = 0.1, one(16, 20, 0.0, 0.0)
    drop = SIZE - 2 - 20  # to where it touches the floor
    time = math.sqrt(2 * drop / g)
    frame, frames = Frame(SIZE, SIZE, g), 40
    for count in range(1, frames + 1):
        state = fly(state, frame).discs
        phase = math.fmod(count, 2 * time)
        fallen = g * min(phase, 2 * time - phase) ** 2 / 2
        assert abs(state.x[0, 0, 1].item() - (20 + fallen)) < 1e-9


def test_time_told_backwards_leads_back() -> None:
    state, frame = discs(16, 3), Frame(SIZE, SIZE, 0.05)
    there = state
    for _ in range(10):
        there = fly(there, frame).discs
    back = there._replace(v=-there.v)
    for _ in range(10):
        back = fly(back, frame).discs
    torch.testing.assert_close(back.x, state.x, atol=1e-5, rtol=0)


def plate(start: float, end: float) -> Plate:
    return Plate(*(torch.tensor([x], dtype=torch.float64) for x in (start, end)), half=4.0)


def test_a_plate_reflects_what_it_is_under_at_the_time_of_contact() -> None:
    """The ball is down after half of the frame, when the plate has gone half of its way."""
    frame = Frame(SIZE, 28.0)
    ball = one(16, 25, 0, 2)
    for start, end, over in ((9.9, 14.0, False), (10.1, 14.0, True), (20.1, 20.1, False)):
        flown = fly(ball, frame, plate(start, end))
        assert flown.hit.item() == over != flown.missed.item()
        assert flown.discs.x[0, 0, 1].item() == (25 if over else 27)
    gone = flown
    for _ in range(20):  # falls on, past the floor that is not there
        gone = fly(gone.discs, frame, plate(16, 16), gone.missed)
    assert gone.discs.x[0, 0, 1].item() == 27 + 20 * 2


@pytest.mark.parametrize("gravity", [0.0, 0.05])
def test_where_a_disc_lands_is_where_it_lands(gravity: float) -> None:
    state = discs(200, 1)
    slow = state.v[..., 1].abs() < 0.1
    state = state._replace(v=torch.where(slow[..., None], torch.ones_like(state.v), state.v))
    frame = Frame(SIZE, SIZE, gravity)
    told, flying = landing(state, frame), state
    landed = torch.full((200, 1), torch.nan, dtype=torch.float64)
    for _ in range(800):
        after = fly(flying, frame).discs
        # Turned upwards within this frame, by the floor: between the two it was at its lowest.
        turned = (flying.v[..., 1] > 0) & (after.v[..., 1] < 0)
        close = ((flying.x[..., 0] - told).abs() <= flying.v[..., 0].abs() + 1e-6) | (
            (after.x[..., 0] - told).abs() <= flying.v[..., 0].abs() + 1e-6
        )
        landed = torch.where(turned & landed.isnan(), close.double(), landed)
        flying = after
    assert (landed == 1).all()


def test_a_disc_covers_its_area_around_its_centre() -> None:
    rng = np.random.default_rng(FRESH)
    x = torch.from_numpy(rng.uniform(6, 26, (50, 1, 2)))
    radius = torch.from_numpy(rng.uniform(2, 4, (50, 1)))
    for scale, size in ((1.0, 32), (2.0, 64)):
        cover = draw(x, radius, size, scale)[:, 0]
        area = cover.sum((1, 2)) / scale**2
        assert ((area / (torch.pi * radius[:, 0].square()) - 1).abs() < 0.05).all()
        axis = (torch.arange(size) + 0.5) / scale
        centre = torch.stack([(cover.sum(i) * axis).sum(1) / cover.sum((1, 2)) for i in (1, 2)], 1)
        assert ((centre - x[:, 0]).abs() < 0.05).all()
