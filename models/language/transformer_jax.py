"""The decoder transformer of `transformer.py` in flax.nnx: same classes, parameters and arguments.

The papers, equations and choices are described there. What differs here:
- every weight has the torch model's name, shape and layout ([out, in] for a linear), so that
  `from_torch` and `to_torch` rename nothing and transpose nothing;
- attention is `jax.nn.dot_product_attention`; there is no KV cache;
- `nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))` replaces the meta device.

Dimensions: b batch, t tokens, d width of the residual stream, h query heads, kv key/value heads,
hd head width, f SwiGLU width, vocab token ids.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.language.config import TransformerConfig


class Linear(nnx.Module):
    """y = x W^T without bias, W normal with the given std."""

    def __init__(self, in_features: int, out_features: int, std: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (out_features, in_features)))

    def __call__(self, x: Float[Array, "*batch inner"]) -> Float[Array, "*batch outer"]:
        return x @ self.weight.T


class Embedding(nnx.Module):
    """A lookup table, normal with the given std."""

    def __init__(self, rows: int, dim: int, std: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (rows, dim)))

    def __call__(self, index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return jnp.take(self.weight[...], index, axis=0)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last dimension, in float32 or wider; dtype of x out."""

    def __init__(self, dim: int, eps: float) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.weight).astype(x.dtype)


