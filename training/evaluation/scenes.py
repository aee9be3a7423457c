"""What a reconstructed scene is worth: views that nobody trained on, and how far things are.

    psnr, ssim      means over the held-out views; psnr_worst: the least
    depth           median over pixels of |told - true| / true, where something is
    pose            pixels between where cameras that were trained on see points of the scene, and
                    where they truly do; pose_said: as their places were said to be
    floors          the training view whose camera is nearest, the mean of all, the background; and
                    of depth, the best single number for each view: who only remembers images knows
                    no other

told of `data` that has depths and true cameras, as ray-traced scenes have.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.splats.gaussian_splatting import GaussianSplatting, exponential
from training.data.posed import PosedData
from training.evaluation.images import psnr, ssim
from training.evaluation.scene_agreement import agreement
from training.evaluation.scene_figures import views_beside_truth
from training.evaluation.scene_objects import removals
from training.evaluation.scene_renders import rendered

TIMED = 20  # renders of one view
SHOWN = 5  # views of the figure


def judge(
    model: GaussianSplatting, data: PosedData[Any], device: torch.device, final: bool, agree: bool
) -> tuple[dict[str, float], dict[str, Any], str]:
    """Metrics; and, at the end, how long a view takes, what is known of each, and a figure."""
    color, depth = rendered(model, model.scene(), data.heldout, data.background, device)
    truth = torch.from_numpy(data.heldout.images)
    each, alike = psnr(color, truth), ssim(color, truth)
    found = {
        "psnr": each.mean().item(),
        "psnr_worst": each.min().item(),
        "ssim": alike.mean().item(),
    }
    depths = None
    if data.heldout.depths is not None:
        true = torch.from_numpy(data.heldout.depths)
        found["depth"], found["depth_flat"] = off(depth, true), off(flat(true), true)
        depths = data.heldout.depths[:SHOWN], depth[:SHOWN].numpy()
    if data.train.true_viewmats is not None:
        found |= poses(model, data)
    if not final:
        return found, {}, ""
    close = torch.from_numpy(data.train.images[nearest(data)])
    found |= floors(data, close)
    if data.things:
        found |= removals(model, data, device)
    if agree:
        found |= agreement(model, data, device)
    shown = (x[:SHOWN].clamp(0, 1).numpy() for x in (truth, color, close))
    known = {"views": {"psnr": each.tolist(), "ssim": alike.tolist()}}
    known["latency"] = latency(model, data, device)
    return found, known, views_beside_truth(*shown, depths)


def off(told: Tensor, true: Tensor) -> float:
    """Median relative error of depth, where something is."""
    there = true.isfinite()
    return ((told - true).abs() / true)[there].median().item()


def flat(true: Tensor) -> Tensor:
    """The median depth of each view, everywhere."""
    middle = [view[view.isfinite()].median() for view in true]
    return torch.stack(middle)[:, None, None].expand_as(true)


@torch.no_grad()
def poses(model: GaussianSplatting, data: PosedData[Any]) -> dict[str, float]:
    """How wrong the cameras that are trained on are: as said, and as corrected."""
    train = data.train
    said = torch.from_numpy(train.viewmats).double()
    found = exponential(model.twists.cpu().double()) @ said if len(model.twists) else said
    assert train.true_viewmats is not None
    true, Ks = (torch.from_numpy(x).double() for x in (train.true_viewmats, train.Ks))
    low, high = torch.from_numpy(data.box).double()
    share = torch.linspace(0.2, 0.8, 4).double()
    points = low + (high - low) * torch.cartesian_prod(share, share, share)
    return {
        "pose": apart(seen_at(points, found, Ks), seen_at(points, true, Ks)),
        "pose_said": apart(seen_at(points, said, Ks), seen_at(points, true, Ks)),
    }


def seen_at(
    points: Float[Tensor, "p 3"], viewmats: Float[Tensor, "v 4 4"], Ks: Float[Tensor, "v 3 3"]
) -> Float[Tensor, "v p 2"]:
    """Pixels."""
    inside = torch.einsum("vij,pj->vpi", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]
    x, y, z = torch.einsum("vij,vpj->vpi", Ks, inside).unbind(-1)
    return torch.stack([x / z, y / z], dim=-1)


def apart(a: Tensor, b: Tensor) -> float:
    """Root mean square distance."""
    return (a - b).square().sum(-1).mean().sqrt().item()


def eyes(viewmats: Float[Tensor, "v 4 4"]) -> Float[Tensor, "v 3"]:
    """Where cameras are."""
    return -torch.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3])


def nearest(data: PosedData[Any]) -> np.ndarray:
    """For each held-out view the training view whose camera is nearest."""
    held, known = (eyes(torch.from_numpy(x.viewmats)) for x in (data.heldout, data.train))
    return torch.cdist(held, known).argmin(1).numpy()


def floors(data: PosedData[Any], close: Tensor) -> dict[str, float]:
    """What needs no model."""
    truth, train = (torch.from_numpy(x.images) for x in (data.heldout, data.train))
    guesses = {
        "nearest": close,
        "mean": train.mean(0).expand_as(truth),
        "background": torch.tensor(data.background).expand_as(truth),
    }
    return {f"floors/{name}": psnr(guess, truth).mean().item() for name, guess in guesses.items()}


@torch.no_grad()
def latency(
    model: GaussianSplatting,
    data: PosedData[Any],
    device: torch.device,
    moment: float | None = None,
) -> dict[str, float]:
    """Milliseconds of one view alone, and views in a second."""
    one, (_, height, width, _) = data.heldout, data.heldout.images.shape
    viewmat, K = (torch.from_numpy(x[:1]).to(device) for x in (one.viewmats, one.Ks))
    taken = []
    for _ in range(TIMED + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        model(viewmat, K, width, height, time=moment)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begun))
    p50, p95 = (float(np.percentile(taken[3:], p)) for p in (50, 95))
    return {"p50_ms": p50, "p95_ms": p95, "fps": 1e3 / p50}
