"""A vision transformer for images and clips, all of whose patches or some.

An Image is Worth 16x16 Words, 2020, arXiv:2010.11929. Pre-norm blocks, GELU, a LayerNorm at the
end. What differs: positions are fixed sines and cosines of each coordinate, as in I-JEPA (2023,
arXiv:2301.08243) and V-JEPA (2024, arXiv:2404.08471), stretched over images of another size.

    x = W patch + position;   x = x + attention(norm(x));   x = x + mlp(norm(x))
    attention sees every patch; those that are masked are left out before the first block

Dimensions: b images, n patches of an image, k of them kept, d width, h heads, hd head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.attention.op import attention

PATCHES = {
    2: "b c (h p) (w q) -> b (h w) (p q c)",
    3: "b c (t r) (h p) (w q) -> b (t h w) (r p q c)",
}
"Axes of an image or a clip -> how it is cut."


class Attention(nn.Module):
    """Multi-head attention of all positions to all, or to those up to them.

    Args:
        block: positions of a block: each sees its own whole, and those before; None: all.
    """

    def __init__(
        self, d: int, heads: int, head_dim: int | None = None, block: int | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.block = head_dim or d // heads, block
        self.qkv = nn.Linear(d, 3 * heads * self.head_dim)
        self.out = nn.Linear(heads * self.head_dim, d)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h hd) -> three b n h hd", three=3, hd=self.head_dim
        )
        mixed = attention(q, k, v, causal=self.block is not None, block=self.block)
        return self.out(mixed.flatten(-2))


class Block(nn.Module):
    """Attention, then an MLP, each after a LayerNorm and added to the residual stream."""

    def __init__(
        self, d: int, heads: int, mlp_ratio: float = 4.0, block: int | None = None
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d, eps=1e-6)
        self.attention = Attention(d, heads, block=block)
        self.mlp_norm = nn.LayerNorm(d, eps=1e-6)
        width = int(d * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, d))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def positions(
    grid: Sequence[int],
    d: int,
    base: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n d"]:
    """Sines and cosines of each coordinate of a grid's points, the last axis the fastest.

    Args:
        base: the grid whose extent this one is stretched over; None: its own.
    """
    axes = [
        (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * (whole / size) - 0.5
        for size, whole in zip(grid, base or grid, strict=True)
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [*grid, a]
    waves = d // (2 * len(grid))
    speed = 10000.0 ** -(torch.arange(waves, dtype=torch.float64, device=device) / max(1, waves))
    angle = points.flatten(0, -2)[..., None] * speed  # [n, a, waves]
    found = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return F.pad(found, (0, d - found.shape[1])).float()


def take(x: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Rows of each sequence."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class VisionTransformer(nn.Module):
    """Patches of an image or a clip, or some of them, each with all it is to know of the others.

    Args:
        size: of an image [height, width], or a clip [frames, height, width].
        patch: of the same axes; divides `size`.
        class_token: put a learned token before the patches.
    """

    def __init__(
        self,
        size: Sequence[int],
        patch: Sequence[int],
        channels: int,
        d: int,
        depth: int,
        heads: int,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.d = tuple(patch), d
        self.grid = self.cut(size)
        self.embed = nn.Linear(math.prod(patch) * channels, d)
        self.class_token = nn.Parameter(torch.empty(d)) if class_token else None
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def init_own(self, generator: torch.Generator | None) -> None:
        if self.class_token is not None:
            self.class_token.normal_(0.0, 0.02, generator=generator)

    def cut(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis."""
        if len(size) != len(self.patch) or any(
            whole % part for whole, part in zip(size, self.patch, strict=True)
        ):
            raise ValueError(
                f"images of {' x '.join(map(str, size))} cannot be cut into patches of "
                f"{' x '.join(map(str, self.patch))}: change the model's patch or the data's size"
            )
        return tuple(whole // part for whole, part in zip(size, self.patch, strict=True))

    @property
    def centre(self) -> int:
        """Number of the patch in the middle."""
        found = 0
        for size in self.grid:
            found = found * size + size // 2
        return found

    def forward(
        self, images: Float[Tensor, "b c *size"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """One latent per patch (after that of the class token, if there is one).

        Args:
            keep: numbers of the patches that are seen; None: all.
        """
        grid = self.cut(images.shape[2:])
        names = dict(zip("rpq"[-len(self.patch) :], self.patch, strict=True))
        x = self.embed(rearrange(images, PATCHES[len(grid)], **names))
        x = x + positions(grid, self.d, self.grid, x.device).to(x.dtype)
        if keep is not None:
            x = take(x, keep)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
