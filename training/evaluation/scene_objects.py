"""Which thing each Gaussian belongs to, and what is left when a thing is taken away.

A Gaussian belongs to the thing that it covers most of, over the views whose ids are known. How much
it covers of each is the gradient of a render whose features are how much of each thing it is: that
of a feature is the sum over pixels of its weight times what the pixel asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import max_pool2d, one_hot

from kernels.splats.op import rasterize
from models.worlds.splats.gaussian_splatting import GaussianSplatting
from models.worlds.splats.gaussians import Fields
from training.data.posed import Posed, PosedData
from training.evaluation.scene_renders import AT_ONCE, rendered


@torch.enable_grad()
def owners(
    scene: Fields, posed: Posed, things: int, device: torch.device, tile: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Id of the thing that each Gaussian covers most of: -1 is the background, 0 what things stand
    on; of what covers nothing: -1. And of how many pixels, in all views together.

    Args:
        scene: as `rasterize` takes it.
    """
    assert posed.ids is not None
    scene = {name: x.detach() for name, x in scene.items() if name != "sh"}
    parts = torch.zeros(len(scene["means"]), things + 2, device=device, requires_grad=True)
    _, height, width = posed.ids.shape
    for first in range(0, len(posed.names), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        viewmats, Ks, ids = (
            torch.from_numpy(x[some]).to(device) for x in (posed.viewmats, posed.Ks, posed.ids)
        )
        seen = rasterize(
            **scene, viewmats=viewmats, Ks=Ks, width=width, height=height, colors=parts, tile=tile
        )
        asked = one_hot(ids.long() + 1, things + 2).to(seen.color)
        (seen.color * asked).sum().backward()
    assert parts.grad is not None
    most = parts.grad.max(-1)
    return most.indices - 1, most.values


@torch.no_grad()
def removals(
    model: GaussianSplatting, data: PosedData[Any], device: torch.device
) -> dict[str, float]:
    """Each thing is taken away, and held-out views are compared with the truth without it.

    depth       median relative error of how far away is what now shows where the thing was (its
                shadow stays, so that colours do not tell); depth_kept: if it stays
    elsewhere   mean change of colour more than two pixels away from it; there: where it was
    """
    scene, things = model.scene(), data.things
    owner, _ = owners(scene, data.train, things, device, model.config.tile)
    before, far_before = rendered(model, scene, data.heldout, data.background, device)
    told: dict[str, list[Tensor]] = {"depth": [], "depth_kept": [], "elsewhere": [], "there": []}
    assert data.heldout.ids is not None
    for thing in range(1, things + 1):
        there = torch.from_numpy(data.heldout.ids == thing)
        truth = torch.from_numpy(data.without(thing).depths)
        left = {k: x[owner != thing] for k, x in scene.items()}
        color, far = rendered(model, left, data.heldout, data.background, device)
        seen = there & truth.isfinite()  # past the table's edge there is nothing behind
        told["depth"].append(((far - truth).abs() / truth)[seen])
        told["depth_kept"].append(((far_before - truth).abs() / truth)[seen])
        near = max_pool2d(there[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0
        told["elsewhere"].append((color - before).abs()[~near].flatten())
        told["there"].append((color - before).abs()[there].flatten())
    found = {name: torch.cat(parts) for name, parts in told.items()}
    return {
        f"removed/{name}": (x.median() if name.startswith("depth") else x.mean()).item()
        for name, x in found.items()
    }
