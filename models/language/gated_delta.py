"""DeltaNet and Gated DeltaNet: a linear memory that corrects what it predicts, in torch.

Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024, arXiv:2406.06484;
Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv:2412.06464.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t

with keys and queries of unit length, beta_t = sigmoid(w_beta . x_t) and, where it is gated,
alpha_t = exp(-exp(a) softplus(w_alpha . x_t + c)) (a, c as in Mamba-2, arXiv:2405.21060); the gated
layer multiplies its normed output by silu of a projection of x. The rule is in
`kernels/fast_weights/gated_delta/`. What differs from the papers: values are as wide as keys, so
that a block has about the parameters of an attention block.

Dimensions: b batch, t tokens, d residual width, h heads, hd their width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.fast_weights.gated_delta.op import gated_delta_rule
from models.language.config import TransformerConfig
from models.language.layers import Linear
from models.language.mixers import FastWeightMixer


class GatedDeltaNet(FastWeightMixer):
    """A mixer with a linear memory per head; without `gated` it never fades."""

    def __init__(self, config: TransformerConfig, layer: int, gated: bool) -> None:
        super().__init__(config, layer)
        d, h = config.d_model, self.heads
        self.gated, self.impl = gated, "auto"
        self.beta_proj = Linear(d, h)
        if gated:
            self.alpha_proj, self.gate_proj = Linear(d, h), Linear(d, d)
            self.log_fade = nn.Parameter(torch.empty(h))
            self.fade_bias = nn.Parameter(torch.empty(h))

    def start(self, batch: int) -> None:
        """Nothing is stored."""

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
        state: Float[Tensor, "b h hd hd"] | None,
    ) -> tuple[Float[Tensor, "b t h hd"], Float[Tensor, "b h hd hd"]]:
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = (F.normalize(y.to(wide), dim=-1).to(y.dtype) for y in (q, k))
        beta = self.beta_proj(x).sigmoid()  # [b, t, h]
        fade = None
        if self.gated:
            pace = F.softplus(self.alpha_proj(x).to(wide) + self.fade_bias)
            fade = -self.log_fade.exp() * pace  # [b, t, h], log of alpha
        return gated_delta_rule(q, k, v, beta, fade, state=state, scale=1.0, impl=self.impl)

    def finish(
        self, x: Float[Tensor, "b t d"], out: Float[Tensor, "b t h hd"]
    ) -> Float[Tensor, "b t h hd"]:
        out = self.out_norm(out)
        if not self.gated:
            return out
        return out * F.silu(self.gate_proj(x)).unflatten(-1, (self.heads, -1))

    def state_values(self) -> int:
        """A matrix per head."""
        return self.heads * self.head_dim**2

    def init_own(self, generator: torch.Generator | None) -> set[str]:
        """Fading as in Mamba-2: rates uniform in [1, 16] (or scaled by `mixing.fade_rate`), times
        log-uniform in [1e-3, 1e-1]."""
        drawn = super().init_own(generator)
        if not self.gated:
            return drawn
        rate = self.config.mixing.fade_rate
        self.log_fade.uniform_(rate / 16, rate, generator=generator).log_()
        low, high = math.log(1e-3), math.log(1e-1)
        time = self.fade_bias.uniform_(low, high, generator=generator).exp()
        self.fade_bias.copy_(time + torch.log(-torch.expm1(-time)))  # softplus of it is `time`
        return drawn | {"log_fade", "fade_bias"}
