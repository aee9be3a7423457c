"""Walks of a disc that pushes a T about, for no purpose: `data=push_t`.

Nothing is recorded: walk number i of a seed is made when it is first asked for, and kept. Two ways
of acting:

    weak      stable-worldmodel's (2026, arXiv:2602.08968): each action is uniform in [-1, 1]^2, but
              that it never leads further than 100 pixels, in x or y, from the block
    strokes   round the block to a point 100 pixels from its middle, then through the middle towards
              some place on the table in at most eight actions, and again for another place

LeWorldModel was trained on what people and their copies did to reach the green T; a user who had
the weak walks alone got 30 to 40 % in place of 90 (stable-worldmodel#185).
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32

from training.data.config_worlds import Pushing, PushTConfig
from training.data.walks import Walks, WalksData
from training.envs.push_t import CENTRE, REACH, PushT
from training.seeding import numpy_rng

SAMPLE = 64  # walks that the actions' mean and deviation are taken from
# A stroke begins so many pixels from the block's middle, or as near to there as THERE, and aims so
# many beyond it. The place that it pushes towards is drawn between PLACES, in x and y.
ALOOF, THERE, THROUGH, PLACES = 100.0, 25.0, 40.0, (130.0, 380.0)
APPROACH, PUSH = 12, 8  # actions at most of its two parts
STRONGEST, NOISE = 0.5, 0.05  # norm of an action; standard deviation of what is added to it


class PushTData(WalksData[PushTConfig]):
    """Walk i of the seed's `data/push_t` stream is trained on, of `eval/push_t` it is not."""

    def __init__(self, config: PushTConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        sample = join([walk(config, numpy_rng(0, "data/push_t/actions", i)) for i in range(SAMPLE)])
        super().__init__(config, seed=seed, rank=rank, world=world, sample=sample)
        self._made: dict[tuple[str, int], Walks] = {}

    def shown(self, step: int) -> tuple[Walks, np.random.Generator]:
        config, rng = self.config, numpy_rng(self._seed, "data/push_t/windows", step)
        chosen = rng.integers(config.walks, size=config.batch_size)
        return join([self.one("data/push_t", i) for i in chosen]), rng

    def heldout(self, count: int) -> Walks:
        return join([self.one("eval/push_t", i) for i in range(count)])

    def one(self, stream: str, index: int) -> Walks:
        """A walk, made only once."""
        if (stream, index) not in self._made:
            self._made[stream, index] = walk(self.config, numpy_rng(self._seed, stream, index))
        return self._made[stream, index]


def join(walks: list[Walks]) -> Walks:
    return Walks(*(np.stack(parts) for parts in zip(*walks, strict=True)))


def begin(rng: np.random.Generator) -> Float32[np.ndarray, " 7"]:
    """Disc and block anywhere, at rest; they may overlap, and part in the first steps."""
    agent, block = rng.uniform(50, 450, 2), rng.uniform(100, 400, 2)
    return np.array([*agent, *block, rng.uniform(0, 2 * math.pi), 0, 0], np.float32)


def walk(config: PushTConfig, rng: np.random.Generator) -> Walks:
    """One walk of data.walk states; batch axes are left out."""
    table = PushT(begin(rng)[None])
    act = {Pushing.weak: Weak, Pushing.strokes: Strokes}[config.pushing](rng)
    states, actions = [table.states[0]], []
    for _ in range(config.walk - 1):
        action = np.clip(act(states[-1]), -1, 1).astype(np.float32)
        states.append(table.step(action[None])[0])
        actions.append(action)
    return Walks(np.stack(states), np.stack(actions))


class Weak:
    """Anywhere, but near the block."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, state: Float32[np.ndarray, " 7"]) -> Float32[np.ndarray, " 2"]:
        agent, block = state[:2], state[2:4]
        target = agent + REACH * self.rng.uniform(-1, 1, 2)
        return (np.clip(target, block - REACH, block + REACH) - agent) / REACH


class Strokes:
    """Round the block to where a line through its middle leads to some place, then along it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.left = rng, 0

    def __call__(self, state: Float32[np.ndarray, " 7"]) -> Float32[np.ndarray, " 2"]:
        agent, middle = state[:2], middle_of(state)
        if not self.left:
            self.left, self.place = APPROACH + PUSH, self.rng.uniform(*PLACES, 2)
        away = (middle - self.place) / max(np.linalg.norm(middle - self.place), 1e-6)
        x, y = agent - middle
        if self.left > PUSH and math.hypot(x - ALOOF * away[0], y - ALOOF * away[1]) < THERE:
            self.left = PUSH
        if self.left > PUSH:  # along the circle, an eighth of it at a time at most
            now = math.atan2(y, x)
            turn = (math.atan2(away[1], away[0]) - now + math.pi) % (2 * math.pi) - math.pi
            to = now + min(max(turn, -math.pi / 4), math.pi / 4)
            target = middle + ALOOF * np.array([math.cos(to), math.sin(to)])
        else:
            target = middle - THROUGH * away
        self.left -= 1
        action = (target - agent) / REACH
        action *= min(1, STRONGEST / max(np.linalg.norm(action), 1e-6))
        return action + NOISE * self.rng.standard_normal(2)


def middle_of(state: Float32[np.ndarray, " 7"]) -> Float32[np.ndarray, " 2"]:
    """What the block turns about."""
    cos, sin = math.cos(state[4]), math.sin(state[4])
    x, y = CENTRE
    return state[2:4] + np.array([x * cos - y * sin, x * sin + y * cos])
