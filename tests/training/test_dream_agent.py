"""An agent that learns in dreams: what its returns are, that the simulator is not asked, how it and
others are ranked inside and outside."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from models.agents.actor_critic import ActorCritic
from models.agents.config import ActorCriticConfig
from tests.helpers import SMALL_AGENT, SMALL_PINFALL, SMALL_WORLD, train
from training.config import compose
from training.data.config_worlds import PinfallConfig, Variant
from training.data.pinfall import Clips, PinfallData
from training.distributed import Processes
from training.envs.pinfall import see
from training.envs.pinfall import step as simulate
from training.errors import UserError
from training.evaluation.lives import (
    Inside,
    Outside,
    all_knowing,
    follower,
    idler,
    live,
    ranking,
    wanderer,
)
from training.evaluation.stub_worlds import Simulator
from training.recipes import dream_agent
from training.returns import lambda_returns
from training.worlds import Start

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def recipe(*overrides: str) -> dream_agent.DreamAgentTraining:
    return dream_agent.build(
        compose([*SMALL_AGENT, "loop.steps=2", *overrides]), Processes(), torch.device("cpu")
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of a small world."""
    runs = tmp_path_factory.mktemp("worlds")
    done = train(runs, *SMALL_PINFALL["diamond"], *SMALL_WORLD, "loop.steps=1", "run=x")
    assert done.returncode == 0, done.stderr[-2000:]
    return next(runs.glob("*/*/x"))


def test_returns_are_the_mixture_of_returns_of_every_length() -> None:
    generator = torch.Generator().manual_seed(FRESH)
    b, h, discount, lam = 20, 6, 0.9, 0.7
    rewards, values = (torch.randn(b, h, generator=generator).double() for _ in range(2))
    ends = torch.rand(b, h, generator=generator) < 0.2

    def of_length(i: int, t: int, n: int) -> float:
        """n rewards from t on, then the value; nothing after an end."""
        total, factor = 0.0, 1.0
        for k in range(t, t + n):
            total += factor * rewards[i, k].item()
            factor *= discount
            if ends[i, k]:
                return total
        return total + factor * values[i, t + n - 1].item()

    found = lambda_returns(rewards, values, ends, discount, lam)
    for i in range(b):
        for t in range(h):
            left = h - t
            shares = [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]
            mixed = sum(s * of_length(i, t, n) for n, s in enumerate(shares, 1))
            assert found[i, t].item() == pytest.approx(mixed, rel=1e-9, abs=1e-12)


def begun(count: int, variant: Variant = Variant.paddle, size: int = 32) -> Start:
    data = PinfallData(PinfallConfig(variant=variant, image_size=size), seed=FRESH)
    clips = data.heldout(count, 4)
    parts = {k: torch.from_numpy(getattr(clips, k)) for k in ("x", "radius", "hue", "plate")}
    frames = see(parts, variant, size).float()
    return Start(frames, torch.from_numpy(clips.actions), clips.state(-1))


def test_who_knows_more_is_rewarded_more_and_every_step_outside_is_counted() -> None:
    start, outside = begun(256), Outside(Variant.paddle, 32)
    won = [live(outside, start, policy, 80).mean().item() for policy in
           (all_knowing(Variant.paddle), follower(0.5), idler)]  # fmt: skip
    assert all(b < a for a, b in pairwise(won)), won
    assert won[0] > 1 > -0.1 > won[2]
    counted, few = Outside(Variant.paddle, 32), begun(8)
    live(counted, few, all_knowing(Variant.paddle), 10)
    assert counted.steps == 80
    told = live(Outside(Variant.paddle, 32), start, wanderer, 40)
    assert torch.equal(live(Outside(Variant.paddle, 32), start, wanderer, 40), told)
    assert not torch.equal(live(Outside(Variant.paddle, 32), start, wanderer, 40, seed=1), told)


class Known(Simulator):
    """The simulator as a world model that also tells what a step was worth."""

    def step(self, cache, action):
        after = simulate(cache, action, self.variant)
        self.last = after
        return super().step(cache, action)

    def outcome(self, before, action, after):
        signs = torch.nn.functional.one_hot(self.last.reward.long() + 1, 3).float()
        return signs, torch.nn.functional.one_hot(self.last.end.long(), 2).float()


