"""Latents of masked parts told from those of the rest: `recipe=ijepa`.

I-JEPA (2023, arXiv:2301.08243). One step:

    masks    = one size of block for the batch, places for every image (training/data/masks.py)
    z        = encoder(patches of the context)
    loss     = smooth L1 of predictor(z, places) - norm(average encoder(all patches))
    average <- decay average + (1 - decay) encoder,   decay from recipe.ema_decay to 1

With `recipe.regularizer=none` the target is the encoder itself, with its gradient: the control that
collapses. What differs: a constant weight decay.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.jepa.config import IJEPAConfig
from models.worlds.jepa.ijepa import IJEPA
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import HubImagesConfig, ImagesConfig, SmallImagesConfig
from training.data.images import ImageData
from training.data.masks import Masks, multi_block
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.recipes.config import check_parts, with_decided
from training.recipes.config_worlds import IJEPARecipeConfig, Target
from training.recipes.image_jepa import ImageJEPATraining, channels_of, open_images
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.schema import TrainConfig
from training.seeding import numpy_rng
from training.torch_step import Batch


class IJEPATraining(ImageJEPATraining):
    """Trains encoder and predictor; the average follows."""

    model: IJEPA

    def __init__(
        self, config: TrainConfig, data: ImageData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, IJEPARecipeConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: IJEPA(self.model_config, averaged),
            data.config.batch_size,
        )
        self.flops_per_step = estimate(config).flops_per_step

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        masks = draw_masks(self.config, numpy_rng(self.config.seed, "masks", self.trainer.count))
        metrics = super().step(
            batch | {name: self.data.mine(rows) for name, rows in masks._asdict().items()}
        )
        shares = {name: rows.shape[-1] for name, rows in masks._asdict().items()}
        patches = np.prod(self.model.encoder.grid)
        return metrics | {f"train/{name}_share": k / patches for name, k in shares.items()}

    def latents(self, batch: Batch) -> tuple[Latents, None]:
        images = self.see(batch)[:, 0]
        return self.model(images, [(batch["context"], batch["targets"])]), None

    def prediction_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(predicted.float(), target.float())

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embed(images)

    def loss_space(self, images: Tensor) -> Tensor:
        """The patch in the middle, of the encoder itself: the average lags behind.

        Patches of one image differ by their places alone, even where the encoder has collapsed.
        """
        return self.model.encoder(images)[:, self.model.encoder.centre]


def draw_masks(config: TrainConfig, rng: np.random.Generator) -> Masks:
    """The masks of a whole batch.

    Raises:
        UserError: no context is left.
    """
    recipe = config.recipe
    assert isinstance(recipe, IJEPARecipeConfig) and isinstance(config.model, IJEPAConfig)
    assert isinstance(config.data, ImagesConfig)
    grid = [config.data.image_size // side for side in config.model.patch]
    try:
        return multi_block(
            rng,
            grid,
            config.data.batch_size,
            targets=recipe.targets,
            target_scale=recipe.target_scale,
            target_aspect=recipe.target_aspect,
            context_scale=recipe.context_scale,
            min_keep=recipe.min_keep,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def fill_shapes(config: TrainConfig) -> IJEPAConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, ImagesConfig)
    size = [config.data.image_size] * 2
    return with_decided(config.model, channels=channels_of(config.data), size=size)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(
        config, ("ijepa",), (SmallImagesConfig, HubImagesConfig),
        "small_images or data=hub_images",
    )  # fmt: skip
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, ImagesConfig)
    size, patch = config.data.image_size, config.model.patch
    if len(patch) != 2 or any(size % side for side in patch):
        raise UserError(
            f"model.patch={patch} must be two numbers that divide data.image_size={size}"
        )
    if (config.data.views.count, config.data.views.local_count) != (1, 0):
        raise UserError(
            f"data.views.count={config.data.views.count}, local_count="
            f"{config.data.views.local_count}: recipe=ijepa masks one view, set 1 and 0"
        )
    draw_masks(config, numpy_rng(config.seed, "masks/check"))


def build(config: TrainConfig, processes: Processes, device: torch.device) -> IJEPATraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    return IJEPATraining(config, open_images(config, processes), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device, with the masks of one batch. No data is read."""
    check(config)
    model_config, data = fill_shapes(config), config.data
    assert isinstance(data, ImagesConfig)
    with torch.device("meta"):
        model = IJEPA(model_config, config.recipe.resolved_target == Target.ema)
    rows = rows_at_once(config)
    size = data.image_size
    images = torch.zeros(rows, model_config.channels, size, size, device="meta")
    masks = draw_masks(config, numpy_rng(config.seed, "masks/estimate"))
    context, targets = (torch.from_numpy(x[:rows]).to("meta") for x in masks)

    def loss() -> Tensor:
        latents = model(images, [(context, targets)])
        return (latents.predicted - latents.target).square().mean()

    return torch_estimate(model, loss, rows, config, data.batch_size, IJEPATraining.unit)
