"""Films told by a U-Net: frames know those before; what moves does so everywhere alike."""

from __future__ import annotations

import pytest
import torch

from models.worlds.video.config import DiffusionForcingConfig, FilmTransformerConfig
from models.worlds.video.diffusion_forcing import DiffusionForcing
from models.worlds.video.film_unet import FilmUNet
from models.worlds.video.unet import UNet
from tests.models.test_film_transformer import FRESH, U_NET, WINDOW, drawn


def config(**changes: object) -> DiffusionForcingConfig:
    layers = FilmTransformerConfig(12, 4, 2, window=WINDOW, time_every=2)
    sizes = {"channels": 3, "image_size": 8, "actions": 3, "transformer": layers}
    return DiffusionForcingConfig(**(sizes | U_NET | changes))  # type: ignore[arg-type]


def network(**changes: object) -> FilmUNet:
    return drawn(FilmUNet(config(**changes), 3))  # type: ignore[return-value]


def film(frames: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH + 1)
    x = torch.randn(2, frames, 3, size, size, generator=generator)
    return x, torch.randn(2, frames, 12, generator=generator)


@torch.no_grad()
def test_a_frame_sees_itself_and_what_was_before_and_nothing_later() -> None:
    """Of many layers over time, each with the window: how far back is the whole network's."""
    model, (x, c) = network(), film(9)
    base, _ = model(x, c)
    for changed_at in range(9):
        other = x.clone()
        other[:, changed_at, 1, 2, 3] += 1
        moved = (model(other, c)[0] - base).abs().amax((0, 2, 3, 4))
        assert (moved[:changed_at] == 0).all()
        assert moved[changed_at] > 0
    told = c.clone()
    told[:, 4] += 1
    moved = (model(x, told)[0] - base).abs().amax((0, 2, 3, 4)) > 0
    assert moved.tolist() == [t >= 4 for t in range(9)]


@torch.no_grad()
def test_beside_a_cache_frames_are_those_of_a_banded_pass_over_everything() -> None:
    model, (x, c) = network(), film(12)
    whole, _ = model(x, c)
    found, cache = model(x[:, :3], c[:, :3])
    torch.testing.assert_close(found, whole[:, :3], atol=1e-3, rtol=1e-3)
    for t in range(3, 12):
        found, cache = model(x[:, t : t + 1], c[:, t : t + 1], cache)
        torch.testing.assert_close(found, whole[:, t : t + 1], atol=1e-3, rtol=1e-3)
        assert cache.frames == min(t + 1, WINDOW - 1), "memory is flat"
    assert len(cache.keys) == len(model.unet.given)
    with pytest.raises(ValueError, match="2 frames beside a cache: they are told one by one"):
        model(x[:, :2], c[:, :2], cache)


@pytest.mark.parametrize("all_again", [False, True])
@torch.no_grad()
def test_what_each_stage_gives_is_as_wide_as_is_said(all_again: bool) -> None:
    unet, widths = UNet([16, 32, 48], 2, 4, attends=False, all_again=all_again), []

    def after(x: torch.Tensor) -> torch.Tensor:
        widths.append(x.shape[1])
        return x

    x, e = torch.randn(1, 16, 8, 8), torch.randn(1, 4)
    assert unet(x, e, after).shape == x.shape
    assert widths == unet.given == [16, 32, 48, 48, 48, 32, 16]
    assert [len(blocks) for blocks in unet.up] == [2 + all_again] * 3


@torch.no_grad()
def test_what_moves_elsewhere_is_told_alike_there() -> None:
    """Rolled around by what the levels halve, and without attention over space, which is of all."""
    model, (x, c) = network(), film(4, size=32)
    for block in model.unet.middle:
        block.attention = None
    x[...] = 0.0
    generator = torch.Generator().manual_seed(FRESH)
    x[..., 12:16, 12:16] = torch.randn(2, 4, 3, 4, 4, generator=generator)
    inside = slice(10, 20)  # away from the border, which the network sees
    here, moved = model(x, c)[0], model(x.roll((2, -2), (3, 4)), c)[0]
    back = moved.roll((-2, 2), (3, 4))
    off = (here - back)[..., inside, inside].abs().amax()
    assert off < 0.1 * (here - moved)[..., inside, inside].abs().amax()


@torch.no_grad()
def test_a_silenced_network_tells_nothing_whatever_it_is_shown() -> None:
    model = DiffusionForcing(config(patch=2))
    model.initialise(torch.Generator().manual_seed(FRESH))
    x, _ = film(3)
    told, _ = model(x, torch.full((2, 3), 500), torch.zeros(2, 3, dtype=torch.long))
    assert (told == 0).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": [16, 24]}, r"model\.widths=\[16, 24\] must be multiples of 16, or none at all"),
        ({"widths": [0]}, r"model\.widths=\[0\] must be multiples of 16"),
        ({"margin": 2}, r"model\.margin=2 is of the transformer's patches, and model\.widths="),
        ({"depth": 0}, r"model\.depth=0 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**changes)


def test_a_frame_is_halved_as_often_as_there_are_levels() -> None:
    assert config(patch=2, widths=[16, 16, 16]).multiple == 8
    assert config(patch=2, widths=[]).multiple == 2
