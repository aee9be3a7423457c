"""What films a predictor of the next latent learns from, and where in them something is.

Each kind of data is one class: `see` draws a batch, `heldout` gives films that training never
shows, `cells` says which cells of a grid over each frame a detector has to find.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.config_worlds import Movers
from training.data.moving import MovingData
from training.data.recorded_films import RecordedFilmsData
from training.envs.moving import draw_discs, draw_sprites
from training.errors import UserError
from training.evaluation.detection import grid_of
from training.recipes.jepa_video_clips import on_device
from training.torch_step import Batch

CHANNELS = 1
LIT = 0.5  # brightness from which on a pixel shows something


class MovingFilms:
    """Digits or balls that are drawn as they are asked for. A cell holds what is centred in it.

    Args:
        frames: of the longest film that is held out.
    """

    def __init__(self, data: MovingData, device: torch.device, frames: int) -> None:
        self.data, self.frames = data, frames
        self.sprites = torch.from_numpy(data.sprites).to(device)

    def see(self, batch: Batch) -> Tensor:
        """[b, t, 1, s, s] frames in [0, 1]."""
        config = self.data.config
        if config.movers == Movers.digits:
            sprites = self.sprites[batch["sprite"]]
            return draw_sprites(batch["positions"], sprites, config.image_size)
        return draw_discs(batch["positions"], batch["radius"], config.image_size)

    def heldout(self, count: int) -> Batch:
        return on_device(self.data.heldout(count, self.frames)._asdict(), self.sprites.device)

    def cells(self, batch: Batch, count: int) -> Tensor:
        """[b, t, g, g] bool."""
        return grid_of(batch["positions"], count, self.data.config.image_size)


class RecordedFilms:
    """Films as they were recorded. A cell holds something where one of its pixels is bright."""

    def __init__(self, data: RecordedFilmsData, device: torch.device, frames: int) -> None:
        self.data, self.device, self.frames = data, device, frames
        if frames > data.frames:
            raise UserError(
                f"data.path={data.config.path} has films of {data.frames} frames, fewer than "
                f"the {frames} of recipe.horizon and before: lower recipe.horizon"
            )

    def see(self, batch: Batch) -> Tensor:
        """[b, t, 1, s, s] frames in [0, 1]."""
        return batch["frames"].float() / 255

    def heldout(self, count: int) -> Batch:
        return on_device(self.data.heldout(count, self.frames), self.device)

    def cells(self, batch: Batch, count: int) -> Tensor:
        """[b, t, g, g] bool."""
        seen = self.see(batch)[:, :, 0]
        return F.adaptive_max_pool2d(seen, count) > LIT


FILMS = {"moving": (MovingData, MovingFilms), "recorded_films": (RecordedFilmsData, RecordedFilms)}
"Data by name -> where it is made, and what is to be found in it."
