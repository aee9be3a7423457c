"""Films whose frames are each as noisy as they like: `recipe=diffusion_forcing`.

Diffusion Forcing (2024, arXiv:2407.01392). One step, with clips of T frames:

    k_t    ~ uniform over the noise levels, of each frame by itself
    v      = model(x_k, k, a before each frame)
    loss   = mean over t of weight_t (v_t - v_t of x, eps, k)^2

where weight is that of min-SNR, fused over the frames before unless `recipe.fade` is null
(models/worlds/video/schedules.py). A past of uniform levels is hardly ever as clean as it is in
dreams: with `recipe.clean`, a share of the frames is as noisy as those of the past are there, and
no noisier.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.video.diffusion_forcing import DiffusionForcing
from models.worlds.video.noise import even, normal
from models.worlds.video.schedules import LEVELS, noised, snr_weight, velocity
from training.distributed import Processes
from training.estimate import Estimate
from training.recipes.config_video import DiffusionForcingRecipeConfig
from training.recipes.video_world import FRAMEWORK as FRAMEWORK
from training.recipes.video_world import (
    VideoWorldTraining,
    check_clips,
    check_world,
    clips_on_meta,
    fill_shapes,
    open_world_data,
    world_estimate,
)
from training.schema import TrainConfig
from training.seeding import stream_seed


class DiffusionForcingTraining(VideoWorldTraining):
    """Trains the transformer."""

    kind = DiffusionForcing
    model: DiffusionForcing
    recipe: DiffusionForcingRecipeConfig

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        seed, x = stream_seed(self.config.seed, "noise"), frames * 2 - 1
        which, share = even(seed, rows, (0,), (2, x.shape[1])).unbind(1)
        level = (share * LEVELS).long().clamp(max=LEVELS - 1)
        past = max(self.model.config.stabilise - 1, 0)
        level = torch.where(which < self.recipe.clean, past, level)
        eps = normal(seed, rows, (1,), x.shape[1:])
        abar = self.model.abar[level]  # [b, t]
        wide = abar[..., None, None, None]
        before = F.pad(actions, (1, 0), value=self.model.actions)
        told, _ = self.model(noised(x, eps, wide), level, before)
        error = (told - velocity(x, eps, wide)).float().square().mean((2, 3, 4))
        return (snr_weight(abar, self.recipe.snr_clip, self.recipe.fade) * error).mean()

    def variations(self) -> dict[str, dict[str, Any]]:
        """In one and in two steps; and, if the past is told as a little noisy, told as clean."""
        found: dict[str, dict[str, Any]] = {
            f"steps_{n}": {"steps": n} for n in (1, 2) if n < self.model.config.steps
        }
        return found | ({"clean_past": {"stabilise": 0}} if self.model.config.stabilise else {})


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_world(config, "diffusion_forcing")
    check_clips(config)


def build(
    config: TrainConfig, processes: Processes, device: torch.device
) -> DiffusionForcingTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return DiffusionForcingTraining(config, data, processes, device, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    with torch.device("meta"):
        model = DiffusionForcing(fill_shapes(config))
    x, actions = clips_on_meta(config)

    def loss() -> Tensor:
        level = torch.zeros(x.shape[:2], dtype=torch.long, device="meta")
        told, _ = model(x, level, F.pad(actions, (1, 0)))
        return told.square().mean()

    return world_estimate(config, model, loss)