def test_inside_a_model_that_is_right_policies_are_worth_what_they_are_outside() -> None:
    start = begun(64)
    inside = Inside(Known(start.state, Variant.paddle, 32, 4))
    policies = {"follows": follower(0.0), "half": follower(0.5), "nothing": idler}
    found = ranking(inside, Outside(Variant.paddle, 32), start, policies, 50)
    for within, without in found.values():
        assert within == pytest.approx(without, abs=0.1)  # frames there are not rounded
    assert found["follows"][0] > found["half"][0] > found["nothing"][0]


def test_an_agent_tells_all_actions_alike_at_first_and_sees_the_last_frames() -> None:
    config = ActorCriticConfig(
        context=2, widths=[4, 4], hidden=8, channels=3, image_size=16, actions=3
    )
    model = ActorCritic(config)
    model.initialise(torch.Generator().manual_seed(0))
    frames = torch.rand(5, 4, 3, 16, 16)
    logits, value = model(frames)
    assert (logits == 0).all() and (value == 0).all()
    for parameter in model.parameters():
        parameter.data.normal_()
    logits, value = model(frames)
    moved = frames.clone()
    moved[:, :2] = 0
    assert torch.equal(model(moved)[0], logits)
    moved[:, 2] = 0
    assert not torch.equal(model(moved)[0], logits) and value.shape == (5,)
    with pytest.raises(ValueError, match=r"model\.widths=.*frames of 10 cannot be halved 2 times"):
        ActorCriticConfig(widths=[4, 4], image_size=10)


def test_in_dreams_the_simulator_is_not_asked(world: Path) -> None:
    made = recipe(f"recipe.world={world}")
    made.outside.step = None  # type: ignore
    before = [p.clone() for p in made.model.parameters()]
    told = [p.clone() for p in made.inside.model.parameters()]  # type: ignore[attr-defined]
    for step in range(2):
        metrics = made.step(made.data.batch(step))
    assert {"train/critic", "train/actor", "train/entropy", "train/reward"} <= metrics.keys()
    moved = [not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True)]
    assert any(moved)
    kept = zip(told, made.inside.model.parameters(), strict=True)  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) and b.grad is None for a, b in kept)
    found = made.evaluate(final=True)
    assert found["eval/learned_outside"] == 0 and -1 <= found["eval/ranks"] <= 1
    told = made.summary()
    assert len(told["ranked"]) == 7
    assert [len(told["series"][place]) for place in ("inside", "outside")] == [7, 7]


def test_with_the_simulator_as_the_world_its_steps_are_counted_and_kept() -> None:
    made = recipe()
    for step in range(2):
        made.step(made.data.batch(step))
    found = made.evaluate(final=True)
    assert found["eval/learned_outside"] == 2 * 4 * 3 and "eval/ranks" not in found
    other = recipe()
    other.load_state_dict(made.state_dict())
    assert other.outside.steps == 24


