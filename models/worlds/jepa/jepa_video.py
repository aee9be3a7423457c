"""Tell the latents of the next frames from those of two: the video example of eb_jepa.

A Lightweight Library for Energy-Based Joint-Embedding Predictive Architectures, 2026,
arXiv:2602.03604. Latents are maps, and so are predictions:

    z_t      = encoder(o_t)                                         [c, s, s]
    z^0      = z,   z^k_0, z^k_1 = z_0, z_1
    z^k_t+1  = z^k-1_t + predictor(z^k-1_t-1, z^k-1_t)              all t at once, passes k = 1..K
    loss     = mean over k of (projector(z^k) - projector(z))^2     at every place

so that pass k tells what is k frames ahead of anything seen, for the frames that are so far from
the two that are given. What differs: the predictor adds to the latest latent, and frames may be
averaged once (`stride`).

Dimensions: b clips, t frames, c channels of a latent, s its height and width, d of a projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import JEPAVideoConfig
from models.worlds.jepa.encoders import Residual, mlp
from models.worlds.jepa.targets import Latents

CONTEXT = 2  # frames that a prediction is made from


class MapEncoder(nn.Module):
    """Five convolutions that keep the map: one of `stride`, then two residual blocks.

    Beyond the edge they see the edge again. Zeros would tell places apart where nothing is to be
    seen: a spread over places that costs no prediction, and so a way round the terms against
    collapse.
    """

    def __init__(self, channels: int, width: int, out: int, stride: int) -> None:
        super().__init__()
        edge = "replicate"
        self.stem = nn.Conv2d(channels, width, 3, stride=stride, padding=1, padding_mode=edge)
        self.blocks = nn.Sequential(Residual(width, edge), Residual(width, edge))
        self.head = nn.Conv2d(width, out, 1)

    def forward(self, images: Float[Tensor, "n c2 h w"]) -> Float[Tensor, "n c s s"]:
        x = images.contiguous(memory_format=torch.channels_last)
        return self.head(F.relu(self.blocks(self.stem(x))))


class UNet(nn.Module):
    """Two steps down and two up again, each joined to what was there before."""

    def __init__(self, before: int, width: int, after: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(before, width, 3, padding=1)
        self.down = nn.ModuleList(
            [
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            ]
        )
        self.middle = Residual(2 * width)
        self.up = nn.ModuleList(
            [
                nn.Conv2d(4 * width, 2 * width, 3, padding=1),
                nn.Conv2d(3 * width, width, 3, padding=1),
            ]
        )
        self.leave = nn.Conv2d(width, after, 1)

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c2 s s"]:
        kept = [F.relu(self.enter(x))]
        for layer in self.down:
            kept.append(F.relu(layer(kept[-1])))
        x = self.middle(kept.pop())
        for layer in self.up:
            other = kept.pop()
            x = F.interpolate(x, size=other.shape[-2:], mode="nearest")
            x = F.relu(layer(torch.cat([x, other], dim=1)))
        return self.leave(x)


class JEPAVideo(nn.Module):
    """Encoder, predictor and projector.

    Args:
        averaged: keep an average of the encoder for the targets.
    """

    def __init__(self, config: JEPAVideoConfig, averaged: bool = False) -> None:
        super().__init__()
        if config.channels is None:
            raise ValueError("model.channels must be known")
        sizes = config.channels, config.encoder_width, config.dim, config.stride
        self.encoder = MapEncoder(*sizes)
        self.average = MapEncoder(*sizes).requires_grad_(False) if averaged else None
        self.predictor = UNet(CONTEXT * config.dim, config.predictor_width, config.dim)
        self.projector = mlp([config.dim, *config.projector])
        self.passes = config.passes

    def forward(self, frames: Float[Tensor, "b t c2 h w"]) -> Latents:
        """Projections, at every place, of every frame and of all predictions of it.

        Returns:
            z [b s s, t, d], predicted and target [b s s, k (t - 2), d].
        """
        z = self.encode(frames)
        target = z if self.average is None else self.encode(frames, self.average)
        told, known = [], z
        for _ in range(self.passes):
            ahead = self.advance(known)[:, :-1]  # of frames 2 .. t - 1
            told.append(ahead)
            known = torch.cat([z[:, :CONTEXT], ahead], dim=1)
        wanted = self.project(target[:, CONTEXT:])
        predicted = torch.cat([self.project(ahead) for ahead in told], dim=1)
        return Latents(self.project(z), predicted, wanted.repeat(1, self.passes, 1))

    def encode(
        self, frames: Float[Tensor, "b t c2 h w"], encoder: nn.Module | None = None
    ) -> Float[Tensor, "b t c s s"]:
        """Each frame by itself."""
        flat = (encoder or self.encoder)(rearrange(frames, "b t c h w -> (b t) c h w"))
        return rearrange(flat, "(b t) c h w -> b t c h w", b=len(frames))

    def advance(self, z: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t-1 c s s"]:
        """What follows each two latents that follow each other."""
        pairs = torch.cat([z[:, :-1], z[:, 1:]], dim=2)
        change = self.predictor(rearrange(pairs, "b t c h w -> (b t) c h w"))
        return z[:, 1:] + rearrange(change, "(b t) c h w -> b t c h w", b=len(z))

    def rollout(self, z: Float[Tensor, "b 2 c s s"], steps: int) -> Float[Tensor, "b steps c s s"]:
        """Latents of the frames after two."""
        states = [*z.unbind(dim=1)]
        for _ in range(steps):
            states.append(self.advance(torch.stack(states[-CONTEXT:], dim=1))[:, 0])
        return torch.stack(states[CONTEXT:], dim=1)

    def project(self, z: Float[Tensor, "b t c s s"]) -> Float[Tensor, "bss t d"]:
        """Into the space of the loss, every place a row."""
        return self.projector(rearrange(z, "b t c h w -> (b h w) t c"))
