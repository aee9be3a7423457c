"""A world model without a decoder, judged by the plans it makes: `recipe=jepa_planning`.

PLDM (2025, arXiv:2502.14819) and eb_jepa (2026, arXiv:2602.03604). One step, with frames o_0..o_T
and actions a_0..a_T-1 of walks that aim at nothing:

    z      = encoder(o)
    zhat   = predictor from z_0 alone, action after action
    loss   = pred_weight mean (zhat_t - z_t)^2  +  what keeps z from collapsing (jepa.py)

Judged by what its latents hold of the dot's place (probes), whether their distance is that of a
walk round the wall, what surprises it, and how many goals its plans reach.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.worlds.jepa.config import JEPAConfig
from models.worlds.jepa.jepa_planning import JEPAPlanning
from models.worlds.jepa.regularizers import straightness
from models.worlds.jepa.targets import Latents
from training.data.config_worlds import TwoRoomsConfig
from training.data.two_rooms import TwoRoomsData, layouts
from training.distributed import Processes
from training.envs.two_rooms import Rooms, image_size, render, statistics
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.planning import (
    Episodes,
    Policies,
    draw_episodes,
    evaluate_policies,
)
from training.evaluation.probes import distance_rms, linear_probe, mlp_probe, r_squared
from training.evaluation.room_figures import (
    distance_maps,
    energy_maps,
    imagined_film,
    paths_chart,
)
from training.evaluation.room_geometry import geometry
from training.evaluation.surprise import judge, violations
from training.files import write_atomic
from training.recipes.config import check_parts, check_patch, with_decided
from training.recipes.config_worlds import JEPAPlanningConfig, Target
from training.recipes.jepa import FRAMEWORK as FRAMEWORK
from training.recipes.jepa import JEPATraining
from training.schema import TrainConfig
from training.seeding import numpy_rng, stream_seed, torch_generator
from training.torch_step import Batch

CHANNELS, ACTION_DIM = 2, 2
REACH = 60  # steps of prediction up to which places are probed
AHEAD = (1, 8, 16, 60)
SHOWN, DRAWN = 6, 3  # episodes whose paths, and whose distances, are drawn
COARSE = 4  # every so many points of a map of distances are kept in the results
HELD, ENERGY_POINTS = 8, 25  # steps for which an action is held, and points along each component


class JEPAPlanningTraining(JEPATraining):
    """Trains encoder and predictor together; plans with them at the end."""

    model: JEPAPlanning
    data: TwoRoomsData

    def __init__(
        self, config: TrainConfig, data: TwoRoomsData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, JEPAPlanningConfig)
        self.recipe, self.model_config = config.recipe, fill_shapes(config)
        averaged = self.recipe.resolved_target == Target.ema
        frames = data.config.batch_size * data.config.seq_len
        super().__init__(
            config,
            data,
            processes,
            device,
            lambda: JEPAPlanning(self.model_config, averaged),
            frames,
        )
        rooms = Rooms(*(torch.from_numpy(x).to(device) for x in layouts(data.config.wall)))
        self.mean, self.std = statistics(rooms, data.config.pool)
        self.flops_per_step = estimate(config).flops_per_step

    def see(self, positions: Tensor, rooms: Rooms) -> Tensor:
        """[b, t, 2, s, s] frames, normalised over the world."""
        return (render(positions, rooms, self.data.config.pool) - self.mean) / self.std

    def latents(self, batch: Batch) -> tuple[Latents, Tensor]:
        rooms, actions = Rooms(batch["wall"], batch["door"]), batch["actions"]
        return self.model(self.see(batch["positions"], rooms), actions), actions

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics and probes; geometry, surprise and plans too, if `final`."""
        with self.whole_model():
            metrics = self.look(final)
            if final:
                metrics |= self.surprise()
                metrics |= self.plan() if self.recipe.policies else {}
        return metrics

    def walks(self, count: int, length: int) -> tuple[Tensor, Tensor, Rooms]:
        """Held-out positions [n, t, 2], actions [n, t-1, 2] and rooms."""
        walks = self.data.heldout(count, length)
        positions, actions, wall, door = (
            torch.from_numpy(x).to(self.trainer.device) for x in walks
        )
        return positions, actions, Rooms(wall, door)

    def look(self, final: bool) -> dict[str, float]:
        """What the latents of held-out walks hold, and what predictions are worth."""
        length = min(REACH + 1, self.data.config.walk)
        positions, actions, rooms = self.walks(self.recipe.probe_walks, length)
        z = self.model.encode(self.see(positions, rooms))  # [n, t, d]
        ahead = self.model.rollout(z[:, 0], actions)
        near = slice(0, self.data.config.seq_len - 1)  # as far as training predicts
        error, wrong = (
            (x - z[:, 1:])[:, near].square().mean().item()
            for x in (ahead, self.model.rollout(z[:, 0], actions.roll(1, 0)))
        )
        metrics = self.health(
            z.flatten(0, 1),
            action_use=wrong / max(error, 1e-12),
            straightness=straightness(z).item(),
        )
        half = len(z) // 2  # probes are fitted to the walks of one half
        seen, place = z[:half].flatten(0, 1), positions[:half].flatten(0, 1)
        probes = {"linear": linear_probe(seen, place)}
        if final:
            generator = torch_generator(self.config.seed, "probe", device=z.device)
            probes["mlp"] = mlp_probe(seen, place, generator)
        truth = positions[half:]
        for name, probe in probes.items():
            told, later = probe(z[half:]), probe(ahead[half:])
            metrics[f"eval/probe/{name}/px"] = distance_rms(told, truth)
            metrics[f"eval/probe/{name}/r2"] = r_squared(told.flatten(0, 1), truth.flatten(0, 1))
            for steps in (s for s in AHEAD if s < length):
                metrics[f"eval/probe/{name}/px_after_{steps}"] = distance_rms(
                    later[:, steps - 1], truth[:, steps]
                )
        self.film = positions[half], probes["linear"](ahead[half]), rooms[half]
        if final:
            curve = [distance_rms(later[:, i], truth[:, i + 1]) for i in range(length - 1)]
            self.found["series"]["px_ahead"] = curve
            metrics |= geometry(
                z[half:, ::8].flatten(0, 1),
                truth[:, ::8].flatten(0, 1),
                Rooms(
                    *(r[half:].repeat_interleave(-(-length // 8)) for r in (rooms.wall, rooms.door))
                ),
            )
        return metrics

    def surprise(self) -> dict[str, float]:
        """Violation of expectation on held-out walks."""
        positions, actions, rooms = self.walks(self.recipe.pairs, self.data.config.seq_len)
        generator = torch_generator(self.config.seed, "eval/surprise", device=positions.device)
        self.found["surprise"] = judge(
            self.model, violations(self.see, positions, actions, rooms, generator)
        )
        return {
            f"eval/surprise/{event}": found["accuracy"]
            for event, found in self.found["surprise"].items()
        }

    def episodes(self) -> Episodes:
        """The starts and goals that every policy of a seed plays."""
        rng = numpy_rng(self.config.seed, "eval/episodes")
        drawn = draw_episodes(self.data.config.wall, rng, self.recipe.episodes)
        return drawn.to(self.trainer.device)

    def plan(self) -> dict[str, float]:
        """Episodes, by every rule for contacts and every policy."""
        recipe, episodes = self.recipe, self.episodes()
        rates, paths = evaluate_policies(
            self.model,
            self.see,
            episodes,
            recipe.planning,
            recipe.policies,
            recipe.contacts,
            recipe.episode_steps,
            partial(stream_seed, self.config.seed),
        )
        self.found["planning"] = rates
        maps, goals, walls = self.distances()
        self.found["series"] |= {
            "distance/map": maps[0, ::COARSE, ::COARSE].flatten().tolist(),
            "distance/goal": goals[0].tolist(),
            "distance/room": walls[0].tolist(),
        }
        rooms = torch.stack([episodes.rooms.wall, episodes.rooms.door], -1)[:SHOWN]
        self.found["series"] |= {
            "paths/rooms": rooms.flatten().tolist(),
            "paths/goals": episodes.goal[:SHOWN].flatten().tolist(),
        } | {
            f"paths/{contact}/{name}": played.positions[:SHOWN].flatten().tolist()
            for contact, played_by in paths.items()
            for name, played in played_by.items()
            if name == "model"
        }
        return {
            f"eval/{contact}/{name}": found["final"]
            for contact, by_name in rates.items()
            for name, found in by_name.items()
        }

    def summary(self) -> dict[str, Any]:
        return {"data": self.data.describe(), **super().summary()}

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and pictures of what it imagines."""
        super().export(directory)
        with self.whole_model():
            found = self.pictures()
        for name, drawn in found.items() if self.processes.is_main else ():
            write_atomic(directory / "figures" / f"{name}.svg", drawn)

    def some_episodes(self) -> Policies:
        """The first episodes, of which pictures are made."""
        few = self.episodes()[:DRAWN]
        return Policies(few, self.model, self.see, self.recipe.planning, torch.Generator())

    def distances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent distances [n, y, x] of all places to goals [n, 2], wall and door [n, 2]."""
        policies = self.some_episodes()
        goal, rooms = policies.episodes.goal, policies.episodes.rooms
        walls = torch.stack([rooms.wall, rooms.door], dim=-1)
        found = policies.latent_distances().sqrt(), goal, walls
        maps, goals, walls = (x.cpu().numpy() for x in found)
        return maps, goals, walls

    def pictures(self) -> dict[str, str]:
        """Name -> SVG."""
        series, found = self.found.get("series", {}), {}
        keys = {name: f"paths/{name}/model" for name in self.recipe.contacts}
        if keys := {name: key for name, key in keys.items() if key in series}:
            found["plans"] = paths_chart(series, keys)
        seen, told, rooms = self.film  # one held-out walk
        steps = [step for step in (1, 2, 4, 8, 16, 32, 60) if step < len(seen)]
        found["imagined"] = imagined_film(
            seen.cpu().numpy(),
            torch.cat([seen[:1], told]).cpu().numpy(),
            steps,
            rooms.wall.item(),
            rooms.door.item(),
        )
        found["distance_to_goal"] = distance_maps(*self.distances())
        policies, bound = self.some_episodes(), self.recipe.planning.max_norm
        few = policies.episodes
        held = policies.held_costs(bound, HELD, ENERGY_POINTS)
        ways = [
            F.normalize(act(few.start, 1)[:, 0], dim=-1)
            for act in (policies.greedy(), policies.oracle())
        ]
        found["energy_of_actions"] = energy_maps(
            held.cpu().numpy(), bound, *(way.cpu().numpy() for way in ways)
        )
        return found


def fill_shapes(config: TrainConfig) -> JEPAConfig:
    """The model's configuration with what the data decides."""
    assert isinstance(config.model, JEPAConfig) and isinstance(config.data, TwoRoomsConfig)
    size = image_size(config.data.pool)
    return with_decided(config.model, channels=CHANNELS, image_size=size, action_dim=ACTION_DIM)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("jepa",), (TwoRoomsConfig,), "two_rooms")
    assert isinstance(config.model, JEPAConfig) and isinstance(config.data, TwoRoomsConfig)
    pixels = image_size(config.data.pool)
    check_patch(config.model.encoder, f"the size at data.pool={config.data.pool},", pixels)


def build(config: TrainConfig, processes: Processes, device: torch.device) -> JEPAPlanningTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    assert isinstance(config.data, TwoRoomsConfig)
    data = TwoRoomsData(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return JEPAPlanningTraining(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is made."""
    check(config)
    assert isinstance(config.data, TwoRoomsConfig)
    model_config, data = fill_shapes(config), config.data
    with torch.device("meta"):
        model = JEPAPlanning(model_config, config.recipe.resolved_target == Target.ema)
    rows = rows_at_once(config)
    size = image_size(data.pool)
    frames = torch.zeros(rows, data.seq_len, CHANNELS, size, size, device="meta")
    actions = torch.zeros(rows, data.seq_len - 1, ACTION_DIM, device="meta")

    def loss() -> Tensor:
        latents = model(frames, actions)
        return (latents.predicted - latents.target).square().mean()

    return torch_estimate(
        model, loss, rows, config, data.batch_size * data.seq_len, JEPATraining.unit
    )
