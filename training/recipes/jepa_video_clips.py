"""What clips a masked video encoder learns from, and what its latents are asked about.

Each kind of data is one class: `see` draws a batch, `heldout` gives films that training never
shows, half of them for probes to be fitted to, `labels` what a linear probe has to tell of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from training.data.config_worlds import (
    Movers,
    MovingConfig,
    RecordedFilmsConfig,
    TrajectoriesConfig,
    TwoRoomsRGBConfig,
)
from training.data.moving import Films, MovingData
from training.data.recorded_films import RecordedFilmsData
from training.data.trajectories import TrajectoriesData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.envs import two_rooms_rgb
from training.envs.moving import draw_sprites
from training.errors import UserError
from training.torch_step import Batch

PIXEL_MEAN, PIXEL_STD = 0.5, 0.5  # of pixels, for normalisation
CELLS = 6  # rows and columns of a grid of places in the rooms


def see_rooms(positions: Tensor, size: int) -> Tensor:
    """[b, t, 2] -> [b, t, 3, size, size] frames of the coloured rooms, normalised."""
    return (two_rooms_rgb.render(positions, size) - PIXEL_MEAN) / PIXEL_STD


def on_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> Batch:
    return {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}


def chunks(batch: Batch, size: int) -> Iterator[Batch]:
    """The same rows, `size` of them at a time."""
    for part in zip(*(x.split(size) for x in batch.values()), strict=True):
        yield dict(zip(batch, part, strict=True))


class DigitClips:
    """One digit that moves: which one, and where to."""

    channels = 1
    DIRECTIONS = 8

    def __init__(self, data: MovingData, device: torch.device) -> None:
        self.data = data
        self.sprites, self.digits = (
            torch.from_numpy(x).to(device) for x in (data.sprites, data.labels)
        )
        shown = self.sprites[: data.trained]
        share = (shown.shape[-1] / data.config.image_size) ** 2  # of a frame, for a digit
        self.mean = shown.mean() * share
        self.std = (shown.square().mean() * share - self.mean**2).sqrt()

    @staticmethod
    def check(config: MovingConfig) -> None:
        if config.movers != Movers.digits or config.objects != 1:
            raise UserError(
                f"data.movers={config.movers}, data.objects={config.objects}: probes of "
                "recipe=jepa_video_masked name one digit, set digits and 1"
            )

    def see(self, batch: Batch) -> Tensor:
        """[b, 1, t, s, s] clips, normalised: a digit must outweigh the places in an embedding."""
        sprites = self.sprites[batch["sprite"]]
        frames = draw_sprites(batch["positions"], sprites, self.data.config.image_size)
        return rearrange((frames - self.mean) / self.std, "b t c h w -> b c t h w")

    def heldout(self, count: int) -> Batch:
        """The first half shows scans of training: no probe knows one that it is judged by."""
        half, frames = count // 2, self.data.config.seq_len
        parts = self.data.for_probes(half, frames), self.data.heldout(count - half, frames)
        films = {
            name: np.concatenate(both) for name, *both in zip(Films._fields, *parts, strict=True)
        }
        return on_device(films, self.sprites.device)

    def labels(self, batch: Batch) -> dict[str, Tensor]:
        step = batch["positions"][:, 1, 0] - batch["positions"][:, 0, 0]
        turn = torch.atan2(step[:, 1], step[:, 0]) / (2 * math.pi) % 1
        way = (turn * self.DIRECTIONS).long() % self.DIRECTIONS
        return {"digit": self.digits[batch["sprite"][:, 0]], "motion": way}


class RoomClips:
    """The dot in the coloured rooms: where it is."""

    channels = 3

    def __init__(self, data: TwoRoomsRGBData, device: torch.device) -> None:
        self.data, self.device = data, device

    @staticmethod
    def check(config: TwoRoomsRGBConfig) -> None:
        pass

    def see(self, batch: Batch) -> Tensor:
        """[b, 3, t, s, s] clips."""
        frames = see_rooms(batch["states"], self.data.config.image_size)
        return rearrange(frames, "b t c h w -> b c t h w")

    def heldout(self, count: int) -> Batch:
        config, walks = self.data.config, self.data.heldout(count)
        seen = walks.states[:, : config.skip * config.seq_len : config.skip]
        return on_device({"states": seen}, self.device)

    def labels(self, batch: Batch) -> dict[str, Tensor]:
        place = batch["states"][:, 0] - two_rooms_rgb.LOW
        cell = place * (CELLS / (two_rooms_rgb.HIGH - two_rooms_rgb.LOW))
        x, y = cell.long().clamp(0, CELLS - 1).unbind(-1)
        return {"place": y * CELLS + x}


class RecordedClips:
    """Recorded films, about which nothing is asked."""

    channels = 3

    def __init__(self, data: TrajectoriesData | RecordedFilmsData, device: torch.device) -> None:
        self.data, self.device = data, device

    @staticmethod
    def check(config: TrajectoriesConfig | RecordedFilmsConfig) -> None:
        pass

    def see(self, batch: Batch) -> Tensor:
        """[b, 3, t, s, s] clips."""
        return rearrange(see_recorded(batch["frames"]), "b t c h w -> b c t h w")

    def heldout(self, count: int) -> Batch:
        return on_device(self.data.heldout(count), self.device)

    def labels(self, batch: Batch) -> dict[str, Tensor]:
        return {}


class GreyClips(RecordedClips):
    """The same without colour."""

    channels = 1
    data: RecordedFilmsData

    def heldout(self, count: int) -> Batch:
        return on_device(self.data.heldout(count, self.data.config.seq_len), self.device)


def see_recorded(frames: Tensor) -> Tensor:
    """uint8 frames, normalised."""
    return (frames.float() / 255 - PIXEL_MEAN) / PIXEL_STD


CLIPS = {
    "moving": (MovingData, DigitClips),
    "two_rooms_rgb": (TwoRoomsRGBData, RoomClips),
    "trajectories": (partial(TrajectoriesData, acted=False), RecordedClips),
    "recorded_films": (RecordedFilmsData, GreyClips),
}
"Data by name -> where it is made, and what is asked about it."
