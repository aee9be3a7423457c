"""An action-conditioned predictor on an encoder that is frozen: V-JEPA 2-AC.

V-JEPA 2: Self-Supervised Video Models Enable Understanding, Prediction and Planning, 2025,
arXiv:2506.09985.

    z_t      = norm(encoder(o_t))               patches; not trained
    frame t  = [action a_t, state s_t, patches z_t]            each through a matrix
    zhat_t+1 = norm(predictor(frames <= t))        attention causal by frames
    loss     = mean |zhat_t+1 - z_t+1|  over true frames, and over a rollout of two steps
    a plan   = the actions for which mean |zhat_H - z_goal| is least

norm is a LayerNorm without weights. In a small world most of what is left then is where a patch is,
which every frame has alike: with model.standardise, latents have mean 0 and standard deviation 1
over frames besides, patch by patch.

States beyond the first are what the actions would make of it with nothing in the way, as a robot's
pose is. What differs: fixed sines and cosines for places and times (theirs: rotary), tubelets of
one frame.

Dimensions: b windows, t frames, n patches of a frame, d width of a latent, m of the predictor,
k sequences of actions, a components of an action, s of a state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.jepa.config import VJEPA2ACConfig
from models.worlds.vit import Block, VisionTransformer, positions

CONDITIONS = 2  # tokens of a frame before its patches
LEAST = 1e-3  # deviation that a latent is divided by: what never changes stays near 0


class ACPredictor(nn.Module):
    """A transformer over frames of action, state and patches, causal by frames."""

    def __init__(
        self, config: VJEPA2ACConfig, d: int, grid: tuple[int, ...], action_dim: int, state_dim: int
    ) -> None:
        super().__init__()
        m, self.grid, self.normed = config.predictor_dim, grid, not config.standardise
        patches = grid[0] * grid[1]
        self.enter = nn.Linear(d, m)
        self.actions = nn.Linear(action_dim, m)
        self.states = nn.Linear(state_dim, m)
        self.kinds = nn.Embedding(CONDITIONS, m)
        self.blocks = nn.ModuleList(
            Block(m, config.predictor_heads, block=CONDITIONS + patches)
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(m, eps=1e-6)
        self.leave = nn.Linear(m, d)

    def forward(
        self,
        z: Float[Tensor, "b t n d"],
        actions: Float[Tensor, "b t a"],
        states: Float[Tensor, "b t s"],
    ) -> Float[Tensor, "b t n d"]:
        """The latents of the frame after each, from those up to it."""
        t, m = z.shape[1], self.norm.weight.shape[0]
        where = positions(self.grid, m, device=z.device).to(z.dtype)  # [n, m]
        when = positions((t,), m, device=z.device).to(z.dtype)[:, None]  # [t, 1, m]
        given = torch.stack([self.actions(actions), self.states(states)], dim=2)
        x = torch.cat([given + self.kinds.weight, self.enter(z) + where], dim=2) + when
        x = rearrange(x, "b t n m -> b (t n) m")
        for block in self.blocks:
            x = block(x)
        x = rearrange(x, "b (t n) m -> b t n m", t=t)[:, :, CONDITIONS:]
        told = self.leave(self.norm(x))
        return F.layer_norm(told, told.shape[-1:]) if self.normed else told


class VJEPA2AC(nn.Module):
    """The frozen encoder, and the predictor that is trained.

    Args:
        encoder: of images, or of clips in tubelets of one frame.
    Attributes:
        mean, deviation: of each patch's latents over frames, [n, d]; 0 and 1 until `standardise`.
    Raises:
        ValueError: the encoder needs several frames.
    """

    def __init__(
        self,
        config: VJEPA2ACConfig,
        encoder: VisionTransformer,
        action_dim: int,
        state_dim: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.of_clips = len(encoder.grid) == 3
        if self.of_clips and encoder.patch[0] != 1:
            raise ValueError(
                f"an encoder of tubelets of {encoder.patch[0]} frames cannot say what one frame "
                "is: train it with model.patch=[1,...]"
            )
        grid = encoder.grid[-2:]
        self.predictor = ACPredictor(config, encoder.d, grid, action_dim, state_dim)
        shape = grid[0] * grid[1], encoder.d
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))

    def forward(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Float[Tensor, "b t-1 a"],
        states: Float[Tensor, "b t s"],
        guessed: Float[Tensor, "b r s"],
    ) -> tuple[Float[Tensor, "b t n d"], Float[Tensor, "b t-1 n d"], Float[Tensor, "b r n d"]]:
        """Latents, those of the next frames from the true ones, and those of a rollout.

        Args:
            guessed: the first state and those that the first actions lead to, r of them.
        """
        z = self.encode(frames)
        told = self.predictor(z[:, :-1], actions, states[:, :-1])
        return z, told, self.rollout(z[:, 0], actions[:, : guessed.shape[1]], guessed)

    def reset_standards(self) -> None:
        """Latents are as the encoder gives them, normed."""
        self.mean.zero_()
        self.deviation.fill_(1.0)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        """Each frame by itself, normalised."""
        images = rearrange(frames, "b t c h w -> (b t) c h w")
        z = self.encoder(images[:, :, None] if self.of_clips else images)
        z = z[:, len(z[0]) - len(self.mean) :]  # without a class token
        z = (F.layer_norm(z, z.shape[-1:]) - self.mean) / self.deviation
        return rearrange(z, "(b t) n d -> b t n d", b=len(frames))

    @torch.no_grad()
    def standardise(self, frames: Float[Tensor, "b t c h w"]) -> None:
        """From now on latents such as those of `frames` have mean 0 and deviation 1."""
        z = self.encode(frames).flatten(0, 1).double()
        self.mean += (z.mean(dim=0) * self.deviation).float()
        self.deviation *= z.std(dim=0).clamp(min=LEAST).float()

    def rollout(
        self,
        z: Float[Tensor, "b n d"],
        actions: Float[Tensor, "b t a"],
        states: Float[Tensor, "b t s"],
    ) -> Float[Tensor, "b t n d"]:
        """Latents after each action, from one frame."""
        known = [z]
        for step in range(1, actions.shape[1] + 1):
            told = self.predictor(torch.stack(known, dim=1), actions[:, :step], states[:, :step])
            known.append(told[:, -1])
        return torch.stack(known[1:], dim=1)

    def imagine(
        self,
        z: Float[Tensor, "b n d"],
        actions: Float[Tensor, "b k t a"],
        states: Float[Tensor, "b k t s"],
    ) -> Float[Tensor, "b k t n d"]:
        """Latents after each action of k sequences of actions."""
        b, k = actions.shape[:2]
        z = repeat(z, "b n d -> (b k) n d", k=k)
        flat = (rearrange(x, "b k t a -> (b k) t a") for x in (actions, states))
        return rearrange(self.rollout(z, *flat), "(b k) t n d -> b k t n d", b=b)
