"""Planners: they find what is known to be best, for many episodes at once."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from models.worlds.planners import (
    CEM,
    ICEM,
    MPPI,
    Adam,
    RandomPlanner,
    Replanning,
    ZeroPlanner,
    within_norm,
)

LIMIT = 2.45
ALL = [
    CEM(samples=200, elites=20, iterations=8, std=1.5, max_norm=LIMIT),
    CEM(samples=200, elites=20, iterations=8, std=1.5, max_norm=LIMIT, best=False, keep=False),
    CEM(samples=200, iterations=8, holds=(1, 4), fresh=0.3, momentum=0.1, max_norm=LIMIT),
    ICEM(samples=200, iterations=8, max_norm=LIMIT),
    MPPI(samples=400, iterations=12, temperature=0.5, max_norm=LIMIT),
    Adam(max_norm=LIMIT),
]


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(torch.seed() % 2**31)


def walk_cost(goal: torch.Tensor):
    """z' = z + a from the origin; the distance to the goal, summed over the horizon."""

    def cost(actions: torch.Tensor) -> torch.Tensor:
        path = actions.cumsum(dim=2)
        return (path - goal[:, None, None]).square().sum(-1).sum(-1)

    return cost


@pytest.mark.parametrize("planner", ALL, ids=lambda p: type(p).__name__)
def test_the_first_action_points_at_a_far_goal(planner) -> None:
    angle = torch.linspace(0, 6.28, 5)
    goal = 30 * torch.stack([angle.cos(), angle.sin()], -1)
    plan = planner(walk_cost(goal), torch.zeros(5, 6, 2), fresh())
    along = torch.cosine_similarity(plan.actions.sum(1), goal, dim=-1)
    assert along.min() > 0.98
    assert (plan.actions.norm(dim=-1) <= LIMIT + 1e-4).all()
    assert plan.actions.shape == (5, 6, 2) and plan.cost.shape == (5,)
    direct = walk_cost(goal)((goal / 30 * LIMIT)[:, None, None].expand(-1, 1, 6, -1))[:, 0]
    nothing = walk_cost(goal)(torch.zeros(5, 1, 6, 2))[:, 0]
    assert (plan.cost < direct + 0.15 * (nothing - direct)).all(), "not near the best there is"


@pytest.mark.parametrize("planner", ALL, ids=lambda p: type(p).__name__)
def test_a_double_integrator_is_brought_to_rest(planner) -> None:
    """x' = x + v, v' = v + a with a quadratic cost, whose best plan linear algebra knows."""
    horizon = 8
    speed = torch.tril(torch.ones(horizon, horizon))
    place = speed @ speed
    start = torch.tensor([3.0, -1.0])

    def cost(actions: torch.Tensor) -> torch.Tensor:
        a = actions[..., 0]
        x = start[:, None, None] + a @ place.T
        return x.square().sum(-1) + 0.5 * a.square().sum(-1)

    # Least squares of [place; sqrt(1/2)] a = [-start; 0].
    system = torch.cat([place, 0.5**0.5 * torch.eye(horizon)])
    goal = torch.cat([-start[:, None].expand(-1, horizon), torch.zeros(2, horizon)], dim=1)
    best = torch.linalg.lstsq(system, goal.T).solution.T[..., None]
    longer = {"iterations": 300} if isinstance(planner, Adam) else {"iterations": 60}
    small = {"std": 0.5} if isinstance(planner, MPPI) else {}
    if isinstance(planner, CEM):
        small["least_std"] = 0.01
    if isinstance(planner, CEM | ICEM):  # with 200, one seed in twenty narrows too early
        small["samples"] = 600
    plan = dataclasses.replace(planner, max_norm=None, **longer, **small)(
        cost, torch.zeros(2, horizon, 1), fresh()
    )
    nothing = cost(torch.zeros(2, 1, horizon, 1))[:, 0]
    optimum = cost(best[:, None])[:, 0]
    assert (plan.cost >= optimum - 1e-4).all()
    close = 1e-3 if isinstance(planner, Adam) else 0.05
    assert ((plan.cost - optimum) < close * (nothing - optimum)).all()


