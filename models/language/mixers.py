"""The mixer of a block: attention, or a layer whose state is trained on the sequence.

Every mixer maps the normalised residual stream to what is added to it, given the rotary tables of
the call's positions. Mixers with fast weights share what stands around them here: projections of
queries, keys and values, a short causal convolution on them, a norm and a projection of the output.

Dimensions: b batch, t tokens, d residual width, h heads of fast weights, hd their width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.language.config import Mixer, TransformerConfig
from models.language.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from models.language.inference.cache import KVCache


def build_mixer(config: TransformerConfig, layer: int) -> nn.Module:
    """The mixer of block `layer`, as `config.mixing.pattern` says."""
    mixer = config.mixers[layer]
    if mixer in (Mixer.full, Mixer.sliding):
        from models.language.transformer import Attention

        return Attention(config, layer, None if mixer == Mixer.full else config.window)
    if mixer in (Mixer.ttt_linear, Mixer.ttt_mlp):
        from models.language.ttt_layers import TTTLayer

        return TTTLayer(config, mlp=mixer == Mixer.ttt_mlp)
    if mixer in (Mixer.delta, Mixer.gated_delta):
        from models.language.gated_delta import GatedDeltaNet

        return GatedDeltaNet(config, gated=mixer == Mixer.gated_delta)
    if mixer == Mixer.lact:
        from models.language.lact import LaCT

        return LaCT(config, layer)
    from models.language.titans import NeuralMemory

    return NeuralMemory(config)


class FastWeightMixer(nn.Module):
    """Projections, convolution, norm and output around a layer with fast weights.

    A subclass computes `mix(x, q, k, v)` and draws what else it has in `init_weights`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config, self.heads = config, config.resolved_mixing_heads
        self.head_dim = d // self.heads
        self.q_proj, self.k_proj, self.v_proj = Linear(d, d), Linear(d, d), Linear(d, d)
        self.o_proj = Linear(d, d)
        width = config.mixing.conv
        self.q_conv = ShortConvolution(d, width) if width else nn.Identity()
        self.k_conv = ShortConvolution(d, width) if width else nn.Identity()
        self.v_conv = ShortConvolution(d, width) if width else nn.Identity()
        self.out_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cos: Float[Tensor, "t 1 hd"],
        sin: Float[Tensor, "t 1 hd"],
        segments: Int[Tensor, "b t"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        self.refuse(segments, cache)
        q, k, v = (
            rearrange(conv(proj(x)), "b t (h hd) -> b t h hd", h=self.heads)
            for proj, conv in (
                (self.q_proj, self.q_conv),
                (self.k_proj, self.k_conv),
                (self.v_proj, self.v_conv),
            )
        )
        return self.o_proj(self.finish(x, self.mix(x, q, k, v)).flatten(-2))

    def refuse(self, segments: object, cache: object) -> None:
        """Fast weights know neither documents within a sequence nor how to go on from a cache."""
        if segments is not None or cache is not None:
            given = "data.document_mask" if segments is not None else "a KV cache"
            raise ValueError(
                f"{type(self).__name__} reads a sequence from its beginning to its end and cannot "
                f"take {given}: use attention in model.mixing.pattern"
            )

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
    ) -> Float[Tensor, "b t h hd"]:
        """What the fast weights answer."""
        raise NotImplementedError

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes of a sequence's fast weights, float32, and of what the convolutions still need."""
        conv = 3 * max(self.config.mixing.conv - 1, 0) * self.config.d_model * itemsize
        return 4 * self.state_values() + conv

    def state_values(self) -> int:
        """Numbers in the state of a sequence."""
        raise NotImplementedError

    def finish(
        self, x: Float[Tensor, "b t d"], out: Float[Tensor, "b t h hd"]
    ) -> Float[Tensor, "b t h hd"]:
        """What is done to the answer before the output projection."""
        return self.out_norm(out)

    def init_own(self, generator: torch.Generator | None) -> set[str]:
        """Draw the parameters that are neither matrices of a projection nor norms; their names.

        The model draws the others.
        """
        drawn = {name for name, _ in self.named_parameters() if "_conv." in name}
        for name in sorted(drawn):
            weight = self.get_parameter(name)
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        return drawn


class ShortConvolution(nn.Module):
    """Each channel's own causal convolution over the last tokens, then SiLU.

    It lets a key stand for a token together with those before it, without which a layer that only
    maps keys to values of the same token could not learn what follows what.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x: Float[Tensor, "b t channels"]) -> Float[Tensor, "b t channels"]:
        channels, _, width = self.weight.shape
        padded = F.pad(x.mT, (width - 1, 0))  # [b, channels, t + width - 1]
        return F.silu(F.conv1d(padded, self.weight, groups=channels).mT)
