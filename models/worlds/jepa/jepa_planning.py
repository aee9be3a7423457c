"""A world model without a decoder, to plan with: PLDM, and eb_jepa's action-conditioned example.

Learning from Reward-Free Offline Data: A Case for Planning with Latent Dynamics Models, 2025,
arXiv:2502.14819. A Lightweight Library for Energy-Based Joint-Embedding Predictive Architectures,
2026, arXiv:2602.03604.

    z_t    = encoder(o_t)
    zhat_0 = z_0,   zhat_t+1 = predictor(zhat_t, a_t)        from the first frame alone
    a plan = the actions for which sum_t ||zhat_t - z_goal||^2 is least

What differs: an MLP that adds to the latent in place of their GRU, and no normalisation of the
latent (`model.predictor.kind=gru` and `model.encoder.norm=layer` are theirs).

Dimensions: b episodes, k sequences of actions, t frames or steps, d width of a latent.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import JEPAConfig, PredictorKind
from models.worlds.jepa.encoders import FrameEncoder, mlp
from models.worlds.jepa.targets import Latents


class MLPPredictor(nn.Module):
    """z + MLP(z, a)."""

    def __init__(self, dim: int, action_dim: int, hidden: list[int]) -> None:
        super().__init__()
        self.network = mlp([dim + action_dim, *hidden, dim])

    def forward(self, z: Float[Tensor, "n d"], a: Float[Tensor, "n a"]) -> Float[Tensor, "n d"]:
        return z + self.network(torch.cat([z, a], dim=-1))


class GRUPredictor(nn.Module):
    """One GRU cell: the latent is its hidden state, the action its input."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(action_dim, dim)

    def forward(self, z: Float[Tensor, "n d"], a: Float[Tensor, "n a"]) -> Float[Tensor, "n d"]:
        return self.cell(a, z)


class JEPAPlanning(nn.Module):
    """Encoder, predictor, and the network that tells the action between two latents.

    Args:
        averaged: keep an average of the encoder for the targets.
    """

    def __init__(self, config: JEPAConfig, averaged: bool = False) -> None:
        super().__init__()
        if config.channels is None or config.image_size is None or config.action_dim is None:
            raise ValueError("model.channels, image_size and action_dim must be known")
        dim, width = config.encoder.dim, config.action_dim
        shape = config.encoder, config.channels, config.image_size
        self.encoder = FrameEncoder(*shape)
        self.average = FrameEncoder(*shape).requires_grad_(False) if averaged else None
        self.predictor = (
            MLPPredictor(dim, width, config.predictor.hidden)
            if config.predictor.kind == PredictorKind.mlp
            else GRUPredictor(dim, width)
        )
        self.inverse = mlp([2 * dim, *config.inverse_hidden, width])

    def forward(
        self, frames: Float[Tensor, "b t c s s"], actions: Float[Tensor, "b t-1 a"]
    ) -> Latents:
        """Every frame encoded, those after the first also predicted from it."""
        z = self.encode(frames)
        target = z if self.average is None else self.average(frames)
        told = self.inverse(torch.cat([z[:, :-1], z[:, 1:]], dim=-1))
        return Latents(z, self.rollout(z[:, 0], actions), target[:, 1:], told)

    def encode(self, frames: Float[Tensor, "b t c s s"]) -> Float[Tensor, "b t d"]:
        """Each frame by itself."""
        return self.encoder(frames)

    def rollout(
        self, z: Float[Tensor, "n d"], actions: Float[Tensor, "n t a"]
    ) -> Float[Tensor, "n t d"]:
        """Latents after each action, from one latent."""
        states = []
        for action in actions.unbind(dim=1):
            z = self.encoder.norm(self.predictor(z, action))
            states.append(z)
        return torch.stack(states, dim=1)

    def imagine(
        self, z: Float[Tensor, "b d"], actions: Float[Tensor, "b k t a"]
    ) -> Float[Tensor, "b k t d"]:
        """Latents after each action of k sequences of actions."""
        b, k = actions.shape[:2]
        z = repeat(z, "b d -> (b k) d", k=k)
        states = self.rollout(z, rearrange(actions, "b k t a -> (b k) t a"))
        return rearrange(states, "(b k) t d -> b k t d", b=b)
