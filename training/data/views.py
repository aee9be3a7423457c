"""Views of an image: parts of it, turned and moved, in other light. Drawn in numpy, shown in torch.

A view is a few numbers (`Views`), which come with the batch; `show` makes images of them on the
device of the model, all at once.

    where    a square of `area` times the image's, turned, moved: one bilinear reading of the image
    light    brightness, contrast, saturation, hue, grey, blur, solarise, in this order
    what is lost   white noise, a square that is cut out

Sources: SimCLR, 2020, arXiv:2002.05709; BYOL, 2020, arXiv:2006.07733; DINO, 2021, arXiv:2104.14294.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from training.data.config_worlds import ViewsConfig

GREY = 0.299, 0.587, 0.114
BLUR = 0.1, 2.0  # standard deviation of a blur, in pixels of an image of 224
KERNEL = 9  # taps along each axis


class Views(NamedTuple):
    """What decides v views of each of n images; shares and angles of the whole image's extent."""

    where: Float32[np.ndarray, "n v 2 3"]  # affine, from the view's [-1, 1]^2 to the image's
    light: Float32[np.ndarray, "n v 7"]  # brightness, contrast, saturation, hue, grey, blur, solar
    hole: Float32[np.ndarray, "n v 3"]  # centre and half side, in the view's [-1, 1]^2
    noise: Float32[np.ndarray, "n v c s s"]  # c = 0 where there is none


def draw_views(
    config: ViewsConfig,
    rng: np.random.Generator,
    n: int,
    v: int,
    area: list[float],
    size: int,
    channels: int,
) -> Views:
    """v views of each of n images.

    Args:
        area: [least, largest] share of the image's area that a view shows.
        size: height and width of a view, in pixels.
    """
    shape = (n, v)
    side = np.sqrt(rng.uniform(*area, shape))
    aspect = np.exp(rng.uniform(-1, 1, shape) * np.log(config.aspect))
    width, height = side * np.sqrt(aspect), side / np.sqrt(aspect)
    angle = np.deg2rad(rng.uniform(-1, 1, shape) * config.rotate)
    mirror = np.where(rng.random(shape) < config.flip, -1.0, 1.0)
    # A part lies anywhere in the image; what is moved besides may leave it.
    room = [np.clip(1 - extent, 0, None) + 2 * config.shift for extent in (width, height)]
    x, y = (rng.uniform(-1, 1, shape) * extent for extent in room)
    cos, sin = np.cos(angle), np.sin(angle)
    rows = (mirror * width * cos, -height * sin, x), (mirror * width * sin, height * cos, y)
    where = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    jitter = rng.random(shape) < config.jitter_share
    change = rng.uniform(-1, 1, (*shape, 4)) * np.array(config.jitter) * jitter[..., None]
    grey, solar = (rng.random(shape) < share for share in (config.grey, config.solarise))
    blur = rng.uniform(*BLUR, shape) * (rng.random(shape) < config.blur)
    light = np.concatenate([change, np.stack([grey, blur, solar], axis=-1)], axis=-1)

    half = config.cutout * rng.uniform(0.5, 1.0, shape)
    hole = np.concatenate([rng.uniform(-1, 1, (*shape, 2)), half[..., None]], axis=-1)
    noise = np.zeros((*shape, 0, size, size), np.float32)
    if config.noise:
        noise = rng.standard_normal((*shape, channels, size, size), dtype=np.float32)
        noise *= (config.noise * rng.random(shape, dtype=np.float32))[..., None, None, None]
    return Views(*(x.astype(np.float32) for x in (where, light, hole)), noise)


