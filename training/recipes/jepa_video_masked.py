"""Latents of masked tubes of a clip told from those of the rest: `recipe=jepa_video_masked`.

V-JEPA (2024, arXiv:2404.08471) and V-JEPA 2 (2025, arXiv:2506.09985), whose model is I-JEPA's over
patches of two frames. One step:

    masks    = many small blocks, and few large ones, through all frames (training/data/masks.py)
    z        = encoder(patches that no block covers)
    loss     = mean over both masks of |predictor(z, places) - norm(average encoder(all patches))|
    average <- decay average + (1 - decay) encoder

Judged by what a linear probe reads off the mean latent of films whose digits were held out: which
digit it is, and where it goes. What differs: fixed sines and cosines for positions (V-JEPA 2:
rotary), a decay that grows to 1 (V-JEPA 2: constant).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.worlds.jepa.config import IJEPAConfig
from models.worlds.jepa.ijepa import IJEPA
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import Movers, MovingConfig
from training.data.masks import Masks, tubes
from training.data.moving import Films, MovingData
from training.distributed import Processes
from training.envs.moving import draw_sprites
from training.errors import UserError
from training.estimate import Estimate, state_memory, torch_activations, torch_flops
from training.evaluation.film_figures import masked_film
from training.evaluation.probes import accuracy, logistic_probe
from training.files import write_atomic
from training.recipes.config import check_parts
from training.recipes.config_worlds import JEPAVideoMaskedRecipeConfig, Target
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.schema import TrainConfig
from training.seeding import numpy_rng
from training.torch_step import Batch

CHANNELS = 1
CHUNK = 64  # films that are encoded at once


class JEPAVideoMaskedTraining(JEPATraining):
    """Trains encoder and predictor; the average follows."""

    model: IJEPA
    data: MovingData

    def __init__(
        self, config: TrainConfig, data: MovingData, processes: Processes, device: torch.device
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
        self.sprites = torch.from_numpy(data.sprites).to(device)
        self.flops_per_step = estimate(config).flops_per_step

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        rng = numpy_rng(self.config.seed, "masks", self.trainer.count)
        for number, masks in enumerate(draw_masks(self.config, rng)):
            batch = batch | {
                f"{name}_{number}": self.data.mine(rows) for name, rows in masks._asdict().items()
            }
        return super().step(batch)

    def see(self, positions: Tensor, sprite: Tensor) -> Tensor:
        """[b, 1, t, s, s] clips in [0, 1]."""
        size = self.data.config.image_size
        return rearrange(
            draw_sprites(positions, self.sprites[sprite], size), "b t c h w -> b c t h w"
        )

    def latents(self, batch: Batch) -> tuple[Latents, None]:
        clips = self.see(batch["positions"], batch["sprite"])
        s = self.model.whole(clips)
        found = [
            self.model.tell(clips, s, batch[f"context_{i}"], batch[f"targets_{i}"])
            for i in range(len(self.recipe.blocks))
        ]
        z, told, wanted = (torch.cat([part[i] for part in found], dim=1) for i in range(3))
        return Latents(z, told, wanted), None

    def prediction_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted - target).float().abs().mean()

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics and probes; those of pixels too, if `final`."""
        drawn = self.data.heldout(self.recipe.films, self.data.config.seq_len)
        films = Films(*(torch.from_numpy(x).to(self.trainer.device) for x in drawn))
        parts = zip(films.positions.split(CHUNK), films.sprite.split(CHUNK), strict=True)
        clips = torch.cat([self.see(*part) for part in parts])
        with self.whole_model():
            encoder = self.model.encoder
            middle = [encoder(part)[:, encoder.centre].float() for part in clips.split(CHUNK)]
            metrics = self.health(torch.cat(middle))
            z = torch.cat([self.model.embed(part).float() for part in clips.split(CHUNK)])
        digit = torch.from_numpy(self.data.labels).to(z.device)[films.sprite[:, 0]]
        step = films.positions[:, 1, 0] - films.positions[:, 0, 0]
        turn = torch.atan2(step[:, 1], step[:, 0]) / (2 * math.pi) % 1
        way = (turn * self.recipe.directions_told).long()
        half = len(z) // 2

        def probe(x: Tensor, labels: Tensor) -> float:
            classes = int(labels.max()) + 1
            return accuracy(
                logistic_probe(x[:half], labels[:half], classes)(x[half:]), labels[half:]
            )

        metrics |= {"eval/probe/digit": probe(z, digit), "eval/probe/motion": probe(z, way)}
        if final:
            pixels = torch.nn.functional.avg_pool3d(clips, (1, 2, 2)).flatten(1)
            metrics |= {
                "eval/pixels/digit": probe(pixels, digit),
                "eval/pixels/motion": probe(pixels, way),
            }
        self.film = clips[:3, 0]
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
        drawn = masked_film(self.film.cpu().numpy(), np.stack(kept))
        write_atomic(directory / "figures" / "masks.svg", drawn)


