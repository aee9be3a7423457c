"""A world model from pixels with two losses, judged by its plans: `recipe=lewm`.

LeWorldModel (2026, arXiv:2603.19312). One step, with T states that are data.skip steps apart and
the blocks of actions between them:

    z      = projector(ViT(o))                               [b, T, d]
    zhat   = predictor(z_<=t, a_<=t)                         all t at once, from the true latents
    loss   = pred_weight mean (zhat_t+1 - z_t+1)^2  +  sigreg_weight mean over t of SIGReg(z_t)

Gradients flow through the targets. `recipe.regularizer=none` leaves out SIGReg, and collapses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.worlds.jepa.config import LeWMConfig
from models.worlds.jepa.lewm import LeWM
from models.worlds.jepa.regularizers import straightness
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import WalksConfig
from training.data.push_t import PushTData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation import goals
from training.evaluation.probes import distance_rms, linear_probe, mlp_probe, r_squared
from training.evaluation.surprise import judge, told_along
from training.files import write_atomic
from training.recipes.acted_worlds import PushTActed, RoomsActed
from training.recipes.config import check_parts, with_decided
from training.recipes.config_worlds import LeWMRecipeConfig, Target
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.schema import TrainConfig
from training.seeding import numpy_rng, torch_generator
from training.torch_step import Batch

CHANNELS, ACTION_DIM = 3, 2
AHEAD = (1, 3, 5)  # blocks ahead at which places are read off predictions
CHUNK = 32  # walks that are encoded at once
WORLDS = {"two_rooms_rgb": (TwoRoomsRGBData, RoomsActed), "push_t": (PushTData, PushTActed)}
"Data by name -> where it is made, and what is acted in."


class LeWMTraining(JEPATraining):
    """Trains encoder and predictor together; plans with them at the end."""

    model: LeWM
    data: TwoRoomsRGBData | PushTData

    def __init__(
        self,
        config: TrainConfig,
        data: TwoRoomsRGBData | PushTData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, LeWMRecipeConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: LeWM(self.model_config, averaged),
            data.config.batch_size * data.config.seq_len,
        )
        self.world = WORLDS[config.data.name][1](data, device)
        self.flops_per_step = estimate(config).flops_per_step

    def latents(self, batch: Batch) -> tuple[Latents, Tensor]:
        return self.model(self.world.film(batch), batch["actions"]), batch["actions"]

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics and probes; surprise and plans too, if `final`."""
        with self.whole_model():
            metrics = self.look(final)
            if final:
                metrics |= self.surprise()
                metrics |= self.plan() if self.recipe.policies else {}
        return metrics

    def look(self, final: bool) -> dict[str, float]:
        """What the latents of held-out walks hold, and what predictions are worth."""
        config = self.data.config
        batch = self.world.heldout(self.recipe.probe_walks, 1 + (config.walk - 1) // config.skip)
        states, blocks = batch["states"], batch["actions"]
        z = torch.cat([self.model.encode(self.world.see(s)).float() for s in states.split(CHUNK)])
        ahead = self.model.rollout(z[:, 0], blocks[:, : max(AHEAD)]).float()
        near = slice(0, config.seq_len - 1)
        error, wrong = (
            (x - z[:, 1 : 1 + max(AHEAD)])[:, near].square().mean().item()
            for x in (ahead, self.model.rollout(z[:, 0], blocks[:, : max(AHEAD)].roll(1, 0)))
        )
        metrics = self.health(
            z.flatten(0, 1),
            action_use=wrong / max(error, 1e-12),
            straightness=straightness(z).item(),
        )
        for name, truth in self.world.asked(states).items():
            metrics |= self.probe(f"eval/probe/{name}", z, ahead, truth, final)
        return metrics

    def probe(
        self, key: str, z: Tensor, ahead: Tensor, truth: Tensor, final: bool
    ) -> dict[str, float]:
        """How far from `truth` [n, t, k] what is read off latents [n, t, d] and predictions is."""
        half = len(z) // 2  # probes are fitted to the walks of one half
        seen, wanted = z[:half].flatten(0, 1), truth[:half].flatten(0, 1)
        probes = {"linear": linear_probe(seen, wanted)}
        if final:
            generator = torch_generator(self.config.seed, "probe", device=z.device)
            probes["mlp"] = mlp_probe(seen, wanted, generator)
        truth, metrics = truth[half:], {}
        for name, probe in probes.items():
            told, later = probe(z[half:]), probe(ahead[half:])
            metrics[f"{key}{name}/rms"] = distance_rms(told, truth)
            metrics[f"{key}{name}/r2"] = r_squared(told.flatten(0, 1), truth.flatten(0, 1))
            for step in AHEAD:
                metrics[f"{key}{name}/rms_after_{step}"] = distance_rms(
                    later[:, step - 1], truth[:, step]
                )
        return metrics

    def surprise(self) -> dict[str, float]:
        """Violation of expectation on held-out windows."""
        device = self.trainer.device
        walks = self.data.heldout(self.recipe.pairs)
        rng = numpy_rng(self.config.seed, "eval/surprise")
        first = rng.integers(walks.actions.shape[1] - self.data.reach, size=self.recipe.pairs)
        windows = self.data.windows(walks, first)
        states, actions = (torch.from_numpy(x).to(device) for x in windows)
        generator = torch_generator(self.config.seed, "eval/surprise", device=device)
        films = self.world.violations(states, actions, generator)
        self.found["surprise"] = judge(self.model, films, told_along)
        return {
            f"eval/surprise/{event}": found["accuracy"]
            for event, found in self.found["surprise"].items()
        }

    def plan(self) -> dict[str, float]:
        """Episodes of every policy."""
        rates, series = goals.evaluate_policies(
            lambda episodes, generator: goals.Policies(
                episodes, self.model, self.world, self.recipe, generator
            ),
            self.world,
            self.recipe,
            self.config.seed,
            self.trainer.device,
        )
        self.found["planning"] = rates
        self.found["series"] |= series
        return goals.headline(rates)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and a picture of its plans."""
        super().export(directory)
        series = self.found.get("series", {})
        if self.processes.is_main and "paths/model" in series:
            write_atomic(directory / "figures" / "plans.svg", self.world.paths_chart(series))


def fill_shapes(config: TrainConfig) -> LeWMConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, LeWMConfig) and isinstance(config.data, WalksConfig)
    return with_decided(
        config.model,
        channels=CHANNELS,
        image_size=config.data.image_size,
        action_dim=ACTION_DIM * config.data.skip,
    )


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("lewm",), (WalksConfig,), "two_rooms_rgb or data=push_t")
    recipe, model, data = config.recipe, config.model, config.data
    assert isinstance(recipe, LeWMRecipeConfig) and isinstance(model, LeWMConfig)
    assert isinstance(data, WalksConfig)
    if data.image_size % model.patch:
        raise UserError(f"model.patch={model.patch} must divide data.image_size={data.image_size}")
    if data.seq_len - 1 > model.history:
        raise UserError(
            f"data.seq_len={data.seq_len}: its {data.seq_len - 1} states are more than the "
            f"predictor looks back at; raise model.history={model.history}"
        )
    ahead = (data.walk - 1) // data.skip
    if ahead < max(AHEAD):
        raise UserError(
            f"data.walk={data.walk}, data.skip={data.skip}: places are read off predictions up to "
            f"{max(AHEAD)} blocks of actions ahead, a walk has {ahead}; raise data.walk"
        )
    goals.check(recipe, data)


def build(config: TrainConfig, processes: Processes, device: torch.device) -> LeWMTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    make, _ = WORLDS[config.data.name]
    data = make(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return LeWMTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    model_config, data = fill_shapes(config), config.data
    assert isinstance(data, WalksConfig) and model_config.action_dim is not None
    with torch.device("meta"):
        model = LeWM(model_config, config.recipe.resolved_target == Target.ema)
    rows = rows_at_once(config, least=2)
    size = data.image_size
    frames = torch.zeros(rows, data.seq_len, CHANNELS, size, size, device="meta")
    actions = torch.zeros(rows, data.seq_len - 1, model_config.action_dim, device="meta")

    def loss() -> Tensor:
        latents = model(frames, actions)
        return (latents.predicted - latents.target).square().mean()

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, LeWMTraining.unit
    )