def rotary(
    config: TransformerConfig, length: int
) -> tuple[Float[Array, "t 1 hd"], Float[Array, "t 1 hd"]]:
    """Cosines and signed sines of positions 0 .. length - 1, float32, for `rotate`."""
    hd = config.resolved_head_dim
    exponent = jnp.arange(0, hd, 2, dtype=jnp.float32) / hd
    frequency = 1.0 / config.rope_theta**exponent  # [hd/2], radians per token
    if (scaling := config.rope_scaling) is not None:
        # How many times a wave turns within the original context decides: few turns, stretch it.
        turns = scaling.original_context * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    position = jnp.arange(length, dtype=jnp.float32)
    angle = jnp.outer(position, frequency)[:, None]  # [t, 1, hd/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(
    x: Float[Array, "b t heads hd"], cos: Float[Array, "t 1 hd"], sin: Float[Array, "t 1 hd"]
) -> Float[Array, "b t heads hd"]:
    """Turn each pair (x_i, x_{i + hd/2}) by its angle; rolling by hd/2 swaps the halves."""
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def visible(
    length: int, window: int | None, segments: Int[Array, "b t"] | None
) -> Bool[Array, "#b 1 t t"]:
    """Which key each query sees: causal, within the window, within its own document."""
    age = jnp.arange(length)[:, None] - jnp.arange(length)  # [t, t], of a key as a query sees it
    mask = (age >= 0) if window is None else (age >= 0) & (age < window)
    mask = mask[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        d, hd = config.d_model, config.resolved_head_dim
        heads, kv = config.num_heads * hd, config.resolved_kv_heads * hd
        out_std = heads**-0.5 / math.sqrt(2 * config.num_layers)
        self.head_dim = hd
        self.q_proj = Linear(d, heads, d**-0.5, rngs)
        self.k_proj = Linear(d, kv, d**-0.5, rngs)
        self.v_proj = Linear(d, kv, d**-0.5, rngs)
        self.o_proj = Linear(heads, d, out_std, rngs)
        self.q_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        cos: Float[Array, "t 1 hd"],
        sin: Float[Array, "t 1 hd"],
        mask: Bool[Array, "#b 1 t t"],
    ) -> Float[Array, "b t d"]:
        b, t, _ = x.shape
        q = self.q_proj(x).reshape(b, t, -1, self.head_dim)  # [b, t, h, hd]
        k = self.k_proj(x).reshape(b, t, -1, self.head_dim)  # [b, t, kv, hd]
        v = self.v_proj(x).reshape(b, t, -1, self.head_dim)  # [b, t, kv, hd]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.astype(q.dtype), sin.astype(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.o_proj(out.reshape(b, t, -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        d, f = config.d_model, config.resolved_d_ff
        self.gate_proj = Linear(d, f, d**-0.5, rngs)
        self.up_proj = Linear(d, f, d**-0.5, rngs)
        self.down_proj = Linear(f, d, f**-0.5 / math.sqrt(2 * config.num_layers), rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm attention, then pre-norm SwiGLU, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        cos: Float[Array, "t 1 hd"],
        sin: Float[Array, "t 1 hd"],
        mask: Bool[Array, "#b 1 t t"],
    ) -> Float[Array, "b t d"]:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """The decoder; initial weights have the torch model's distributions, not its values.

    Args:
        config: sizes and options; `vocab_size` must be set.
        rngs: its `params` stream gives the initial weights.

    Attributes:
        checkpoint_blocks: recompute each block in the backward pass, keep no activations.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        if config.mixing.pattern:
            raise ValueError(
                "the jax twin has attention only: set model.mixing.pattern=[], or use torch"
            )
        vocab, d = config.resolved_vocab_size, config.d_model
        self.config = config
        self.checkpoint_blocks = False
        self.embed = Embedding(vocab, d, d**-0.5, rngs)
        self.ngram_tables = nnx.List(
            Embedding(config.ngram_buckets, d, 0.0, rngs) for _ in config.ngram_orders
        )
        self.blocks = nnx.List(Block(config, rngs) for _ in range(config.num_layers))
        self.norm = RMSNorm(d, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(d, vocab, d**-0.5, rngs)

    def __call__(
        self, tokens: Int[Array, "b t"], *, segments: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t vocab"]:
        """Logits of the token after each position, in the compute dtype (upcast in the loss).

        Args:
            tokens: ids in [0, vocab); jax does not notice one outside.
            segments: document of each token; nothing is read across documents. Positions run on.
        Raises:
            ValueError: tokens not [b, t], or segments of another shape.
        """
        return self.logits(self.hidden(tokens, segments=segments))

    def hidden(
        self, tokens: Int[Array, "b t"], *, segments: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """The normalised residual stream that the head reads. Arguments as in `__call__`."""
        check_tokens(tokens.shape, None if segments is None else segments.shape)
        x = self.embed(tokens)
        for order, table in zip(self.config.ngram_orders, self.ngram_tables, strict=True):
            x = x + table(ngram_rows(tokens, order, self.config.ngram_buckets, segments))

        cos, sin = rotary(self.config, tokens.shape[1])
        mask = visible(tokens.shape[1], self.config.window, segments)
        forward = nnx.remat(Block.__call__) if self.checkpoint_blocks else Block.__call__
        for block in self.blocks:
            x = forward(block, x, cos, sin, mask)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t vocab"]:
        """The output head, tied or not, on what `hidden` returned."""
        head = self.embed if self.lm_head is None else self.lm_head
        return hidden @ head.weight.T


def check_tokens(tokens: tuple[int, ...], segments: tuple[int, ...] | None) -> None:
    """Refuse shapes that are not those of a batch of sequences."""
    if len(tokens) != 2 or 0 in tokens:
        raise ValueError(f"tokens must be [b, t] with b, t >= 1, got {list(tokens)}")
    if segments is not None and segments != tokens:
        raise ValueError(f"segments must be [b, t] = {list(tokens)}, got {list(segments)}")


def ngram_rows(
    tokens: Int[Array, "b t"],
    order: int,
    buckets: int,
    segments: Int[Array, "b t"] | None = None,
) -> Int[Array, "b t"]:
    """Table row of the `order` tokens ending at each position, counting missing ones as zero.

    A 32-bit FNV-1a hash of token id + 1, newest first, then a mixing round, in wrapping uint32.
    """
    t = tokens.shape[1]
    code = jnp.full(tokens.shape, order, jnp.uint32)
    for age in range(order):
        pad = ((0, 0), (age, 0))
        word = jnp.pad(tokens.astype(jnp.uint32) + 1, pad)[:, :t]
        if segments is not None:
            word = word * (jnp.pad(segments, pad)[:, :t] == segments)
        code = (code ^ word) * jnp.uint32(16777619)
    code = (code ^ (code >> 16)) * jnp.uint32(0x45D9F3B)
    return ((code ^ (code >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)


def num_parameters(model: nnx.Module) -> int:
    """Number of values in the model's parameters, tied ones once; works after `nnx.eval_shape`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model's parameters under the names and in the layout of the torch model's state dict."""
    return {name: np.asarray(param[...]) for name, param in _named_parameters(model).items()}


def from_torch(config: TransformerConfig, state: dict[str, np.ndarray]) -> Transformer:
    """A model holding a torch state dict, given as numpy arrays (`{n: p.numpy() for n, p in ...}`).

    Raises:
        ValueError: names or shapes are not those of `config`.
    """
    return fill(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), state)


M = TypeVar("M", bound=nnx.Module)


def fill(model: M, state: dict[str, np.ndarray]) -> M:
    """`model`, abstract or not, with its parameters set to arrays under their dotted names.

    Raises:
        ValueError: names or shapes are not the model's.
    """
    parameters = _named_parameters(model)
    missing, unexpected = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing or unexpected:
        raise ValueError(
            f"the state is not one of this config: missing {sorted(missing) or 'nothing'}, "
            f"unexpected {sorted(unexpected) or 'nothing'}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"{name} has shape {list(state[name].shape)}, the config asks for "
                f"{list(parameter.shape)}"
            )
        parameter.set_value(jnp.asarray(state[name]))
    return model


def _named_parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): parameter for path, parameter in flat}
