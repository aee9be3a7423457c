"""A U-Net over images that is told something about each: noise, actions.

As in DIAMOND (2024, arXiv:2405.12399). Residual blocks whose group norms are scaled and shifted by
a condition, self-attention at the bottom only; on the way up every output of the way down is seen
again, those of the downsamplings too.

    norm(x, c)  = groupnorm(x) (1 + scale c) + shift c
    block(x, c) = skip x + conv(silu(norm(conv(silu(norm(x, c))), c))), the last one zero at first

Dimensions: b images, c channels, h and w their height and width, e width of the condition.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kernels.attention.op import attention
from models.worlds.video.config import HEAD

GROUP = 32  # channels of a group


def groups_of(channels: int) -> int:
    """As many groups of `GROUP` channels or a few more as divide them."""
    return next(n for n in range(max(1, channels // GROUP), 0, -1) if channels % n == 0)


class AdaptiveNorm(nn.Module):
    """Group norm without weights of its own."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.groups = groups_of(channels)
        self.linear = nn.Linear(condition, 2 * channels)

    def forward(self, x: Float[Tensor, "b c h w"], e: Float[Tensor, "b e"]) -> Tensor:
        scale, shift = self.linear(e)[..., None, None].chunk(2, dim=1)
        return F.group_norm(x, self.groups, eps=1e-5) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Every place sees every place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        q, k, v = rearrange(
            self.qkv(self.norm(x)), "b (three n d) h w -> three b (h w) n d", three=3, d=HEAD
        )
        mixed = attention(q, k, v, causal=False)
        return x + self.out(rearrange(mixed, "b (h w) n d -> b (n d) h w", h=x.shape[-2]))


class Residual(nn.Module):
    """Two convolutions, each after a norm that is told the condition."""

    def __init__(self, before: int, after: int, condition: int, attends: bool = False) -> None:
        super().__init__()
        self.skip = nn.Conv2d(before, after, 1) if before != after else None
        self.first_norm = AdaptiveNorm(before, condition)
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second_norm = AdaptiveNorm(after, condition)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.attention = SelfAttention(after) if attends else None

    def forward(self, x: Float[Tensor, "b c h w"], e: Float[Tensor, "b e"]) -> Tensor:
        kept = x if self.skip is None else self.skip(x)
        x = self.first(F.silu(self.first_norm(x, e)))
        x = kept + self.second(F.silu(self.second_norm(x, e)))
        return x if self.attention is None else self.attention(x)


def unchanged(x: Tensor) -> Tensor:
    return x


class UNet(nn.Module):
    """Levels of halved size, and back.

    Args:
        widths: channels of each level.
        depth: residual blocks of a level on the way down.
        all_again: see again on the way up, in one block more of each level, what the first block
            is given and what the downsamplings give; otherwise only what residual blocks give.

    Attributes:
        given: channels of what each stage gives: the levels on the way down, the bottom, and the
            levels on the way up.
    """

    def __init__(
        self, widths: list[int], depth: int, condition: int, attends: bool, all_again: bool = True
    ) -> None:
        super().__init__()
        self.all_again = all_again
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        seen: list[int] = [widths[0]] if all_again else []  # channels of what is seen again
        for level, width in enumerate(widths):
            before = widths[max(0, level - 1)]
            sizes = [before, *[width] * depth]
            self.down.append(nn.ModuleList(Residual(a, b, condition) for a, b in pairwise(sizes)))
            seen += [width] * depth
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                seen += [width] if all_again else []
        last = widths[-1]
        self.middle = nn.ModuleList(Residual(last, last, condition, attends) for _ in range(2))
        for level, width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(depth + all_again):
                blocks.append(Residual(last + seen.pop(), width, condition))
                last = width
            self.up.append(blocks)
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.given = [*widths, widths[-1], *reversed(widths)]

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        e: Float[Tensor, "b e"],
        after: Callable[[Tensor], Tensor] = unchanged,
    ) -> Float[Tensor, "b c h w"]:
        """The images, told e.

        Args:
            after: what is done to what each stage gives.
        """
        seen = [x] if self.all_again else []
        for level, blocks in enumerate(self.down):
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                seen.append(x := block(x, e))
            seen[-1] = x = after(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
                seen += [x] if self.all_again else []
        for block in self.middle:
            x = block(x, e)
        x = after(x)
        for level, blocks in enumerate(self.up):
            assert isinstance(blocks, nn.ModuleList)
            if level:
                x = self.grow[level - 1](F.interpolate(x, scale_factor=2, mode="nearest"))
            for block in blocks:
                x = block(torch.cat([x, seen.pop()], dim=1), e)
            x = after(x)
        return x
