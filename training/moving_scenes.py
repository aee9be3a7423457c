"""A scene that moves, as a run has left it: what Gaussians there are at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from models.worlds.splats.config import DynamicGaussiansConfig
from models.worlds.splats.dynamic_gaussians import DynamicGaussians
from models.worlds.splats.gaussians import Edit
from training.errors import UserError
from training.formats.gaussians import Splats, splats_of_scene
from training.pretrained import read_tensors, typed

MOTION = "motion."
"What the names of what is not of one Gaussian begin with."


def open_moving(run: Path) -> Callable[[float], Splats] | None:
    """From a time, 0 to 1, to Gaussians; None if the run is of something else.

    Raises:
        UserError: a file is missing, damaged, or not what the configuration says.
    """
    file = run / "model.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("name") != "dynamic_gaussians":
        return None
    try:
        config = typed(DynamicGaussiansConfig, content)
    except ValueError as error:
        raise UserError(f"{file} does not describe a scene that moves: {error}") from error
    weights = run / "model.safetensors"
    tensors = read_tensors(weights, "cpu")
    motion = {k.removeprefix(MOTION): x for k, x in tensors.items() if k.startswith(MOTION)}
    fields = {k: x for k, x in tensors.items() if not k.startswith(MOTION)}
    model = DynamicGaussians(config, box=motion.get("box"), times=motion.get("times"))
    try:
        if fields.keys() != (own := dict(model.gaussians.named_parameters())).keys():
            raise ValueError(f"it holds {', '.join(sorted(fields))}, not {', '.join(sorted(own))}")
        model.motion.load_state_dict(motion)
        model.gaussians.apply_edit(Edit(torch.zeros(0, dtype=torch.long), fields))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{weights} does not fit its model.json: {error}") from error
    model.requires_grad_(False)

    def at(time: float) -> Splats:
        return splats_of_scene(model.scene(time))

    return at
