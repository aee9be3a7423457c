"""Planners: sequences of actions whose predicted cost is low, for a batch of episodes at once.

A planner knows a cost and nothing of where it comes from: a learned model, the true dynamics, or a
formula. All have one interface: `plan(cost, mean, generator)`, where `mean` is what was planned
before. An objective says what of a predicted trajectory counts, `Replanning` when to plan again.

    CEM    the cross-entropy method: fit a normal distribution to the best samples, again and again
    iCEM   Sample-efficient Cross-Entropy Method for Real-time Planning, 2020, arXiv:2008.06389:
           noise that is correlated in time, elites that are kept
    MPPI   Information Theoretic MPC for Model-Based Reinforcement Learning, 2017: all samples,
           weighted by exp(-(cost - least) / temperature)
    Adam   gradient descent through the model, from several starts

Shapes: b episodes, k samples, h steps of the horizon, a components of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Cost = Callable[[Float[Tensor, "b k h a"]], Float[Tensor, "b k"]]
"Predicted cost of each sequence of actions; not finite is as bad as can be."


@dataclass
class Plan:
    """What a planner found."""

    actions: Float[Tensor, "b h a"]
    cost: Float[Tensor, " b"]
    history: list[Float[Tensor, " b"]] = field(default_factory=list)
    "Mean cost of the elites, or of all samples where there are none, after each iteration."


class Planner(Protocol):
    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        """A plan of the horizon of `mean`, which is where the search begins."""
        ...


def within_norm(actions: Float[Tensor, "... a"], limit: float | None) -> Float[Tensor, "... a"]:
    """Actions no longer than `limit`, their direction kept."""
    if limit is None:
        return actions
    length = actions.norm(dim=-1, keepdim=True)
    return actions * (limit / length.clamp(min=limit))


def worst_if_broken(costs: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    return torch.where(costs.isfinite(), costs, torch.inf)


def held_noise(
    shape: tuple[int, int, int, int],
    holds: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator | None,
) -> Float[Tensor, "b k h a"]:
    """Standard normal noise that stays the same for some steps: sample i for holds[i mod n].

    A plan around a corner needs long stretches in one direction, which white noise never has.
    """
    b, k, h, a = shape
    noise = torch.randn(b, k, h, a, generator=generator, device=like.device, dtype=like.dtype)
    steps = torch.arange(h, device=like.device)
    index = torch.stack([steps // hold * hold for hold in holds])  # [n, h]
    chosen = index[torch.arange(k, device=like.device) % len(holds)]  # [k, h]
    return noise.gather(2, chosen[None, :, :, None].expand(b, k, h, a))


@dataclass(frozen=True)
class CEM:
    """The cross-entropy method."""

    samples: int = 150
    elites: int = 10
    iterations: int = 4
    std: float = 1.2
    "Of the first samples, around `mean`."
    least_std: float = 0.1
    max_norm: float | None = None
    "Of an action."
    holds: tuple[int, ...] = (1,)
    "Steps for which the noise of a sample stays the same; samples take them in turn."
    fresh: float = 0.0
    "Share of the samples that forget what was found: around zero, with the longest hold."
    keep: bool = True
    "The best sequence so far is among the samples of every iteration."
    kept: int = 0
    "Elites of the iteration before that are among the samples too."
    best: bool = True
    "Plan the best sequence; else the mean of the elites."
    momentum: float = 0.0
    "Of mean and std, over the iterations."

    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        b, h, a = mean.shape
        std = torch.full_like(mean, self.std)
        fresh = round(self.fresh * self.samples)
        history, best, least = [], mean, torch.full((b,), torch.inf, device=mean.device)
        elites = mean[:, None]
        for iteration in range(self.iterations):
            noise = self.noise((b, self.samples, h, a), mean, generator)
            candidates = mean[:, None] + std[:, None] * noise
            if fresh:
                away = held_noise((b, fresh, h, a), (max(self.holds),), mean, generator)
                candidates[:, -fresh:] = self.std * away
            if self.keep:
                candidates[:, 0] = mean if iteration == 0 else best
            if iteration:
                again = elites[:, : min(self.kept, self.samples - 1)]
                candidates[:, 1 : 1 + again.shape[1]] = again
            candidates = within_norm(candidates, self.max_norm)
            costs = worst_if_broken(cost(candidates))  # [b, k]
            elite_costs, index = costs.topk(self.elites, dim=1, largest=False)
            elites = candidates.gather(1, index[..., None, None].expand(-1, -1, h, a))
            better = elite_costs[:, 0] < least
            best = torch.where(better[:, None, None], elites[:, 0], best)
            least = torch.where(better, elite_costs[:, 0], least)
            spread = elites.std(dim=1, unbiased=False).clamp(min=self.least_std)
            mean = torch.lerp(elites.mean(dim=1), mean, self.momentum)
            std = torch.lerp(spread, std, self.momentum)
            history.append(elite_costs.mean(dim=1))
        if self.best:
            return Plan(within_norm(best, self.max_norm), least, history)
        mean = within_norm(mean, self.max_norm)
        return Plan(mean, cost(mean[:, None])[:, 0], history)

    def noise(
        self, shape: tuple[int, int, int, int], like: Tensor, generator: torch.Generator | None
    ) -> Float[Tensor, "b k h a"]:
        """Standard normal."""
        return held_noise(shape, self.holds, like, generator)


@dataclass(frozen=True)
class ICEM(CEM):
    """CEM with noise of a power spectrum 1 / f^beta, and elites that stay.

    The noise is correlated over the whole horizon, so that `holds` is for `fresh` samples only.
    """

    kept: int = 5
    beta: float = 2.0

    def noise(
        self, shape: tuple[int, int, int, int], like: Tensor, generator: torch.Generator | None
    ) -> Float[Tensor, "b k h a"]:
        """Normal, of unit variance, correlated over the horizon."""
        b, k, h, a = shape
        count = h // 2 + 1
        parts = torch.randn(
            2, b, k, count, a, generator=generator, device=like.device, dtype=like.dtype
        )
        frequency = torch.arange(count, device=like.device, dtype=like.dtype).clamp(min=1) / h
        scale = frequency ** (-self.beta / 2)
        spectrum = torch.complex(parts[0], parts[1]) * scale[:, None]
        noise = torch.fft.irfft(spectrum, n=h, dim=2)
        weight = torch.full_like(scale, 4.0)  # every frequency counts for its negative too
        if h % 2 == 0:
            weight[-1] = 1.0
        weight[0] = 1.0
        variance = (weight * scale.square()).sum() / h**2
        return noise / variance.sqrt()


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral control."""

    samples: int = 200
    iterations: int = 4
    std: float = 1.2
    temperature: float = 1.0
    "Divides costs: towards 0 only the best sample counts, towards infinity all count alike."
    max_norm: float | None = None
    holds: tuple[int, ...] = (1,)

    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        b, h, a = mean.shape
        history = []
        for _ in range(self.iterations):
            noise = held_noise((b, self.samples, h, a), self.holds, mean, generator)
            candidates = mean[:, None] + self.std * noise
            candidates[:, 0] = mean
            candidates = within_norm(candidates, self.max_norm)
            costs = worst_if_broken(cost(candidates))
            least = costs.amin(1, keepdim=True)
            weight = torch.softmax(-(costs - least) / self.temperature, dim=1)
            weight = weight.where(least.isfinite(), 0.0)
            found = (weight[..., None, None] * candidates).sum(dim=1)
            mean = torch.where(least[..., None].isfinite(), found, mean)  # all broken: as before
            history.append((weight * costs.nan_to_num(posinf=0.0)).sum(dim=1))
        mean = within_norm(mean, self.max_norm)
        return Plan(mean, cost(mean[:, None])[:, 0], history)


