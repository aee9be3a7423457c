"""A scene from two views in one pass: `recipe=mvsplat`.

MVSplat (2024, arXiv:2403.14627): models/worlds/splats/mvsplat.py, learned as feed_forward.py says.
A run leaves the Gaussians of the first scene that is held out, its table level, but those that are
white as the background is, which would hide it from elsewhere, and as wide as its pixels show them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from kernels.splats.constants import BLUR
from kernels.splats.harmonics import of_color
from models.worlds.splats.config import MvSplatConfig
from models.worlds.splats.gaussians import Fields
from models.worlds.splats.mvsplat import MvSplat
from models.worlds.splats.rigid import moved
from training import formats
from training.data.config_scenes import RandomTablesConfig
from training.data.random_tables import CONTEXT, FURTHEST, NEAREST
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.formats.gaussians import splats_of_scene
from training.recipes.feed_forward import FeedForwardTraining, check_glimpses, estimate_glimpses
from training.schema import TrainConfig

FRAMEWORK = "torch"
WHITE = 0.95
"Of red, green and blue."


class MvSplatTraining(FeedForwardTraining):
    """Trains a `MvSplat`, and leaves a scene that it has seen."""

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        super().export(directory)
        held = self.data.heldout.some(np.array([0]))
        given = (held.images[:, :CONTEXT], held.viewmats[:, :CONTEXT], held.Ks[:, :CONTEXT])
        device = self.trainer.device
        with self.trainer.averaged_weights():
            scenes, _ = self.model.eval().scenes(*(torch.from_numpy(x).to(device) for x in given))
        scene = colored({name: x[0].cpu() for name, x in scenes.items()})
        scene = widened(scene, float(held.Ks[0, 0, 0, 0]))
        splats = splats_of_scene(moved(scene, level(torch.from_numpy(held.table[0]))))
        for ending in (".ply", ".spz"):
            formats.write(directory / f"scene{ending}", splats)


def colored(scene: Fields) -> Fields:
    """The Gaussians that are not nearly white."""
    there = (scene["sh"][:, 0] < of_color(WHITE)).any(-1)
    return {name: x[there] for name, x in scene.items()}


def widened(scene: Fields, focal: float) -> Fields:
    """With the variance in space that a pixel of the first camera adds on the image."""
    pixel = scene["means"][:, 2:] / focal
    return scene | {"scales": (scene["scales"] ** 2 + BLUR * pixel**2).sqrt()}


def level(plane: Float[Tensor, " 4"]) -> Float[Tensor, " 7"]:
    """Pose that a camera's frame has where its table is z = 0 and the camera looks at the origin.

    Args:
        plane: (a, b, c, d) of a x + b y + c z = d, in the camera.
    """
    up, distance = plane[:3], plane[3]
    right = F.normalize(torch.linalg.cross(plane.new_tensor([0.0, 0.0, 1.0]), up), dim=0)
    R = torch.stack([right, torch.linalg.cross(up, right), up])
    middle = plane.new_tensor([0.0, 0.0, 1.0]) * distance / up[2]
    quat = torch.from_numpy(Rotation.from_matrix(R.numpy()).as_quat(scalar_first=True)).to(R)
    return torch.cat([-R @ middle, quat])


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_glimpses(config, "mvsplat")
    model, data = config.model, config.data
    assert isinstance(model, MvSplatConfig) and isinstance(data, RandomTablesConfig)
    near, far = NEAREST / data.scale, FURTHEST * data.scale
    if model.near > near or model.far < far:
        raise UserError(
            f"model.near={model.near} and model.far={model.far} must hold all that is seen with "
            f"data.scale={data.scale}: from {near:.2f} to {far:.2f}"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> MvSplatTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    if processes.world > 1:
        raise UserError("scale.devices: recipe=mvsplat runs in one process, set it to 1")
    model = config.model
    assert isinstance(model, MvSplatConfig)
    flops = estimate(config).flops_per_step
    return MvSplatTraining(config, processes, device, lambda: MvSplat(model), flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, without the rasteriser. No data is read."""
    check(config)
    model = config.model
    assert isinstance(model, MvSplatConfig)

    def told(mvsplat: MvSplat, images: Tensor, viewmats: Tensor) -> Tensor:
        cameras = viewmats[:, :CONTEXT], viewmats[:, :CONTEXT, :3, :3]
        scenes, depth = mvsplat.scenes(images, *cameras)
        return depth.mean() + torch.stack([x.square().mean() for x in scenes.values()]).sum()

    return estimate_glimpses(config, lambda: MvSplat(model), told)
