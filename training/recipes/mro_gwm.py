"""Objects that are pushed, of Gaussians: `recipe=mro_gwm`.

MRO-GWM (2026, arXiv:2606.01950). Before, `experiment=mro_gwm/table` reconstructs the table once,
and each Gaussian belongs to an object. One step, of windows of episodes:

    each member, on windows of its own, is told the first h states and all actions, and says the
    next u poses, each from the ones that it said before
    loss = Huber(anchors as it says, anchors as they were), anchors being points of each object

Poses are those of the simulator; at the end they are found in images too, by turning and moving
each object's Gaussians until renders are as the images are, and plans that push the T to a goal are
carried out in the simulator. What differs from the paper: mro_gwm.py in models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.splats.config import MroGwmConfig
from models.worlds.splats.mro_gwm import LENGTH, MroGwm, PushHistory, carried
from models.worlds.splats.objects import farthest
from training.data.config_scenes import PushWorldConfig
from training.data.push_world import PushWorldData
from training.distributed import Processes
from training.envs.push_world import THINGS
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.push_planning import planned
from training.evaluation.push_tracking import BLIND, watched
from training.evaluation.pushing import open_loop
from training.exchange import write_model
from training.files import write_atomic
from training.formats.gltf import serialise_moving
from training.object_scenes import PushScene, motion_of, open_push_scene, write_push_scene
from training.recipes.config import check_parts
from training.recipes.config_scenes import MroGwmRecipeConfig
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch, TorchStep, build_on

FRAMEWORK = "torch"


class MroGwmTraining:
    """Trains the ensemble."""

    framework = FRAMEWORK
    unit = "windows"
    remedy = "Lower optim.lr, or set optim.clip_norm"
    alarm: str | None = None

    def __init__(
        self, config: TrainConfig, data: PushWorldData, scene: PushScene, processes: Processes,
        device: torch.device,
    ) -> None:  # fmt: skip
        assert isinstance(config.recipe, MroGwmRecipeConfig)
        assert isinstance(config.model, MroGwmConfig)
        self.config, self.recipe, self.data, self.scene = config, config.recipe, data, scene
        self.processes, model_config = processes, config.model
        self.units_per_step = data.config.batch_size
        try:
            things = scene.scene.objects[:THINGS]
            anchors = torch.stack([farthest(thing, model_config.anchors) for thing in things])
        except ValueError as error:
            raise UserError(f"recipe.scene={self.recipe.scene}: {error}") from error
        generator = torch_generator(config.seed, "init", device=device)
        self.model: Any = build_on(
            device, lambda: MroGwm(model_config), lambda model: model.initialise(generator, anchors)
        )
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trainer = TorchStep(
            self.model, [], config.optim, config.scale, processes, config.loop.steps
        )
        self.flops_per_step = estimate(config).flops_per_step
        self.found: dict[str, Any] = {}
        self.figures: dict[str, str] = {}
        self.way: Tensor | None = None

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        return self.trainer.update(batch, self.loss)

    def loss(self, batch: Batch) -> Tensor:
        return unrolled(self.model, batch["poses"], batch["pusher"], batch["actions"])

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Ten steps from true poses; from images, and plans, at the end."""
        with self.trainer.averaged_weights():
            return {f"eval/{name}": value for name, value in self.judged(final).items()}

    def judged(self, final: bool) -> dict[str, float]:
        """Metrics of the weights in use."""
        recipe, seed, device = self.recipe, self.config.seed, self.trainer.device
        found = open_loop(self.model, self.data.heldout, recipe.ahead, recipe.moved, seed, device)
        if final and recipe.tracked:
            watching = watched(self.model, self.scene, self.data.heldout, recipe, seed, device)
            found |= watching.metrics
            self.figures, self.way = watching.figures, watching.poses
        if final and recipe.episodes:
            plans, self.found["planning"] = planned(self.model, recipe, seed, device)
            found |= plans
        return found

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters, **self.found}

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        weights = self.trainer.full_weights() | {"anchors": self.model.anchors.cpu()}
        if self.processes.is_main:
            write_model(directory, weights, self.model.config)
            write_push_scene(directory, self.scene)
            if self.way is not None:
                content = serialise_moving(motion_of(self.scene, self.way.cpu().numpy()))
                write_atomic(directory / "pushed.glb", content)
            for name, figure in self.figures.items():
                write_atomic(directory / "figures" / f"{name}.svg", figure)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def unrolled(model: MroGwm, poses: Tensor, pusher: Tensor, actions: Tensor) -> Tensor:
    """Mean loss of the members, each on its part of the windows."""
    h, losses = model.config.history, []
    parts = [x.tensor_split(len(model.members)) for x in (poses, pusher, actions)]
    for member, (p, x, a) in enumerate(zip(*parts, strict=True)):
        told = model.rollout(member, PushHistory(p[:, :h], x[:, :h]), a[:, h - 1 :], x[:, h:])
        said, true = (carried(model.anchors, q) / LENGTH for q in (told, p[:, h:]))
        losses.append(F.smooth_l1_loss(said, true, beta=0.1))
    return torch.stack(losses).mean()


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("mro_gwm",), (PushWorldConfig,), "push_world")
    model, data, recipe = config.model, config.data, config.recipe
    assert isinstance(model, MroGwmConfig) and isinstance(data, PushWorldConfig)
    assert isinstance(recipe, MroGwmRecipeConfig)
    if model.objects != THINGS:
        raise UserError(f"model.objects={model.objects}: there are {THINGS}, leave it out")
    if model.history < 2:
        raise UserError(f"model.history={model.history}: how fast things are takes 2 or more")
    if data.batch_size // (config.optim.accumulate * (config.scale.devices or 1)) < model.members:
        raise UserError(
            f"data.batch_size={data.batch_size} must be model.members={model.members} or more in "
            "each part (optim.accumulate) of each process (scale.devices): each member has windows "
            "of its own"
        )
    if recipe.tracked and recipe.ahead < BLIND:
        raise UserError(
            f"recipe.ahead={recipe.ahead} must be {BLIND} or more, or recipe.tracked=0: nobody "
            f"looks for {BLIND} steps"
        )
    if recipe.consulted > model.members:
        raise UserError(
            f"recipe.consulted={recipe.consulted} must be model.members={model.members} or fewer"
        )
    needed = model.history + max(recipe.unroll, recipe.ahead)
    if data.steps + 1 < needed:
        raise UserError(
            f"data.steps={data.steps}: model.history={model.history} and recipe.unroll="
            f"{recipe.unroll} or recipe.ahead={recipe.ahead} take {needed - 1} or more"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> MroGwmTraining:
    """The recipe of `config` with its data and its scene, its model initialised on `device`."""
    check(config)
    recipe, model = config.recipe, config.model
    assert isinstance(recipe, MroGwmRecipeConfig) and isinstance(model, MroGwmConfig)
    if recipe.scene is None:
        raise UserError(
            "recipe=mro_gwm needs recipe.scene=<directory of a finished run>; make one with "
            "afferent train experiment=mro_gwm/table"
        )
    scene = open_push_scene(recipe.scene, device)
    data = PushWorldData(
        config.data, seed=config.seed, rank=processes.rank, world=processes.world,  # type: ignore[arg-type]
        length=model.history + recipe.unroll,
    )  # fmt: skip
    return MroGwmTraining(config, data, scene, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device; without the scene, which does not learn."""
    check(config)
    model_config, recipe, data = config.model, config.recipe, config.data
    assert isinstance(model_config, MroGwmConfig) and isinstance(recipe, MroGwmRecipeConfig)
    assert isinstance(data, PushWorldConfig)
    rows = max(rows_at_once(config), model_config.members)
    length = model_config.history + recipe.unroll
    with torch.device("meta"):
        model = MroGwm(model_config)
        poses, pusher = torch.zeros(rows, length, THINGS, 7), torch.zeros(rows, length, 2)
        actions = torch.zeros(rows, length - 1, 2)

    def loss() -> Tensor:
        return unrolled(model, poses, pusher, actions)

    return torch_estimate(model, loss, rows, config, data.batch_size, MroGwmTraining.unit)
