"""LaCT: fast weights that are updated seldom, by large chunks, in torch.

Test-Time Training Done Right, 2025, arXiv:2505.23884.

Each head has a SwiGLU MLP f(x) = W1 (silu(W0 x) o (W2 x)). A chunk of tokens is first read with it
and then learned from, by one step along the gradient of sum_s <f(k_s), v_s>:

    G_i = sum_s eta_is d<f(k_s), v_s>/dW_i          eta_is learned from x_s, for each matrix
    M_i <- G_i + m M_i                              m: the chunk's mean of a learned momentum
    W_i <- rows of W_i + NS(M_i), rescaled to the norms they began with

NS is the Newton-Schulz iteration of Muon, which sets the singular values of M_i to about one. With
it a common factor of the eta has no effect, only their ratios do. Sliding attention in the same
layer, on the same queries, keys and values, carries what is read within a chunk.

What differs from the paper: initial weights are full matrices, as at this size a low rank saves
nothing; learning rates, momentum and the gate of the output have biases or fixed offsets, no more.

Dimensions: b batch, t tokens, d residual width, h heads of fast weights, hd their width, f hidden
width of the fast MLP, c tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from kernels.attention.op import attention
from models.language.config import TransformerConfig
from models.language.layers import Linear, rotate
from models.language.mixers import FastWeightMixer

# Coefficients of the five steps of the iteration, as published with the paper.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
FIRST_RATE = 1e-2
"Learning rate of every token before training."

Weights = tuple[Tensor, Tensor, Tensor]  # W0, W1, W2: [b, h, f, hd], [b, h, hd, f], [b, h, f, hd]


class LaCTState(NamedTuple):
    """What a sequence has trained: its weights, their momentum M, and the norms of their rows."""

    weights: Weights
    momentum: Weights
    norms: Weights  # [b, h, rows, 1] each

    @classmethod
    def at(cls, weights: Weights) -> LaCTState:
        """Where a sequence begins."""
        w0, w1, w2 = weights
        n0, n1, n2 = (w.norm(dim=-1, keepdim=True) for w in weights)
        still = torch.zeros_like(w0), torch.zeros_like(w1), torch.zeros_like(w2)
        return cls(weights, still, (n0, n1, n2))


class LaCT(FastWeightMixer):
    """A mixer of sliding attention and of a fast SwiGLU per head."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        d, h, hd = config.d_model, self.heads, self.head_dim
        f = round(config.mixing.expansion * hd)
        self.window, self.impl = config.window, "auto"
        self.chunk, self.reach = config.mixing.chunk, (config.window or 1) - 1
        self.q_conv = self.k_conv = self.v_conv = nn.Identity()  # attention looks back already
        self.attention_head_dim = config.resolved_head_dim
        self.q_scale, self.q_shift = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.k_scale, self.k_shift = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))
        self.start_weights = nn.ParameterList(
            torch.empty(h, *shape) for shape in ((f, hd), (hd, f), (f, hd))
        )
        self.rate_proj, self.momentum_proj = Linear(d, 3 * h), Linear(d, h)
        self.gate_proj = Linear(d, h)

    def answer(
        self,
        x: Float[Tensor, "b r+t d"],
        state: LaCTState,
        before: int,
        cos: Float[Tensor, "r+t 1 hd"],
        sin: Float[Tensor, "r+t 1 hd"],
    ) -> tuple[Float[Tensor, "b t d"], LaCTState]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        seen = self.attend(q, k, v, cos, sin)[:, before:]
        q, k, v = (
            rearrange(y[:, before:], "b t (h hd) -> b t h hd", h=self.heads) for y in (q, k, v)
        )
        x = x[:, before:]
        out, state = self.mix(x, q, k, v, state)
        out = self.out_norm(out) * F.silu(self.gate_proj(x))[..., None]
        return self.o_proj(seen + out.flatten(-2)), state

    def attend(
        self,
        q: Float[Tensor, "b t d"],
        k: Float[Tensor, "b t d"],
        v: Float[Tensor, "b t d"],
        cos: Float[Tensor, "t 1 hd"],
        sin: Float[Tensor, "t 1 hd"],
    ) -> Float[Tensor, "b t d"]:
        """Sliding attention on the shared projections, queries and keys scaled per channel."""
        q, k = q * self.q_scale + self.q_shift, k * self.k_scale + self.k_shift
        q, k, v = (y.unflatten(-1, (-1, self.attention_head_dim)) for y in (q, k, v))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attention(q, k, v, window=self.window, impl=self.impl).flatten(-2)

    def start(self, batch: int) -> LaCTState:
        """The learned weights, at rest."""
        weights = [repeat(w, "h ... -> b h ...", b=batch) for w in self.start_weights]
        w0, w1, w2 = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights)
        return LaCTState.at((w0, w1, w2))

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
        state: LaCTState,
    ) -> tuple[Float[Tensor, "b t h hd"], LaCTState]:
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = (F.normalize(F.silu(y).to(wide), dim=-1) for y in (q, k))
        shift = math.log(math.expm1(FIRST_RATE))  # softplus of it is FIRST_RATE
        rates = F.softplus(self.rate_proj(x).to(wide) + shift)
        rates = rearrange(rates, "b t (h matrix) -> matrix b h t", matrix=3)
        mixing = self.config.mixing
        momentum = self.momentum_proj(x).to(wide).sigmoid() if mixing.momentum else None
        given = q, k, v.to(wide), rates, momentum, state, mixing.chunk
        with torch.autocast(x.device.type, enabled=False):  # fast weights are as wide as they are
            out, state = lact(*given, muon=mixing.muon)
        return out.to(x.dtype), state

    def state_values(self) -> int:
        """The matrices, their momentum, and the norms of their rows."""
        return sum(2 * weight.numel() + weight[..., 0].numel() for weight in self.start_weights)

    def init_own(self, generator: torch.Generator | None) -> set[str]:
        """Fast weights: normal, std 1 / sqrt(columns); attention begins with keys as they are."""
        drawn = super().init_own(generator)
        for weight in self.start_weights:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        for scale, shift in ((self.q_scale, self.q_shift), (self.k_scale, self.k_shift)):
            scale.fill_(1.0)
            shift.zero_()
        names = ("start_", "q_scale", "q_shift", "k_scale", "k_shift")
        return drawn | {name for name, _ in self.named_parameters() if name.startswith(names)}