def test_elites_get_better() -> None:
    goal = torch.tensor([[20.0, 5.0]])
    plan = CEM(samples=300, elites=30, iterations=6)(walk_cost(goal), torch.zeros(1, 5, 2), fresh())
    costs = torch.cat(plan.history)
    assert (costs[1:] < costs[:-1] + 1e-3 * costs[0]).all() and costs[-1] < 0.8 * costs[0]


def test_nothing_is_preferred_where_nothing_matters() -> None:
    planner = CEM(samples=500, elites=50, iterations=3, best=False, keep=False)
    plan = planner(lambda a: torch.zeros(a.shape[:2]), torch.zeros(40, 4, 2), fresh())
    assert plan.actions.isfinite().all()
    # The mean of 50 elites, three times: 40 x 8 numbers of standard error 1.2 sqrt(3 / 50),
    # and five of the mean's, as every run draws another seed.
    assert plan.actions.mean().abs() < 5 * 1.2 * (3 / 50 / 320) ** 0.5


@pytest.mark.parametrize("planner", ALL, ids=lambda p: type(p).__name__)
def test_what_cannot_be_computed_is_never_chosen(planner) -> None:
    goal = torch.tensor([[10.0, 0.0]])

    def cost(actions: torch.Tensor) -> torch.Tensor:
        found = walk_cost(goal)(actions)
        return torch.where(actions[..., 0, 1] > 0, torch.nan, found)

    if isinstance(planner, Adam):
        planner = dataclasses.replace(planner, samples=32)
    plan = planner(cost, torch.tensor([[[0.0, -1.0]] * 4]), fresh())
    assert plan.actions.isfinite().all()
    if not isinstance(planner, MPPI) and getattr(planner, "best", True):
        assert plan.cost.isfinite().all() and plan.actions[0, 0, 1] <= 0


def test_gradients_are_followed_where_an_evaluation_records_none() -> None:
    goal = torch.tensor([[3.0, 2.0]])
    with torch.no_grad():
        plan = Adam(max_norm=LIMIT)(walk_cost(goal), torch.zeros(1, 4, 2), fresh())
    assert plan.cost < walk_cost(goal)(torch.zeros(1, 1, 4, 2))[:, 0]


@pytest.mark.parametrize("planner", ALL, ids=lambda p: type(p).__name__)
def test_the_same_seed_gives_the_same_plan(planner) -> None:
    goal = torch.tensor([[10.0, 3.0], [-4.0, 8.0]])
    plans = [
        planner(walk_cost(goal), torch.zeros(2, 4, 2), torch.Generator().manual_seed(5)).actions
        for _ in range(2)
    ]
    assert torch.equal(*plans)


@pytest.mark.parametrize("kind", [CEM, ICEM, MPPI])
def test_episodes_of_a_batch_do_not_see_each_other(kind) -> None:
    goal = torch.tensor([[10.0, 3.0], [-4.0, 8.0]])
    for other in (torch.tensor([0.0, 0.0]), torch.tensor([50.0, 50.0])):
        changed = torch.stack([goal[0], other])
        plan = kind()(walk_cost(changed), torch.zeros(2, 4, 2), torch.Generator().manual_seed(5))
        first = kind()(walk_cost(goal), torch.zeros(2, 4, 2), torch.Generator().manual_seed(5))
        torch.testing.assert_close(plan.actions[0], first.actions[0])


def test_mppi_goes_from_the_best_sample_to_the_mean_of_all() -> None:
    goal, mean = torch.tensor([[10.0, 3.0]]), torch.zeros(1, 3, 2)
    seen = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions)
        return walk_cost(goal)(actions)

    for temperature in (1e-6, 1e9):
        seen.clear()
        plan = MPPI(iterations=1, temperature=temperature)(cost, mean, fresh())
        samples = seen[0][0]
        best = samples[walk_cost(goal)(seen[0])[0].argmin()]
        wanted = best if temperature < 1 else samples.mean(0)
        torch.testing.assert_close(plan.actions[0], wanted, atol=1e-4, rtol=1e-4)


