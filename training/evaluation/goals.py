"""Episodes with a goal that a held-out walk reached some steps later: who gets there?

The rule of stable-worldmodel (2026, arXiv:2602.08968), by which LeWorldModel (2026,
arXiv:2603.19312) was judged: start and goal are two states of one walk, 25 steps apart, an episode
has 50 steps, and it counts as soon as the goal is reached, ever. What that means is the world's to
say: 16 pixels from it in the coloured rooms. Some starts are there already, and random actions
reach some of the rest, so no rate means anything without those of the same episodes:

    model          blocks of actions whose predicted latent is nearest to that of the goal's image
    random, zero   uniform actions, and none
    true_dynamics  the same planner with the true dynamics and the straight distance
    oracle         knows the way, or does what was done in the walk
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.worlds.planners import Cost, Replanning
from training.data.config_worlds import PushTConfig, WalksConfig
from training.data.walks import WalksData
from training.errors import UserError
from training.evaluation.planning import PlanningModel, over_horizon, planner_of
from training.evaluation.statistics import wilson_interval
from training.recipes.config_worlds import LeWMRecipeConfig
from training.seeding import numpy_rng, torch_generator

Act = Callable[[Float[Tensor, "n s"], int], Float[Tensor, "n m a"]]
"From states and the number of blocks that are left: the next actions, in [-1, 1]."
SHOWN = 6  # episodes whose ways are kept


@dataclass(frozen=True)
class Episodes:
    """Starts and goals [n, s], and what the walk did in between."""

    start: Float[Tensor, "n s"]
    goal: Float[Tensor, "n s"]
    done: Float[Tensor, "n t a"]


class Playing(Protocol):
    """Episodes that go on."""

    @property
    def states(self) -> Float[Tensor, "n s"]: ...
    def step(self, actions: Float[Tensor, "n a"]) -> None: ...


class GoalWorld(Protocol):
    """What episodes ask of a world."""

    data: WalksData[Any]

    def raw(self, blocks: Float[Tensor, "... k"]) -> Float[Tensor, "... skip a"]: ...
    def see(self, states: Float[Tensor, "n t s"]) -> Float[Tensor, "n t 3 h w"]: ...
    def begin(self, states: Float[Tensor, "n s"]) -> Playing: ...
    def reached(
        self, states: Float[Tensor, "... s"], goal: Float[Tensor, "... s"]
    ) -> Bool[Tensor, ...]: ...
    def distance(
        self, states: Float[Tensor, "... s"], goal: Float[Tensor, "... s"]
    ) -> Float[Tensor, ...]: ...
    def oracle(self, episodes: Episodes) -> Act: ...


def draw_episodes(
    data: WalksData[Any], rng: np.random.Generator, count: int, ahead: int
) -> Episodes:
    """Two states, `ahead` steps apart, of each of `count` held-out walks."""
    states, actions = data.heldout(count)
    first = rng.integers(states.shape[1] - ahead, size=count)
    rows = np.arange(count)
    done = actions[rows[:, None], first[:, None] + np.arange(ahead)]
    parts = states[rows, first], states[rows, first + ahead], done
    return Episodes(*(torch.from_numpy(x) for x in parts))


@dataclass
class Policies:
    """Everyone who can act in `episodes`, by name."""

    episodes: Episodes
    predictor: PlanningModel
    world: Any  # a GoalWorld
    recipe: LeWMRecipeConfig
    generator: torch.Generator

    def raw(self, blocks: Float[Tensor, "*n m k"]) -> Float[Tensor, "*n s a"]:
        """Actions in [-1, 1] that normalised blocks stand for."""
        return self.world.raw(blocks).flatten(-3, -2).clamp(-1, 1)

    def planned(self, cost_from: Callable[[Float[Tensor, "n s"]], Cost]) -> Act:
        planning = self.recipe.planning
        control = Replanning(planner_of(planning), planning.horizon, planning.replan)
        width = self.world.data.block

        def act(states: Tensor, left: int) -> Tensor:
            count, cost = len(states), cost_from(states)
            return self.raw(control.next(cost, count, width, left, states, self.generator))

        return act

    def model(self) -> Act:
        goal = self.latent(self.episodes.goal)

        def cost_from(states: Tensor) -> Cost:
            z = self.latent(states)

            def cost(blocks: Tensor) -> Tensor:
                ahead = self.predictor.imagine(z, blocks)  # [n, k, h, d]
                distances = (ahead - goal[:, None, None]).square().sum(-1)
                return over_horizon(distances, self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)

    def latent(self, states: Float[Tensor, "n s"]) -> Float[Tensor, "n d"]:
        return self.predictor.encode(self.world.see(states[:, None]))[:, 0]

    def true_dynamics(self) -> Act:
        goal, skip = self.episodes.goal[:, None, None], self.world.data.config.skip

        def cost_from(states: Tensor) -> Cost:
            def cost(blocks: Tensor) -> Tensor:
                path = [states[:, None].expand(-1, blocks.shape[1], -1)]
                for action in self.raw(blocks).unbind(dim=2):
                    path.append(self.world.move(path[-1], action))
                distances = self.world.distance(torch.stack(path[skip::skip], dim=2), goal)
                return over_horizon(distances, self.recipe.planning.cost)

            return cost

        return self.planned(cost_from)

    def random(self) -> Act:
        def act(states: Tensor, left: int) -> Tensor:
            shape = (len(states), *self.block)
            drawn = torch.rand(shape, generator=self.generator, device=states.device)
            return 2 * drawn - 1

        return act

    def zero(self) -> Act:
        return lambda states, left: states.new_zeros(len(states), *self.block)

    def oracle(self) -> Act:
        return self.world.oracle(self.episodes)

    @property
    def block(self) -> tuple[int, int]:
        """Actions of a block, and components of one."""
        data = self.world.data
        return data.config.skip, len(data.action_mean)


def play(
    act: Act, world: GoalWorld, start: Float[Tensor, "n s"], steps: int
) -> Float[Tensor, "n t s"]:
    """The states of `steps` steps, from the start on; nothing ends early."""
    episodes, skip = world.begin(start), world.data.config.skip
    states = [episodes.states]
    while (done := len(states) - 1) < steps:
        for action in act(states[-1], -(-(steps - done) // skip)).unbind(dim=1):
            episodes.step(action)
            states.append(episodes.states)
    return torch.stack(states[: steps + 1], dim=1)


def judge(
    world: GoalWorld, states: Float[Tensor, "n t s"], goal: Float[Tensor, "n s"]
) -> dict[str, Any]:
    """Rate by the published rule with Wilson's interval; where things were at the end; who began
    there."""
    there = world.reached(states, goal[:, None])  # [n, t]
    ever, count = int(there.any(dim=1).sum()), len(goal)
    low, high = wilson_interval(ever, count)
    return {
        "ever": ever / count,
        "low": low,
        "high": high,
        "final": there[:, -1].float().mean().item(),
        "at_start": there[:, 0].float().mean().item(),
        "distance": world.distance(states[:, -1], goal).mean().item(),
        "episodes": count,
    }


def evaluate_policies(
    policies_of: Callable[[Episodes, torch.Generator], Policies],
    world: GoalWorld,
    recipe: LeWMRecipeConfig,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """What `judge` says of every policy of the recipe, and the ways of some episodes, flat."""
    rng = numpy_rng(seed, "eval/episodes")
    drawn = draw_episodes(world.data, rng, recipe.episodes, recipe.goal_steps)
    episodes = Episodes(*(x.to(device) for x in (drawn.start, drawn.goal, drawn.done)))
    rates, series = {}, {"paths/goals": episodes.goal[:SHOWN].flatten().tolist()}
    for name in recipe.policies:
        generator = torch_generator(seed, f"eval/plan/{name}", device=device)
        act = getattr(policies_of(episodes, generator), name)()
        states = play(act, world, episodes.start, recipe.episode_steps)
        rates[name] = judge(world, states, episodes.goal)
        if name in ("model", "random"):
            series[f"paths/{name}"] = states[:SHOWN].flatten().tolist()
    return rates, series


def headline(rates: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rate of every policy, and how many episodes were over before they began."""
    found = {f"eval/{name}": rate["ever"] for name, rate in rates.items()}
    return found | {"eval/at_start": rate["at_start"] for rate in rates.values()}  # noqa: B035


def check(recipe: LeWMRecipeConfig, data: WalksConfig) -> None:
    """Raise UserError unless plans and goals fit the episodes and the walks."""
    budget = -(-recipe.episode_steps // data.skip)
    if recipe.planning.horizon > budget:
        raise UserError(
            f"recipe.planning.horizon={recipe.planning.horizon} blocks of data.skip={data.skip} "
            f"steps reach beyond recipe.episode_steps={recipe.episode_steps}: lower it to {budget}"
        )
    if recipe.goal_steps >= data.walk:
        raise UserError(
            f"recipe.goal_steps={recipe.goal_steps} must be fewer than data.walk={data.walk} states"
        )
    if "true_dynamics" in recipe.policies and isinstance(data, PushTConfig):
        raise UserError(
            f"recipe.policies={recipe.policies}: data={data.name} cannot try thousands of plans "
            "with its true dynamics, leave true_dynamics out"
        )
