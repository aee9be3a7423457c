"""A world drawn by diffusion beside its last frames: `recipe=diamond`.

DIAMOND (2024, arXiv:2405.12399). One step, with clips of T frames of which the model sees
`context`, and is asked for the rest one by one:

    for n = context .. T - 1
        seen    = x_{n-context} .. x_{n-1}, what was told before in the place of the truth
        loss   += EDM's error of x_n, given seen and a_{n-context} .. a_{n-1}        (diamond.py)
        x_n    <- D, cut, rounded, without a gradient

data.seq_len = context + 1 is one frame at a time, as for Atari; CS:GO had four. With
`recipe.context_noise` the frames that are seen are noisy, each clip by as much as is drawn for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.worlds.video.diamond import Diamond
from models.worlds.video.noise import normal
from training.distributed import Processes
from training.estimate import Estimate
from training.recipes.config_video import DiamondRecipeConfig
from training.recipes.video_world import FRAMEWORK as FRAMEWORK
from training.recipes.video_world import (
    VideoWorldTraining,
    check_world,
    clips_on_meta,
    fill_shapes,
    open_world_data,
    world_estimate,
)
from training.schema import TrainConfig
from training.seeding import stream_seed


class DiamondTraining(VideoWorldTraining):
    """Trains the denoiser."""

    kind = Diamond
    model: Diamond
    recipe: DiamondRecipeConfig

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        seed = stream_seed(self.config.seed, "noise")
        return unrolled(self.model, frames * 2 - 1, actions, rows, seed, self.recipe.context_noise)

    def variations(self) -> dict[str, dict[str, Any]]:
        """Drawn in one step."""
        return {"one_step": {"steps": 1}} if self.model.config.steps > 1 else {}


def unrolled(
    model: Diamond, x: Tensor, actions: Tensor, rows: Tensor, seed: int, loud: float
) -> Tensor:
    """The mean error over the frames that follow the first `context` of x [b, T, c, h, w].

    Args:
        rows: number of each clip, which with `seed` decides its noise.
        loud: largest standard deviation of noise on what is seen.
    """
    losses = []
    for n in range(model.context, x.shape[1]):

        def draw(use: int, *shape: int, frame: int = n) -> Tensor:
            return normal(seed, rows, (frame, use), shape)

        seen = x[:, n - model.context : n]
        if loud:
            level = loud * (draw(3) / 2**0.5).erf().abs()  # uniform
            seen = seen + level[:, None, None, None, None] * draw(4, *seen.shape[1:])
        loss, told = model.loss(x[:, n], seen, actions[:, n - model.context : n], draw)
        losses.append(loss)
        x = torch.cat([x[:, :n], told[:, None].to(x.dtype), x[:, n + 1 :]], dim=1)
    return torch.stack(losses).mean()


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_world(config, "diamond")


def build(config: TrainConfig, processes: Processes, device: torch.device) -> DiamondTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return DiamondTraining(config, data, processes, device, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    with torch.device("meta"):
        model = Diamond(fill_shapes(config))
    x, actions = clips_on_meta(config)

    def loss() -> Tensor:
        n, total = model.context, torch.zeros((), device="meta")
        for first in range(x.shape[1] - n):
            seen, done = x[:, first : first + n], actions[:, first : first + n]
            noise = torch.zeros(len(x), device="meta")
            total = total + model(x[:, 0], noise, seen, done).square().mean()
        return total

    return world_estimate(config, model, loss)
