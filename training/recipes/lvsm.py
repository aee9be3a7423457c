"""A view from other views without any 3D: `recipe=lvsm`.

LVSM (2024, arXiv:2410.17242): models/worlds/splats/lvsm.py, learned as feed_forward.py says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.worlds.splats.config import LvsmConfig
from models.worlds.splats.lvsm import Lvsm
from training.distributed import Processes
from training.estimate import Estimate
from training.recipes.feed_forward import FeedForwardTraining, check_glimpses, estimate_glimpses
from training.schema import TrainConfig

FRAMEWORK = "torch"


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_glimpses(config, "lvsm", getattr(config.model, "patch", 1))


def build(config: TrainConfig, processes: Processes, device: torch.device) -> FeedForwardTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    model = config.model
    assert isinstance(model, LvsmConfig)
    flops = estimate(config).flops_per_step
    return FeedForwardTraining(config, processes, device, lambda: Lvsm(model), flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run. No data is read."""
    check(config)
    model = config.model
    assert isinstance(model, LvsmConfig)

    def told(lvsm: Lvsm, images: Tensor, viewmats: Tensor) -> Tensor:
        return lvsm(images, viewmats, viewmats[..., :3, :3]).square().mean()

    return estimate_glimpses(config, lambda: Lvsm(model), told)
