"""A scene from two views in one pass: a Gaussian for every pixel, as far away as a sweep says.

MVSplat: Efficient 3D Gaussian Splatting from Sparse Multi-View Images (2024, arXiv:2403.14627). Of
each view i that is given, with features f_i of a small network and planes at depths d_1 .. d_k:

    c_i(p, k) = f_i(p) . f_j(where the other view j sees p if it is d_k away) / sqrt(width)
    depth     = sum_k softmax_k(c_i refined)(p) d_k
    Gaussian  = at that depth on p's ray, with opacity, scale, rotation and colour of a head

and the view that is asked for is `rasterize`'s. What differs: features are those of one view, with
no attention to the other; one scale; rotations are told in the frame of the first camera; colours
are p's and what a head adds to them, and do not depend on the direction; no perceptual loss.

Dimensions: b scenes, v = 2 views that are given, c channels, k planes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kernels.splats.harmonics import of_color
from kernels.splats.op import rasterize
from models.worlds.splats.config import MvSplatConfig
from models.worlds.splats.gaussians import Fields
from models.worlds.splats.rays import points_at, sampled

SMALLEST, LARGEST = 0.05, 1.5
"Pixels of a Gaussian's standard deviation, where its pixel's depth is."


class Residual(nn.Module):
    """Two convolutions, and what they were given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in "ab")
        self.norm = nn.GroupNorm(min(8, width), width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.silu(self.one(F.silu(self.norm(x)))))


class MvSplat(nn.Module):
    """From two views to Gaussians, and from these to any view."""

    def __init__(self, config: MvSplatConfig) -> None:
        super().__init__()
        self.config = config
        width, k = config.width, config.depths
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2), *(Residual(width) for _ in range(config.blocks))
        )
        self.refine = nn.Sequential(
            nn.Conv2d(width + k, width, 3, padding=1),
            *(Residual(width) for _ in range(config.blocks)),
        )
        self.sweep = nn.Conv2d(width, k, 1)
        self.head = nn.Conv2d(width + 3, 1 + 3 + 4 + 3, 1)
        nearest, furthest = 1 / config.near, 1 / config.far
        self.register_buffer("planes", 1 / torch.linspace(nearest, furthest, k), persistent=False)

    planes: Float[Tensor, " k"]

    def initialise(self, generator: torch.Generator) -> None:
        """Convolutions by their fan-in, heads small."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.ones_(p) if "norm" in name and "weight" in name else nn.init.zeros_(p)
            else:
                std = p[0].numel() ** -0.5
                small = 0.1 if name.startswith(("sweep", "head")) or "two" in name else 1.0
                nn.init.normal_(p, std=small * std, generator=generator)
        k = self.config.depths
        self.planes.copy_(1 / torch.linspace(1 / self.config.near, 1 / self.config.far, k))

    def forward(
        self,
        images: Float[Tensor, "b 2 h w 3"],
        viewmats: Float[Tensor, "b n 4 4"],
        Ks: Float[Tensor, "b n 3 3"],
    ) -> Float[Tensor, "b h w 3"]:
        """What the last camera sees, over white."""
        scenes, _ = self.scenes(images, viewmats[:, :2], Ks[:, :2])
        height, width = images.shape[2:4]
        light = images.new_ones(3)
        seen = []
        for i in range(len(images)):
            one = {name: x[i] for name, x in scenes.items()}
            with torch.autocast(images.device.type, enabled=False):
                rendered = rasterize(
                    one["means"], one["quats"], one["scales"], one["opacities"], viewmats[i, -1:],
                    Ks[i, -1:], width, height, sh=one["sh"], background=light,
                    tile=self.config.tile,
                )  # fmt: skip
            seen.append(rendered.color)
        return torch.cat(seen)

    def scenes(
        self,
        images: Float[Tensor, "b 2 h w 3"],
        viewmats: Float[Tensor, "b 2 4 4"],
        Ks: Float[Tensor, "b 2 3 3"],
    ) -> tuple[Fields, Float[Tensor, "b 2 h w"]]:
        """As `rasterize` takes them, each [b, 2 h w, ..]; and how far away pixels are."""
        b = len(images)
        x = rearrange(images, "b v h w c -> (b v) c h w")
        f = self.features(2 * x - 1).float()  # with autocast too, as all that is not a network
        costs = self.costs(rearrange(f, "(b v) c h w -> b v c h w", v=2), viewmats, Ks)
        g = self.refine(torch.cat([f, rearrange(costs, "b v k h w -> (b v) k h w")], dim=1))
        weights = (rearrange(costs, "b v k h w -> (b v) k h w") + self.sweep(g)).softmax(1)
        depth = (weights * self.planes[:, None, None]).sum(1)
        heads = self.head(torch.cat([g, x], dim=1)).float()
        told = rearrange(heads, "(b v) c h w -> b (v h w) c", b=b)
        opacity, scale, quat, color = told.split([1, 3, 4, 3], dim=-1)
        depth = rearrange(depth, "(b v) h w -> b v h w", b=b)
        pixel = depth / Ks[:, :, 0, 0, None, None]
        size = SMALLEST + (LARGEST - SMALLEST) * scale.sigmoid()
        own = rearrange(images, "b v h w c -> b (v h w) c")
        upright = quat.new_tensor([1.0, 0.0, 0.0, 0.0])
        return {
            "means": rearrange(points_at(depth, viewmats, Ks), "b v h w c -> b (v h w) c"),
            "quats": upright + quat,
            "scales": size * rearrange(pixel, "b v h w -> b (v h w) 1"),
            "opacities": (opacity[..., 0] + 2.0).sigmoid(),
            "sh": of_color(own + 0.1 * color)[:, :, None],
        }, depth

    def costs(
        self,
        features: Float[Tensor, "b 2 c h w"],
        viewmats: Float[Tensor, "b 2 4 4"],
        Ks: Float[Tensor, "b 2 3 3"],
    ) -> Float[Tensor, "b 2 k h w"]:
        """How alike what both views show is, if pixels are as far away as each plane."""
        b, _, c, height, width = features.shape
        k, found = self.config.depths, []
        if not self.config.sweep:
            return features.new_zeros(b, 2, k, height, width)
        for i, j in ((0, 1), (1, 0)):
            depth = self.planes[None, :, None, None].expand(b, k, height, width)
            views, lenses = (x[:, i, None].expand(b, k, *x.shape[2:]) for x in (viewmats, Ks))
            points = rearrange(points_at(depth, views, lenses), "b k h w c -> b k (h w) c")
            other, _ = sampled(features[:, j], points, viewmats[:, j], Ks[:, j])  # [b c k hw]
            other = rearrange(other, "b c k (h w) -> b c k h w", h=height)
            found.append((features[:, i, :, None] * other).sum(1) / c**0.5)
        return torch.stack(found, dim=1)
