"""A world model that a run has left, opened: to be played, or to be learned in.

A run's directory holds `model.json`, `model.safetensors` and `config.yaml`, which says what the
world is that it was trained on; from that come the frames that a dream begins with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

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
from training.data.config_worlds import PinfallConfig
from training.data.pinfall import PinfallData
from training.envs.pinfall import State, Stepped, see, step
from training.errors import UserError
from training.pretrained import fit, read_tensors, typed

KINDS = {
    "diamond": (DiamondConfig, Diamond),
    "diffusion_forcing": (DiffusionForcingConfig, DiffusionForcing),
    "dreamer4": (Dreamer4Config, Dreamer4),
    "genie": (GenieConfig, Genie),
}
"Model by name -> its configuration, and what is built from it."
NAMES = "left", "stay", "right"
"What the actions of Pinfall are called."


class Start(NamedTuple):
    """Frames [1, c, 3, s, s] of the last moments, the actions between them, the state after."""

    frames: Tensor
    actions: Tensor
    state: State


@dataclass(frozen=True)
class OpenWorld:
    """A model, and the world that it dreams of."""

    model: WorldModel
    data: PinfallData
    actions: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.data.config.image_size

    def start(self, number: int, device: torch.device) -> Start:
        """A beginning that was never trained on."""
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


def open_world(directory: str | Path, device: torch.device | str = "cpu") -> OpenWorld:
    """What a run of a video world model has left.

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
    data = PinfallData(world_of(directory / "config.yaml"), seed=0)
    if data.config.image_size != config.image_size:
        raise UserError(
            f"{directory}: the model draws frames of {config.image_size}, config.yaml has "
            f"data.image_size={data.config.image_size}"
        )
    return OpenWorld(model.requires_grad_(False).eval(), data, NAMES)


def world_of(file: Path) -> PinfallConfig:
    """The data that a run was trained on. Raises UserError."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if content["data"]["name"] != "pinfall":
            raise ValueError(f"it is of data={content['data']['name']}, which has no simulator")
        return typed(PinfallConfig, content["data"])
    except OSError:
        raise UserError(f"{file} is missing: it says which world the model is of") from None
    except Exception as error:  # whatever YAML is wrong with
        summary = str(error).strip().splitlines()[0]
        raise UserError(f"{file} does not describe the world of a run: {summary}") from error
