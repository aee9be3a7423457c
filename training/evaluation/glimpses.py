"""What a model is worth that sees a scene once, of scenes that nobody trained on.

psnr, ssim      of the view that is asked for
floors          the nearest of the two that are given, their mean, and the nearest, turned as
                the camera is (a homography that knows no depth)
plane           the nearest, as if all it showed were on the table
elsewhere       if the model is asked by the camera of another scene

and of models that tell how far away is what the given views show, medians of |told - true| / true

depth           over pixels that see something, most of which is the table
depth_things    over those that see what stands on it
    .._flat     the median of all that a view sees; .._plane: the table's own
    .._other    told if the other view that is given is that of another scene
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.splats.rays import directions, points_at, sampled
from training.data.random_tables import CONTEXT, Glimpses
from training.evaluation.images import psnr, ssim
from training.evaluation.scene_figures import views_beside_truth
from training.evaluation.scenes import eyes, flat, off

AT_ONCE = 16
SHOWN = 5
THINGS = 0.01
"Of its distance, that what stands on the table is higher than it, at least."
TIMED = 10


@torch.no_grad()
def judge(
    model: Any, held: Glimpses, device: torch.device, final: bool
) -> tuple[dict[str, float], dict[str, Any], str]:
    """Metrics; and, at the end, floors, how long a scene takes, and a figure."""
    images, viewmats, Ks = (torch.from_numpy(x) for x in (held.images, held.viewmats, held.Ks))
    given, truth = images[:, :CONTEXT], images[:, CONTEXT]
    told = asked(model, given, viewmats, Ks, device)
    found = {"psnr": psnr(told, truth).mean().item(), "ssim": ssim(told, truth).mean().item()}
    if not final:
        return found, {}, ""
    other = torch.cat([viewmats[:, :CONTEXT], viewmats[:, CONTEXT:].roll(1, 0)], dim=1)
    guesses = {
        "floors/nearest": nearest(given, viewmats),
        "floors/mean": given.mean(1),
        "floors/turned": warped(given, viewmats, Ks, None),
        "plane": warped(given, viewmats, Ks, torch.from_numpy(held.table)),
        "elsewhere": asked(model, given, other, Ks, device),
    }
    found |= {name: psnr(x, truth).mean().item() for name, x in guesses.items()}
    found["floors/best"] = max(v for k, v in found.items() if k.startswith("floors/"))
    if hasattr(model, "scenes"):
        found |= judged_depths(model, held, device)
    shown = (x[:SHOWN].clamp(0, 1).numpy() for x in (truth, told, guesses["floors/nearest"]))
    known = {"latency": latency(model, given, viewmats, Ks, device)}
    return found, known, views_beside_truth(*shown, None)


def asked(
    model: Any, given: Tensor, viewmats: Tensor, Ks: Tensor, device: torch.device
) -> Float[Tensor, "n h w 3"]:
    """What a model shows, a few scenes at a time, on the CPU."""
    parts = zip(*(x.split(AT_ONCE) for x in (given, viewmats, Ks)), strict=True)
    return torch.cat([model(*(x.to(device) for x in part)).clamp(0, 1).cpu() for part in parts])


def judged_depths(model: Any, held: Glimpses, device: torch.device) -> dict[str, float]:
    """How wrong a model's depths are, and those of who knows less."""
    given, viewmats, Ks, true, plane = (
        torch.from_numpy(x)
        for x in (
            held.images[:, :CONTEXT], held.viewmats[:, :CONTEXT], held.Ks[:, :CONTEXT],
            held.depths[:, :CONTEXT], held.table,
        )
    )  # fmt: skip
    sees = true.isfinite()
    things = torch.where(sees & (above(plane, true, viewmats, Ks) > THINGS * true), true, math.inf)
    told = depths(model, given, viewmats, Ks, device)
    mixtures = []
    for i in range(CONTEXT):  # the view that tells stays, the other is another scene's
        mixed = given.roll(1, 0)
        mixed[:, i] = given[:, i]
        mixtures.append(depths(model, mixed, viewmats, Ks, device)[:, i])
    other = torch.stack(mixtures, dim=1)
    level = flat(true.flatten(0, 1)).unflatten(0, true.shape[:2])
    return {
        "depth": off(told, true),
        "depth_flat": off(level, true),
        "depth_things": off(told, things),
        "depth_things_flat": off(level, things),
        "depth_things_plane": off(on_plane(plane, viewmats, Ks, *true.shape[2:]), things),
        "depth_things_other": off(other, things),
    }


