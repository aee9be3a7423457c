"""A predictor on a frozen encoder, judged by its plans: `recipe=vjepa2_ac`.

V-JEPA 2-AC (2025, arXiv:2506.09985). One step, with T frames and the blocks of actions between:

    z      = norm(encoder(o)),   frozen                      [b, T, n, d]
    told   = predictor(z_<=t, a_<=t, s_<=t)                  all t at once, from true frames
    ahead  = rollout of recipe.rollout_steps from z_0
    loss   = mean of |told_t - z_t+1| and of |ahead_k - z_k|

The encoder is that of a run of recipe=jepa_video_masked on the same world (`recipe.weights`), or
random. A state is where the dot is; in rollouts and plans, where the actions would have brought it
with nothing in the way.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.worlds.initialise import init_uniform
from models.worlds.jepa.config import IJEPAConfig, VJEPA2ACConfig
from models.worlds.jepa.targets import Latents
from models.worlds.jepa.vjepa2_ac import VJEPA2AC
from models.worlds.planners import Cost
from training.data.config_worlds import TwoRoomsRGBConfig
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.distributed import Processes
from training.envs.two_rooms_rgb import CANVAS, SPEED
from training.errors import UserError
from training.estimate import Estimate, state_memory, torch_activations, torch_flops
from training.evaluation import rooms_rgb
from training.evaluation.planning import over_horizon
from training.evaluation.probes import distance_rms, linear_probe, r_squared
from training.evaluation.room_figures import rgb_paths_chart
from training.files import write_atomic
from training.pretrained import locate
from training.recipes.config import check_parts
from training.recipes.config_worlds import VJEPA2ACRecipeConfig
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.recipes.jepa_video_clips import see_rooms
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch

CHANNELS, STATE_DIM = 3, 2
AHEAD = (1, 2, 3)  # blocks ahead at which places are read off predictions
CHUNK = 32  # walks that are encoded at once


class VJEPA2ACTraining(JEPATraining):
    """Trains the predictor; plans with it at the end."""

    model: VJEPA2AC
    data: TwoRoomsRGBData

    def __init__(
        self, config: TrainConfig, data: TwoRoomsRGBData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, VJEPA2ACRecipeConfig)
        self.recipe, self.model_config = config.recipe, config.model
        super().__init__(
            config, data, processes, device, partial(build_model, config),
            data.config.batch_size * data.config.seq_len,
        )  # fmt: skip
        self.mean, self.std = (
            torch.from_numpy(x).to(device) for x in (data.action_mean, data.action_std)
        )
        self.flops_per_step = estimate(config).flops_per_step

    def initialise(self, model: torch.nn.Module) -> None:
        device = next(model.parameters()).device
        init_uniform(model, torch_generator(self.config.seed, "init", device=device))
        if self.recipe.weights is not None:
            assert isinstance(model, VJEPA2AC)
            load_encoder(model, locate(self.recipe.weights))

    def see(self, positions: Tensor) -> Tensor:
        """[b, t, 3, s, s] frames, normalised."""
        return see_rooms(positions, self.data.config.image_size)

    def states(self, start: Tensor, actions: Tensor) -> Tensor:
        """[..., 2] places and [..., t, a] blocks after them -> [..., t, 2] states before each."""
        raw = actions.unflatten(-1, (-1, 2)) * self.std + self.mean
        moved = SPEED * raw.clamp(-1, 1).sum(dim=-2)  # [..., t, 2]
        reached = start[..., None, :] + moved.cumsum(dim=-2) - moved
        return reached / CANVAS * 2 - 1

    def latents(self, batch: Batch) -> tuple[Latents, Tensor]:
        positions, actions = batch["positions"], batch["actions"]
        z = self.model.encode(self.see(positions))  # [b, t, n, d]
        true = positions[:, :-1] / CANVAS * 2 - 1
        told = self.model.predictor(z[:, :-1], actions, true)
        steps = min(self.recipe.rollout_steps, actions.shape[1])
        guessed = self.states(positions[:, 0], actions[:, :steps])
        ahead = self.model.rollout(z[:, 0], actions[:, :steps], guessed)
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
        """Errors against the last frame seen, and places read off predictions."""
        skip, device, reach = self.data.config.skip, self.trainer.device, max(AHEAD)
        walks = self.data.heldout(self.recipe.probe_walks)
        positions = torch.from_numpy(walks.positions[:, : reach * skip + 1 : skip]).to(device)
        blocks = torch.from_numpy(self.data.blocks(walks.actions[:, : reach * skip])).to(device)
        z = torch.cat([self.model.encode(self.see(p)).float() for p in positions.split(CHUNK)])
        ahead, wrong = (
            self.model.rollout(z[:, 0], a, self.states(positions[:, 0], a)).float()
            for a in (blocks, blocks.roll(1, 0))
        )
        truth = z[:, 1:]
        errors = {
            name: (x - truth).abs().mean().item()
            for name, x in (("told", ahead), ("wrong", wrong), ("last", z[:, :1]))
        }
        middle = z[:, 0, z.shape[2] // 2]
        metrics = self.health(middle, action_use=errors["wrong"] / max(errors["told"], 1e-12))
        self.alarm = None  # what is frozen does not collapse
        metrics["eval/error_over_last"] = errors["told"] / max(errors["last"], 1e-12)
        half, flat, later = len(z) // 2, z.flatten(2), ahead.flatten(2)
        probe = linear_probe(flat[:half].flatten(0, 1), positions[:half].flatten(0, 1), ridge=1e-2)
        told, places = probe(flat[half:]), positions[half:]
        metrics["eval/probe/px"] = distance_rms(told, places)
        metrics["eval/probe/r2"] = r_squared(told.flatten(0, 1), places.flatten(0, 1))
        for step in AHEAD:
            told = probe(later[half:, step - 1])
            metrics[f"eval/probe/px_after_{step}"] = distance_rms(told, places[:, step])
        return metrics

    def plan(self) -> dict[str, float]:
        """Episodes of every policy."""
        rates, series = rooms_rgb.evaluate_policies(
            lambda episodes, generator: ACPolicies(
                episodes, self.model, self.see, self.recipe, self.data, generator, self.states
            ),
            self.data,
            self.recipe,
            self.config.seed,
            self.trainer.device,
        )
        self.found["planning"] = rates
        self.found["series"] |= series
        return rooms_rgb.headline(rates)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and its plans drawn in the rooms."""
        super().export(directory)
        series = self.found.get("series", {})
        if self.processes.is_main and "paths/model" in series:
            write_atomic(directory / "figures" / "plans.svg", rgb_paths_chart(series))


