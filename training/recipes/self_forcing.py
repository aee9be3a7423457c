"""A student of few steps, taught on films that it draws itself: `recipe=self_forcing`.

Self Forcing (2025, arXiv:2506.08009), from a run of `recipe=diffusion_forcing`, `recipe.teacher`.
Of every `recipe.critic_steps` + 1 steps the last is the student's, the others are the critic's:

    film       data.seq_len - model.context frames that the student draws after frames that somebody
               saw, with the actions that were taken
    critic     its error on the film, at one noise level
    student    the direction from what the critic takes the film for to what the teacher does
               (models/worlds/video/self_forcing.py)

At the end dreams of the teacher are judged beside those of the student: in as few steps
(`eval/teacher_few/...`) and in `recipe.teacher_steps` (`eval/teacher/...`).
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.video.config import DiffusionForcingConfig
from models.worlds.video.noise import even, normal
from models.worlds.video.schedules import LEVELS
from models.worlds.video.self_forcing import SelfForcing
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.pretrained import locate
from training.recipes.config_video import SelfForcingRecipeConfig
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
from training.seeding import numpy_rng, stream_seed
from training.worlds import open_model

ENDS = 0.02, 0.98  # of the noise levels: nothing is learned beyond
OWN = "steps", "fresh", "guidance"  # what the student has of its own


class SelfForcingTraining(VideoWorldTraining):
    """Trains student and critic in turn."""

    kind = SelfForcing
    methods = ("outcome", "init_cache", "step", "roll", "match", "doubt")
    model: SelfForcing
    recipe: SelfForcingRecipeConfig

    @property
    def hears(self) -> bool:
        return False  # its loss is no error of frames

    def initialise(self, model: SelfForcing) -> None:
        super().initialise(model)
        begin(model, self.config)

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        model, n, seed = self.model, self.model.context, stream_seed(self.config.seed, "noise")
        x, before = frames * 2 - 1, F.pad(actions, (1, 0), value=self.model.student.actions)
        seen, ahead = x[:, :n], x.shape[1] - n
        steps, every = self.config.model.steps, self.recipe.critic_steps + 1  # type: ignore
        last = int(numpy_rng(self.config.seed, "exit", self.trainer.count).integers(steps))
        noise = normal(seed, rows, (0,), (ahead, steps, *x.shape[2:]))
        own = self.trainer.count % every == every - 1
        with torch.set_grad_enabled(own):
            film = model.roll(seen, before, noise, last)
        low, high = (round(end * LEVELS) for end in ENDS)
        level = low + (even(seed, rows, (1,), ()) * (high - low)).long()
        eps = normal(seed, rows, (2,), film.shape[1:])
        term = (model.match if own else model.doubt)(seen, film, before, level, eps)
        self.note(**{"student" if own else "critic": term})
        return term

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        metrics = super().evaluate(final)
        if final:
            exam, few = self.exam(), self.config.model.steps  # type: ignore[attr-defined]
            teacher = self.model.teacher
            with self.whole_model():
                for name, steps in (("teacher_few", few), ("teacher", self.recipe.teacher_steps)):
                    teacher.config = replace(self.model.config, steps=steps, fresh=False)
                    metrics |= {f"eval/{name}/{k}": v for k, v in self.told(teacher, exam).items()}
        return metrics

    def left(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The student's: a world like any other."""
        own = "student."
        return {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_world(config, "diffusion_forcing")
    check_clips(config)


def begin(model: SelfForcing, config: TrainConfig) -> None:
    """Make all three models what the run of recipe.teacher has left.

    Raises:
        UserError: it names none, or another kind of model.
    """
    where = config.recipe.teacher  # type: ignore[attr-defined]
    if where is None:
        raise UserError(
            "recipe.teacher=null: name the directory of a finished run of recipe=diffusion_forcing"
        )
    directory = locate(where, "recipe.teacher")
    teacher = open_model(directory)
    if not isinstance(teacher.config, DiffusionForcingConfig):
        raise UserError(
            f"recipe.teacher={where} is a {teacher.config.name}, not a diffusion_forcing"
        )
    wanted, given = asdict(model.config), asdict(teacher.config)
    for key in wanted:
        if key not in OWN and wanted[key] != given[key]:
            raise UserError(
                f"recipe.teacher={where} has model.{key}={given[key]}, the student "
                f"{wanted[key]}: give the student the teacher's"
            )
    model.teacher.load_state_dict(teacher.state_dict())
    model.begin()


def build(config: TrainConfig, processes: Processes, device: torch.device) -> SelfForcingTraining:
    """The recipe of `config` with its data, its models those of the teacher, on `device`."""
    check(config)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return SelfForcingTraining(config, data, processes, device, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device: of a step of the critic's, without the film."""
    check(config)
    with torch.device("meta"):
        model = SelfForcing(fill_shapes(config))
    x, actions = clips_on_meta(config)
    n = model.context

    def loss() -> Tensor:
        level = torch.zeros(len(x), dtype=torch.long, device="meta")
        before = F.pad(actions, (1, 0))
        return model.doubt(x[:, :n], x[:, n:], before, level, x[:, n:])

    return world_estimate(config, model, loss)
