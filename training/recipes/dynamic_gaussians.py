"""A scene that moves, from images whose cameras and times are known: `recipe=dynamic_gaussians`.

Dynamic 3D Gaussians (2023, arXiv:2308.09713), `model.motion=tracked`, time after time:

    first time    gaussian_splatting's step, with clones, halves and removals
    other times   only means and rotations learn, from where the two times before lead; the loss has
                  what keeps neighbours together (models/worlds/splats/tracked.py)

and its rivals (models/worlds/splats/motions.py), at all times at random:

    warm          gaussian_splatting's step, as if nothing moved
    then          the same, of the scene at the image's time; what says where they are learns too

What differs: no images of what is in front, and no losses of them. Rivals that were published with
losses, rates and refinements of their own have here those of gaussian_splatting, so that what is
compared is how things may move.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.worlds.splats.config import DynamicGaussiansConfig, Motion
from models.worlds.splats.dynamic_gaussians import DynamicGaussians
from models.worlds.splats.gaussians import Fields
from models.worlds.splats.tracked import Bonds, Tracked, bonds_of
from training.data.config_scenes import TimedConfig
from training.data.timed import TimedData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.evaluation.dynamic_scenes import judge
from training.formats.gaussians import Splats, splats_of_scene
from training.recipes.config import check_parts
from training.recipes.config_scenes import DynamicGaussiansRecipeConfig
from training.recipes.gaussian_splatting import (
    SplatTraining,
    check_optimiser,
    estimate_of,
)
from training.scenes import scene_data
from training.schedules import lr_scale
from training.schema import TrainConfig

FRAMEWORK = "torch"
ALSO_FALLING = "network", "planes", "velocities"
"Whose learning rates fall, besides those of a scene that is still."


class DynamicTraining(SplatTraining):
    """Fits Gaussians to the images of one scene, and how they move."""

    data: TimedData[Any]
    model: DynamicGaussians
    recipe: DynamicGaussiansRecipeConfig
    bonds: Bonds | None = None

    def begun(self, views: int) -> DynamicGaussians:
        assert isinstance(self.config.model, DynamicGaussiansConfig)
        box, times = (torch.from_numpy(x) for x in (self.data.box, self.data.moments))
        torch.manual_seed(self.config.seed)  # networks and planes
        return DynamicGaussians(self.config.model, views, box, times)

    def more_of(self, n: int) -> Fields:
        return self.model.motion.first(n)

    def more_rates(self) -> list[dict[str, Any]]:
        recipe, motion = self.recipe, self.model.motion
        own = {
            "velocities": recipe.velocities_lr * self.data.extent, "spins": recipe.spins_lr,
            "middles": recipe.middles_lr, "lastings": recipe.lastings_lr,
        }  # fmt: skip
        groups = [
            {"params": [getattr(self.gaussians, name)], "lr": own[name], "name": name}
            for name in motion.rows
        ]
        for name, rate in (("network", recipe.motion_lr), ("planes", recipe.planes_lr)):
            if hasattr(motion, name):
                params = list(getattr(motion, name).parameters())
                groups.append({"params": params, "lr": rate, "name": name})
        return groups

    @property
    def tracked(self) -> Tracked | None:
        """The motion, if Gaussians are tracked."""
        return self.model.motion if isinstance(self.model.motion, Tracked) else None

    @property
    def following(self) -> bool:
        """Past the first time."""
        return self.tracked is not None and int(self.tracked.known) > 0

    @property
    def first_steps(self) -> int:
        """In which there may be more Gaussians."""
        return self.steps if self.tracked is None else self.data.config.first_steps

    @property
    def share(self) -> float:
        return self.count / self.first_steps

    @property
    def falling(self) -> float:
        return lr_scale(self.config.optim, min(self.count, self.first_steps), self.first_steps)

    def rate_of(self, group: dict[str, Any], falling: float) -> float:
        if self.following:
            recipe = self.recipe
            rates = {"means": recipe.tracking_lr * self.data.extent, "quats": recipe.turning_lr}
            return rates.get(group["name"], 0.0) * math.sqrt(self.data.config.batch_size)
        if group["name"] in ALSO_FALLING:
            return group["peak"] * falling
        return super().rate_of(group, falling)

    def time(self, batch: dict[str, np.ndarray]) -> float | None:
        if self.tracked is None and self.share < self.recipe.warm:
            return None
        times = np.unique(batch["times"])
        assert len(times) == 1, "a batch is of one time"
        return float(times[0])

    def penalty(self, fields: Fields) -> Tensor | float:
        if not self.following:
            return self.model.motion.penalty()
        recipe, tracked = self.recipe, self.tracked
        assert tracked is not None
        if self.bonds is None:
            first = tracked.means[0, : self.gaussians.count]
            self.bonds = bonds_of(first, recipe.neighbours, recipe.neighbour_decay)
        rigid, rot, iso = tracked.together(fields["means"], fields["quats"], self.bonds)
        return recipe.rigid_weight * rigid + recipe.rot_weight * rot + recipe.iso_weight * iso

    def refine(self) -> None:
        if not self.following:
            super().refine()

    @torch.no_grad()
    def after(self) -> None:
        """The next time, if this one is done."""
        tracked, moment = self.tracked, self.data.moment
        if tracked is None or (moment(self.count) == moment(self.count - 1) and not self.done):
            return
        fields = self.gaussians.fields()
        tracked.advance(fields["means"], fields["quats"])
        for name in ("means", "quats"):
            for key, x in self.optimiser.state[getattr(self.gaussians, name)].items():
                if key != "step":
                    x.zero_()

    @property
    def done(self) -> bool:
        return self.count == self.steps

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Held-out cameras and times; where things went; floors, at the end."""
        found, self.found, self.figures = judge(self.model, self.data, self.device, final)
        found["gaussians"] = float(self.gaussians.count)
        return {f"eval/{name}": value for name, value in found.items()}

    @property
    def parameters_used(self) -> int:
        return super().parameters_used + sum(p.numel() for p in self.model.motion.parameters())

    def more_weights(self) -> dict[str, Tensor]:
        motion = {f"motion.{k}": x for k, x in self.model.motion.state_dict().items()}
        return {name: x.detach().cpu().contiguous() for name, x in motion.items()}

    @torch.no_grad()
    def exported(self, weights: dict[str, Tensor]) -> Splats:
        """The scene at its first time."""
        first = self.model.scene(float(self.data.moments[0]))
        return splats_of_scene({name: x.cpu() for name, x in first.items()})


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("dynamic_gaussians",), (TimedConfig,), "moving_tabletop, dnerf")
    check_optimiser(config)
    data, model = config.data, config.model
    assert isinstance(data, TimedConfig) and isinstance(model, DynamicGaussiansConfig)
    if (model.motion == Motion.tracked) != (data.steps_per_time > 0):
        asked = "above 0" if model.motion == Motion.tracked else "0"
        raise UserError(
            f"model.motion={model.motion} needs data.first_steps and data.steps_per_time "
            f"{asked}, not {data.first_steps} and {data.steps_per_time}"
        )
    if model.motion == Motion.tracked and data.shuffled_times:
        raise UserError(
            "data.shuffled_times=true: model.motion=tracked has one time after the other, use "
            "another motion"
        )
    if data.batch_size > 1 and not data.steps_per_time:
        raise UserError(
            f"data.batch_size={data.batch_size}: images of a batch are of one time, which only "
            "model.motion=tracked has them of; set it to 1"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> DynamicTraining:
    """The recipe of `config` with its data, its Gaussians placed on `device`."""
    check(config)
    if processes.world > 1:
        raise UserError("scale.devices: recipe=dynamic_gaussians runs in one process, set it to 1")
    data = scene_data(config.data, seed=config.seed)
    assert isinstance(data, TimedData)
    timed = data.config
    needed = timed.first_steps + (len(data.moments) - 1) * timed.steps_per_time
    if timed.steps_per_time and config.loop.steps != needed:
        raise UserError(
            f"loop.steps={config.loop.steps}: {len(data.moments)} times, data.first_steps="
            f"{timed.first_steps} and data.steps_per_time={timed.steps_per_time} make {needed}"
        )
    return DynamicTraining(config, data, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run with all the Gaussians there may be. No data is read."""
    check(config)
    assert isinstance(config.model, DynamicGaussiansConfig)
    with torch.device("meta"):
        model = DynamicGaussians(config.model)
    return estimate_of(model, config)
