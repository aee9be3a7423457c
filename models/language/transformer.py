"""A decoder transformer: the Llama / Qwen3 family on one page, in torch.

    x = embed[token] (+ hashed n-gram tables)
    x = x + attention(norm(x));  x = x + swiglu(norm(x))      in each of L blocks
    logits = norm(x) @ head^T

GQA            Training Generalized Multi-Query Transformer Models, 2023, arXiv:2305.13245
SwiGLU         GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 6
qk-norm        Scaling Vision Transformers to 22 Billion Parameters, 2023, arXiv:2302.05442; here
               per head with a weight, before the rotation, as in Qwen3, 2025, arXiv:2505.09388
n-gram tables  a plain form of N-Grammer, 2022, arXiv:2207.06366: hashed token ids, no clusters

`transformer_jax.py` is the same model in flax.nnx, parameter for parameter; `huggingface.py` reads
and writes Hugging Face checkpoints.

Dimensions: b batch, t tokens of this call, s positions attended (cached + t), d residual width,
h query heads, kv key/value heads, hd head width, f SwiGLU width, vocab token ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.op import attention
from models.language.config import TransformerConfig
from models.language.inference.cache import KVCache
from models.language.layers import Embedding, Linear, RMSNorm, rotary, rotate
from models.language.mixers import FastWeightMixer, build_mixer
from models.language.prefix import Prefix, Reading

Cache = KVCache | Prefix | Reading


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, layer: int, window: int | None) -> None:
        super().__init__()
        d, hd = config.d_model, config.resolved_head_dim
        self.layer, self.head_dim, self.window = layer, hd, window
        self.impl = "auto"
        self.q_proj = Linear(d, config.num_heads * hd)
        self.k_proj = Linear(d, config.resolved_kv_heads * hd)
        self.v_proj = Linear(d, config.resolved_kv_heads * hd)
        self.o_proj = Linear(config.num_heads * hd, d)
        self.q_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cos: Float[Tensor, "t 1 hd"],
        sin: Float[Tensor, "t 1 hd"],
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t d"]:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [b, t, h, hd]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [b, t, kv, hd]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [b, t, kv, hd]
        if cache is None:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
            q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
            out = attention(q, k, v, window=self.window, segments=segments, impl=self.impl)
        else:
            rope = cos[:, 0], sin[:, 0]  # [t, hd]
            out = cache.attend(self.layer, q, k, v, rope=rope, window=self.window, **self.norms())
        return self.o_proj(out.flatten(-2))

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Bytes of the keys and values that queries after `length` tokens can see."""
        seen = length if self.window is None else min(length, self.window)
        return 2 * seen * self.k_proj.out_features * itemsize

    def norms(self) -> dict[str, Any]:
        """The query and key norms as the cache takes them; none without qk-norm."""
        if not (isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm)):
            return {}
        eps = self.q_norm.eps
        return {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "norm_eps": eps}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.resolved_d_ff
        self.gate_proj = Linear(d, f)
        self.up_proj = Linear(d, f)
        self.down_proj = Linear(f, d)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention (or another mixer), then pre-norm SwiGLU, added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = build_mixer(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cos: Float[Tensor, "t 1 hd"],
        sin: Float[Tensor, "t 1 hd"],
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.attention(self.attention_norm(x), cos, sin, segments, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The decoder. Under `torch.device("meta")` it is built without memory or values; then
    `model.to_empty(device=...)` and `model.init_weights(generator)` give what a direct build gives.

    Args:
        config: sizes and options; `vocab_size` must be set.
        generator: source of the initial weights, on the device of the model; None: torch's own.

    Attributes:
        checkpoint_blocks: recompute each block in the backward pass, keep no activations.
    """

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        vocab, d = config.resolved_vocab_size, config.d_model
        self.config = config
        self.checkpoint_blocks = False
        self.embed = Embedding(vocab, d)
        self.ngram_tables = nn.ModuleList(
            Embedding(config.ngram_buckets, d) for _ in config.ngram_orders
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(d, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(d, vocab)
        if not self.embed.weight.is_meta:
            self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter, in the order of the modules.

        Matrices: normal, std 1 / sqrt(columns), so that what a norm feeds (queries, keys, logits)
        starts with unit variance at any width. The two that write to the residual stream: a further
        1 / sqrt(2 L), so that its variance does not grow with depth (GPT-2). Norms: one. n-gram
        tables: zero, as if they were not there. What else a mixer has, it draws itself.
        """
        own = set()
        for prefix, module in self.named_modules():
            if isinstance(module, FastWeightMixer):
                own |= {f"{prefix}.{name}" for name in module.init_own(generator)}
        for name, parameter in self.named_parameters():
            if name in own:
                continue
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.startswith("ngram_tables."):
                parameter.zero_()
            else:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.num_layers)
                parameter.normal_(0.0, std, generator=generator)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b t vocab"]:
        """Logits of the token after each position, in the compute dtype (upcast in the loss).

        Args:
            tokens: ids in [0, vocab).
            segments: document of each token; nothing is read across documents. Positions run on.
            cache: what stands before the tokens: a `KVCache`, to which they are added, a `Prefix`,
                or a `Reading`, which keeps what the layers compute.
            positions: of the tokens, the same for all sequences; None: one after the other, from
                where the cache ends.
        Raises:
            ValueError: tokens not [b, t], segments or positions of another shape, segments or
                positions given together with a `KVCache`, a prefix of another model, or more
                tokens than the cache has room for.
        """
        hidden = self.hidden(tokens, segments=segments, cache=cache, positions=positions)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        segments: Int[Tensor, "b t"] | None = None,
        cache: Cache | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The normalised residual stream that the head reads. Arguments as in `forward`."""
        check_tokens(tokens.shape, None if segments is None else segments.shape)
        t = tokens.shape[1]
        if cache is not None:
            if segments is not None:
                raise ValueError(
                    "segments and cache exclude each other: generate one document at a time"
                )
            cache.check(self.config)
        if positions is None:
            start = 0 if cache is None else cache.position
            positions = torch.arange(start, start + t, device=tokens.device)
        elif positions.shape != (t,) or isinstance(cache, KVCache):
            raise ValueError(
                f"positions must be [t] = [{t}], got {list(positions.shape)}, and a KVCache counts "
                "them itself"
            )
        history = tokens if cache is None else cache.extend(tokens)  # [b, s]

        x = self.embed(tokens)
        for order, table in zip(self.config.ngram_orders, self.ngram_tables, strict=True):
            recent = history[:, max(0, history.shape[1] - t - order + 1) :]
            rows = ngram_rows(recent, order, self.config.ngram_buckets, segments)
            x = x + table(rows[:, -t:])

        cos, sin = rotary(self.config, positions)
        for block in self.blocks:
            again = cache is None or isinstance(cache, Prefix)  # the others must be filled once
            if self.checkpoint_blocks and torch.is_grad_enabled() and again:
                x = checkpoint(block, x, cos, sin, segments, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, segments, cache)
        return self.norm(x)

    def state_bytes(self, length: int) -> int:
        """Bytes that a sequence of `length` tokens leaves behind: keys and values, fast weights."""
        itemsize = self.embed.weight.element_size()
        mixers: list[Any] = [block.attention for block in self.blocks]
        return sum(mixer.state_bytes(length, itemsize) for mixer in mixers)

    def logits(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t vocab"]:
        """The output head, tied or not, on what `hidden` returned."""
        head = self.embed if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)


def check_tokens(tokens: tuple[int, ...], segments: tuple[int, ...] | None) -> None:
    """Refuse shapes that are not those of a batch of sequences."""
    if len(tokens) != 2 or 0 in tokens:
        raise ValueError(f"tokens must be [b, t] with b, t >= 1, got {list(tokens)}")
    if segments is not None and segments != tokens:
        raise ValueError(f"segments must be [b, t] = {list(tokens)}, got {list(segments)}")


def ngram_rows(
    tokens: Int[Tensor, "b t"],
    order: int,
    buckets: int,
    segments: Int[Tensor, "b t"] | None = None,
) -> Int[Tensor, "b t"]:
    """Table row of the `order` tokens ending at each position, counting missing ones as zero.

    A 32-bit FNV-1a hash of token id + 1, newest first, then a mixing round. Products stay below
    2^63, so int64 arithmetic reduced modulo 2^32 equals the wrapping uint32 of the jax twin.
    """
    low32, t = 0xFFFFFFFF, tokens.shape[1]
    code = torch.full_like(tokens, order, dtype=torch.int64)
    for age in range(order):
        word = F.pad(tokens.long() + 1, (age, 0))[:, :t]
        if segments is not None:
            word = word * (F.pad(segments, (age, 0))[:, :t] == segments)
        code = ((code ^ word) * 16777619) & low32
    code = ((code ^ (code >> 16)) * 0x45D9F3B) & low32
    return (code ^ (code >> 16)) % buckets


def num_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of values in the model's parameters, tied ones once; works on meta."""
    parameters = model.parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable_only)
