"""Encoders: from an image to a latent.

ConvEncoder is small enough for a CPU. ImpalaEncoder is that of PLDM (2025, arXiv:2502.14819) and
eb_jepa (2026, arXiv:2602.03604), after IMPALA (2018, arXiv:1802.01561). ResNet18 (2015,
arXiv:1512.03385) has the stem that is customary for images of 32 x 32. ViTEncoder says what its
class token says.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import EncoderConfig, EncoderKind, Norm
from models.worlds.vit import VisionTransformer


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
    """x + conv(relu(conv(relu(x)))).

    Args:
        padding: what the convolutions see beyond the edge: "zeros", or "replicate" for its repeat.
    """

    def __init__(self, channels: int, padding: Literal["zeros", "replicate"] = "zeros") -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding) for _ in range(2)
        )

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


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + x), x through a matrix where its shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            matrix = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.skip = nn.Sequential(matrix, nn.BatchNorm2d(after))

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c2 s2 s2"]:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.skip(x))


class ResNet18(nn.Module):
    """A 3 x 3 convolution, eight residual blocks, three of which halve; the mean of the rest."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        self.blocks = nn.Sequential(
            *(
                block
                for before, after, stride in stages
                for block in (BasicBlock(before, after, stride), BasicBlock(after, after, 1))
            )
        )

    def forward(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n 512"]:
        x = images.contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return x.mean(dim=(2, 3))


class ViTEncoder(nn.Module):
    """The class token of a vision transformer."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        patch, shape = (config.patch, config.patch), (config.dim, config.depth, config.heads)
        self.network = VisionTransformer((size, size), patch, channels, *shape, class_token=True)

    def forward(self, images: Float[Tensor, "n c s s"]) -> Float[Tensor, "n d"]:
        return self.network(images)[:, 0]


ENCODERS = {
    EncoderKind.conv: ConvEncoder,
    EncoderKind.impala: ImpalaEncoder,
    EncoderKind.resnet18: ResNet18,
    EncoderKind.vit: ViTEncoder,
}


class FrameEncoder(nn.Module):
    """An encoder of images, for sequences of them, with what comes after its last layer."""

    def __init__(self, config: EncoderConfig, channels: int, size: int) -> None:
        super().__init__()
        self.network = ENCODERS[config.kind](config, channels, size)
        self.norm = nn.LayerNorm(config.dim) if config.norm == Norm.layer else nn.Identity()

    def forward(self, frames: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t d"]:
        images = rearrange(frames, "b t c h w -> (b t) c h w")
        return rearrange(self.norm(self.network(images)), "(b t) d -> b t d", b=len(frames))