def draw_masks(config: TrainConfig, rng: np.random.Generator) -> list[Masks]:
    """The masks of a whole batch, one for each of recipe.blocks.

    Raises:
        UserError: no context is left.
    """
    recipe, data = config.recipe, config.data
    assert isinstance(recipe, JEPAVideoMaskedRecipeConfig) and isinstance(data, MovingConfig)
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
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, MovingConfig)
    size = [config.data.seq_len, config.data.image_size, config.data.image_size]
    return dataclasses.replace(config.model, channels=CHANNELS, size=size)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, JEPAVideoMaskedRecipeConfig, ("ijepa",), (MovingConfig,), "moving")
    assert isinstance(config.model, IJEPAConfig) and isinstance(config.data, MovingConfig)
    size = config.data.seq_len, config.data.image_size, config.data.image_size
    patch = config.model.patch
    if len(patch) != 3 or any(whole % part for whole, part in zip(size, patch, strict=True)):
        raise UserError(
            f"model.patch={patch} must be three numbers that divide clips of "
            f"{' x '.join(map(str, size))} (data.seq_len, data.image_size)"
        )
    if config.data.movers != Movers.digits or config.data.objects != 1:
        raise UserError(
            f"data.movers={config.data.movers}, data.objects={config.data.objects}: probes of "
            "recipe=jepa_video_masked name one digit, set digits and 1"
        )
    draw_masks(config, numpy_rng(config.seed, "masks/check"))


def build(
    config: TrainConfig, processes: Processes, device: torch.device
) -> JEPAVideoMaskedTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    assert isinstance(config.data, MovingConfig)
    data = MovingData(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return JEPAVideoMaskedTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device, with the masks of one batch. No data is made."""
    check(config)
    model_config, data, recipe = fill_shapes(config), config.data, config.recipe
    assert isinstance(data, MovingConfig) and isinstance(recipe, JEPAVideoMaskedRecipeConfig)
    with torch.device("meta"):
        model = IJEPA(model_config, recipe.resolved_target == Target.ema)
    rows = max(1, data.batch_size // (config.scale.devices or 1) // config.optim.accumulate)
    assert model_config.size is not None
    clips = torch.zeros(rows, CHANNELS, *model_config.size, device="meta")
    masks = [
        [torch.from_numpy(x[:rows]).to("meta") for x in mask]
        for mask in draw_masks(config, numpy_rng(config.seed, "masks/estimate"))
    ]

    def loss() -> Tensor:
        s = model.whole(clips)
        found = [model.tell(clips, s, *mask) for mask in masks]
        return torch.stack([(x.predicted - x.target).abs().mean() for x in found]).sum()

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = state_memory(parameters, 0, config.optim, config.scale)
    return Estimate(
        parameters,
        torch_flops(loss) * (data.batch_size / rows),
        data.batch_size * data.seq_len,
        JEPAVideoMaskedTraining.unit,
        {**memory, "activations": torch_activations(model, loss)},
    )
