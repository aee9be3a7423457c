"""Latents of masked tubes of a clip told from those of the rest: `recipe=jepa_video_masked`.

V-JEPA (2024, arXiv:2404.08471) and V-JEPA 2 (2025, arXiv:2506.09985), whose model is I-JEPA's over
patches of two frames. One step:

    masks    = many small blocks, and few large ones, through all frames (training/data/masks.py)
    z        = encoder(patches that no block covers)
    loss     = mean over all that is told under both masks of
               |predictor(z, places) - norm(average encoder(all patches))|
    average <- decay average + (1 - decay) encoder

Judged by what a linear probe reads off the mean latent of held-out films: which digit it is and
where it goes, or where the dot is in the coloured rooms (jepa_video_clips.py); it was fitted to
other films, and of digits to other scans. What differs: fixed sines and cosines for positions
(V-JEPA 2: rotary), a decay that grows to 1 (V-JEPA 2: constant).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.worlds.jepa.config import IJEPAConfig
from models.worlds.jepa.ijepa import IJEPA
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import (
    MovingConfig,
    RecordedFilmsConfig,
    TrajectoriesConfig,
    TwoRoomsRGBConfig,
)
from training.data.masks import Masks, tubes
from training.data.moving import MovingData
from training.data.recorded_films import RecordedFilmsData
from training.data.trajectories import TrajectoriesData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.film_figures import masked_film
from training.evaluation.probes import accuracy, logistic_probe
from training.files import write_atomic
from training.recipes.config import check_parts, with_decided
from training.recipes.config_worlds import JEPAVideoMaskedRecipeConfig, Target
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.recipes.jepa_video_clips import CLIPS, chunks
from training.schema import TrainConfig
from training.seeding import numpy_rng
from training.torch_step import Batch

CLIP_DATA = MovingConfig, TwoRoomsRGBConfig, TrajectoriesConfig, RecordedFilmsConfig
CHUNK = 64  # films that are encoded at once


def channels_of(config: TrainConfig) -> int:
    """Channels of a frame, before any is made."""
    return CLIPS[config.data.name][1].channels


class JEPAVideoMaskedTraining(JEPATraining):
    """Trains encoder and predictor; the average follows."""

    model: IJEPA
    data: MovingData | TwoRoomsRGBData | TrajectoriesData | RecordedFilmsData

    def __init__(
        self,
        config: TrainConfig,
        data: MovingData | TwoRoomsRGBData | TrajectoriesData | RecordedFilmsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, JEPAVideoMaskedRecipeConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: IJEPA(self.model_config, averaged),
            data.config.batch_size * data.config.seq_len,
        )
        _, kind = CLIPS[config.data.name]
        self.clips = kind(data, device)
        self.flops_per_step = estimate(config).flops_per_step

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        rng = numpy_rng(self.config.seed, "masks", self.trainer.count)
        for number, masks in enumerate(draw_masks(self.config, rng)):
            batch = batch | {
                f"{name}_{number}": self.data.mine(rows) for name, rows in masks._asdict().items()
            }
        return super().step(batch)

    def latents(self, batch: Batch) -> tuple[Latents, None]:
        clips = self.clips.see(batch)
        count = len(self.recipe.blocks)
        masks = [(batch[f"context_{i}"], batch[f"targets_{i}"]) for i in range(count)]
        return self.model(clips, masks), None

    def prediction_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).float().abs().mean()

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics and probes; those of pixels too, if `final`."""
        films = self.clips.heldout(self.recipe.films)
        clips = torch.cat([self.clips.see(part) for part in chunks(films, CHUNK)])
        with self.whole_model():
            encoder = self.model.encoder
            middle = [encoder(part)[:, encoder.centre].float() for part in clips.split(CHUNK)]
            metrics = self.health(torch.cat(middle))
            z = torch.cat([self.model.embed(part).float() for part in clips.split(CHUNK)])
        half = len(z) // 2

        def probe(x: Tensor, labels: Tensor) -> float:
            classes = int(labels.max()) + 1
            return accuracy(
                logistic_probe(x[:half], labels[:half], classes)(x[half:]), labels[half:]
            )

        asked = self.clips.labels(films)
        metrics |= {f"eval/probe/{name}": probe(z, labels) for name, labels in asked.items()}
        if final:
            pixels = torch.nn.functional.avg_pool3d(clips, (1, 2, 2)).flatten(1)
            metrics |= {
                f"eval/pixels/{name}": probe(pixels, labels) for name, labels in asked.items()
            }
        self.film = clips[:3].mean(dim=1)
        return metrics

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and clips beside what of them is seen under each mask."""
        super().export(directory)
        if not self.processes.is_main:
            return
        masks = draw_masks(self.config, numpy_rng(self.config.seed, "masks/drawn"))
        grid, patch = self.model.encoder.grid, self.model.encoder.patch
        seen = [np.isin(np.arange(math.prod(grid)), mask.context[0]) for mask in masks]
        shown = [mask.reshape(grid).repeat(patch[1], 1).repeat(patch[2], 2) for mask in seen]
        kept = [mask.repeat(patch[0], 0) for mask in shown]
        low, high = self.film.min(), self.film.max()
        film = ((self.film - low) / (high - low)).cpu().numpy()
        drawn = masked_film(film, np.stack(kept))
        write_atomic(directory / "figures" / "masks.svg", drawn)


def draw_masks(config: TrainConfig, rng: np.random.Generator) -> list[Masks]:
    """The masks of a whole batch, one for each of recipe.blocks.

    Raises:
        UserError: no context is left.
    """
    recipe, data = config.recipe, config.data
    assert isinstance(recipe, JEPAVideoMaskedRecipeConfig) and isinstance(data, CLIP_DATA)
    assert isinstance(config.model, IJEPAConfig)
    size = data.seq_len, data.image_size, data.image_size
    grid = [whole // part for whole, part in zip(size, config.model.patch, strict=True)]
    try:
        return [
            tubes(
                rng, grid, data.batch_size, blocks=blocks, scale=scale, aspect=recipe.aspect,
                min_keep=recipe.min_keep,
            )
            for blocks, scale in zip(recipe.blocks, recipe.scales, strict=True)
        ]  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def fill_shapes(config: TrainConfig) -> IJEPAConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, CLIP_DATA)
    size = [config.data.seq_len, config.data.image_size, config.data.image_size]
    return with_decided(config.model, channels=channels_of(config), size=size)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(
        config,
        ("ijepa",),
        CLIP_DATA,
        "moving, data=two_rooms_rgb, data=trajectories or data=recorded_films",
    )
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, CLIP_DATA)
    size = config.data.seq_len, config.data.image_size, config.data.image_size
    patch = config.model.patch
    if len(patch) != 3 or any(whole % part for whole, part in zip(size, patch, strict=True)):
        raise UserError(
            f"model.patch={patch} must be three numbers that divide clips of "
            f"{' x '.join(map(str, size))} (data.seq_len, data.image_size)"
        )
    CLIPS[config.data.name][1].check(config.data)
    draw_masks(config, numpy_rng(config.seed, "masks/check"))


def build(
    config: TrainConfig, processes: Processes, device: torch.device
) -> JEPAVideoMaskedTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    make, _ = CLIPS[config.data.name]
    data = make(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return JEPAVideoMaskedTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device, with the masks of one batch. No data is made."""
    check(config)
    model_config, data, recipe = fill_shapes(config), config.data, config.recipe
    assert isinstance(data, CLIP_DATA) and isinstance(recipe, JEPAVideoMaskedRecipeConfig)
    with torch.device("meta"):
        model = IJEPA(model_config, recipe.resolved_target == Target.ema)
    rows = rows_at_once(config)
    assert model_config.size is not None
    clips = torch.zeros(rows, channels_of(config), *model_config.size, device="meta")
    masks = [
        tuple(torch.from_numpy(x[:rows]).to("meta") for x in mask)
        for mask in draw_masks(config, numpy_rng(config.seed, "masks/estimate"))
    ]

    def loss() -> Tensor:
        latents = model(clips, masks)
        return (latents.predicted - latents.target).abs().mean()

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, JEPAVideoMaskedTraining.unit
    )