def show(
    images: Float[Tensor, "n c h w"],
    where: Float[Tensor, "n v 2 3"],
    light: Float[Tensor, "n v 7"],
    hole: Float[Tensor, "n v 3"],
    noise: Float[Tensor, "n v k s s"],
) -> Float[Tensor, "n v c s s"]:
    """The views, in [0, 1] but for noise; black where they leave the image."""
    n, v, _, size, _ = noise.shape
    c = images.shape[1]
    flat = where.flatten(0, 1)  # [n v, 2, 3]
    grid = F.affine_grid(flat, [n * v, c, size, size], align_corners=False)
    # One reading of each image for all its views: they stand below each other in the grid.
    tall = grid.unflatten(0, (n, v)).flatten(1, 2)  # [n, v s, s, 2]
    seen = F.grid_sample(images, tall, mode="bilinear", align_corners=False)
    x = seen.unflatten(2, (v, size)).transpose(1, 2)  # [n, v, c, s, s]
    x = relight(x, light)
    axis = (torch.arange(size, device=x.device) + 0.5) / size * 2 - 1
    inside = (axis[None, None] - hole[..., :2, None]).abs() < hole[..., 2, None, None]  # [n,v,2,s]
    cut = inside[..., 1, :, None] & inside[..., 0, None, :]  # [n, v, s, s]
    x = x * ~cut[:, :, None]
    return x + noise if noise.shape[2] else x


def relight(
    x: Float[Tensor, "n v c s s"], light: Float[Tensor, "n v 7"]
) -> Float[Tensor, "n v c s s"]:
    """Brightness, contrast, saturation, hue, grey, blur, solarise."""
    if not light.any():
        return x
    bright, contrast, saturation, hue, grey, blur, solar = (
        part[..., None, None, None] for part in light.unbind(-1)
    )
    x = (x * (1 + bright)).clamp(0, 1)
    middle = luma(x).mean(dim=(-1, -2), keepdim=True)
    x = (middle + (x - middle) * (1 + contrast)).clamp(0, 1)
    if x.shape[2] == 3:
        plain = luma(x)
        x = (plain + (x - plain) * (1 + saturation) * (1 - grey)).clamp(0, 1)
        x = turn_hue(x, hue)
    if blur.any():
        x = blurred(x, blur * x.shape[-1] / 224)
    return torch.where((solar > 0) & (x >= 0.5), 1 - x, x)


def luma(x: Float[Tensor, "n v c s s"]) -> Float[Tensor, "n v 1 s s"]:
    if x.shape[2] != 3:
        return x.mean(dim=2, keepdim=True)
    weights = torch.tensor(GREY, device=x.device, dtype=x.dtype)
    return torch.einsum("n v c h w, c -> n v h w", x, weights)[:, :, None]


def turn_hue(
    x: Float[Tensor, "n v 3 s s"], turns: Float[Tensor, "n v 1 1 1"]
) -> Float[Tensor, "n v 3 s s"]:
    """Turn colours about the grey axis, by a share of a whole turn (Rodrigues' formula)."""
    cos, sin = torch.cos(2 * torch.pi * turns), torch.sin(2 * torch.pi * turns)
    middle = x.mean(dim=2, keepdim=True)
    across = (x.roll(1, dims=2) - x.roll(-1, dims=2)) / 3**0.5  # the grey axis times x
    return (middle + (x - middle) * cos + across * sin).clamp(0, 1)


def blurred(
    x: Float[Tensor, "n v c s s"], sigma: Float[Tensor, "n v 1 1 1"]
) -> Float[Tensor, "n v c s s"]:
    """A Gaussian blur of its own width for each view."""
    n, v, c, s, _ = x.shape
    taps = torch.arange(KERNEL, device=x.device) - KERNEL // 2
    weight = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[..., 0]).square())  # [n, v, 1, taps]
    weight = (weight / weight.sum(-1, keepdim=True)).expand(n, v, c, KERNEL).flatten(0, 2)
    flat = x.flatten(0, 2)[None]  # [1, n v c, s, s]
    for shape in ((1, KERNEL), (KERNEL, 1)):
        pad = [shape[1] // 2] * 2 + [shape[0] // 2] * 2
        around = F.pad(flat, pad, mode="replicate")
        flat = F.conv2d(around, weight.view(-1, 1, *shape), groups=len(weight))
    return flat.view(n, v, c, s, s)
