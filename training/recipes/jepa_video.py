"""Latents of the next frames told from those of two: `recipe=jepa_video`.

The video example of eb_jepa (2026, arXiv:2602.03604). One step, with films o_0..o_T-1:

    z      = encoder(o)
    zhat^k = predictor, all frames at once, k times over what it told before (passes)
    loss   = pred_weight mean over k of (projector(zhat^k) - projector(z))^2
             +  what keeps the projections from collapsing (jepa.py)

Judged by a detector: a small network is fitted to latents of seen frames, to say which cells of a
grid hold something (jepa_video_films.py), and then reads what was predicted. Its average precision,
frame by frame, stands beside that of the last latent seen, which is what a predictor that knows
nothing of motion would tell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.worlds.jepa.config import JEPAVideoConfig
from models.worlds.jepa.jepa_video import CONTEXT, JEPAVideo
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import MovingConfig, RecordedFilmsConfig
from training.data.moving import MovingData
from training.data.recorded_films import RecordedFilmsData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.detection import average_precision, detector
from training.evaluation.film_figures import detection_film
from training.files import write_atomic
from training.recipes.config import check_parts, with_decided
from training.recipes.config_worlds import JEPAVideoRecipeConfig, Target
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.recipes.jepa_video_clips import chunks
from training.recipes.jepa_video_films import CHANNELS, FILMS
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch

FILM_DATA = MovingConfig, RecordedFilmsConfig
CHUNK = 32  # films that are encoded at once
SHOWN = 3  # films that are drawn


class JEPAVideoTraining(JEPATraining):
    """Trains encoder, predictor and projector together."""

    model: JEPAVideo

    def __init__(
        self,
        config: TrainConfig,
        data: MovingData | RecordedFilmsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, JEPAVideoRecipeConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        _, kind = FILMS[config.data.name]
        self.films = kind(data, device, CONTEXT + self.recipe.horizon)
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: JEPAVideo(self.model_config, averaged),
            data.config.batch_size * data.config.seq_len,
        )
        self.flops_per_step = estimate(config).flops_per_step

    def latents(self, batch: Batch) -> tuple[Latents, None]:
        return self.model(self.films.see(batch)), None

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics, errors of predictions, and what a detector makes of them."""
        recipe = self.recipe
        films = self.films.heldout(recipe.films)
        with self.whole_model():
            parts = chunks(films, CHUNK)
            z = torch.cat([self.model.encode(self.films.see(part)) for part in parts]).float()
            ahead = torch.cat(
                [self.model.rollout(part[:, :CONTEXT], recipe.horizon) for part in z.split(CHUNK)]
            ).float()
            shown = self.model.project(z[:CHUNK]).flatten(0, 1).float()
        metrics = self.health(shown)
        truth, last = z[:, CONTEXT:], z[:, CONTEXT - 1 : CONTEXT].expand_as(ahead)
        worth = [
            ((x - truth).square().mean(dim=(0, 2, 3, 4)) + 1e-12).tolist() for x in (ahead, last)
        ]
        relative = [a / b for a, b in zip(*worth, strict=True)]
        metrics["eval/error/1"], metrics[f"eval/error/{recipe.horizon}"] = relative[0], relative[-1]
        metrics |= self.detect(films, z, ahead, last)
        self.found["series"]["error"] = relative
        return metrics

    def detect(self, films: Batch, z: Tensor, ahead: Tensor, last: Tensor) -> dict[str, float]:
        """Fit a detector to latents of one half of the films; judge it on the other half."""
        recipe, half = self.recipe, len(z) // 2
        cells = self.films.cells(films, recipe.cells)  # [n, t, g, g]
        generator = torch_generator(self.config.seed, "probe", device=z.device)
        find = detector(z[:half].flatten(0, 1), cells[:half].flatten(0, 1), generator)
        truth = cells[half:, CONTEXT:]
        metrics = {
            "eval/ap/seen": average_precision(find(z[half:, CONTEXT:].flatten(0, 1)), truth),
            "eval/ap/chance": truth.float().mean().item(),
        }
        curves = {}
        for name, told in (("", ahead), ("copy/", last)):
            scores = find(told[half:].flatten(0, 1)).unflatten(0, truth.shape[:2])
            curve = [average_precision(scores[:, h], truth[:, h]) for h in range(recipe.horizon)]
            curves[name] = scores
            self.found["series"][f"ap/{name.strip('/') or 'predicted'}"] = curve
            metrics[f"eval/ap/{name}mean"] = float(np.mean(curve))
            metrics |= {f"eval/ap/{name}{h}": curve[h - 1] for h in (1, 4, recipe.horizon)
                        if h <= recipe.horizon}  # fmt: skip
        few = slice(half, half + SHOWN)
        self.film = (
            self.films.see({name: x[few] for name, x in films.items()})[:, :, 0],
            curves[""][:SHOWN].sigmoid(),
            curves["copy/"][:SHOWN].sigmoid(),
        )
        return metrics

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and a strip of each film with what was told of it."""
        super().export(directory)
        if not self.processes.is_main:
            return
        seen, told, copied = (part.cpu().numpy() for part in self.film)
        drawn = detection_film(seen, told, copied, CONTEXT)
        write_atomic(directory / "figures" / "foretold.svg", drawn)


def fill_shapes(config: TrainConfig) -> JEPAVideoConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, JEPAVideoConfig)
    return with_decided(config.model, channels=CHANNELS)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("jepa_video",), FILM_DATA, "moving or data=recorded_films")
    assert isinstance(config.model, JEPAVideoConfig) and isinstance(config.data, FILM_DATA)
    assert isinstance(config.recipe, JEPAVideoRecipeConfig)
    if config.model.passes > config.data.seq_len - CONTEXT:
        raise UserError(
            f"model.passes={config.model.passes}: after {config.data.seq_len - CONTEXT} the "
            f"predictions of data.seq_len={config.data.seq_len} frames stay as they are"
        )
    side = -(-config.data.image_size // config.model.stride)
    if side % config.recipe.cells:
        raise UserError(
            f"recipe.cells={config.recipe.cells} must divide the {side} rows of a latent map "
            f"(data.image_size={config.data.image_size}, model.stride={config.model.stride})"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> JEPAVideoTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    make, _ = FILMS[config.data.name]
    data = make(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return JEPAVideoTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    assert isinstance(config.data, FILM_DATA)
    data = config.data
    with torch.device("meta"):
        model = JEPAVideo(fill_shapes(config), config.recipe.resolved_target == Target.ema)
    rows = rows_at_once(config)
    shape = rows, data.seq_len, CHANNELS, data.image_size, data.image_size
    frames = torch.zeros(shape, device="meta")

    def loss() -> Tensor:
        latents = model(frames)
        return (latents.predicted - latents.target).square().mean()

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, JEPAVideoTraining.unit
    )
