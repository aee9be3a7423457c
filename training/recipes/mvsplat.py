"""A scene from two views in one pass: `recipe=mvsplat`.

MVSplat (2024, arXiv:2403.14627): models/worlds/splats/mvsplat.py, learned as feed_forward.py says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.worlds.splats.config import MvSplatConfig
from models.worlds.splats.mvsplat import MvSplat
from training.data.random_tables import CONTEXT
from training.distributed import Processes
from training.estimate import Estimate
from training.recipes.feed_forward import FeedForwardTraining, check_glimpses, estimate_glimpses
from training.schema import TrainConfig

FRAMEWORK = "torch"


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_glimpses(config, "mvsplat")


def build(config: TrainConfig, processes: Processes, device: torch.device) -> FeedForwardTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    model = config.model
    assert isinstance(model, MvSplatConfig)
    flops = estimate(config).flops_per_step
    return FeedForwardTraining(config, processes, device, lambda: MvSplat(model), flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, without the rasteriser. No data is read."""
    check(config)
    model = config.model
    assert isinstance(model, MvSplatConfig)

    def told(mvsplat: MvSplat, images: Tensor, viewmats: Tensor) -> Tensor:
        cameras = viewmats[:, :CONTEXT], viewmats[:, :CONTEXT, :3, :3]
        scenes, depth = mvsplat.scenes(images, *cameras)
        return depth.mean() + torch.stack([x.square().mean() for x in scenes.values()]).sum()

    return estimate_glimpses(config, lambda: MvSplat(model), told)