def test_correlated_noise_has_unit_variance_and_is_smooth() -> None:
    for horizon in (1, 2, 7, 16):
        noise = ICEM(beta=2.0).noise((20, 200, horizon, 2), torch.zeros(1), fresh())
        assert noise.shape == (20, 200, horizon, 2)
        assert abs(noise.var().item() - 1) < 0.1, horizon
    steps = (noise[:, :, 1:] - noise[:, :, :-1]).var()
    assert steps < 0.5 * 2, "white noise would have steps of variance 2"


def test_held_noise_is_held() -> None:
    seen = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions)
        return torch.zeros(actions.shape[:2])

    CEM(samples=6, elites=2, iterations=1, holds=(1, 3), keep=False)(
        cost, torch.zeros(1, 6, 2), fresh()
    )
    held = seen[0][0, 1::2]  # every second sample
    assert (held[:, 0] == held[:, 2]).all() and (held[:, 3] == held[:, 5]).all()
    assert (held[:, 2] != held[:, 3]).any() and (seen[0][0, 0, 0] != seen[0][0, 0, 1]).any()


def test_floors() -> None:
    cost = walk_cost(torch.tensor([[3.0, 0.0]]))
    assert (ZeroPlanner()(cost, torch.ones(1, 5, 2)).actions == 0).all()
    drawn = RandomPlanner(2.0)(cost, torch.zeros(1, 4000, 2), fresh()).actions
    assert drawn.abs().max() <= 2 and abs(drawn.std().item() - 2 / 3**0.5) < 0.05


def test_sum_and_last_step_are_different_objectives() -> None:
    """To be at 1 in the end, or to be near it all the time: here the last step alone may wander."""
    late = torch.tensor([0.0, 1.0])
    early = torch.tensor([1.0, 0.0])
    paths = torch.stack([late, early]).cumsum(1)
    distance = (paths - 1).abs()
    assert distance[:, -1].tolist() == [0, 0] and distance.sum(1).tolist() == [1, 0]


def test_replanning_keeps_what_is_left_of_a_plan_and_ends_with_the_episode() -> None:
    given = []

    class Counting:
        def __call__(self, cost, mean, generator=None):
            given.append(mean.clone())
            from models.worlds.planners import Plan

            steps = torch.arange(mean.shape[1], dtype=mean.dtype) + 1
            return Plan(steps[None, :, None].expand(1, -1, 1).clone(), torch.zeros(1))

    control = Replanning(Counting(), horizon=5, every=2)
    left, taken = 7, []
    while left:
        actions = control.next(None, 1, 1, left, torch.zeros(1))
        taken.append(actions[0, :, 0].tolist())
        left -= actions.shape[1]
    assert taken == [[1, 2], [1, 2], [1, 2], [1]]
    assert [m.shape[1] for m in given] == [5, 5, 3, 1]
    assert given[1][0, :, 0].tolist() == [3, 4, 5, 0, 0]


def test_actions_keep_their_direction_within_a_norm() -> None:
    actions = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = within_norm(actions, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.equal(within_norm(actions, None), actions)


def test_elites_stay_among_the_samples_of_icem() -> None:
    goal, seen = torch.tensor([[10.0, 3.0]]), []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        seen.append(actions[0])
        return walk_cost(goal)(actions)

    ICEM(samples=50, elites=8, iterations=3, kept=5)(cost, torch.zeros(1, 4, 2), fresh())
    for before, after in itertools.pairwise(seen[:3]):
        best = before[walk_cost(goal)(before[None])[0].argsort()[:5]]
        assert all((after == row).flatten(1).all(dim=1).any() for row in best)


@pytest.mark.parametrize("planner", ALL, ids=lambda p: type(p).__name__)
def test_where_every_sample_is_broken_the_plan_before_stands(planner) -> None:
    def cost(actions: torch.Tensor) -> torch.Tensor:
        broken = torch.tensor([torch.nan, 0.0])[:, None]
        return actions.square().sum(dim=(-1, -2)) + broken

    plan = planner(cost, torch.full((2, 4, 2), 0.1), fresh())
    assert plan.actions.isfinite().all()
    assert plan.actions[1].norm() < 0.5
