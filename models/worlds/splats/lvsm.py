"""A view from other views without any 3D: patches, their rays, and attention.

LVSM: A Large View Synthesis Model with Minimal 3D Inductive Bias (2024, arXiv:2410.17242), its
decoder-only form. Every patch is a token,

    given       x = W_in [rgb, rays]           asked for   q = W_ask [rays]

rays being Pluecker's (d, o x d) of its pixels; all tokens attend to all, without any other place
than their rays; and what comes out at those that were asked for is the view, sigmoid(W_out q).

Dimensions: b scenes, v views that are given, s patches of a view, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.splats.config import LvsmConfig
from models.worlds.splats.rays import plucker


class Block(nn.Module):
    """Attention among all, whose queries and keys are of one size, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = rearrange(qkv, "b s (three h d) -> three b h s d", three=3, h=self.heads)
        attended = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        x = x + self.out(rearrange(attended, "b h s d -> b s (h d)"))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Lvsm(nn.Module):
    """From views that are given to one that is asked for."""

    def __init__(self, config: LvsmConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.patch**2
        self.given = nn.Linear(9 * pixels, config.width, bias=False)
        self.asked = nn.Linear(6 * pixels, config.width, bias=False)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.color = nn.Linear(config.width, 3 * pixels)

    def initialise(self, generator: torch.Generator) -> None:
        """Normal of deviation 0.02, what adds to the stream less, the deeper the network."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.ones_(p) if "norm" in name and "weight" in name else nn.init.zeros_(p)
            else:
                deep = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * len(self.blocks)) ** 0.5 if deep else 0.02
                nn.init.normal_(p, std=std, generator=generator)

    def forward(
        self,
        images: Float[Tensor, "b v h w 3"],
        viewmats: Float[Tensor, "b n 4 4"],
        Ks: Float[Tensor, "b n 3 3"],
    ) -> Float[Tensor, "b h w 3"]:
        """What the last camera sees.

        Args:
            images: of all cameras but the last, from 0 to 1.
        """
        views, height, width = images.shape[1:4]
        rays = plucker(viewmats, Ks, height, width)
        known = self.patches(torch.cat([2 * images - 1, rays[:, :views]], dim=-1))
        tokens = torch.cat([
            self.given(rearrange(known, "b v s d -> b (v s) d")),
            self.asked(self.patches(rays[:, views:])[:, 0]),
        ], dim=1)  # fmt: skip
        x = self.norm_in(tokens)
        for block in self.blocks:
            x = block(x)
        asked = self.norm_out(x[:, -(height * width) // self.config.patch**2 :])
        p = self.config.patch
        told = rearrange(
            self.color(asked), "b (i j) (p q c) -> b (i p) (j q) c", i=height // p, p=p, q=p, c=3
        )
        return told.sigmoid()

    def patches(self, x: Float[Tensor, "b v h w c"]) -> Float[Tensor, "b v s d"]:
        """Flat."""
        p = self.config.patch
        return rearrange(x, "b v (i p) (j q) c -> b v (i j) (p q c)", p=p, q=p)