@dataclasses.dataclass
class ACPolicies(rooms_rgb.Policies):
    """Plans by the mean absolute distance of patches.

    Args:
        states: places and blocks of actions -> states before each block.
    """

    states: Callable[[Tensor, Tensor], Tensor]

    def model(self) -> rooms_rgb.Act:
        goal = self.latent(self.episodes.goal)

        def cost_from(position: Tensor) -> Cost:
            z = self.latent(position)

            def cost(blocks: Tensor) -> Tensor:
                start = position[:, None].expand(-1, blocks.shape[1], -1)
                told = self.world.imagine(z, blocks, self.states(start, blocks))
                distances = (told - goal[:, None, None]).abs().mean(dim=(-1, -2))
                return over_horizon(distances, self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)


def encoder_config(config: TrainConfig) -> IJEPAConfig:
    """Of the encoder that recipe.weights names; without one, of a small one for the data's size.

    Raises:
        UserError: there is none, or it is of other frames.
    """
    data, weights = config.data, config.recipe.weights
    assert isinstance(data, TwoRoomsRGBConfig)
    size = [1, data.image_size, data.image_size]
    if weights is None:
        patch = [1, data.image_size // 4, data.image_size // 4]
        return IJEPAConfig(patch=patch, dim=64, depth=3, heads=2, channels=CHANNELS, size=size)
    file = locate(weights) / "model.json"
    try:
        found = IJEPAConfig(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"recipe.weights={weights}: {file} is no model of recipe=jepa_video_masked ({error}); "
            "name the directory of its run"
        ) from error
    if found.channels != CHANNELS or not found.size or found.size[1:] != size[1:]:
        raise UserError(
            f"recipe.weights={weights} sees clips of {found.size} with {found.channels} channels, "
            f"this run's frames are {size[1]} x {size[2]} with {CHANNELS}: set data.image_size, or "
            "train it with data=two_rooms_rgb"
        )
    return dataclasses.replace(found, size=size)


def build_model(config: TrainConfig) -> VJEPA2AC:
    assert isinstance(config.model, VJEPA2ACConfig) and isinstance(config.data, TwoRoomsRGBConfig)
    try:
        return VJEPA2AC(config.model, encoder_config(config), 2 * config.data.skip, STATE_DIM)
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
    for prefix in ("average.", "encoder."):
        found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        if found:
            break
    try:
        model.encoder.load_state_dict(found)
    except RuntimeError as error:
        raise UserError(f"recipe.weights={directory}: {str(error).splitlines()[-1]}") from error


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, VJEPA2ACRecipeConfig, ("vjepa2_ac",), (TwoRoomsRGBConfig,), "two_rooms_rgb")
    rooms_rgb.check(config.recipe, config.data)
    if config.data.image_size % 4:
        raise UserError(f"data.image_size={config.data.image_size} must be a multiple of 4")


def build(config: TrainConfig, processes: Processes, device: torch.device) -> VJEPA2ACTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    assert isinstance(config.data, TwoRoomsRGBConfig)
    make = partial(TwoRoomsRGBData, rank=processes.rank, world=processes.world)
    return VJEPA2ACTraining(config, make(config.data, seed=config.seed), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    data = config.data
    assert isinstance(data, TwoRoomsRGBConfig)
    with torch.device("meta"):
        model = build_model(config)
    rows = max(1, data.batch_size // (config.scale.devices or 1) // config.optim.accumulate)
    steps, size = data.seq_len - 1, data.image_size
    frames = torch.zeros(rows, data.seq_len, CHANNELS, size, size, device="meta")
    actions = torch.zeros(rows, steps, 2 * data.skip, device="meta")
    states = torch.zeros(rows, steps, STATE_DIM, device="meta")
    ahead = min(config.recipe.rollout_steps, steps)

    def loss() -> Tensor:
        z = model.encode(frames)
        told = model.predictor(z[:, :-1], actions, states)
        later = model.rollout(z[:, 0], actions[:, :ahead], states[:, :ahead])
        return told.abs().mean() + later.abs().mean()

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = state_memory(parameters, 0, config.optim, config.scale)
    return Estimate(
        parameters,
        torch_flops(loss) * (data.batch_size / rows),
        data.batch_size * data.seq_len,
        VJEPA2ACTraining.unit,
        {**memory, "activations": torch_activations(model, loss)},
    )
