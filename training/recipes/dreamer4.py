"""Clean frames told from any noise, in steps of any size: `recipe=dreamer4`.

Dreamer 4 (2025, arXiv:2509.24527). With a tokenizer (`model.tokenizer`), the first `recipe.prepare`
of the run is its own: |decode(encode(masked x)) - x|^2, a share of the patches masked that is drawn
for every frame. Then, or from the start, the dynamics learns, and the tokenizer does not change.
One step, with clips of T frames whose noise and step are each frame's own:

    most clips      tau on the finest grid, d the smallest step: |f(z, tau, d) - x|^2
    recipe.jumps    d = 2, 4, .. smallest steps: what two steps of d / 2 reach, without a gradient
    loss            = mean of (0.9 tau + 0.1) of either                       (shortcut.py)

Larger steps are taught from `recipe.jumps_after` of the run on, when the smallest have been
learned. What differs: errors are not divided by their running root mean square.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.video.config import Dreamer4Config, Objective
from models.worlds.video.dreamer4 import Dreamer4
from models.worlds.video.noise import even, normal
from models.worlds.video.shortcut import draw_levels, flow_loss, jump_loss, powers
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.recipes.config_video import Dreamer4RecipeConfig
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

GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly


class Dreamer4Training(VideoWorldTraining):
    """Trains the transformer."""

    kind = Dreamer4
    methods = ("outcome", "prepare", "encode", "decode")
    model: Dreamer4
    recipe: Dreamer4RecipeConfig

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        seed, model = stream_seed(self.config.seed, "noise"), self.model
        if self.preparing:
            error = model.prepare(frames, self.masked(frames, rows))
            self.note(tokenizer=error)
            return error
        x = model.encode(frames)
        most, t, slopes = model.most, x.shape[1], model.config.objective == Objective.v
        share = even(seed, rows, (0,), (t, 2))
        eps = normal(seed, rows, (1,), x.shape[1:])
        before = F.pad(actions, (1, 0), value=self.model.actions)
        total = x.new_zeros(())
        for large, own in self.kinds(rows):  # told together: larger steps need two more passes
            part = torch.tensor(own or [0], device=x.device)
            done, given = before[part], (eps[part], x[part])

            def tell(z: Tensor, tau: Tensor, stride: Tensor, done: Tensor = done) -> Tensor:
                return self.model(z, tau, stride, done)[0]

            if large:
                tau, d = draw_levels(share[part], most, least=2)
                error = jump_loss(tell, *given, tau, d, most, slopes)
            else:
                tau = (share[part][..., 1] * most).long().clamp(max=most - 1)
                error = flow_loss(tell, *given, tau, most, slopes)
            total = total + bool(own) * error.mean(1).sum()
        return total / len(x)

    def variations(self) -> dict[str, dict[str, Any]]:
        """In every other number of steps."""
        own = self.model.config.steps
        return {f"steps_{n}": {"steps": n} for n in powers(self.model.most) if n != own}

    @property
    def preparing(self) -> bool:
        """Whether it is the tokenizer's turn."""
        share = self.recipe.prepare if self.model.tokenizer is not None else 0.0
        return self.trainer.count < share * self.config.loop.steps

    def masked(self, frames: Tensor, rows: Tensor) -> Tensor:
        """Which patches [b, t, s] of frames are."""
        model, seed = self.model, stream_seed(self.config.seed, "mask")
        t = frames.shape[1]
        share = even(seed, rows, (0,), (t, 1)) * model.config.tokenizer.masked
        return even(seed, rows, (1,), (t, (model.size // model.config.patch) ** 2)) < share

    def kinds(self, rows: Tensor) -> list[tuple[bool, list[int]]]:
        """Whether steps are large, and which clips learn them; the same whatever else is in the
        batch. A kind that there is, every process goes through, with a clip of its own or not."""
        early = self.trainer.count < self.recipe.jumps_after * self.config.loop.steps
        share = 0.0 if early or self.model.most == 1 else self.recipe.jumps
        large = [number * GOLDEN % 1 < share for number in rows.tolist()]
        kinds = ([False] if share < 1 else []) + ([True] if share else [])
        return [(kind, [i for i, own in enumerate(large) if own == kind]) for kind in kinds]


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_world(config, "dreamer4")
    check_clips(config)
    recipe = config.recipe
    assert isinstance(recipe, Dreamer4RecipeConfig) and isinstance(config.model, Dreamer4Config)
    if config.model.tokenizer.latents and recipe.jumps_after < recipe.prepare:
        raise UserError(
            f"recipe.jumps_after={recipe.jumps_after} must be recipe.prepare={recipe.prepare} or "
            "more: larger steps are learned from smaller ones, those from a tokenizer"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> Dreamer4Training:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return Dreamer4Training(config, data, processes, device, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device, without the passes that teach larger steps."""
    check(config)
    with torch.device("meta"):
        model = Dreamer4(fill_shapes(config))
    x, actions = clips_on_meta(config)

    def loss() -> Tensor:
        tau, z = torch.zeros(x.shape[:2], dtype=torch.long, device="meta"), model.encode(x)
        told, _ = model(z, tau, tau + 1, F.pad(actions, (1, 0)))
        return told.square().mean()

    return world_estimate(config, model, loss)
