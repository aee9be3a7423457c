"""Clips of Pinfall: what was done in it and what came of it. Nothing is drawn here.

Worlds run side by side for `data.length` frames; one whose ball was lost begins anew. Windows of
`data.seq_len` frames are trained on, but for those that a new beginning lies in. Who acts
is drawn for every world:

    sticky     the action before, but that in a quarter of the frames one is drawn at random
    oracle     goes where the ball will land; `data.noise` of the actions are drawn at random

A seed's `data/pinfall` stream gives what is trained on, `eval/pinfall` other worlds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from training.data.config_worlds import PinfallConfig, Split
from training.data.corpus import DataError
from training.data.generated import GeneratedData
from training.envs.pinfall import ACTIONS, State, oracle, serve, step
from training.seeding import numpy_rng

CHANGE = 0.25  # of the frames in which someone sticky draws an action


class Clips(NamedTuple):
    """[n, t, ...] states, and what was done after each but the last: [n, t-1].

    Where `begins`, the state after is that of another world.
    """

    x: Float32[np.ndarray, "n t k 2"]
    v: Float32[np.ndarray, "n t k 2"]
    radius: Float32[np.ndarray, "n t k"]
    hue: Int64[np.ndarray, "n t k"]
    plate: Float32[np.ndarray, "n t"]
    hang: Int64[np.ndarray, "n t"]
    missed: Bool[np.ndarray, "n t k"]
    actions: Int64[np.ndarray, "n t-1"]
    rewards: Float32[np.ndarray, "n t-1"]
    ends: Bool[np.ndarray, "n t-1"]
    begins: Bool[np.ndarray, "n t-1"]

    def state(self, frame: int) -> State:
        """Of every world at one frame, to go on from."""
        parts = (torch.from_numpy(getattr(self, name)[:, frame]) for name in State._fields)
        return State(*(part.double() if part.is_floating_point() else part for part in parts))


class PinfallData(GeneratedData[PinfallConfig]):
    """Windows of worlds that somebody acts in."""

    item = "window"

    def __init__(self, config: PinfallConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        frames = config.worlds * config.length
        self.reuse = max(1, frames // (config.batch_size * config.seq_len))  # steps of a round
        self.round = lru_cache(2)(self.draw_round)

    def draw_round(self, number: int) -> tuple[Clips, Int64[np.ndarray, "w 2"]]:
        """Worlds that are trained on together, and the windows in them."""
        rng = numpy_rng(self._seed, "data/pinfall", number)
        clips = play(rng, self.config, self.config.worlds, self.config.length, Split.shown)
        return clips, windows(clips.begins, self.config.seq_len)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The fields of `Clips`, of this process's windows."""
        clips, found = self.round(step // self.reuse)
        if not len(found):
            raise DataError(
                f"data.seq_len={self.config.seq_len}: no ball stayed in play for so long, lower it"
            )
        rng = numpy_rng(self._seed, "data/pinfall/windows", step)
        chosen = self.mine(found[rng.integers(len(found), size=self.config.batch_size)])
        return cut(clips, chosen, self.config.seq_len)._asdict()

    def beginning(self, number: int, frames: int) -> Clips:
        """One window of a world that is never trained on, and of no other number."""
        rng = numpy_rng(self._seed, "eval/pinfall/beginnings", number)
        while True:
            clips = play(rng, self.config, 4, 2 * frames, Split.shown)
            found = windows(clips.begins, frames)
            if len(found):
                return cut(clips, found[:1], frames)

    def bank(self, count: int, frames: int) -> Clips:
        """`count` windows of so many frames of what is trained on, from its first rounds."""
        parts, number = [], 0
        while sum(len(part.x) for part in parts) < count:
            clips = self.draw_round(number)[0]
            found = windows(clips.begins, frames)
            parts.append(cut(clips, found[:: max(1, frames // 4)], frames))
            number += 1
        return joined(parts, count)

    def heldout(self, count: int, frames: int, split: Split = Split.shown) -> Clips:
        """`count` windows of so many frames, each of another world."""
        rng, parts = numpy_rng(self._seed, f"eval/pinfall/{split}", frames), []
        while sum(len(part.x) for part in parts) < count:
            clips = play(rng, self.config, count, 2 * frames, split)
            found = windows(clips.begins, frames)
            _, first = np.unique(found[:, 0], return_index=True)
            parts.append(cut(clips, found[first], frames))
        return joined(parts, count)


def joined(parts: list[Clips], count: int) -> Clips:
    return Clips(*(np.concatenate(each)[:count] for each in zip(*parts, strict=True)))


def windows(begins: Bool[np.ndarray, "n t-1"], frames: int) -> Int64[np.ndarray, "w 2"]:
    """World and first frame of every window in which no world begins anew."""
    count = np.cumsum(np.pad(begins, ((0, 0), (1, 0))), axis=1)
    return np.argwhere(count[:, : count.shape[1] - frames + 1] == count[:, frames - 1 :])


def cut(clips: Clips, chosen: Int64[np.ndarray, "w 2"], frames: int) -> Clips:
    """Windows of so many frames."""
    world, time = chosen[:, :1], chosen[:, 1:] + np.arange(frames)
    return Clips(
        *(
            part[world, time if name in State._fields else time[:, :-1]]
            for name, part in clips._asdict().items()
        )
    )


def play(
    rng: np.random.Generator, config: PinfallConfig, count: int, frames: int, split: Split
) -> Clips:
    """`count` worlds side by side. One whose ball was lost is served again after that frame."""
    variant = config.variant
    state = serve(rng, count, variant, split, config.hang)
    knows = torch.from_numpy(rng.random(count) < config.oracles)
    change = np.where(knows.numpy(), config.noise, CHANGE)
    action = torch.from_numpy(rng.integers(ACTIONS, size=count))
    lost = torch.zeros(count, dtype=torch.bool)
    states, done = [state], []
    for _ in range(frames - 1):
        drawn = torch.from_numpy(rng.integers(ACTIONS, size=count))
        fresh = torch.from_numpy(rng.random(count) < change)
        action = torch.where(fresh, drawn, torch.where(knows, oracle(state, variant), action))
        begins = lost
        state, reward, lost = step(state, action, variant)
        if begins.any():
            state = serve(rng, count, variant, split, config.hang).where(begins, state)
            reward, lost = reward * ~begins, lost & ~begins
        states.append(state)
        done.append((action, reward.float(), lost, begins))
    seen = (torch.stack(parts, dim=1) for parts in zip(*states, strict=True))
    after = (torch.stack(parts, dim=1) for parts in zip(*done, strict=True))
    parts = (part.float() if part.is_floating_point() else part for part in (*seen, *after))
    return Clips(*(part.numpy() for part in parts))
