"""LeWorldModel: two losses and a world model from pixels.

LeWorldModel: Stable End-to-End Joint-Embedding Predictive Architecture from Pixels, 2026,
arXiv:2603.19312.

    z_t      = projector(class token of ViT(o_t))                    BatchNorm in the projector
    zhat_t+1 = projector'(transformer(z_<=t, a_<=t)),   causal, conditioned by AdaLN-zero
    loss     = mean (zhat_t+1 - z_t+1)^2  +  lambda SIGReg(z)        teacher forcing, no stopped
                                                                     gradient
    a plan   = the blocks of actions for which ||zhat_H - z_goal||^2 is least

AdaLN-zero (Peebles and Xie, 2022, arXiv:2212.09748): shift, scale and gate of every sublayer are a
linear function of the action's embedding that begins at zero, so that the action has no influence
until it earns one. The projector lets latents become normal, which the vision transformer's last
LayerNorm would not.

Dimensions: b windows, t states, k sequences of actions, d width of a latent, m of the predictor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import LeWMConfig
from models.worlds.jepa.lejepa import Projector
from models.worlds.jepa.targets import Latents
from models.worlds.vit import Attention, VisionTransformer


class ActionEncoder(nn.Module):
    """A matrix, then an MLP with SiLU, over blocks of actions."""

    def __init__(self, action_dim: int, d: int) -> None:
        super().__init__()
        self.enter = nn.Linear(action_dim, action_dim)
        self.mlp = nn.Sequential(nn.Linear(action_dim, 4 * d), nn.SiLU(), nn.Linear(4 * d, d))

    def forward(self, a: Float[Tensor, "b t a"]) -> Float[Tensor, "b t m"]:
        return self.mlp(self.enter(a))


class ZeroLinear(nn.Linear):
    """A matrix that begins at zero."""

    def init_own(self, generator: torch.Generator | None) -> None:
        self.weight.zero_()
        self.bias.zero_()


def modulate(
    x: Float[Tensor, "b t m"], shift: Float[Tensor, "b t m"], scale: Float[Tensor, "b t m"]
) -> Float[Tensor, "b t m"]:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class ConditionedBlock(nn.Module):
    """Causal attention and an MLP, both shifted, scaled and gated by a condition (AdaLN-zero)."""

    def __init__(self, m: int, heads: int, head_dim: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(m, heads, head_dim, block=1)
        self.mlp = nn.Sequential(
            nn.Linear(m, mlp_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_width, m)
        )
        self.dropout = nn.Dropout(dropout)
        self.condition = ZeroLinear(m, 6 * m)

    def forward(
        self, x: Float[Tensor, "b t m"], c: Float[Tensor, "b t m"]
    ) -> Float[Tensor, "b t m"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c)).chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(modulate(x, shift1, scale1)))
        return x + gate2 * self.dropout(self.mlp(modulate(x, shift2, scale2)))


class Predictor(nn.Module):
    """A causal transformer over latents, conditioned on the action after each."""

    def __init__(self, config: LeWMConfig, action_dim: int) -> None:
        super().__init__()
        m = config.predictor_dim
        self.enter = nn.Linear(config.dim, m)
        self.positions = nn.Embedding(config.history, m)
        self.actions = ActionEncoder(action_dim, m)
        self.blocks = nn.ModuleList(
            ConditionedBlock(
                m,
                config.predictor_heads,
                config.predictor_head_dim,
                config.predictor_mlp,
                config.dropout,
            )
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(m)
        self.projector = Projector([m, config.projector, config.dim], nn.GELU)

    def forward(
        self, z: Float[Tensor, "b t d"], a: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t d"]:
        """The latent after each state and action, from those up to it."""
        x = self.enter(z) + self.positions.weight[: z.shape[1]]
        c = self.actions(a)
        for block in self.blocks:
            x = block(x, c)
        return self.projector(self.norm(x))


class ImageEncoder(nn.Module):
    """The class token of a vision transformer, through a projector."""

    def __init__(self, config: LeWMConfig) -> None:
        super().__init__()
        assert config.channels is not None and config.image_size is not None
        size, patch = (config.image_size,) * 2, (config.patch,) * 2
        self.vit = VisionTransformer(
            size, patch, config.channels, config.width, config.depth, config.heads,
            class_token=True,
        )  # fmt: skip
        self.projector = Projector([config.width, config.projector, config.dim], nn.GELU)

    def forward(self, frames: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t d"]:
        token = self.vit(rearrange(frames, "b t c h w -> (b t) c h w"))[:, 0]
        return self.projector(rearrange(token, "(b t) w -> b t w", b=len(frames)))


class LeWM(nn.Module):
    """Encoder and predictor.

    Args:
        averaged: keep an average of the encoder for the targets.
    """

    def __init__(self, config: LeWMConfig, averaged: bool = False) -> None:
        super().__init__()
        if config.channels is None or config.image_size is None or config.action_dim is None:
            raise ValueError("model.channels, image_size and action_dim must be known")
        self.history = config.history
        self.encoder = ImageEncoder(config)
        self.average = ImageEncoder(config).requires_grad_(False) if averaged else None
        self.predictor = Predictor(config, config.action_dim)

    def forward(
        self, frames: Float[Tensor, "b t c s s"], actions: Float[Tensor, "b t-1 a"]
    ) -> Latents:
        """Every frame encoded, those after the first also predicted from those before."""
        z = self.encode(frames)
        target = z if self.average is None else self.average(frames)
        return Latents(z, self.predictor(z[:, :-1], actions), target[:, 1:])

    def encode(self, frames: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t d"]:
        """Each frame by itself."""
        return self.encoder(frames)

    def rollout(
        self, z: Float[Tensor, "n d"], actions: Float[Tensor, "n t a"]
    ) -> Float[Tensor, "n t d"]:
        """Latents after each block of actions, from one latent, of which at most `history` are
        looked back at."""
        states = [z]
        for step in range(actions.shape[1]):
            first = max(0, step + 1 - self.history)
            known = torch.stack(states[first:], dim=1)
            states.append(self.predictor(known, actions[:, first : step + 1])[:, -1])
        return torch.stack(states[1:], dim=1)

    def imagine(
        self, z: Float[Tensor, "b d"], actions: Float[Tensor, "b k t a"]
    ) -> Float[Tensor, "b k t d"]:
        """Latents after each block of k sequences of them."""
        b, k = actions.shape[:2]
        z = repeat(z, "b d -> (b k) d", k=k)
        states = self.rollout(z, rearrange(actions, "b k t a -> (b k) t a"))
        return rearrange(states, "(b k) t d -> b k t d", b=b)
