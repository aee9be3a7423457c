"""Joint embedding of views without a teacher: `recipe=lejepa`.

LeJEPA (2025, arXiv:2511.08544). One step, with views v of images n:

    z_nv   = projector(encoder(view))
    loss   = pred_weight mean (z_nv - mean over global views of z_n)^2  +  sigreg_weight SIGReg(z_v)

and every other term of `recipe.regularizer` in the place of SIGReg (jepa.py): VICReg's, an averaged
teacher (BYOL), or nothing, which collapses. What the paper writes as (1 - lambda) and lambda are
pred_weight and sigreg_weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.worlds.jepa.config import EncoderKind, LeJEPAConfig
from models.worlds.jepa.lejepa import LeJEPA
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import HubImagesConfig, ImagesConfig, SmallImagesConfig
from training.data.images import LOCAL, ImageData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.recipes.config import check_parts, check_patch, with_decided
from training.recipes.config_worlds import LeJEPARecipeConfig, Target
from training.recipes.image_jepa import ImageJEPATraining, channels_of, open_images
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.schema import TrainConfig
from training.torch_step import Batch


class LeJEPATraining(ImageJEPATraining):
    """Trains encoder and projector together."""

    model: LeJEPA

    def __init__(
        self, config: TrainConfig, data: ImageData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, LeJEPARecipeConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: LeJEPA(self.model_config, averaged),
            data.config.batch_size,
        )
        self.flops_per_step = estimate(config).flops_per_step

    def latents(self, batch: Batch) -> tuple[Latents, None]:
        local = self.see(batch, LOCAL) if f"{LOCAL}where" in batch else None
        return self.model(self.see(batch), local), None

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embed(images)

    def loss_space(self, images: Tensor) -> Tensor:
        return self.model.encoder(images[:, None])[:, 0]


def fill_shapes(config: TrainConfig) -> LeJEPAConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, LeJEPAConfig) and isinstance(config.data, ImagesConfig)
    channels, size = channels_of(config.data), config.data.image_size
    return with_decided(config.model, channels=channels, image_size=size)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(
        config, ("lejepa",), (SmallImagesConfig, HubImagesConfig),
        "small_images or data=hub_images",
    )  # fmt: skip
    views, kind = config.data.views, config.model.encoder.kind
    if config.recipe.resolved_target == Target.ema and views.count < 2:
        raise UserError(
            f"data.views.count={views.count}: an averaged target is of other views, give 2 or more"
        )
    if views.count + views.local_count < 2:
        raise UserError(
            f"data.views.count={views.count}, local_count={views.local_count}: a view alone agrees "
            "with itself, give 2 or more"
        )
    check_patch(config.model.encoder, "data.image_size,", config.data.image_size)
    if views.local_count:
        check_patch(config.model.encoder, "data.views.local_size,", views.local_size)
    one_size = kind in (EncoderKind.conv, EncoderKind.impala)
    if one_size and views.local_count and views.local_size != config.data.image_size:
        raise UserError(
            f"data.views.local_size={views.local_size}: model.encoder.kind={kind} sees images of "
            f"one size, {config.data.image_size}; use that, or kind=vit or resnet18"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> LeJEPATraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    return LeJEPATraining(config, open_images(config, processes), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is read."""
    check(config)
    model_config, data = fill_shapes(config), config.data
    averaged = config.recipe.resolved_target == Target.ema
    with torch.device("meta"):
        model = LeJEPA(model_config, averaged)
    rows = rows_at_once(config, least=2)

    def images(count: int, size: int) -> Tensor:
        return torch.zeros(rows, count, model_config.channels, size, size, device="meta")

    views = images(data.views.count, data.image_size)
    local = (
        images(data.views.local_count, data.views.local_size) if data.views.local_count else None
    )

    def loss() -> Tensor:
        latents = model(views, local)
        return (latents.predicted - latents.target).square().mean()

    return torch_estimate(model, loss, rows, config, data.batch_size, LeJEPATraining.unit)
