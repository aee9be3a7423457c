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

import math

import torch
from torch import Tensor

from models.worlds.video.config import DiamondConfig
from models.worlds.video.diamond import Diamond
from models.worlds.video.noise import normal
from models.worlds.video.outcome import BEFORE, outcome_loss, steps_of
from models.worlds.video.outcome import LEVELS as OUTCOME_LEVELS
from training.data.config_worlds import PinfallConfig, Variant
from training.data.pinfall import PinfallData
from training.distributed import Processes
from training.envs.pinfall import ACTIONS
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.dreams import forked
from training.recipes.config import check_parts, with_decided
from training.recipes.config_worlds import DiamondRecipeConfig
from training.recipes.video_world import FORKS, VideoWorldTraining
from training.recipes.video_world import FRAMEWORK as FRAMEWORK
from training.schema import TrainConfig
from training.seeding import stream_seed

CHANNELS = 3


class DiamondTraining(VideoWorldTraining):
    """Trains the denoiser."""

    model: Diamond

    def __init__(
        self, config: TrainConfig, data: PinfallData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, DiamondRecipeConfig)
        self.recipe = config.recipe
        filled = fill_shapes(config)
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: Diamond(filled),
            estimate(config).flops_per_step,
        )

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        seed = stream_seed(self.config.seed, "noise")
        return unrolled(self.model, frames * 2 - 1, actions, rows, seed, self.recipe.context_noise)

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """And, at a fork, what is drawn in one step: the mean of what may be."""
        metrics = super().evaluate(final)
        if final and self.data.config.variant == Variant.fork:
            steps, self.model.config.steps = self.model.config.steps, 1
            with self.whole_model():
                found = forked(self.model, self.draw, FORKS, self.trainer.device)
            self.model.config.steps = steps
            metrics |= {f"eval/one_step/{name}": value for name, value in found.items()}
        return metrics


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


def fill_shapes(config: TrainConfig) -> DiamondConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, DiamondConfig) and isinstance(config.data, PinfallConfig)
    size = config.data.image_size
    return with_decided(config.model, channels=CHANNELS, image_size=size, actions=ACTIONS)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("diamond",), (PinfallConfig,), "pinfall")
    model, data, recipe = config.model, config.data, config.recipe
    assert isinstance(model, DiamondConfig) and isinstance(data, PinfallConfig)
    assert isinstance(recipe, DiamondRecipeConfig)
    if data.seq_len <= model.context:
        raise UserError(
            f"data.seq_len={data.seq_len} must be above model.context={model.context}: a clip has "
            "frames that are seen, and those that are asked for"
        )
    if model.context < BEFORE:
        raise UserError(
            f"model.context={model.context}: rewards are told from {BEFORE} frames before a step, "
            "give as many or more"
        )
    if data.length < model.context + recipe.horizon:
        raise UserError(
            f"data.length={data.length}: a dream has model.context={model.context} frames that are "
            f"seen and recipe.horizon={recipe.horizon} more; raise it, or lower these"
        )
    halved = math.lcm(model.patch * 2 ** (len(model.widths) - 1), 2 ** (OUTCOME_LEVELS - 1))
    if data.image_size % halved:
        raise UserError(
            f"data.image_size={data.image_size} must be a multiple of {halved}, for patches of "
            f"model.patch={model.patch}, the {len(model.widths)} levels of model.widths and the "
            f"{OUTCOME_LEVELS} of what tells rewards"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> DiamondTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    assert isinstance(config.data, PinfallConfig)
    data = PinfallData(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return DiamondTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    data = config.data
    assert isinstance(data, PinfallConfig)
    with torch.device("meta"):
        model = Diamond(fill_shapes(config))
    rows, size = rows_at_once(config), data.image_size
    x = torch.zeros(rows, data.seq_len, CHANNELS, size, size, device="meta")
    actions = torch.zeros(rows, data.seq_len - 1, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        n, total = model.context, torch.zeros((), device="meta")
        for first in range(data.seq_len - n):
            seen, done = x[:, first : first + n], actions[:, first : first + n]
            noise = torch.zeros(rows, device="meta")
            total = total + model(x[:, 0], noise, seen, done).square().mean()
        signs, ends = model.outcome(*steps_of(x, actions))
        nothing = torch.zeros(len(signs), device="meta")
        return total + outcome_loss(signs, ends, nothing, nothing)

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, DiamondTraining.unit
    )
