"""Atari games, played at random before the run begins: films with actions, rewards and ends.

The Arcade Learning Environment (2013, arXiv:1207.4708) through ale-py, which brings the ROMs; the
extra `atari`. An action lasts `data.frame_skip` frames; what is seen is, pixel by pixel, the
brighter of the last two, scaled. The player keeps to its action for a while (`data.sticky`). An
episode ends when a life is lost, so that no window shows two lives; the game goes on until it is
over. The seed decides everything.

Where ball and paddle are is read from the memory of the machine, in games that `MEMORY` has.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from training.config import did_you_mean
from training.data.config_episodes import AtariConfig
from training.data.corpus import DataError
from training.data.episodes import Played, PlayedData, scaled
from training.seeding import numpy_rng, stream_seed

WIDTH, HEIGHT = 160, 210  # of the screen, in pixels
MEMORY = {"breakout": {"ball_x": (99, -48.5), "ball_y": (101, 10.5), "plate_x": (72, -39.5)}}
"Of a game, the byte that says where the middle of a thing is, and how far it is off, in pixels."
LOWEST = {"breakout": 187.0}  # a ball is not to be told from the paddle further down


class AtariData(PlayedData[AtariConfig]):
    """Episodes of one game."""

    def __init__(self, config: AtariConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.known, self.screen = tuple(MEMORY.get(config.game, {})), (WIDTH, HEIGHT)
        self.episodes, self.places = played(config, seed)
        self.lengths = [len(one.frames) for one in self.episodes]
        out = max(1, round(config.heldout * len(self.episodes)))
        if len(self.episodes) < 2:
            raise DataError(
                f"data.frames={config.frames}: that is one episode of {config.game}, and one must "
                "be held out: raise it"
            )
        self.held = [number >= len(self.episodes) - out for number in range(len(self.episodes))]

    def episode(self, number: int) -> Played:
        return self.episodes[number]

    def states(
        self, windows: Int64[np.ndarray, "w 2"], frames: int
    ) -> Float32[np.ndarray, "w t k"]:
        """Where things are on the screen, in pixels of it; NaN where the ball is not."""
        parts = [self.places[number][first : first + frames] for number, first in windows.tolist()]
        return np.stack(parts)

    @property
    def content_hash(self) -> str:
        """Of what was played."""
        found = hashlib.sha256(json.dumps(asdict(self.config)).encode())
        for one in self.episodes:
            for part in one:
                found.update(part.tobytes())
        return found.hexdigest()


def machine(config: AtariConfig, seed: int) -> Any:
    """The game, switched on. Raises DataError."""
    try:
        ale_py, roms = (importlib.import_module(name) for name in ("ale_py", "ale_py.roms"))
    except ImportError:
        raise DataError(
            "data=atari is played by ale-py, which is not installed: pip install 'afferent[atari]'"
        ) from None
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", seed % 2**31)
    ale.setFloat("repeat_action_probability", 0.0)
    known = roms.get_all_rom_ids()
    if config.game not in known:
        near = did_you_mean(config.game, known)
        raise DataError(f"data.game={config.game}: there is no such game.{near}")
    ale.loadROM(roms.get_rom_path(config.game))
    return ale


def names_of(config: AtariConfig) -> tuple[str, ...]:
    """What the game's actions are called. Raises DataError."""
    return tuple(one.name.lower() for one in machine(config, 0).getMinimalActionSet())


def places(game: str, memory: UInt8[np.ndarray, " n"]) -> list[float]:
    """Where things are, of the names of `MEMORY`; NaN where the ball is not in the picture."""
    found = {name: memory[at] + off for name, (at, off) in MEMORY.get(game, {}).items()}
    hidden = found and (memory[MEMORY[game]["ball_y"][0]] == 0 or found["ball_y"] > LOWEST[game])
    return [math.nan if hidden and name.startswith("ball") else x for name, x in found.items()]


def played(config: AtariConfig, seed: int) -> tuple[list[Played], list[Float32[np.ndarray, "t k"]]]:
    """Episodes of `config.frames` frames in all, and where things are in them."""
    ale, rng = machine(config, stream_seed(seed, "data/atari")), numpy_rng(seed, "data/atari", 0)
    actions, found, known, count, action = ale.getMinimalActionSet(), [], [], 0, 0
    while count < config.frames:
        if ale.game_over():
            ale.reset_game()
        lives = ale.lives()
        films, done, rewards = [ale.getScreenRGB()], [], []
        states = [places(config.game, ale.getRAM())]
        over = False
        while not over and count < config.frames:
            if rng.random() < config.sticky:
                action = int(rng.integers(len(actions)))
            reward, screens = 0, [films[-1]]
            for _ in range(config.frame_skip):
                reward += ale.act(actions[action])
                screens.append(ale.getScreenRGB())
                over = ale.game_over() or ale.lives() < lives
                if over:
                    break
            films.append(np.maximum(*screens[-2:]) if config.frame_skip > 1 else screens[-1])
            states.append(places(config.game, ale.getRAM()))
            done.append(action)
            rewards.append(reward)
            count += 1
        frames = scaled(np.stack(films), config.image_size)
        ends = np.zeros(len(done), bool)
        ends[-1] = over
        given = np.array(rewards, np.float32)
        found.append(Played(frames, np.array(done, np.int64), given, ends))
        known.append(np.array(states, np.float32))
    return found, known
