"""Encoders: from an image to a latent.

ConvEncoder is small enough for a CPU. ImpalaEncoder is that of PLDM (2025, arXiv:2502.14819) and
eb_jepa (2026, arXiv:2602.03604), after IMPALA (2018, arXiv:1802.01561).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import EncoderConfig, EncoderKind, Norm


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def flat_width(channels: list[int], size: int) -> int:
    """Numbers that are left of an image after stages that each halve it, rounding up."""
    for _ in channels:
        size = -(-size // 2)
    return channels[-1] * size * size


class ConvEncoder(nn.Module):
    """Convolutions of stride 2, flattened, then an MLP."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        widths = [channels, *config.channels]
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.head = mlp([flat_width(config.channels, size), *config.hidden, config.dim])

    def forward(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
        x = images.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = F.relu(stage(x))
        return self.head(x.flatten(1))


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c s s"]:
        return x + self.second(F.relu(self.first(F.relu(x))))


class ImpalaEncoder(nn.Module):
    """Stages of a convolution, a max-pool of stride 2 and two residual blocks, then an MLP."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        widths = [channels, *config.channels]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                nn.MaxPool2d(3, stride=2, padding=1),
                Residual(after),
                Residual(after),
            )
            for before, after in pairwise(widths)
        )
        self.head = mlp([flat_width(config.channels, size), *config.hidden, config.dim])

    def forward(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
        x = images.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.relu(x).flatten(1))


ENCODERS = {EncoderKind.conv: ConvEncoder, EncoderKind.impala: ImpalaEncoder}


class FrameEncoder(nn.Module):
    """An encoder of images, for sequences of them, with what comes after its last layer."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        self.network = ENCODERS[config.kind](config, channels, size)
        self.norm = nn.LayerNorm(config.dim) if config.norm == Norm.layer else nn.Identity()

    def forward(self, frames: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t d"]:
        images = rearrange(frames, "b t c h w -> (b t) c h w")
        return rearrange(self.norm(self.network(images)), "(b t) d -> b t d", b=len(frames))
