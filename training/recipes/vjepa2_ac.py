"""A predictor on a frozen encoder, judged by its plans: `recipe=vjepa2_ac`.

V-JEPA 2-AC (2025, arXiv:2506.09985). One step, with T frames and the blocks of actions between:

    z      = norm(encoder(o)),   frozen                      [b, T, n, d]
    told   = predictor(z_<=t, a_<=t, s_<=t)                  all t at once, from true frames
    ahead  = rollout of recipe.rollout_steps from z_0
    loss   = mean of |told_t - z_t+1| and of |ahead_k - z_k|

The encoder is that of a run of recipe=jepa_video_masked or recipe=lewm on the same world
(`recipe.weights`), or random. A state is where the actor is; in rollouts and plans, where the
actions would have brought it with nothing in the way.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.worlds.initialise import init_uniform
from models.worlds.jepa.config import IJEPAConfig, LeWMConfig, VJEPA2ACConfig
from models.worlds.jepa.ijepa import build_encoder
from models.worlds.jepa.lewm import ImageEncoder
from models.worlds.jepa.targets import Latents
from models.worlds.jepa.vjepa2_ac import VJEPA2AC
from models.worlds.planners import Cost
from training.data.config_worlds import TrajectoriesConfig, TwoRoomsRGBConfig
from training.data.trajectories import TrajectoriesData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation import goals
from training.evaluation.planning import over_horizon
from training.evaluation.probes import distance_rms, linear_probe, r_squared
from training.evaluation.room_figures import rgb_paths_chart
from training.files import write_atomic
from training.pretrained import locate, typed
from training.recipes.acted_worlds import RecordedActed, RoomsActed
from training.recipes.config import check_parts
from training.recipes.config_worlds import VJEPA2ACRecipeConfig
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.recipes.jepa_video_clips import on_device
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch

CHANNELS = 3
CHUNK = 32  # walks that are encoded at once
BATCHES = 8  # of training, whose frames latents are standardised by


class VJEPA2ACTraining(JEPATraining):
    """Trains the predictor; plans with it at the end."""

    model: VJEPA2AC
    data: TwoRoomsRGBData | TrajectoriesData

    def __init__(
        self,
        config: TrainConfig,
        data: TwoRoomsRGBData | TrajectoriesData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, VJEPA2ACRecipeConfig)
        self.recipe, self.model_config, self.data = config.recipe, config.model, data
        self.world = (
            RoomsActed(data, device)
            if isinstance(data, TwoRoomsRGBData)
            else RecordedActed(data, device)
        )
        super().__init__(
            config, data, processes, device, partial(build_model, config),
            data.config.batch_size * data.config.seq_len,
        )  # fmt: skip
        self.flops_per_step = estimate(config).flops_per_step

    def initialise(self, model: torch.nn.Module) -> None:
        assert isinstance(model, VJEPA2AC)
        device = next(model.parameters()).device
        init_uniform(model, torch_generator(self.config.seed, "init", device=device))
        model.reset_standards()
        if self.recipe.weights is not None:
            load_encoder(model, locate(self.recipe.weights))
        if self.model_config.standardise:
            model.standardise(self.sample(device))

    def sample(self, device: torch.device) -> Tensor:
        """Frames of the first batches, whole in every process, so that all agree on their mean."""
        data = type(self.data)(self.data.config, seed=self.config.seed)
        batches = [on_device(data.batch(step), device) for step in range(BATCHES)]
        return torch.cat([self.world.film(batch) for batch in batches])

    def latents(self, batch: Batch) -> tuple[Latents, Tensor]:
        actions, states = batch["actions"], self.world.actor(batch["states"])
        steps = self.recipe.rollout_steps
        guessed = self.world.guessed(states[:, 0], actions[:, :steps])
        z, told, ahead = self.model(self.world.film(batch), actions, states, guessed)
        wanted = torch.cat([z[:, 1:], z[:, 1 : 1 + steps]], dim=1)
        return Latents(z, torch.cat([told, ahead], dim=1), wanted), actions

    def prediction_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error over true frames, and over the rollout, in equal parts."""
        frames = self.data.config.seq_len - 1
        error = (predicted - target).float().abs()
        return 0.5 * (error[:, :frames].mean() + error[:, frames:].mean())

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """What predictions are worth; plans too, if `final`."""
        with self.whole_model():
            metrics = self.look()
            if final and self.recipe.policies:
                metrics |= self.plan()
        return metrics

    def look(self) -> dict[str, float]:
        """Errors against the last frame seen; in the rooms, places read off predictions too."""
        batch = self.world.heldout(self.recipe.probe_walks, self.data.config.seq_len)
        states, actions = self.world.actor(batch["states"]), batch["actions"]
        parts = zip(*(x.split(CHUNK) for x in batch.values()), strict=True)
        seen = [self.world.film(dict(zip(batch, part, strict=True))) for part in parts]
        z = torch.cat([self.model.encode(frames).float() for frames in seen])
        guessed = self.world.guessed(states[:, 0], actions)
        ahead, wrong = (
            self.model.rollout(z[:, 0], a, guessed).float()
            for a in (actions, actions.roll(1, 0))  # states stay: they tell of actions too
        )
        truth = z[:, 1:]
        told, shuffled, last = (
            (x - truth).abs().mean(dim=(0, 2, 3)) for x in (ahead, wrong, z[:, :1])
        )  # [steps] each
        middle = z[:, 0, z.shape[2] // 2]
        action_use = (shuffled.mean() / told.mean().clamp(min=1e-12)).item()
        metrics = self.health(middle, action_use=action_use)
        self.alarm = None  # what is frozen does not collapse
        metrics["eval/error_over_last"] = (told.mean() / last.mean().clamp(min=1e-12)).item()
        self.found["series"]["ahead"] = (told / last.clamp(min=1e-12)).tolist()
        if isinstance(self.world, RoomsActed):
            metrics |= self.read_places(z, ahead, batch["states"])
        return metrics

    def read_places(self, z: Tensor, ahead: Tensor, positions: Tensor) -> dict[str, float]:
        """A probe of places, fitted to the latents of half of the walks."""
        half, flat, later = len(z) // 2, z.flatten(2), ahead.flatten(2)
        probe = linear_probe(flat[:half].flatten(0, 1), positions[:half].flatten(0, 1), ridge=1e-2)
        told, places = probe(flat[half:]), positions[half:]
        metrics = {
            "eval/probe/rms": distance_rms(told, places),
            "eval/probe/r2": r_squared(told.flatten(0, 1), places.flatten(0, 1)),
        }
        for step in range(1, places.shape[1]):
            told = probe(later[half:, step - 1])
            metrics[f"eval/probe/rms_after_{step}"] = distance_rms(told, places[:, step])
        return metrics

    def plan(self) -> dict[str, float]:
        """Episodes of every policy."""
        world = self.world
        assert isinstance(world, RoomsActed)
        rates, series = goals.evaluate_policies(
            lambda episodes, generator: ACPolicies(
                episodes, self.model, world, self.recipe, generator
            ),
            world,
            self.recipe,
            self.config.seed,
            self.trainer.device,
        )
        self.found["planning"] = rates
        self.found["series"] |= series
        return goals.headline(rates)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and its plans drawn in the rooms."""
        super().export(directory)
        series = self.found.get("series", {})
        if self.processes.is_main and "paths/model" in series:
            write_atomic(directory / "figures" / "plans.svg", rgb_paths_chart(series))


class ACPolicies(goals.Policies):
    """Plans by the mean absolute distance of patches."""

    def model(self) -> goals.Act:
        goal = self.latent(self.episodes.goal)

        def cost_from(states: Tensor) -> Cost:
            z, place = self.latent(states), self.world.actor(states)

            def cost(blocks: Tensor) -> Tensor:
                start = place[:, None].expand(-1, blocks.shape[1], -1)
                told = self.predictor.imagine(z, blocks, self.world.guessed(start, blocks))
                distances = (told - goal[:, None, None]).abs().mean(dim=(-1, -2))
                return over_horizon(distances, self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)


def seen_by(config: TrainConfig) -> IJEPAConfig | LeWMConfig:
    """The model whose encoder recipe.weights names; without one, a small one for the data's size.

    Raises:
        UserError: there is none, or it is of other frames.
    """
    data, weights = config.data, config.recipe.weights
    assert isinstance(data, TwoRoomsRGBConfig | TrajectoriesConfig)
    size = [1, data.image_size, data.image_size]
    if weights is None:
        patch = [1, data.image_size // 4, data.image_size // 4]
        return IJEPAConfig(patch=patch, dim=64, depth=3, heads=2, channels=CHANNELS, size=size)
    file = locate(weights) / "model.json"
    try:
        content = json.loads(file.read_text())
        kind = {"ijepa": IJEPAConfig, "lewm": LeWMConfig}[content["name"]]
        found: IJEPAConfig | LeWMConfig = typed(kind, content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"recipe.weights={weights}: {file} is no model of recipe=jepa_video_masked or "
            f"recipe=lewm ({error}); name the directory of its run"
        ) from error
    side = found.image_size if isinstance(found, LeWMConfig) else (found.size or [0])[-1]
    if found.channels != CHANNELS or side != data.image_size:
        raise UserError(
            f"recipe.weights={weights} sees frames of {side} x {side} with {found.channels} "
            f"channels, this run's are {size[1]} x {size[2]} with {CHANNELS}: set data.image_size, "
            "or train it with data=two_rooms_rgb"
        )
    return found if isinstance(found, LeWMConfig) else dataclasses.replace(found, size=size)


def widths(config: TrainConfig) -> tuple[int, int]:
    """Components of an action and of a state."""
    data = config.data
    if isinstance(data, TwoRoomsRGBConfig):
        return 2 * data.skip, 2
    assert isinstance(data, TrajectoriesConfig)
    return data.action_dim, data.state_dim


def build_model(config: TrainConfig) -> VJEPA2AC:
    assert isinstance(config.model, VJEPA2ACConfig)
    seen = seen_by(config)
    try:
        encoder = ImageEncoder(seen).vit if isinstance(seen, LeWMConfig) else build_encoder(seen)
        return VJEPA2AC(config.model, encoder, *widths(config))
    except ValueError as error:
        raise UserError(f"recipe.weights={config.recipe.weights}: {error}") from error


def load_encoder(model: VJEPA2AC, directory: Path) -> None:
    """The averaged encoder of a run, or its encoder where there is no average.

    Raises:
        UserError: the weights are not those of the configuration beside them.
    """
    file = directory / "model.safetensors"
    try:
        weights = load_file(file)
    except Exception as error:
        raise UserError(f"recipe.weights={directory}: {file} cannot be read ({error})") from error
    found: dict[str, Tensor] = {}
    for prefix in ("average.vit.", "encoder.vit.", "average.", "encoder."):
        found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if found:
            break
    wanted = model.encoder.state_dict()
    for name in sorted({*wanted, *found}):
        here, there = (describe(x.get(name)) for x in (found, wanted))
        if here != there:
            raise UserError(
                f"recipe.weights={directory}: {file} has {here} for {prefix}{name}, its model.json "
                f"says {there}: name the directory of another run"
            )
        if not found[name].isfinite().all():
            raise UserError(
                f"recipe.weights={directory}: {prefix}{name} of {file} is not finite: the run "
                "that wrote it had broken; name another"
            )
    model.encoder.load_state_dict(found)


def describe(tensor: Tensor | None) -> str:
    """Kind and shape of a tensor, or that there is none."""
    if tensor is None:
        return "nothing"
    return f"{'floats' if tensor.is_floating_point() else tensor.dtype} {list(tensor.shape)}"


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(
        config, ("vjepa2_ac",), (TwoRoomsRGBConfig, TrajectoriesConfig),
        "two_rooms_rgb or data=trajectories",
    )  # fmt: skip
    recipe, data = config.recipe, config.data
    assert isinstance(recipe, VJEPA2ACRecipeConfig)
    if isinstance(data, TwoRoomsRGBConfig):
        goals.check(recipe, data)
    elif recipe.policies or data.action_dim != data.state_dim:
        raise UserError(
            f"recipe.policies={recipe.policies}, data.action_dim={data.action_dim}, "
            f"data.state_dim={data.state_dim}: recorded actions are what they add to a state, and "
            "no plans can be tried; set recipe.policies=[] and both widths alike"
        )
    if recipe.rollout_steps >= data.seq_len:
        raise UserError(
            f"recipe.rollout_steps={recipe.rollout_steps}: a window of "
            f"data.seq_len={data.seq_len} frames has {data.seq_len - 1} steps"
        )
    if config.data.image_size % 4:
        raise UserError(f"data.image_size={config.data.image_size} must be a multiple of 4")


def build(config: TrainConfig, processes: Processes, device: torch.device) -> VJEPA2ACTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    make = TwoRoomsRGBData if isinstance(config.data, TwoRoomsRGBConfig) else TrajectoriesData
    data = make(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return VJEPA2ACTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    data, (action_dim, state_dim) = config.data, widths(config)
    with torch.device("meta"):
        model = build_model(config)
    rows = rows_at_once(config)
    steps, size = data.seq_len - 1, data.image_size
    frames = torch.zeros(rows, data.seq_len, CHANNELS, size, size, device="meta")
    actions = torch.zeros(rows, steps, action_dim, device="meta")
    states = torch.zeros(rows, data.seq_len, state_dim, device="meta")
    ahead = config.recipe.rollout_steps

    def loss() -> Tensor:
        _, told, later = model(frames, actions, states, states[:, :ahead])
        return told.abs().mean() + later.abs().mean()

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, VJEPA2ACTraining.unit
    )