def above(
    plane: Float[Tensor, "n 4"], depth: Float[Tensor, "n c h w"], viewmats: Tensor, Ks: Tensor
) -> Float[Tensor, "n c h w"]:
    """How high over a plane is what pixels see."""
    points = points_at(torch.where(depth.isfinite(), depth, 1.0), viewmats, Ks)
    return (points * plane[:, None, None, None, :3]).sum(-1) - plane[:, None, None, None, 3]


def on_plane(
    plane: Float[Tensor, "n 4"], viewmats: Tensor, Ks: Tensor, height: int, width: int
) -> Float[Tensor, "n c h w"]:
    """How far away along z a plane is that pixels see."""
    one = torch.ones(*viewmats.shape[:2], height, width)
    near, far = (above(plane, k * one, viewmats, Ks) for k in (1.0, 2.0))
    falls = near - far  # per unit of depth: heights are linear along a ray
    return 1 + near / torch.where(falls.abs() < 1e-6, 1e-6, falls)


def depths(
    model: Any, given: Tensor, viewmats: Tensor, Ks: Tensor, device: torch.device
) -> Float[Tensor, "n 2 h w"]:
    """How far away a model says that pixels are."""
    cameras = viewmats[:, :CONTEXT], Ks[:, :CONTEXT]
    parts = zip(*(x.split(AT_ONCE) for x in (given, *cameras)), strict=True)
    return torch.cat([model.scenes(*(x.to(device) for x in part))[1].cpu() for part in parts])


def nearer(viewmats: Float[Tensor, "n 3 4 4"]) -> Tensor:
    """Which of the two that are given is nearer to the one that is asked for."""
    places = eyes(viewmats.flatten(0, 1)).unflatten(0, viewmats.shape[:2])
    return (places[:, :CONTEXT] - places[:, CONTEXT:]).norm(dim=-1).argmin(1)


def nearest(given: Tensor, viewmats: Tensor) -> Float[Tensor, "n h w 3"]:
    return given[torch.arange(len(given)), nearer(viewmats)]


def warped(
    given: Tensor, viewmats: Tensor, Ks: Tensor, plane: Float[Tensor, "n 4"] | None
) -> Float[Tensor, "n h w 3"]:
    """What the nearest view shows of where pixels of the one that is asked for look: infinitely far
    away, or on a plane; what it does not show is white."""
    rows, which = torch.arange(len(given)), nearer(viewmats)
    height, width = given.shape[2:4]
    target, lens = viewmats[:, CONTEXT], Ks[:, CONTEXT]
    if plane is None:
        d = torch.einsum("nji,nhwj->nhwi", target[:, :3, :3], directions(lens, height, width))
        far = eyes(viewmats[rows, which])[:, None, None] + 1e3 * d  # from where the other one is
    else:
        depth = on_plane(plane, target[:, None], lens[:, None], height, width)[:, 0]
        ahead = depth > 0
        far = points_at(torch.where(ahead, depth, 1.0), target, lens)
        far = torch.where(ahead[..., None], far, 1e6)
    image = given[rows, which].permute(0, 3, 1, 2)
    seen, there = sampled(image, far, viewmats[rows, which], Ks[rows, which])
    return (seen + (1 - there[:, None])).permute(0, 2, 3, 1)


def latency(
    model: Any, given: Tensor, viewmats: Tensor, Ks: Tensor, device: torch.device
) -> dict[str, float]:
    """Milliseconds of one scene alone."""
    one, taken = [x[:1].to(device) for x in (given, viewmats, Ks)], []
    for _ in range(TIMED + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        model(*one)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begun))
    p50, p95 = (float(np.percentile(taken[2:], p)) for p in (50, 95))
    return {"p50_ms": p50, "p95_ms": p95}
