"""The decoder of `ttt_e2e.py` in torch: same names, parameters and arithmetic, for reading.

A model that was meta-trained in jax is exported under these names and reads here, one sequence at a
time, with this project's attention kernels under it. The papers, equations and choices are
described there. What differs here:
- nothing is meta-trained: `create_graph=True` gives losses that can be differentiated through the
  inner steps, which the tests compare, but attention's kernels have first derivatives only;
- a memory holds no empty rows: it grows until it has the window's.

Dimensions: t tokens, d residual width, h query heads, kv key/value heads, hd head width, w window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from kernels.attention.op import attention
from models.language.config import TTTE2EConfig
from models.language.layers import Embedding, Linear, RMSNorm, rotary, rotate
from models.language.transformer import SwiGLU

Memory = tuple[Tensor, Tensor]  # keys (normalised, not rotated) and values, [s, kv, hd], s <= w


class State(NamedTuple):
    """What a sequence has left behind: fast weights by name, and a memory for each block."""

    fast: dict[str, Tensor]
    memories: tuple[Memory, ...]


class SlidingAttention(nn.Module):
    """Attention over the window before each token, part of which may be in memory."""

    def __init__(self, config: TTTE2EConfig) -> None:
        super().__init__()
        d, hd, kv = config.d_model, config.resolved_head_dim, config.resolved_kv_heads
        self.config, self.impl = config, "auto"
        self.q_proj, self.o_proj = (
            Linear(d, config.num_heads * hd),
            Linear(config.num_heads * hd, d),
        )
        self.k_proj, self.v_proj = Linear(d, kv * hd), Linear(d, kv * hd)
        self.q_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "t d"], memory: Memory
    ) -> tuple[Float[Tensor, "t d"], Memory]:
        t, hd, window = x.shape[0], self.config.resolved_head_dim, self.config.window
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, hd)))  # [t, h, hd]
        k = torch.cat([memory[0], self.k_norm(self.k_proj(x).unflatten(-1, (-1, hd)))])
        v = torch.cat([memory[1], self.v_proj(x).unflatten(-1, (-1, hd))])  # [s, kv, hd]
        cos, sin = (
            y.to(x.dtype) for y in rotary(self.config, torch.arange(len(k), device=x.device))
        )
        out = attention(
            rotate(q[None], cos[-t:], sin[-t:]), rotate(k[None], cos, sin), v[None],
            window=window, impl=self.impl,
        )  # fmt: skip
        kept = len(k) if window is None else window
        return self.o_proj(out[0].flatten(-2)), (k[-kept:], v[-kept:])


class Block(nn.Module):
    """Attention, a prime MLP in the last blocks, the MLP; each between two norms."""

    def __init__(self, config: TTTE2EConfig, prime: bool) -> None:
        super().__init__()
        d, eps = config.d_model, config.norm_eps
        self.attention_norm, self.attention = RMSNorm(d, eps), SlidingAttention(config)
        self.attention_post_norm = RMSNorm(d, eps)
        self.prime = None
        if prime:
            wide = dataclasses.replace(config, d_ff=config.resolved_prime_d_ff)
            self.prime_norm, self.prime = RMSNorm(d, eps), SwiGLU(wide)
            self.prime_post_norm = RMSNorm(d, eps)
        self.mlp_norm, self.mlp, self.mlp_post_norm = (
            RMSNorm(d, eps),
            SwiGLU(config),
            RMSNorm(d, eps),
        )

    def forward(
        self, x: Float[Tensor, "t d"], memory: Memory
    ) -> tuple[Float[Tensor, "t d"], Memory]:
        out, memory = self.attention(self.attention_norm(x), memory)
        x = x + self.attention_post_norm(out)
        if self.prime is not None:
            x = x + self.prime_post_norm(self.prime(self.prime_norm(x)))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), memory


class TTTE2E(nn.Module):
    """The decoder, holding exported weights.

    Args:
        config: as exported in model.json.
        weights: as exported in model.safetensors.
    Raises:
        RuntimeError: names or shapes are not those of `config`.
    """

    def __init__(self, config: TTTE2EConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        vocab, d = config.resolved_vocab_size, config.d_model
        self.config, self.first_prime = config, config.num_layers - config.prime_layers
        self.embed = Embedding(vocab, d)
        self.blocks = nn.ModuleList(
            Block(config, layer >= self.first_prime) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(d, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(d, vocab)
        self.load_state_dict(dict(weights))

    def forward(
        self, x: Float[Tensor, "t d"], memories: tuple[Memory, ...]
    ) -> tuple[Float[Tensor, "t vocab"], tuple[Memory, ...]]:
        """Logits and memories after the blocks that carry fast weights."""
        after = []
        for block, memory in zip(self.blocks[self.first_prime :], memories, strict=True):
            x, memory = block(x, memory)
            after.append(memory)
        head = self.embed if self.lm_head is None else self.lm_head
        return F.linear(self.norm(x), head.weight), tuple(after)

    def initial_state(self) -> State:
        """Of a sequence that has read nothing: W_0 in float32 or wider, no memory."""
        config = self.config
        fast = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32))
            for name, p in self.named_parameters()
            if fnmatchcase(name, config.fast)
        }
        empty = self.embed.weight.new_empty(0, config.resolved_kv_heads, config.resolved_head_dim)
        return State(fast, ((empty, empty),) * config.num_layers)


def read(
    model: TTTE2E,
    tokens: Int[Tensor, " t+1"],
    state: State,
    inner_lr: float | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Float[Tensor, " t"], State]:
    """Score tokens[1:] chunk by chunk, learning from each chunk after it was scored.

    Args:
        tokens: t + 1 ids; t is a multiple of `config.chunk`.
        state: where the sequence stands.
        inner_lr: eta; None takes the model's, 0 learns nothing.
        create_graph: keep the graph of the inner steps, so that the losses have exact derivatives.
    Raises:
        ValueError: t is no multiple of the chunk.
    """
    config, first = model.config, model.first_prime
    rate = config.inner_lr if inner_lr is None else inner_lr
    t = len(tokens) - 1
    if t < 1 or t % config.chunk:
        raise ValueError(f"{t} tokens are no whole number of chunks of model.chunk={config.chunk}")
    memories, fast, scores = list(state.memories), state.fast, []
    with torch.set_grad_enabled(create_graph):
        x = model.embed(tokens[:-1])
        for layer in range(first):
            x, memories[layer] = model.blocks[layer](x, memories[layer])
    suffix = tuple(memories[first:])
    for begin in range(0, t, config.chunk):
        here = slice(begin, begin + config.chunk)
        with torch.enable_grad():
            if not create_graph:
                fast = {name: w.detach().requires_grad_() for name, w in fast.items()}
            narrow = {name: w.to(x.dtype) for name, w in fast.items()}
            logits, suffix = functional_call(model, narrow, (x[here], suffix))
            wide = torch.promote_types(logits.dtype, torch.float32)
            losses = F.cross_entropy(logits.to(wide), tokens[1:][here], reduction="none")
            if rate:
                leaves = tuple(fast.values())
                gradient = torch.autograd.grad(losses.mean(), leaves, create_graph=create_graph)
                stepped = inner_step(leaves, gradient, rate, config.inner_clip)
                fast = dict(zip(fast, stepped, strict=True))
        scores.append(losses)
        if not create_graph:
            scores[-1] = losses.detach()
            suffix = tuple((k.detach(), v.detach()) for k, v in suffix)
    if not create_graph:
        fast = {name: w.detach() for name, w in fast.items()}
    return torch.cat(scores), State(fast, (*memories[:first], *suffix))


def inner_step(
    weights: tuple[Tensor, ...], gradient: tuple[Tensor, ...], inner_lr: float, clip: float | None
) -> list[Tensor]:
    """W - eta g min(1, clip / |g|), |g| over all weights together. Differentiable at g = 0."""
    squares = torch.stack([g.square().sum() for g in gradient]).sum()
    norm = (squares + 1e-5).sqrt()
    scale = inner_lr if clip is None else inner_lr * (clip / norm).clamp(max=1.0)
    return [w - scale * g for w, g in zip(weights, gradient, strict=True)]
