"""The mixer of a block: attention, or a layer whose state is trained on the sequence.

Every mixer maps the normalised residual stream to what is added to it, given the rotary tables of
the call's positions. Mixers with fast weights share what stands around them here: projections of
queries, keys and values, a short causal convolution on them, a norm and a projection of the output.

Dimensions: b batch, t tokens, d residual width, h heads of fast weights, hd their width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.language.config import Mixer, TransformerConfig
from models.language.layers import Linear, RMSNorm, rotary

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

        return TTTLayer(config, layer, mlp=mixer == Mixer.ttt_mlp)
    if mixer in (Mixer.delta, Mixer.gated_delta):
        from models.language.gated_delta import GatedDeltaNet

        return GatedDeltaNet(config, layer, gated=mixer == Mixer.gated_delta)
    if mixer == Mixer.lact:
        from models.language.lact import LaCT

        return LaCT(config, layer)
    from models.language.titans import NeuralMemory

    return NeuralMemory(config, layer)


class Past(NamedTuple):
    """What a layer with fast weights keeps of the tokens before a call."""

    state: Any
    "Fast weights after the last whole chunk."
    recent: Float[Tensor, "b r d"]
    "The layer's last inputs: those since then, and before them those that the layer looks back to."
    pending: int
    "How many of them the fast weights have not learned from."


class FastWeightMixer(nn.Module):
    """Projections, convolution, norm and output around a layer with fast weights.

    A subclass computes `mix`, says what `start` is, and draws what else it has in `init_own`.

    Attributes:
        chunk: tokens between which one call may end and the next begin; within, they are read anew.
        reach: tokens before the current one that anything but the fast weights looks at.
    """

    chunk = 1

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.layer, self.reach = layer, max(config.mixing.conv - 1, 0)
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
        if segments is not None:
            raise ValueError(
                f"{type(self).__name__} reads a sequence from its beginning to its end and cannot "
                "take data.document_mask: use attention in model.mixing.pattern"
            )
        if cache is None:
            return self.answer(x, self.start(len(x)), 0, cos, sin)[0]
        return self.go_on(x, cache)

    def answer(
        self,
        x: Float[Tensor, "b r+t d"],
        state: Any,
        before: int,
        cos: Float[Tensor, "r+t 1 hd"],
        sin: Float[Tensor, "r+t 1 hd"],
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """What is added to the stream, and the fast weights after the last token.

        Args:
            x: `before` inputs that are only looked back to, and those to learn from and to answer.
            state: fast weights before the first of those.
        """
        q, k, v = (
            rearrange(conv(proj(x))[:, before:], "b t (h hd) -> b t h hd", h=self.heads)
            for proj, conv in (
                (self.q_proj, self.q_conv),
                (self.k_proj, self.k_conv),
                (self.v_proj, self.v_conv),
            )
        )
        x = x[:, before:]
        out, state = self.mix(x, q, k, v, state)
        return self.o_proj(self.finish(x, out).flatten(-2)), state

    def go_on(self, x: Float[Tensor, "b t d"], cache: KVCache) -> Float[Tensor, "b t d"]:
        """The tokens after those that the cache has seen; what they leave is put there.

        Fast weights are kept as they are after a whole chunk. The tokens since then are read again
        with every call, so that any cut of a sequence into calls gives what one call gives.
        """
        t = x.shape[1]
        past = cache.past[self.layer] or Past(self.start(len(x)), x[:, :0], 0)
        x = torch.cat([past.recent, x], dim=1)
        seen = torch.arange(cache.position - x.shape[1], cache.position, device=x.device)
        cos, sin = rotary(self.config, seen)
        outputs, state, begin = [], past.state, past.recent.shape[1] - past.pending
        whole = (x.shape[1] - begin) // self.chunk * self.chunk
        for end in (begin + whole, x.shape[1]):
            if end > begin:
                first = max(0, begin - self.reach)
                part = x[:, first:end], state, begin - first, cos[first:end], sin[first:end]
                out, after = self.answer(*part)
                outputs.append(out)
                state = after if (end - begin) % self.chunk == 0 else state
            begin = end
        pending = (past.pending + t) % self.chunk
        recent = x[:, max(0, x.shape[1] - self.reach - pending) :]
        cache.past[self.layer] = Past(state, recent, pending)
        return torch.cat(outputs, dim=1)[:, -t:]

    def start(self, batch: int) -> Any:
        """Fast weights of sequences before their first token."""
        raise NotImplementedError

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
        state: Any,
    ) -> tuple[Float[Tensor, "b t h hd"], Any]:
        """What the fast weights answer, and what they are after the last token."""
        raise NotImplementedError

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes of a `Past`: fast weights in float32, and the most inputs that it can hold."""
        recent = min(length, self.reach + self.chunk - 1)
        return 4 * self.state_values() + recent * self.config.d_model * itemsize

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
