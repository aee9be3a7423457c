"""Diffusion Forcing's step: every frame as noisy as it likes, and the velocity of each told."""

from __future__ import annotations

import pytest
import torch

from models.worlds.video.schedules import (
    LEVELS,
    noised,
    snr_weight,
    told_apart,
    velocity,
    velocity_of,
)
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import diffusion_forcing


def recipe(*overrides: str):
    config = compose([*SMALL_PINFALL["diffusion_forcing"], *SMALL_WORLD, *overrides])
    return diffusion_forcing.build(config, Processes(), torch.device("cpu"))


def test_frames_are_noised_each_by_itself_and_told_the_action_before_them() -> None:
    """A network that knows x and eps has no error; what it was given says so."""
    made = recipe("data.batch_size=64")
    batch = made.trainer.to_device(made.data.batch(0))
    x = made.see(batch) * 2 - 1
    given = {}

    def knows(x_k, level, before, cache=None):
        given.update(level=level, before=before)
        abar = made.model.abar[level][..., None, None, None]
        eps = (x_k - abar.sqrt() * x) / (1 - abar).sqrt()
        assert torch.allclose(noised(x, eps, abar), x_k, atol=1e-4)
        given.update(eps=eps)
        return velocity(x, eps, abar), None

    made.model.forward = knows
    loss = made.loss((x + 1) / 2, batch["actions"], torch.arange(64))
    assert loss < 1e-6
    level, eps = given["level"].double(), given["eps"]
    assert level.min() < 0.05 * LEVELS and level.max() > 0.95 * LEVELS
    assert abs(level.mean() / LEVELS - 0.5) < 0.05
    assert (level[:, 1:] != level[:, :-1]).double().mean() > 0.95, "each frame its own"
    assert abs(eps.mean()) < 0.02 and abs(eps.var() - 1) < 0.05
    assert torch.equal(given["before"][:, 1:], batch["actions"])
    assert (given["before"][:, 0] == 3).all(), "what was done before the first is not known"


def test_a_share_of_frames_may_be_as_clean_as_the_past_is_in_dreams() -> None:
    seen = {}

    def nothing(x_k, level, before, cache=None):
        seen["level"] = level
        return torch.zeros_like(x_k), None

    for stabilise, past in ((15, 14), (0, 0)):
        made = recipe("recipe.clean=0.7", f"model.stabilise={stabilise}")
        made.model.forward = nothing
        made.loss(torch.rand(200, 6, 3, 16, 16), torch.zeros(200, 5).long(), torch.arange(200))
        clean = seen["level"] == past
        assert abs(clean.double().mean() - 0.7) < 0.06
        assert abs(seen["level"][~clean].double().mean() / LEVELS - 0.5) < 0.08


def test_errors_are_weighed_by_the_signal_of_a_frame_and_of_those_before() -> None:
    made = recipe("data.batch_size=16", "recipe.fade=0.9")
    frames, actions = torch.rand(16, 6, 3, 16, 16), torch.zeros(16, 5, dtype=torch.long)
    seen = {}

    def nothing(x_k, level, before, cache=None):
        seen.update(x_k=x_k, level=level)
        return torch.zeros_like(x_k), None

    made.model.forward = nothing
    loss = made.loss(frames, actions, torch.arange(16))
    abar = made.model.abar[seen["level"]]
    wide, x = abar[..., None, None, None], frames * 2 - 1
    eps = (seen["x_k"] - wide.sqrt() * x) / (1 - wide).sqrt()
    error = velocity(x, eps, wide).square().mean((2, 3, 4))
    torch.testing.assert_close(loss, (snr_weight(abar, 5.0, 0.9) * error).mean())


def test_a_step_learns_and_dreams_send_nothing_back() -> None:
    made = recipe()
    first = [float(made.step(made.data.batch(i))["train/frame"]) for i in range(3)]
    assert len(set(first)) == 3
    before = [p.clone() for p in made.model.parameters()]
    metrics = made.evaluate(final=True)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert {"eval/error/5", "eval/pairs/error/5", "eval/separation"} <= metrics.keys()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.patch=3"], r"data\.image_size=16 must be a multiple of 24"),
        (
            ["model.transformer.sinks=1", "model.transformer.window=4"],
            r"data\.seq_len=6: with model",
        ),
        (
            ["model.context=1", "data.seq_len=3"],
            r"model\.context=1: rewards are told from 2 frames",
        ),
        (["recipe.fade=2"], r"recipe\.fade=2"),
        (["recipe.snr_clip=0"], r"recipe\.snr_clip=0"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(*overrides)


def test_a_network_that_tells_clean_frames_has_the_velocity_that_goes_with_them() -> None:
    made = recipe("model.objective=x")
    model, told = made.model.eval(), recipe("model.objective=v").model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    told.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 3, 16, 16)
    level = torch.tensor([[0, 14, 500, 999]]).expand(2, 4)
    before = torch.zeros(2, 4, dtype=torch.long)
    with torch.no_grad():
        clean, (v, _) = told(x, level, before)[0], model(x, level, before)
    abar = model.abar[level][..., None, None, None]
    torch.testing.assert_close(told_apart(x, v, abar)[0], clean, atol=1e-4, rtol=1e-4)
    assert (model(x, torch.full_like(level, -1), before)[0] == 0).all(), "what is clean has no v"
    batch = made.trainer.to_device(made.data.batch(0))
    seen = made.see(batch)
    made.model.forward = lambda x_k, level, before, cache=None: (
        velocity_of(x_k, seen * 2 - 1, model.abar[level][..., None, None, None]), None
    )  # fmt: skip
    assert made.loss(seen, batch["actions"], torch.arange(len(seen))) < 1e-4
