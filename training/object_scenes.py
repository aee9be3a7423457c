"""The objects that a reconstructed table is made of, opened: Gaussians in frames of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from models.worlds.splats.config import GaussianSplattingConfig, MroGwmConfig
from models.worlds.splats.gaussians import activated
from models.worlds.splats.mro_gwm import MroGwm
from models.worlds.splats.objects import ObjectScene, divided
from training import formats
from training.data.config_scenes import PushTableConfig
from training.data.push_table import PushTableData
from training.envs.push_world import DT, NAMES, PUSHER, THINGS
from training.errors import UserError
from training.evaluation.scene_objects import owners
from training.formats.gaussians import Splats, splats_of_scene
from training.formats.gltf import Motion
from training.pretrained import fit, locate, read_tensors, typed


@dataclass(frozen=True)
class PushScene:
    """What PushWorld3D looks like: three things and, last, the pusher."""

    scene: ObjectScene
    background: tuple[float, float, float]
    antialiased: bool
    tile: int

    def at(self, poses: Float[Tensor, "m 7"], pusher: Float[Tensor, " 2"]) -> dict[str, Tensor]:
        """As `rasterize` takes it."""
        return self.scene.at(with_pusher(poses, pusher))


def with_pusher(
    poses: Float[Tensor, "*b m 7"], pusher: Float[Tensor, "*b 2"]
) -> Float[Tensor, "*b n 7"]:
    """Poses of things, and of the pusher."""
    rest = pusher.new_tensor([PUSHER, 1.0, 0.0, 0.0, 0.0]).expand(*pusher.shape[:-1], 5)
    return torch.cat([poses, torch.cat([pusher, rest], dim=-1)[..., None, :]], dim=-2)


def parts_of(scene: PushScene) -> dict[str, Splats]:
    """The table, and each object in its own frame, by name."""
    parts = scene.scene.background, *scene.scene.objects
    return {
        name: splats_of_scene({k: x.detach().cpu() for k, x in part.items()})
        for name, part in zip(("table", *NAMES), parts, strict=True)
    }


def write_push_scene(directory: Path, scene: PushScene) -> None:
    """A PLY of each part."""
    for name, splats in parts_of(scene).items():
        formats.write(directory / f"{name}.ply", splats)


def motion_of(scene: PushScene, poses: Float[np.ndarray, "t n 7"]) -> Motion:
    """What things do, of poses a step apart, the pusher's last; the table stays."""
    parts = parts_of(scene)
    stays = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0]), (len(poses), 1, 1))
    ways = np.concatenate([stays, poses], axis=1).swapaxes(0, 1)
    times = (DT * np.arange(len(poses))).astype(np.float32)
    return Motion(tuple(parts.values()), tuple(parts), times, ways)


def open_push_scene(run: str, device: torch.device | str, key: str = "recipe.scene") -> PushScene:
    """What a run of experiment=mro_gwm/table has left; each Gaussian belongs to what it covers
    most of in the images that it was trained on.

    Raises:
        UserError: a file is missing, damaged, or of something else.
    """
    directory = locate(run, key)
    try:
        content = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"), resolve=False)
        assert isinstance(content, dict)
        if content["data"]["name"] != "push_table":
            raise ValueError(f"it is of data={content['data']['name']}, not of push_table")
        data_config = typed(PushTableConfig, content["data"])
        seed = int(content["seed"])
        model = typed(GaussianSplattingConfig, json.loads((directory / "model.json").read_text()))
    except OSError as error:
        raise UserError(
            f"{key}={run}: {error.filename} is missing; name a finished run of "
            "experiment=mro_gwm/table"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}={run} is no reconstructed table: {error}") from error
    fields = read_tensors(directory / "model.safetensors", device)
    if missing := {"means", "quats", "scales", "opacities", "sh0", "shN"} - fields.keys():
        raise UserError(f"{key}={run}: its weights lack {', '.join(sorted(missing))}")
    scene = activated(fields)
    data = PushTableData(data_config, seed=seed)
    owner, _ = owners(scene, data.train, data.things, torch.device(device), model.tile)
    state = data.state
    poses, pusher = (
        torch.from_numpy(np.float32(x)).to(device) for x in (state.poses, state.pusher)
    )
    whole = divided(scene, owner, with_pusher(poses, pusher))
    if any(not len(x["means"]) for x in whole.objects):
        raise UserError(f"{key}={run}: a thing has no Gaussian of its own; train it longer")
    assert len(whole.objects) == THINGS + 1
    return PushScene(whole, data.background, model.antialiased, model.tile)


def open_push_model(run: Path, device: torch.device | str = "cpu") -> MroGwm:
    """The ensemble that a run has left. Raises UserError."""
    file = run / "model.json"
    try:
        config = typed(MroGwmConfig, json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} does not describe a model of pushing: {error}") from error
    with torch.device("meta"):
        model = MroGwm(config)
    weights = run / "model.safetensors"
    fit(model, read_tensors(weights, device), weights)
    return model.requires_grad_(False).eval()
