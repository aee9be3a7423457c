"""An actor and a critic that see the last frames.

The agent of DIAMOND (2024, arXiv:2405.12399): convolutions, and on top of them two linear maps, one
to the logits of actions, one to the value. What differs: it sees the last `context` frames at once
where the published one sees one and has an LSTM; each of its levels is one convolution of stride 2;
a black pixel is 0 to it, so that little else than what moves comes through.

Dimensions: b worlds, n frames, c channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.agents.config import ActorCriticConfig

LIT = 4.0  # what a pixel's 1 is to the network: most are 0


class ActorCritic(nn.Module):
    """Frames in [0, 1] to logits of actions, and the value."""

    def __init__(self, config: ActorCriticConfig) -> None:
        super().__init__()
        if config.channels is None or config.actions is None or config.image_size is None:
            raise ValueError("model.channels, model.image_size and model.actions must be known")
        self.config, self.context = config, config.context
        widths = [config.context * config.channels, *config.widths]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        side = config.image_size // 2 ** len(config.widths)
        self.hidden = nn.Linear(widths[-1] * side**2, config.hidden)
        self.actor = nn.Linear(config.hidden, config.actions)
        self.critic = nn.Linear(config.hidden, 1)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Random weights, those of He et al. (2015), that keep the size of what comes through; at
        first every action is as likely, and worth nothing."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                size = (2 / part.weight[0].numel()) ** 0.5
                part.weight.normal_(0.0, size, generator=generator)
                assert part.bias is not None
                part.bias.zero_()
        for part in (self.actor, self.critic):
            for parameter in part.parameters():
                parameter.zero_()

    def forward(
        self, frames: Float[Tensor, "b n c h w"]
    ) -> tuple[Float[Tensor, "b actions"], Float[Tensor, " b"]]:
        x = frames[:, -self.context :].flatten(1, 2) * LIT
        for layer in self.layers:
            x = F.silu(layer(x))
        x = F.silu(self.hidden(x.flatten(1)))
        return self.actor(x), self.critic(x)[:, 0]