def lact(
    q: Float[Tensor, "b t h hd"],
    k: Float[Tensor, "b t h hd"],
    v: Float[Tensor, "b t h hd"],
    rates: Float[Tensor, "3 b h t"],
    momentum: Float[Tensor, "b t h"] | None,
    state: LaCTState,
    chunk: int,
    *,
    muon: bool = True,
) -> tuple[Float[Tensor, "b t h hd"], LaCTState]:
    """Read each chunk with the weights before it, then learn from it.

    Args:
        q, k: of unit length.
        rates: learning rate of each token, for each matrix.
        momentum: in (0, 1), averaged over a chunk; None keeps none.
        state: where the sequence begins; rows keep the norms of it.
        muon: orthogonalise the update.
    Returns:
        f(q) under the weights of the chunk's beginning, and the state after the last chunk.
    """
    queries, keys, values = (y.transpose(1, 2) for y in (q, k, v))  # [b, h, t, hd]
    weights, moving, norms = state
    out = []
    for begin in range(0, q.shape[1], chunk):
        here = slice(begin, begin + chunk)
        out.append(swiglu(queries[:, :, here], weights))
        ascent = gradients(keys[:, :, here], values[:, :, here], rates[..., here], weights)
        if momentum is not None:
            kept = momentum[:, here].mean(dim=1)[..., None, None]  # [b, h, 1, 1]
            m0, m1, m2 = (g + kept * m for g, m in zip(ascent, moving, strict=True))
            ascent = moving = m0, m1, m2
        steps = orthogonal_steps(ascent) if muon else ascent
        stepped = [w + step for w, step in zip(weights, steps, strict=True)]
        w0, w1, w2 = (
            w / (w.norm(dim=-1, keepdim=True) + 1e-5) * norm
            for w, norm in zip(stepped, norms, strict=True)
        )
        weights = w0, w1, w2
    return torch.cat(out, dim=2).transpose(1, 2), LaCTState(weights, moving, norms)


def swiglu(x: Float[Tensor, "b h t hd"], weights: Weights) -> Float[Tensor, "b h t hd"]:
    """W1 (silu(W0 x) o (W2 x)) for each row x."""
    w0, w1, w2 = weights
    return (F.silu(x @ w0.mT) * (x @ w2.mT)) @ w1.mT


def gradients(
    k: Float[Tensor, "b h t hd"],
    v: Float[Tensor, "b h t hd"],
    rates: Float[Tensor, "3 b h t"],
    weights: Weights,
) -> list[Tensor]:
    """sum_s rate_is d<f(k_s), v_s>/dW_i for i = 0, 1, 2: the direction of ascent."""
    w0, w1, w2 = weights
    gate, up = k @ w0.mT, k @ w2.mT  # [b, h, t, f]
    sigmoid = torch.sigmoid(gate)
    silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    back = v @ w1  # d<f, v> / d hidden
    r0, r1, r2 = rates[..., None]
    return [
        (r0 * back * up * slope).mT @ k,
        (r1 * v).mT @ (silu * up),
        (r2 * back * silu).mT @ k,
    ]


def orthogonal_steps(ascent: Sequence[Tensor]) -> list[Tensor]:
    """The three directions orthogonalised, in one go: they have one shape but for a transpose."""
    g0, g1, g2 = ascent
    s0, s1, s2 = orthogonalised(torch.stack([g0.mT, g1, g2.mT]))
    return [s0.mT, s1, s2.mT]


def orthogonalised(m: Float[Tensor, "... rows columns"]) -> Float[Tensor, "... rows columns"]:
    """About U V^T of m = U S V^T, by five steps of an odd polynomial; 0 of 0."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    # The square root is kept off zero, where it has no derivative.
    x = x / (x.square().sum(dim=(-2, -1), keepdim=True) + 1e-14).sqrt()
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
