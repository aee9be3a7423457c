"""TTT-Linear and TTT-MLP: a layer whose hidden state is a model that learns, in torch.

Learning to (Learn at Test Time): RNNs with Expressive Hidden States, 2024, arXiv:2407.04620.

Each head has a model f(x) = LN(x W + b), or LN(gelu(x W1 + b1) W2 + b2), that every sequence
begins at the same learned weights and trains to map keys to values,

    l_s(W) = 1/2 | f(k_s; W) - (v_s - k_s) |^2          o_t = q_t + f(q_t; W_t)

by mini-batches of `mixing.chunk` tokens, whose gradients are taken together where the mini-batch
began. The step of token s, as token t of its mini-batch sees it, has the learned size

    eta_ts = max(1 / (t + 1) + delta_t, 0) base_lr / hd sigmoid(theta . x_s + c)

The dual form is in `kernels/fast_weights/ttt/`. What differs from the paper: the layer stands in
this project's pre-norm decoder with SwiGLU, queries and keys have convolutions of their own, the
norm of the output is an RMSNorm per head.

Dimensions: b batch, t tokens, d residual width, h heads, hd their width, f hidden width of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from kernels.fast_weights.ttt.op import ttt_linear, ttt_mlp
from models.language.config import TransformerConfig
from models.language.layers import Linear, rotary, rotate
from models.language.mixers import FastWeightMixer


class TTTLayer(FastWeightMixer):
    """A mixer that trains a linear model, or an MLP, per head."""

    def __init__(self, config: TransformerConfig, layer: int, mlp: bool) -> None:
        super().__init__(config, layer)
        h, hd, chunk = self.heads, self.head_dim, config.mixing.chunk
        self.chunk, self.mlp, self.impl = chunk, mlp, "auto"
        self.base_lr = config.mixing.base_lr / hd
        widths = [hd, round(config.mixing.expansion * hd), hd] if mlp else [hd, hd]
        self.start_weights = nn.ParameterList(
            torch.empty(h, inner, outer) for inner, outer in pairwise(widths)
        )
        self.start_biases = nn.ParameterList(torch.empty(h, outer) for outer in widths[1:])
        self.model_norm_weight = nn.Parameter(torch.empty(h, hd))
        self.model_norm_shift = nn.Parameter(torch.empty(h, hd))
        self.rate_proj = Linear(config.d_model, h)
        self.rate_bias = nn.Parameter(torch.empty(h))
        self.position_delta = nn.Parameter(torch.empty(chunk))
        self.rotary_config = dataclasses.replace(config, head_dim=hd)

    def start(self, batch: int) -> list[Tensor]:
        """The learned models, weights and biases of each of their layers in turn."""
        return [
            repeat(parameter, "h ... -> b h ...", b=batch)
            for pair in zip(self.start_weights, self.start_biases, strict=True)
            for parameter in pair
        ]

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
        state: Sequence[Tensor],
    ) -> tuple[Float[Tensor, "b t h hd"], Sequence[Tensor]]:
        cos, sin = rotary(self.rotary_config, torch.arange(self.chunk, device=x.device))
        # Positions begin anew in each chunk.
        place = torch.arange(x.shape[1], device=x.device) % self.chunk
        cos, sin = cos[place].to(q.dtype), sin[place].to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        rate = self.base_lr * torch.sigmoid(self.rate_proj(x) + self.rate_bias)  # [b, t, h]
        places = torch.arange(1, self.chunk + 1, device=x.device)
        position = (1 / places + self.position_delta).clamp(min=0)
        norm = self.model_norm_weight, self.model_norm_shift
        if self.mlp:
            w1, b1, w2, b2 = state
            return ttt_mlp(q, k, v, rate, position, (w1, b1, w2, b2), *norm)
        weight, bias = state
        out, *after = ttt_linear(q, k, v, rate, position, weight, bias, *norm, impl=self.impl)
        return out, after

    def state_values(self) -> int:
        """The models."""
        return sum(p.numel() for p in (*self.start_weights, *self.start_biases))

    def init_own(self, generator: torch.Generator | None) -> set[str]:
        """Models: normal with std 0.02, as in the paper; everything that shifts: zero."""
        drawn = super().init_own(generator)
        for weight in self.start_weights:
            weight.normal_(0.0, 0.02, generator=generator)
        self.model_norm_weight.fill_(1.0)
        zero = [self.model_norm_shift, self.rate_bias, self.position_delta, *self.start_biases]
        for parameter in zero:
            parameter.zero_()
        names = ("start_", "model_norm_", "rate_bias", "position_delta")
        return drawn | {name for name, _ in self.named_parameters() if name.startswith(names)}