def drawn_weights(made) -> None:
    generator = torch.Generator().manual_seed(FRESH)
    for parameter in made.model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_gradient_of_one_pass_is_that_of_the_formula() -> None:
    made = recipe("data.batch_size=16", "recipe.horizon=4", "recipe.entropy=0.5",
                  "recipe.normalise=false")  # fmt: skip
    drawn_weights(made)
    batch = made.trainer.to_device(made.data.batch(0) | {"row": np.arange(16)})
    lived, step = [], made.inside.step

    def noted(cache, action):
        found = step(cache, action)
        lived.append(found[0])
        return found

    made.inside.step = noted  # type: ignore[method-assign]
    dreams = made.dream(batch)
    reward, end = (torch.stack([getattr(x, k) for x in lived], 1) for k in ("reward", "end"))
    seen = [dreams.frames[:, t : t + 4] for t in range(5)]
    told = [made.model(x) for x in seen]
    value = torch.stack([v for _, v in told], dim=1)
    returns = lambda_returns(reward, value[:, 1:], end, 0.985, 0.95).detach()
    total, count, over = torch.zeros(()), 0, batch["missed"][:, 3].any(-1)
    for i in range(16):
        for t in range(0 if over[i] else 4):
            p = told[t][0][i].softmax(-1)
            away = (returns[i, t] - value[i, t]).detach()
            total = total + (value[i, t] - returns[i, t]) ** 2
            total = total - p[dreams.action[i, t]].log() * away + 0.5 * (p * p.log()).sum()
            count += 1
            if end[i, t]:
                break
    made.terms = {}
    loss = made.loss(dreams, torch.arange(16))
    parameters = list(made.model.parameters())
    wanted = torch.autograd.grad(total / count, parameters)
    for a, b in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_nobody_learns_from_a_game_that_was_over_before() -> None:
    made = recipe("data.batch_size=8", "recipe.horizon=4")
    batch = made.trainer.to_device(made.data.batch(0) | {"row": np.arange(8)})
    batch["missed"][:, 3] = (torch.arange(8) % 2 == 0)[:, None]
    assert made.dream(batch).on.sum(1).bool().tolist() == [False, True] * 4
    clips = Clips(*(batch[name].numpy() for name in Clips._fields))
    assert (
        len(dream_agent.going_on(clips, 3).x) == 4
        and not dream_agent.going_on(clips, 3).missed[:, 3].any()
    )


def test_how_much_better_actions_were_can_be_made_of_size_one() -> None:
    made = recipe("data.batch_size=64", "recipe.horizon=6", "recipe.normalise=true")
    plain = recipe("data.batch_size=64", "recipe.horizon=6", "recipe.normalise=false")
    told = []
    for each in (made, plain):
        drawn_weights(each)
        batch = each.trainer.to_device(each.data.batch(0) | {"row": np.arange(64)})
        told.append(each.dream(batch))
    size = (told[0].better.square() * told[0].on).sum() / told[0].on.sum()
    assert size.item() == pytest.approx(1, rel=1e-4)
    ratio = told[0].better / told[1].better
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), atol=0, rtol=1e-3)


def test_later_passes_do_not_push_further_than_the_clip() -> None:
    made = recipe("data.batch_size=16", "recipe.clip=0.1", "recipe.entropy=0")
    drawn_weights(made)
    batch = made.trainer.to_device(made.data.batch(0) | {"row": np.arange(16)})
    dreams = made.dream(batch)
    n = torch.arange(16)
    made.terms = {}
    far = dreams._replace(logp=dreams.logp - 1, better=torch.ones_like(dreams.better))
    loss = made.loss(far, n)
    loss.backward()
    assert made.model.actor.weight.grad.abs().max() == 0, "it is likelier by enough"
    made.model.zero_grad()
    made.loss(far._replace(better=-far.better), n).backward()
    assert made.model.actor.weight.grad.abs().max() > 0, "and may become less likely again"
    calls = recipe("recipe.passes=3", "loop.steps=2")
    calls.step(calls.data.batch(0))
    assert calls.trainer.count == 3 and calls.trainer.steps == 6


def test_what_cannot_be_is_refused(world: Path, tmp_path: Path) -> None:
    for overrides, says in (
        (["data.seq_len=3"], r"data\.seq_len=3 must be model\.context=4 or more"),
        ([f"recipe.world={world}", "data.image_size=32"], r"is of data\.image_size=16, not of 32"),
        ([f"recipe.world={world}", "data.variant=uniform"], r"is of data\.variant=paddle, not of"),
        ([f"recipe.world={world}", "model.context=2"], r"must see 4 frames, model\.context=2"),
        (["recipe.world=nowhere"], r"recipe\.world=nowhere: there is no such directory"),
        ([f"recipe.world={tmp_path}"], r"config\.yaml is missing"),
        (["recipe.discount=1.5"], r"recipe\.discount=1\.5 must be between"),
        (["recipe.horizon=0"], r"recipe\.horizon=0"),
        (["model.widths=[4,4,4,4,4]"], r"frames of 16 cannot be halved 5 times"),
    ):
        with pytest.raises(UserError, match=says):
            recipe(*overrides)
