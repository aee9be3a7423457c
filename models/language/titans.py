"""The neural long-term memory of Titans: an MLP per head with momentum and forgetting, in torch.

Titans: Learning to Memorize at Test Time, 2025, arXiv:2501.00663, section 3.

    S_t = eta_t S_{t-1} - theta_t grad l_t          momentum: past surprise, and that of the moment
    M_t = (1 - alpha_t) M_{t-1} + S_t               forgetting

l_t is 1/2 |f(k_t; M) - v_t|^2 of the memory f(k) = k + LN(gelu(k W1) W2). eta, theta and alpha are
learned from the token. Gradients of a chunk are taken where it began, so its S and M are weighted
sums of them, whose weights follow in closed form; a chunk is read before it is stored.

What differs from the paper: a chunk is read with the memory of its beginning, so something else
must carry what is read within it (alternate with sliding attention in `mixing.pattern`: the paper's
memory as a layer); there are no persistent tokens; the gradient of a token is scaled down to norm
1, without which the memory is known to diverge.

Dimensions: b batch, t tokens, d residual width, h heads, hd their width, f hidden width of the
memory, c tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from kernels.fast_weights.ttt.op import inner_gradients, layer_norm
from models.language.config import TransformerConfig
from models.language.layers import Linear
from models.language.mixers import FastWeightMixer

Matrices = tuple[Tensor, Tensor]  # W1 [b, h, hd, f] and W2 [b, h, f, hd], or what belongs to them


class MemoryState(NamedTuple):
    """The weights M of the memory and their momentum S."""

    weights: Matrices
    momentum: Matrices


class NeuralMemory(FastWeightMixer):
    """A mixer that stores the sequence in an MLP per head."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        h, hd = self.heads, self.head_dim
        f = round(config.mixing.expansion * hd)
        self.max_lr, self.chunk = config.mixing.max_lr, config.mixing.chunk
        self.start_weights = nn.ParameterList([torch.empty(h, hd, f), torch.empty(h, f, hd)])
        self.model_norm_weight = nn.Parameter(torch.empty(h, hd))
        self.model_norm_shift = nn.Parameter(torch.empty(h, hd))
        self.rates_proj = Linear(config.d_model, 3 * h)  # eta, theta, alpha
        self.rates_bias = nn.Parameter(torch.empty(3, h))

    def start(self, batch: int) -> MemoryState:
        """The learned memories, at rest."""
        weights = [repeat(w, "h ... -> b h ...", b=batch) for w in self.start_weights]
        wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
        return MemoryState(
            (wide[0], wide[1]), (torch.zeros_like(wide[0]), torch.zeros_like(wide[1]))
        )

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t h hd"],
        v: Float[Tensor, "b t h hd"],
        state: MemoryState,
    ) -> tuple[Float[Tensor, "b t h hd"], MemoryState]:
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(wide) for y in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
        rates = rearrange(self.rates_proj(x).to(wide), "b t (three h) -> three b h t", three=3)
        eta, theta, alpha = (rates + self.rates_bias[:, None, :, None]).sigmoid()
        norm = self.model_norm_weight[:, None].to(wide), self.model_norm_shift[:, None].to(wide)
        given = q, k, v, eta, self.max_lr * theta, alpha, state, norm, self.chunk
        with torch.autocast(x.device.type, enabled=False):  # memories are as wide as they are
            out, state = remember(*given)
        return out.to(x.dtype), state

    def state_values(self) -> int:
        """The memories and their momentum."""
        return 2 * sum(weight.numel() for weight in self.start_weights)

    def init_own(self, generator: torch.Generator | None) -> set[str]:
        """Memories: normal, std 1 / sqrt(columns); forgetting begins at 0.25 % a token."""
        drawn = super().init_own(generator)
        for weight in self.start_weights:
            weight.normal_(0.0, weight.shape[-2] ** -0.5, generator=generator)
        self.model_norm_weight.fill_(1.0)
        self.model_norm_shift.zero_()
        self.rates_bias.copy_(torch.tensor([0.0, 0.0, -6.0])[:, None].expand(3, self.heads))
        names = ("start_", "model_norm_", "rates_bias")
        return drawn | {name for name, _ in self.named_parameters() if name.startswith(names)}


