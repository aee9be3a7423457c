"""A world model that a run has left, opened: to be played, or to be learned in.

A run's directory holds `model.json`, `model.safetensors` and `config.yaml`, which says what the
world is that it was trained on; from that come the frames that a dream begins with. Of Pinfall
there is a simulator beside the dream; of recorded films there is none.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models.worlds.video.actions import strides
from models.worlds.video.config import (
    DiamondConfig,
    DiffusionForcingConfig,
    Dreamer4Config,
    GenieConfig,
)
from models.worlds.video.diamond import Diamond
from models.worlds.video.diffusion_forcing import DiffusionForcing
from models.worlds.video.dreamer4 import Dreamer4
from models.worlds.video.genie import Genie
from models.worlds.video.world import WorldModel
from training.data.config_episodes import (
    AtariConfig,
    CsgoConfig,
    EpisodesConfig,
    Part,
    PlayedConfig,
    ProcgenConfig,
    VptConfig,
)
from training.data.config_worlds import PinfallConfig
from training.data.episodes import PlayedData
from training.data.pinfall import PinfallData
from training.envs.pinfall import ACTIONS, State, Stepped, see, step
from training.errors import UserError
from training.pretrained import fit, read_tensors, typed

KINDS = {
    "diamond": (DiamondConfig, Diamond),
    "diffusion_forcing": (DiffusionForcingConfig, DiffusionForcing),
    "dreamer4": (Dreamer4Config, Dreamer4),
    "genie": (GenieConfig, Genie),
}
"Model by name -> its configuration, and what is built from it."
WORLDS = {
    "pinfall": (PinfallConfig, "PinfallData"),
    "episodes": (EpisodesConfig, "EpisodesData"),
    "atari": (AtariConfig, "AtariData"),
    "procgen": (ProcgenConfig, "ProcgenData"),
    "csgo": (CsgoConfig, "CsgoData"),
    "vpt": (VptConfig, "VptData"),
}
"Data by name: its configuration, and the class in training/data/<name>.py."
NAMES = "left", "stay", "right"
"What the actions of Pinfall are called."
PROCGEN = ("leftdown", "left", "leftup", "down", "rest", "up", "rightdown", "right", "rightup",
           "d", "a", "w", "s", "q", "e")  # fmt: skip
"Those of Procgen (2020, arXiv:1912.01588): ways, then buttons."
BEGINNINGS = 64
"Moments of films that are held out, which dreams of a recorded world begin from."


def world_data(config: Any, *, seed: int, rank: int = 0, world: int = 1) -> Any:
    """Clips of the world that `config` describes. Raises DataError."""
    module = importlib.import_module(f"training.data.{config.name}")
    return getattr(module, WORLDS[config.name][1])(config, seed=seed, rank=rank, world=world)


class Choice(NamedTuple):
    """What a player may do: its name, and the action."""

    name: str
    action: int


def actions_of(config: PinfallConfig | PlayedConfig) -> int:
    """How many actions there are. Raises DataError."""
    if isinstance(config, AtariConfig):
        from training.data.atari import names_of

        return len(names_of(config))
    if isinstance(config, PinfallConfig):
        return ACTIONS
    if config.parts:
        return math.prod(part.values for part in config.parts)
    return config.actions  # type: ignore[attr-defined]


def choices_of(config: PinfallConfig | PlayedConfig) -> tuple[Choice, ...]:
    """What a player may do; of actions of several parts, one of these at a time."""
    if isinstance(config, PinfallConfig):
        names: Sequence[str] = NAMES
    elif isinstance(config, AtariConfig):
        from training.data.atari import names_of

        names = names_of(config)
    elif isinstance(config, ProcgenConfig):
        names = PROCGEN
    elif config.parts:
        return choices_of_parts(config.parts)
    else:
        names = [str(number) for number in range(actions_of(config))]
    return tuple(Choice(name, number) for number, name in enumerate(names))


def choices_of_parts(parts: Sequence[Part]) -> tuple[Choice, ...]:
    """Nothing; each key; of what has a middle, half way to either side."""
    each = strides([part.values for part in parts])
    rest = sum(part.rest * stride for part, stride in zip(parts, each, strict=True))
    found = [Choice("rest", rest)]
    for part, stride in zip(parts, each, strict=True):
        if part.values == 2:
            found.append(Choice(part.name, rest + stride))
            continue
        far = part.values // 4
        for sign, way in ((-1, "left" if part.name == "turn" else "up"),
                          (1, "right" if part.name == "turn" else "down")):  # fmt: skip
            found.append(Choice(f"{part.name} {way}", rest + sign * far * stride))
    return tuple(found)


class Start(NamedTuple):
    """Frames [1, c, 3, s, s] of the last moments, the actions between them, the state after."""

    frames: Tensor
    actions: Tensor
    state: State | None


@dataclass(frozen=True)
class OpenWorld:
    """A model, and how a dream of it begins."""

    model: WorldModel
    data: Any
    choices: tuple[Choice, ...]
    simulated: ClassVar[bool] = False

    @property
    def size(self) -> int:
        return self.data.config.image_size

    def start(self, number: int, device: torch.device) -> Start:
        """A beginning that was never trained on."""
        raise NotImplementedError


@dataclass(frozen=True)
class SimulatedWorld(OpenWorld):
    """One that has a simulator."""

    data: PinfallData
    simulated: ClassVar[bool] = True

    def start(self, number: int, device: torch.device) -> Start:
        clips = self.data.beginning(number, self.model.context)
        parts = {name: torch.from_numpy(x) for name, x in clips._asdict().items()}
        frames = see(parts, self.data.config.variant, self.size).float().to(device)
        return Start(frames, parts["actions"].to(device), clips.state(-1))

    def step(self, state: State, action: Tensor) -> Stepped:
        """What the simulator does."""
        return step(state, action, self.data.config.variant)

    def show(self, state: State) -> Tensor:
        """[n, 3, s, s] what the simulator would show."""
        return see(state._asdict(), self.data.config.variant, self.size).float()


@dataclass(frozen=True)
class RecordedWorld(OpenWorld):
    """One of which there are films."""

    data: PlayedData[Any]

    def start(self, number: int, device: torch.device) -> Start:
        every = self.data.windows(self.model.context, held=True)
        apart = max(len(every) // BEGINNINGS, 1)
        row = number * apart % len(every)
        begun = self.data.gather(every[row : row + 1], self.model.context)
        frames = torch.from_numpy(begun.frames).to(device).movedim(-1, -3).float() / 255
        return Start(frames, torch.from_numpy(begun.actions).to(device), None)


def open_model(directory: str | Path, device: torch.device | str = "cpu") -> Any:
    """The model that a run has left, without its world.

    Raises:
        UserError: a file is missing, damaged, or not what the configuration says.
    """
    directory = Path(directory)
    file = directory / "model.json"
    try:
        content = json.loads(file.read_text())
        name = content["name"]
        if name not in KINDS:
            raise ValueError(f"it is a {name}, not one of {', '.join(KINDS)}")
        kind, build = KINDS[name]
        config = typed(kind, content)
        with torch.device("meta"):
            model = build(config)
    except OSError:
        raise UserError(
            f"model={directory} holds no model.json: name the directory of a finished run of a "
            "video world model (runs/diamond/pinfall/...)"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} does not describe a video world model: {error}") from error
    weights = directory / "model.safetensors"
    fit(model, read_tensors(weights, device), weights)
    return model.requires_grad_(False).eval()


def open_world(directory: str | Path, device: torch.device | str = "cpu") -> OpenWorld:
    """What a run of a video world model has left, and the world that it dreams of.

    Raises:
        UserError: a file is missing, damaged, or not what the configuration says.
        DataError: recorded films are not where they were.
    """
    directory = Path(directory)
    model = open_model(directory, device)
    config, seed = world_of(directory / "config.yaml")
    drawn = model.config.image_size
    if config.image_size != drawn:
        raise UserError(
            f"{directory}: the model draws frames of {drawn}, config.yaml has "
            f"data.image_size={config.image_size}"
        )
    if isinstance(config, PinfallConfig):
        return SimulatedWorld(model, PinfallData(config, seed=0), choices_of(config))
    if (count := actions_of(config)) != model.config.actions:
        raise UserError(
            f"{directory}: the model knows {model.config.actions} actions, of data={config.name} "
            f"there are {count}"
        )
    return RecordedWorld(model, world_data(config, seed=seed), choices_of(config))


def world_of(file: Path) -> tuple[PinfallConfig | PlayedConfig, int]:
    """The data that a run was trained on, and its seed. Raises UserError."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        name = content["data"]["name"]
        if name not in WORLDS:
            raise ValueError(f"it is of data={name}, not of {', '.join(WORLDS)}")
        return typed(WORLDS[name][0], content["data"]), int(content["seed"])
    except OSError:
        raise UserError(f"{file} is missing: it says which world the model is of") from None
    except Exception as error:  # whatever YAML is wrong with
        summary = str(error).strip().splitlines()[0]
        raise UserError(f"{file} does not describe the world of a run: {summary}") from error