@dataclass(frozen=True)
class Adam:
    """Gradient descent on the cost itself, from several starts, by Adam."""

    samples: int = 16
    iterations: int = 60
    std: float = 1.2
    lr: float = 0.1
    max_norm: float | None = None
    holds: tuple[int, ...] = (1,)

    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        b, h, a = mean.shape
        noise = held_noise((b, self.samples, h, a), self.holds, mean, generator)
        noise[:, 0] = 0.0
        actions = within_norm(mean[:, None] + self.std * noise, self.max_norm)
        best, least = actions[:, 0], torch.full((b,), torch.inf, device=mean.device)
        history, actions = [], actions.detach().requires_grad_()
        optimiser = torch.optim.Adam([actions], lr=self.lr)
        for iteration in range(self.iterations + 1):
            with torch.enable_grad():
                costs = cost(within_norm(actions, self.max_norm))
                total = costs.sum()
            found, index = worst_if_broken(costs.detach()).min(dim=1)
            chosen = within_norm(actions.detach(), self.max_norm)[torch.arange(b), index]
            best = torch.where((found < least)[:, None, None], chosen, best)
            least = torch.minimum(found, least)
            history.append(costs.detach().mean(dim=1))
            if iteration < self.iterations:
                (actions.grad,) = torch.autograd.grad(total, actions)
                optimiser.step()
        return Plan(best, least, history)


@dataclass(frozen=True)
class RandomPlanner:
    """Uniform actions within a square: the floor."""

    bound: float = 1.0

    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        drawn = torch.rand(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        actions = (2 * drawn - 1) * self.bound
        return Plan(actions, cost(actions[:, None])[:, 0])


@dataclass(frozen=True)
class ZeroPlanner:
    """Nothing is done."""

    def __call__(
        self, cost: Cost, mean: Float[Tensor, "b h a"], generator: torch.Generator | None = None
    ) -> Plan:
        actions = torch.zeros_like(mean)
        return Plan(actions, cost(actions[:, None])[:, 0])


@dataclass
class Replanning:
    """Model predictive control: carry out some steps of a plan, then plan again from there.

    What is left of the old plan, shifted, is where the next search begins.
    """

    planner: Planner
    horizon: int
    every: int = 8
    "Steps that are carried out before the next plan."
    left: Float[Tensor, "b h a"] | None = None

    def next(
        self,
        cost: Cost,
        batch: int,
        width: int,
        steps: int,
        like: Tensor,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b n a"]:
        """The next actions to carry out, at most `steps`, the steps that are left in the episode.

        No plan reaches further than the episode does.
        """
        horizon = min(self.horizon, steps)
        mean = self.left
        if mean is None:
            mean = like.new_zeros(batch, self.horizon, width)
        plan = self.planner(cost, mean[:, :horizon], generator).actions
        count = min(self.every, horizon)
        left = like.new_zeros(batch, self.horizon, width)
        left[:, : horizon - count] = plan[:, count:]
        self.left = left
        return plan[:, :count]
