"""What a reconstructed scene is worth: views that nobody trained on, and how far things are.

    psnr, ssim      means over the held-out views; psnr_worst: the least
    depth           median over pixels of |told - true| / true, where something is
    floors          the training view whose camera is nearest, the mean of all, the background; and
                    of depth, the best single number for each view: who only remembers images knows
                    no other

told of `data` that has depths, as ray-traced scenes have.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.worlds.splats.gaussian_splatting import GaussianSplatting
from training.data.posed import Posed, PosedData
from training.evaluation.images import psnr, ssim

AT_ONCE = 4  # views
TIMED = 20  # renders of one view


def judge(
    model: GaussianSplatting, data: PosedData[Any], device: torch.device, final: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics; and, at the end, how long a view takes and what is known of each."""
    color, depth = rendered(model, data.heldout, data.background, device)
    truth = torch.from_numpy(data.heldout.images)
    each, alike = psnr(color, truth), ssim(color, truth)
    found = {
        "psnr": each.mean().item(),
        "psnr_worst": each.min().item(),
        "ssim": alike.mean().item(),
    }
    if data.heldout.depths is not None:
        true = torch.from_numpy(data.heldout.depths)
        found["depth"] = off(depth, true)
        found["depth_flat"] = off(flat(true), true)
    if not final:
        return found, {}
    found |= floors(data)
    return found, {"views": {"psnr": each.tolist(), "ssim": alike.tolist()}} | {
        "latency": latency(model, data, device)
    }


@torch.no_grad()
def rendered(
    model: GaussianSplatting, posed: Posed, background: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Colours [v h w 3] in [0, 1] and depths [v h w] of views, on the CPU."""
    _, height, width, _ = posed.images.shape
    light = torch.tensor(background, device=device)
    colors, depths = [], []
    for first in range(0, len(posed.names), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        viewmats, Ks = (torch.from_numpy(x[some]).to(device) for x in (posed.viewmats, posed.Ks))
        seen = model(viewmats, Ks, width, height, background=light)
        colors.append(seen.color.clamp(0, 1).cpu())
        depths.append(seen.depth.cpu())
    return torch.cat(colors), torch.cat(depths)


def off(told: Tensor, true: Tensor) -> float:
    """Median relative error of depth, where something is."""
    there = true.isfinite()
    return ((told - true).abs() / true)[there].median().item()


def flat(true: Tensor) -> Tensor:
    """The median depth of each view, everywhere."""
    middle = [view[view.isfinite()].median() for view in true]
    return torch.stack(middle)[:, None, None].expand_as(true)


def floors(data: PosedData[Any]) -> dict[str, float]:
    """What needs no model."""
    truth, train = (torch.from_numpy(x.images) for x in (data.heldout, data.train))
    nearest = np.linalg.norm(
        (data.heldout.viewmats[:, None] - data.train.viewmats)[:, :, :3].reshape(
            len(truth), len(train), -1
        ), axis=-1,
    ).argmin(1)  # fmt: skip
    guesses = {
        "nearest": train[torch.from_numpy(nearest)],
        "mean": train.mean(0).expand_as(truth),
        "background": torch.tensor(data.background).expand_as(truth),
    }
    return {f"floors/{name}": psnr(guess, truth).mean().item() for name, guess in guesses.items()}


@torch.no_grad()
def latency(
    model: GaussianSplatting, data: PosedData[Any], device: torch.device
) -> dict[str, float]:
    """Milliseconds of one view alone, and views in a second."""
    one, (_, height, width, _) = data.heldout, data.heldout.images.shape
    viewmat, K = (torch.from_numpy(x[:1]).to(device) for x in (one.viewmats, one.Ks))
    taken = []
    for _ in range(TIMED + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        model(viewmat, K, width, height)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begun))
    p50, p95 = (float(np.percentile(taken[3:], p)) for p in (50, 95))
    return {"p50_ms": p50, "p95_ms": p95, "fps": 1e3 / p50}
