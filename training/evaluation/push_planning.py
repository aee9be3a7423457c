"""Whether plans in the learned world push the T to where it should be, in the true one.

In each episode things stand anywhere, and the T should be up to half a metre elsewhere and turned.
At every step CEM tries sequences of actions in the model and the first action of the best is done
in the simulator. It counts as soon as points of the T are within NEAR of where they should be, on
the average. Beside it, in the same episodes: actions at random, each held for some steps, and
whoever made the episodes that are learned from, who goes for things.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from models.worlds.planners import CEM
from models.worlds.splats.mro_gwm import MroGwm, PushHistory
from training.envs.push_goals import NEAR, T, apart, drawn
from training.envs.push_world import PushState, PushWorld, led_by
from training.evaluation.pushing import led
from training.recipes.config_scenes import MroGwmRecipeConfig
from training.seeding import numpy_rng, torch_generator

CLOSER = 0.1  # what a metre between pusher and T costs, next to one between the T and its goal
HELD = 5  # steps of an action at random

Policy = Callable[[int, list[list[PushState]]], Float[ndarray, "e 2"]]
"From the step and the states so far of every episode to an action for each."


def planned(
    model: MroGwm, recipe: MroGwmRecipeConfig, seed: int, device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    """Share of episodes that succeed, of plans and of others; distances that are left, of each."""
    starts, goals = [], []
    for i in range(recipe.episodes):
        start, goal = drawn(numpy_rng(seed, "eval/plans", i))
        starts.append(start)
        goals.append(goal)
    target = torch.from_numpy(np.float32(goals)).to(device)
    policies = {
        "plans": planner(model, target, recipe, seed),
        "random": wanderer(recipe.episodes, seed),
        "explorer": explorer(recipe.episodes, seed),
    }
    found, left = {}, {}
    for name, policy in policies.items():
        distances = carried_out(policy, starts, target, model.anchors, recipe.episode_steps)
        left[name] = {"begun": distances[:, 0].tolist(), "least": distances.min(1).tolist()}
        found[f"{name}/success"] = float((distances.min(1) < NEAR).mean())
        found[f"{name}/left"] = float((distances.min(1) / distances[:, 0]).mean())
    found["plans/over_others"] = found["plans/success"] - 2 * max(
        found["random/success"], found["explorer/success"]
    )
    return found, left


def carried_out(
    policy: Policy, starts: list[PushState], goals: Float[Tensor, "e 7"],
    anchors: Float[Tensor, "m a 3"], steps: int,
) -> Float[ndarray, "e t"]:  # fmt: skip
    """Mean distance of the T's points from where they should be, at every time."""
    worlds = [PushWorld(state) for state in starts]
    states, distances = [[state] for state in starts], []

    def measure() -> None:
        now = np.float32([s[-1].poses[T] for s in states])
        distances.append(apart(torch.from_numpy(now).to(goals), goals, anchors).cpu().numpy())

    measure()
    for step in range(steps):
        for world, seen, action in zip(worlds, states, policy(step, states), strict=True):
            seen.append(world.step(action))
        measure()
    return np.stack(distances, axis=1)


def planner(
    model: MroGwm, goals: Float[Tensor, "e 7"], recipe: MroGwmRecipeConfig, seed: int
) -> Policy:
    """CEM in the model, which plans anew at every step from where it was."""
    cem = CEM(samples=recipe.samples, elites=max(2, recipe.samples // 8), std=0.8,
              iterations=recipe.iterations, least_std=0.2, max_norm=1.0, holds=(1, 3, 5),
              fresh=0.25)  # fmt: skip
    generator = torch_generator(seed, "eval/cem", device=goals.device)
    mean = torch.zeros(len(goals), recipe.horizon, 2, device=goals.device)

    def act(step: int, states: list[list[PushState]]) -> Float[ndarray, "e 2"]:
        nonlocal mean
        seen = history(states, model.config.history, goals.device)
        with torch.no_grad():
            plan = cem(lambda x: cost(model, seen, x, goals, recipe.consulted), mean, generator)
        mean = torch.cat([plan.actions[:, 1:], plan.actions[:, -1:]], dim=1)
        return plan.actions[:, 0].cpu().numpy()

    return act


def cost(
    model: MroGwm, seen: PushHistory, actions: Float[Tensor, "e k h 2"],
    goals: Float[Tensor, "e 7"], members: int,
) -> Float[Tensor, "e k"]:  # fmt: skip
    """Mean over time and so many members of how far the T is from its goal, and from the pusher."""
    e, k = actions.shape[:2]
    wide = PushHistory(seen.poses.repeat_interleave(k, 0), seen.pusher.repeat_interleave(k, 0))
    flat = actions.flatten(0, 1)
    pusher = led(wide.pusher[:, -1], flat)
    goal = goals.repeat_interleave(k, 0)[:, None]
    total = torch.zeros(e * k, device=goals.device)
    for member in range(members):
        told = model.rollout(member, wide, flat, pusher)[:, :, T]
        away = apart(told, goal.expand_as(told), model.anchors)
        near = (told[..., :2] - pusher).norm(dim=-1)
        total += (away + CLOSER * near).mean(1) + away[:, -1]
    return total.view(e, k) / members


def history(states: list[list[PushState]], times: int, device: torch.device) -> PushHistory:
    """The last times of every episode; before its first, it was as at first."""
    last = [[s[max(0, len(s) - times + i)] for i in range(times)] for s in states]
    poses = np.float32([[state.poses for state in some] for some in last])
    pusher = np.float32([[state.pusher for state in some] for some in last])
    return PushHistory(torch.from_numpy(poses).to(device), torch.from_numpy(pusher).to(device))


def wanderer(episodes: int, seed: int) -> Policy:
    """Anything, for some steps."""

    def act(step: int, states: list[list[PushState]]) -> Float[ndarray, "e 2"]:
        return numpy_rng(seed, "eval/wanderer", step // HELD).uniform(-1, 1, (episodes, 2))

    return act


def explorer(episodes: int, seed: int) -> Policy:
    """Who made the episodes that are learned from."""
    rngs = [numpy_rng(seed, "eval/explorer", i) for i in range(episodes)]
    aims: list[Any] = [None] * episodes

    def act(step: int, states: list[list[PushState]]) -> Float[ndarray, "e 2"]:
        found = []
        for i, (rng, seen) in enumerate(zip(rngs, states, strict=True)):
            action, aims[i] = led_by(rng, seen[-1], aims[i])
            found.append(action)
        return np.stack(found)

    return act
