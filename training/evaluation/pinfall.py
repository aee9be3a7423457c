"""What a frame of Pinfall says of its state, and how far a dream of it is from the truth.

Balls are the only thing in colour, so that the largest channel of a pixel less the smallest is how
much of it is ball; what is white in the paddle's rows is paddle. Centres are means over what is
above `FAINT`. Read off true frames, they are within 0.1 pixels of the state.

Everything is in units of a frame of 32 x 32. Dimensions: n clips, t frames, h of
them ahead, k balls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from training.envs.pinfall import HUES, PLATE, PLATE_HEIGHT, SIZE

FAINT = 0.15  # of what a pixel may hold, and not be counted
WIDEST = 5.0  # pixels from where a ball is thickest, that may still be of it
STILL = 0.2  # pixels per frame: slower is not said to have turned
ALIVE = 0.5, 1.5  # of its area before, of a ball that is still there


class Parsed(NamedTuple):
    """Where balls and paddle are, and how large a ball is."""

    ball: Float[Tensor, "n t k 2"]
    area: Float[Tensor, "n t k"]
    plate: Float[Tensor, "n t"]


def parse(frames: Float[Tensor, "n t 3 s s"], hue: Int64[Tensor, "n k"]) -> Parsed:
    """Read frames in [0, 1]. One ball is looked for in any hue, several each in its own."""
    size = frames.shape[-1]
    unit = SIZE / size
    axis = (torch.arange(size, device=frames.device) + 0.5) * unit
    white, most = frames.amin(2), frames.amax(2)
    colour = (most - white)[:, :, None]  # [n, t, 1, s, s]
    if hue.shape[1] > 1:
        pure = (frames - white[:, :, None]) / colour.clamp(min=1e-6)
        away = (pure[:, :, None] - HUES.to(frames)[:, :, None, None]).square().sum(3)
        colour = colour * (away.argmin(2)[:, :, None] == hue[:, None, :, None, None])
        colour = colour * around_thickest(colour, unit)
    ink = (colour - FAINT).clamp(min=0)
    whole = ink.sum((-2, -1)).clamp(min=1e-6)
    x, y = ((ink.sum(i) * axis).sum(-1) / whole for i in (-2, -1))
    rows = (axis > PLATE) & (axis < PLATE + PLATE_HEIGHT)
    bar = (white[:, :, rows] - FAINT).clamp(min=0).sum(2)
    plate = (bar * axis).sum(-1) / bar.sum(-1).clamp(min=1e-6)
    area = (colour * (colour > FAINT)).sum((-2, -1)) * unit**2
    return Parsed(torch.stack([x, y], dim=-1), area, plate)


def around_thickest(colour: Float[Tensor, "n t k s s"], unit: float) -> Bool[Tensor, "n t k s s"]:
    """What is near the place where most of a hue is.

    Where two balls touch, their hues mix, now and then to that of a third which is elsewhere.
    """
    size = colour.shape[-1]
    reach = int(2.5 / unit)  # a ball is no wider than such a window by much: one place is best
    thick = avg_pool2d(colour.flatten(0, 1), 2 * reach + 1, stride=1, padding=reach)
    most = thick.flatten(2).argmax(-1).unflatten(0, colour.shape[:2])
    at = torch.stack([most // size, most % size], dim=-1)[..., None, None]  # [n, t, k, 2, 1, 1]
    axis = torch.arange(size, device=colour.device)
    off = (axis[:, None] - at[..., 0, :, :]).square() + (axis - at[..., 1, :, :]).square()
    return off * unit**2 <= WIDEST**2


def turned(v: Float[Tensor, "n t k 2"], gravity: float = 0.0) -> Bool[Tensor, "n t-1 k"]:
    """Whether a ball met something between a frame and the next, from exact velocities.

    Args:
        gravity: what a frame adds to how fast it falls.
    """
    falls = torch.tensor([0.0, gravity], device=v.device)
    return ((v.diff(dim=1) - falls).abs() > 1e-4).any(-1)


def first_turn(x: Float[Tensor, "n t 2"]) -> Float[Tensor, " n"]:
    """When one that goes straight on first turns, in frames and parts of them; infinity for never.

    Between the frames before and after it, both of its straight lines are known; where they meet is
    the time.
    """
    v = x.diff(dim=1)
    before, during, after = v[:, :-2], v[:, 1:-1], v[:, 2:]
    turns = (before * after < 0) & (torch.minimum(before.abs(), after.abs()) > STILL)
    share = ((during - after) / torch.where(turns, before - after, 1.0)).clamp(0, 1)
    time = torch.arange(1, v.shape[1] - 1, device=x.device)[:, None] + share
    return torch.where(turns, time, torch.inf).amin((1, 2))


def psnr(
    told: Float[Tensor, "n h 3 s s"], truth: Float[Tensor, "n h 3 s s"]
) -> Float[Tensor, " h"]:
    """Decibels, of each frame, then their mean over clips."""
    error = (told - truth).square().mean((2, 3, 4)).clamp(min=1e-10)
    return (-10 * error.log10()).mean(0)


def foreground_psnr(
    told: Float[Tensor, "n h 3 s s"], truth: Float[Tensor, "n h 3 s s"]
) -> Float[Tensor, " h"]:
    """The same over the pixels alone in which either shows something."""
    seen = (torch.maximum(told.amax(2), truth.amax(2)) > FAINT).unsqueeze(2)
    error = ((told - truth).square() * seen).sum((2, 3, 4)) / (3 * seen.sum((2, 3, 4))).clamp(min=1)
    return (-10 * error.clamp(min=1e-10).log10()).mean(0)


def ssim(
    told: Float[Tensor, "n h 3 s s"], truth: Float[Tensor, "n h 3 s s"]
) -> Float[Tensor, " h"]:
    """Structural similarity (Wang et al., 2004): a Gaussian window of 11 pixels, 1.5 wide, of which
    none reaches over the border; mean over places, channels and clips. In float64: variances are
    differences of much larger numbers, and a GPU may round those of float32."""
    given, told, truth = told.dtype, told.double(), truth.double()
    axis = torch.arange(11, device=told.device, dtype=told.dtype) - 5
    window = (-axis.square() / (2 * 1.5**2)).exp()
    window = (window[:, None] * window / window.sum() ** 2)[None, None]

    def blur(x: Tensor) -> Tensor:
        return conv2d(x.flatten(0, 2)[:, None], window)

    x, y = blur(told), blur(truth)
    xx, yy, xy = blur(told**2) - x**2, blur(truth**2) - y**2, blur(told * truth) - x * y
    one, two = 0.01**2, 0.03**2
    each = (2 * x * y + one) * (2 * xy + two) / ((x**2 + y**2 + one) * (xx + yy + two))
    return each.flatten(1).mean(1).unflatten(0, told.shape[:3]).mean((0, 2)).to(given)
