"""What a scene that moves is worth: cameras and times nobody trained on, and where things went.

    psnr, ssim      means over the held-out views
    moving          PSNR where pixels are not the same at all times; moving/cameras in views of
                    cameras that are held out, moving/times in those of times that are
    floors          over the same pixels: the training view that is nearest in place and time, the
                    scene as it was at the nearest time that was trained on, the background
    tracking        over Gaussians that make up things at the first time, and all times: the median
                    distance from where the point of the thing that they were at truly is, as a
                    share of the scene's width; still: if they had stayed; kept: the share that make
                    up the same thing at times that are trained on

the last two of data that know it, as ray-traced scenes do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.splats.dynamic_gaussians import DynamicGaussians
from training.data.posed import Posed
from training.data.timed import TimedData
from training.evaluation.images import psnr, ssim
from training.evaluation.scene_figures import film_beside_truth, paths_beside_truth
from training.evaluation.scene_objects import owners
from training.evaluation.scene_renders import rendered
from training.evaluation.scenes import eyes, latency

COVERED = 1.0
"Pixels that a Gaussian must cover, in all views of the first time, to be followed."
SHOWN = 6  # times of the film


def judge(
    model: DynamicGaussians, data: TimedData[Any], device: torch.device, final: bool
) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """Metrics; and, at the end, how long a view takes, and figures by name."""
    held, times = data.heldout, data.times(data.heldout.times)
    told, truth = at_times(model, held, times, data, device), torch.from_numpy(held.images)
    found = {"psnr": psnr(told, truth).mean().item(), "ssim": ssim(told, truth).mean().item()}
    found |= where_it_moves("moving", told, data)
    if not final:
        return found, {}, {}
    close = torch.from_numpy(data.train.images[nearest(data)])
    moments = data.moments
    frozen = moments[np.abs(times[:, None] - moments).argmin(1)]
    guesses = {
        "nearest": close,
        "frozen": at_times(model, held, frozen, data, device),
        "background": torch.tensor(data.background).expand_as(truth),
    }
    for name, guess in guesses.items():
        found |= where_it_moves(f"floors/{name}", guess, data)
        found[f"floors/{name}/psnr"] = psnr(guess, truth).mean().item()
    figures = {}
    if data.things:
        tracks, figures["paths"] = tracking(model, data, device)
        found |= tracks
    film = np.flatnonzero((held.viewmats == held.viewmats[-1]).all((1, 2)))  # the last camera's
    film = film[np.linspace(0, len(film) - 1, min(SHOWN, len(film))).round().astype(int)]
    shown = (x[film].clamp(0, 1).numpy() for x in (truth, told, close))
    figures["film"] = film_beside_truth(times[film], *shown)
    return found, {"latency": latency(model, data, device, float(times[0]))}, figures


@torch.no_grad()
def at_times(
    model: DynamicGaussians, posed: Posed, times: np.ndarray, data: TimedData[Any],
    device: torch.device,
) -> Float[Tensor, "v h w 3"]:  # fmt: skip
    """What views show if they are of these times."""
    images = torch.empty(posed.images.shape)
    for time in np.unique(times):
        rows = np.flatnonzero(times == time)
        scene = model.scene(float(time))
        images[rows] = rendered(model, scene, posed.some(rows), data.background, device)[0]
    return images


def where_it_moves(name: str, told: Tensor, data: TimedData[Any]) -> dict[str, float]:
    """Mean PSNR of held-out views over the pixels that change, of cameras and of times that are
    held out and of both. None of these of views that do not tell which do."""
    held = data.heldout
    if held.changing is None:
        return {}
    pixels, truth = torch.from_numpy(held.changing), torch.from_numpy(held.images)
    error = (told.double() - truth.double()).square().mean(-1)
    each = (error * pixels).sum((1, 2)) / pixels.sum((1, 2)).clamp_min(1)
    decibels = -10 * each.clamp_min(1e-10).log10()
    known = torch.from_numpy(np.isin(data.times(held.times), data.moments))
    there = pixels.any(2).any(1)
    parts = {"": there, "/cameras": there & known, "/times": there & ~known}
    return {
        f"{name}{part}": decibels[rows].mean().item() for part, rows in parts.items() if rows.any()
    }


def nearest(data: TimedData[Any]) -> np.ndarray:
    """For each held-out view the training view that is nearest, in place and time: as far as
    cameras are from their middle counts as much as from the first time to the last."""
    held, known = (eyes(torch.from_numpy(x.viewmats)) for x in (data.heldout, data.train))
    apart = torch.cdist(held, known).numpy() / data.extent
    times = (data.times(x.times) for x in (data.heldout, data.train))
    return (apart + np.abs(np.subtract.outer(*times))).argmin(1)


def tracking(
    model: DynamicGaussians, data: TimedData[Any], device: torch.device
) -> tuple[dict[str, float], str]:
    """How well Gaussians follow the things that they make up, and a figure of it."""
    moments = data.moments
    owner, covered = owned(model, data, float(moments[0]), device)
    followed = (owner > 0) & (covered >= COVERED)
    if not followed.any():
        return {"tracking/followed": 0.0}, ""
    every = np.unique(np.concatenate([data.times(x.times) for x in (data.train, data.heldout)]))
    with torch.no_grad():
        paths = torch.stack([model.scene(float(time))["means"][followed] for time in every])
    ids, told = owner[followed].cpu().numpy(), paths.cpu().numpy()
    true = np.empty_like(told)
    for id in np.unique(ids):
        for t, time in enumerate(every):
            true[t, ids == id] = data.carried(told[0, ids == id], int(id), float(time))
    width = float((data.box[1] - data.box[0]).max())
    off, stayed = (np.linalg.norm(x - true, axis=-1)[1:] / width for x in (told, told[:1]))
    same, counted = 0, 0
    for time in moments[1:]:
        now, seen = (x[followed] for x in owned(model, data, float(time), device))
        counted += int((seen >= COVERED).sum())
        same += int(((now == owner[followed]) & (seen >= COVERED)).sum())
    found = {
        "tracking/error": float(np.median(off)), "tracking/last": float(np.median(off[-1])),
        "tracking/still": float(np.median(stayed)), "tracking/kept": same / max(1, counted),
        "tracking/followed": float(followed.sum()),
    }  # fmt: skip
    return found, paths_beside_truth(told, true, ids)


def owned(
    model: DynamicGaussians, data: TimedData[Any], time: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`owners` at a time that is trained on."""
    views = data.train.some(data.times(data.train.times) == np.float32(time))
    with torch.no_grad():
        scene = model.scene(time)
    return owners(scene, views, data.things, device, model.config.tile)
