"""What the torch decoders are made of: projections, tables, norms, rotary positions.

RMSNorm        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4
RoPE           RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
               arXiv:2104.09864, eq. 34, but rotating the pairs (i, i + hd/2), as Hugging Face's
               weights expect, not (2i, 2i + 1); stretched as in Llama 3.1, arXiv:2407.21783

Dimensions: b batch, t tokens, hd head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.language.config import TransformerConfig


class Linear(nn.Linear):
    """y = x W^T without bias; left empty at construction, `Transformer.init_weights` fills it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """A lookup table; left empty at construction, `Transformer.init_weights` fills it."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 or wider; dtype of x out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """x / rms(x) * weight over the last dimension, in float32 or wider; dtype of x out."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def rotary(
    config: TransformerConfig, positions: Int[Tensor, " t"]
) -> tuple[Float[Tensor, "t 1 hd"], Float[Tensor, "t 1 hd"]]:
    """Cosines and signed sines of the rotation at some positions, float32, for `rotate`."""
    hd = config.resolved_head_dim
    exponent = torch.arange(0, hd, 2, device=positions.device).float() / hd
    frequency = 1.0 / config.rope_theta**exponent  # [hd/2], radians per token
    if (scaling := config.rope_scaling) is not None:
        # How many times a wave turns within the original context decides: few turns, stretch it.
        turns = scaling.original_context * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = torch.outer(positions.float(), frequency)[:, None]  # [t, 1, hd/2]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # [t, 1, hd]


def rotate(
    x: Float[Tensor, "b t heads hd"], cos: Float[Tensor, "t 1 hd"], sin: Float[Tensor, "t 1 hd"]
) -> Float[Tensor, "b t heads hd"]:
    """Turn each pair (x_i, x_{i + hd/2}) by its angle; rolling by hd/2 swaps the halves."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