def remember(
    q: Float[Tensor, "b t h hd"],
    k: Float[Tensor, "b t h hd"],
    v: Float[Tensor, "b t h hd"],
    eta: Float[Tensor, "b h t"],
    theta: Float[Tensor, "b h t"],
    alpha: Float[Tensor, "b h t"],
    state: MemoryState,
    norm: tuple[Float[Tensor, "h 1 hd"], Float[Tensor, "h 1 hd"]],
    chunk: int,
) -> tuple[Float[Tensor, "b t h hd"], MemoryState]:
    """Read each chunk from the memory before it, then store it.

    Args:
        eta, theta, alpha: momentum in (0, 1), step size, share that is forgotten in (0, 1).
        norm: scale and shift of the norm inside the memory.
    Returns:
        q + LN(gelu(q W1) W2) under the memory of the chunk's beginning, and the last state.
    """
    queries, keys, values = (y.transpose(1, 2) for y in (q, k, v))  # [b, h, t, hd]
    out = []
    for begin in range(0, q.shape[1], chunk):
        here = slice(begin, begin + chunk)
        w1, w2 = state.weights
        read, ks, vs = queries[:, :, here], keys[:, :, here], values[:, :, here]
        answer = F.gelu(read @ w1, approximate="tanh") @ w2
        out.append(read + layer_norm(answer, *norm))
        none = torch.zeros((), dtype=w1.dtype, device=w1.device)
        inputs, slopes = inner_gradients([(w1, none), (w2, none)], ks, vs - ks, norm)
        scale = 1 / token_norms(inputs, slopes).clamp(min=1.0)  # [b, h, c]
        kept = chunk_weights(eta[..., here], theta[..., here] * scale, alpha[..., here])
        state = stored(state, inputs, slopes, kept)
    return torch.cat(out, dim=2).transpose(1, 2), state


def token_norms(inputs: list[Tensor], slopes: list[Tensor]) -> Float[Tensor, "b h c"]:
    """Norm of each token's gradient, an outer product in each matrix, over both together."""
    squares = [x.square().sum(-1) * g.square().sum(-1) for x, g in zip(inputs, slopes, strict=True)]
    return (sum(squares, torch.zeros_like(squares[0])) + 1e-12).sqrt()


class ChunkWeights(NamedTuple):
    """S and M after a chunk, as sums of what was before and of its tokens' gradients g_s:

    S' = s_of_s S + sum_s s_of_g g_s,  M' = m_of_m M + m_of_s S + sum_s m_of_g g_s
    """

    s_of_s: Float[Tensor, "b h"]
    s_of_g: Float[Tensor, "b h c"]
    m_of_m: Float[Tensor, "b h"]
    m_of_s: Float[Tensor, "b h"]
    m_of_g: Float[Tensor, "b h c"]


def chunk_weights(
    eta: Float[Tensor, "b h c"], theta: Float[Tensor, "b h c"], alpha: Float[Tensor, "b h c"]
) -> ChunkWeights:
    """Both recurrences in closed form, from cumulative sums of log eta and log (1 - alpha)."""
    fading = eta.clamp(min=1e-6).log().cumsum(-1)  # [b, h, c]
    lasting = torch.log1p(-alpha.clamp(max=1 - 1e-6)).cumsum(-1)
    after = torch.ones(eta.shape[-1], eta.shape[-1], dtype=torch.bool, device=eta.device).tril()
    span = fading[..., :, None] - fading[..., None, :]  # [.., t, s]: log of eta_{s+1} .. eta_t
    passed = span.masked_fill(~after, -torch.inf).exp()  # how much of g_s is in S_t
    remains = (lasting[..., -1:] - lasting).exp()  # how much of S_t is in the last M
    return ChunkWeights(
        s_of_s=fading[..., -1].exp(),
        s_of_g=-theta * passed[..., -1, :],
        m_of_m=lasting[..., -1].exp(),
        m_of_s=(remains * fading.exp()).sum(-1),
        m_of_g=-theta * (remains[..., :, None] * passed).sum(-2),
    )


def stored(
    state: MemoryState, inputs: list[Tensor], slopes: list[Tensor], kept: ChunkWeights
) -> MemoryState:
    """The memory after a chunk."""
    weights, momentum = [], []
    for m, s, x, g in zip(state.weights, state.momentum, inputs, slopes, strict=True):
        before = kept.m_of_m[..., None, None] * m + kept.m_of_s[..., None, None] * s
        weights.append(before + (kept.m_of_g[..., None] * x).mT @ g)
        momentum.append(kept.s_of_s[..., None, None] * s + (kept.s_of_g[..., None] * x).mT @ g)
    return MemoryState((weights[0], weights[1]), (momentum[0], momentum[1]))
