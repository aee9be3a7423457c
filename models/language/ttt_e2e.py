"""TTT-E2E: a decoder that trains a few of its weights on what it reads, in flax.nnx.

End-to-End Test-Time Training for Long Context, 2025, arXiv:2512.23675.

A sequence is read in chunks of b tokens. The last blocks carry a second, "prime" MLP, and its
weights W are fast: every chunk is first scored and then learned from,

    W_i = W_{i-1} - eta clip( grad_W  1/b sum_{t in chunk i} l_t(W_{i-1}) )        inner step
    L   = 1/T sum_i sum_{t in chunk i} l_t(W_{i-1})                                outer loss

l_t is the cross-entropy of token t + 1, clip limits the global norm of the gradient. The outer
loss is differentiated through the inner steps (`order="second"`), with respect to every weight and
to W_0 among them. One forward pass per chunk serves both, so the model is causal by construction.

Blocks are serial with sandwich norms, the prime MLP before the normal one:

    h += norm(attention(norm(h)));  h += norm(prime(norm(h)));  h += norm(mlp(norm(h)))

The blocks before the first prime MLP do not depend on W: they read the whole sequence at once and
need no second derivative. Attention is a sliding window; each block of queries re-anchors its
rotary positions to 0 .. 2 window - 1, so positions stay bounded at any length.

`ttt_e2e_torch.py` reads with exported weights in torch.

What differs from the paper: the square root in the clip has 1e-5 inside (its gradient exists at
zero), and sequences may be continued: `State` is all that has been learned and is in view.

Dimensions: t tokens, d residual width, h query heads, kv key/value heads, hd head width, w window,
b tokens of a chunk. Everything up to `losses` is about one sequence; batches are vmapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.language.config import InnerOrder, TTTE2EConfig
from models.language.transformer_jax import (
    Attention,
    Embedding,
    Linear,
    RMSNorm,
    SwiGLU,
    rotary,
    rotate,
)
from models.language.transformer_jax import num_parameters as num_parameters

Fast = Any  # a pytree of the fast weights


class Memory(NamedTuple):
    """Keys (normalised, not rotated) and values of the last w positions that a layer has seen."""

    k: Float[Array, "w kv hd"]
    v: Float[Array, "w kv hd"]


class State(NamedTuple):
    """What a sequence has left behind: all that is needed to read on."""

    fast: Fast
    memories: tuple[Memory, ...]
    seen: Int[Array, ""]


class Reading(NamedTuple):
    """What reading n chunks gave."""

    losses: Float[Array, " t"]
    "Nats of each next token, scored before it was learned from."
    gradient_norms: Float[Array, " n"]
    "Global norm of each chunk's inner gradient, before the clip."
    state: State


def sliding_attention(
    q: Float[Array, "t h hd"],
    k: Float[Array, "t kv hd"],
    v: Float[Array, "t kv hd"],
    memory: Memory,
    seen: Int[Array, ""],
    rope: Callable[[int], tuple[Array, Array]],
) -> tuple[Float[Array, "t h hd"], Memory]:
    """Each query sees itself and the w - 1 positions before it, of this call or in memory.

    Blocks of at most w queries, each against the w keys before it and its own: linear in t.

    Args:
        memory: its first rows are empty as long as fewer than w positions were seen.
        seen: positions before the first of this call.
        rope: length -> cosines and sines of positions 0 .. length - 1.
    """
    t, w = q.shape[0], memory.k.shape[0]
    keys, values = jnp.concatenate([memory.k, k]), jnp.concatenate([memory.v, v])  # [w + t, kv, hd]
    size = min(t, w)
    blocks = -(-t // size)
    cos, sin = (table.astype(q.dtype) for table in rope(w + size))

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, blocks * size - t), (0, 0), (0, 0)))

    def block(index: Array, q: Float[Array, "size h hd"]) -> Float[Array, "size h hd"]:
        begin, span = index * size, w + size
        k = jax.lax.dynamic_slice_in_dim(padded(keys), begin, span)
        v = jax.lax.dynamic_slice_in_dim(padded(values), begin, span)
        age = (w + jnp.arange(size))[:, None] - jnp.arange(span)  # of a key, as a query sees it
        exists = jnp.arange(span) >= w - (seen + begin)
        q, k = rotate(q, cos[w:], sin[w:]), rotate(k, cos, sin)
        return softmax_attention(q, k, v, (age >= 0) & (age < w) & exists)

    q = padded(q).reshape(blocks, size, *q.shape[1:])
    out = jax.vmap(block)(jnp.arange(blocks), q) if blocks > 1 else block(jnp.asarray(0), q[0])
    return out.reshape(blocks * size, *q.shape[2:])[:t], Memory(keys[t:], values[t:])


def full_attention(
    q: Float[Array, "t h hd"],
    k: Float[Array, "t kv hd"],
    v: Float[Array, "t kv hd"],
    rope: Callable[[int], tuple[Array, Array]],
) -> Float[Array, "t h hd"]:
    """Each query sees itself and all before it. Blocks of queries keep the memory linear in t."""
    t = q.shape[0]
    size = min(t, 1024)
    blocks = -(-t // size)
    cos, sin = (table.astype(q.dtype) for table in rope(t))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    def block(given: tuple[Array, Array]) -> Float[Array, "size h hd"]:
        begin, q = given
        return softmax_attention(q, k, v, begin + jnp.arange(size)[:, None] >= jnp.arange(t))

    if blocks == 1:
        return block((jnp.asarray(0), q))
    q = jnp.pad(q, ((0, blocks * size - t), (0, 0), (0, 0))).reshape(blocks, size, *q.shape[1:])
    out = jax.lax.map(block, (jnp.arange(blocks) * size, q))
    return out.reshape(blocks * size, *q.shape[2:])[:t]


def softmax_attention(
    q: Float[Array, "t h hd"],
    k: Float[Array, "s kv hd"],
    v: Float[Array, "s kv hd"],
    mask: Bool[Array, "t s"],
) -> Float[Array, "t h hd"]:
    """Softmax attention in plain operations, softmax in float32: it is differentiated twice.

    `mask` is True where the query sees the key.
    """
    (t, _, hd), kv = q.shape, k.shape[1]
    q = q.reshape(t, kv, -1, hd)  # [t, kv, g, hd]
    scores = jnp.einsum("tkgd,skd->kgts", q, k).astype(jnp.promote_types(q.dtype, jnp.float32))
    weights = jax.nn.softmax(jnp.where(mask, scores * hd**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum("kgts,skd->tkgd", weights.astype(v.dtype), v).reshape(t, -1, hd)


class SlidingAttention(Attention):
    """The decoder's attention, for one sequence that continues what is in memory."""

    def __init__(self, config: TTTE2EConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.config = config

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "t d"], memory: Memory | None, seen: Int[Array, ""]
    ) -> tuple[Float[Array, "t d"], Memory | None]:
        t = x.shape[0]
        q = self.q_proj(x).reshape(t, -1, self.head_dim)  # [t, h, hd]
        k = self.k_proj(x).reshape(t, -1, self.head_dim)  # [t, kv, hd]
        v = self.v_proj(x).reshape(t, -1, self.head_dim)  # [t, kv, hd]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = partial(rotary, self.config)
        if memory is None:  # full attention
            out = full_attention(q, k, v, rope)
        else:
            out, memory = sliding_attention(q, k, v, memory, seen, rope)
        return self.o_proj(out.reshape(t, -1)), memory


class Block(nnx.Module):
    """Attention, then the MLP, each between two norms."""

    def __init__(self, config: TTTE2EConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SlidingAttention(config, rngs)
        self.attention_post_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config, rngs)
        self.mlp_post_norm = RMSNorm(config.d_model, config.norm_eps)

    def __call__(
        self, x: Float[Array, "t d"], memory: Memory | None, seen: Int[Array, ""]
    ) -> tuple[Float[Array, "t d"], Memory | None]:
        out, memory = self.attention(self.attention_norm(x), memory, seen)
        x = self.recall(x + self.attention_post_norm(out))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), memory

    def recall(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        """What fast weights add to the residual stream: these blocks have none."""
        return x


class PrimeBlock(Block):
    """A block with a prime MLP of its own, whose weights are fast, before the normal one."""

    def __init__(self, config: TTTE2EConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.prime_norm = RMSNorm(config.d_model, config.norm_eps)
        self.prime = SwiGLU(dataclasses.replace(config, d_ff=config.resolved_prime_d_ff), rngs)
        self.prime_post_norm = RMSNorm(config.d_model, config.norm_eps)

    def recall(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        return x + self.prime_post_norm(self.prime(self.prime_norm(x)))


class TTTE2E(nnx.Module):
    """The decoder. `nnx.eval_shape(lambda: TTTE2E(config, rngs=nnx.Rngs(0)))` builds it abstractly.

    Args:
        config: sizes, window, chunk, inner step; `vocab_size` must be set.
        rngs: its `params` stream gives the initial weights.
    Raises:
        ValueError: `config.fast` matches no weight, one before the first prime MLP, or one of
            attention that `config.fast_attention` does not allow.
    """

    def __init__(self, config: TTTE2EConfig, *, rngs: nnx.Rngs) -> None:
        vocab, d = config.resolved_vocab_size, config.d_model
        self.config = config
        self.first_prime = config.num_layers - config.prime_layers
        self.embed = Embedding(vocab, d, config.init_std, rngs)
        kinds = [Block] * self.first_prime + [PrimeBlock] * config.prime_layers
        self.blocks = nnx.List(kind(config, rngs) for kind in kinds)
        self.norm = RMSNorm(d, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(d, vocab, config.init_std, rngs)
        state = nnx.state(self, nnx.Param)
        for _, parameter in nnx.to_flat_state(state):
            if parameter.ndim == 2:
                draw = jax.random.normal(rngs.params(), parameter.shape)
                parameter.set_value(config.init_std * draw)
        nnx.update(self, state)
        check_fast(self)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Logits of the token after each position, by the weights as they are: nothing is learned.

        With `window=None` attention is full.
        """
        return jax.vmap(self._static)(tokens)

    def _static(self, tokens: Int[Array, " t"]) -> Float[Array, "t vocab"]:
        x, seen = self.embed(tokens), jnp.asarray(0)
        for block in self.blocks:
            x, _ = block(x, self.no_memory(), seen)
        return self.logits(x)

    def static_losses(self, tokens: Int[Array, "b t+1"]) -> Float[Array, "b t"]:
        """Nats of tokens[:, 1:] by the weights as they are."""
        logits = widen(self(tokens[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def logits(self, x: Float[Array, "t d"]) -> Float[Array, "t vocab"]:
        """Norm and output head, on the residual stream after the last block."""
        head = self.embed if self.lm_head is None else self.lm_head
        return self.norm(x) @ head.weight.T

    def tuned(self, fast: Fast) -> TTTE2E:
        """This model with other fast weights, cast to the dtype of the slow ones."""
        graph, _, slow = nnx.split(self, is_fast(self.config), ...)
        dtype = self.embed.weight.dtype
        narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), fast)
        return nnx.merge(graph, nnx.State(narrow), slow)

    def no_memory(self) -> Memory | None:
        """The memory of a layer that has seen nothing; None for full attention."""
        if self.config.window is None:
            return None
        shape = (self.config.window, self.config.resolved_kv_heads, self.config.resolved_head_dim)
        zero = jnp.zeros(shape, self.embed.weight.dtype)
        return Memory(zero, zero)


def matches_fast(config: TTTE2EConfig, name: str) -> bool:
    """Whether the parameter of this dotted name is fast."""
    return fnmatchcase(name, config.fast)


def is_fast(config: TTTE2EConfig) -> Callable[[tuple[Any, ...], Any], bool]:
    """The filter of `nnx.split` for the fast weights."""
    return lambda path, _: matches_fast(config, ".".join(map(str, path)))


def check_fast(model: TTTE2E) -> None:
    """Refuse a glob whose weights the inner loop could not, or should not, change."""
    config, key = model.config, f"model.fast={model.config.fast!r}"
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    matched = [name for name in names if matches_fast(config, name)]
    if not matched:
        raise ValueError(f"{key} matches no weight; there are {', '.join(sorted(names))}")
    suffix = tuple(f"blocks.{i}." for i in range(model.first_prime, config.num_layers))
    if early := [name for name in matched if not name.startswith(suffix)]:
        raise ValueError(
            f"{key} matches {early[0]}, which lies outside the last model.prime_layers="
            f"{config.prime_layers} blocks: only those are read chunk by chunk"
        )
    if not config.fast_attention and (keys := [n for n in matched if ".attention." in n]):
        raise ValueError(
            f"{key} matches {keys[0]}: set model.fast_attention=true if attention shall be fast too"
        )


def initial_state(model: TTTE2E) -> State:
    """Of a sequence that has read nothing: W_0 in float32 or wider, empty memories."""
    _, fast, _ = nnx.split(model, is_fast(model.config), ...)
    fast = jax.tree.map(widen, nnx.to_pure_dict(fast))
    empty = model.no_memory()
    if empty is None:
        raise ValueError(
            "model.window=null is full attention, which keeps no memory of bounded size: only "
            "recipe.order=none can train it"
        )
    return State(fast, (empty,) * model.config.num_layers, jnp.asarray(0, jnp.int32))


def widen(x: Array) -> Array:
    """bf16 would lose the updates: a step of norm 1 moves each weight by less than its spacing."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def read(
    model: TTTE2E,
    tokens: Int[Array, " t+1"],
    state: State,
    inner_lr: Float[Array, ""] | float,
    order: InnerOrder = InnerOrder.second,
    remat_group: int | None = None,
) -> Reading:
    """Score tokens[1:] chunk by chunk, learning from each chunk after it was scored.

    Args:
        tokens: t + 1 ids; t is a multiple of `config.chunk`. The last is only a target, so that a
            continued sequence starts with it.
        state: where the sequence stands.
        inner_lr: eta; 0 learns nothing.
        order: of the derivative that an outer gradient takes; with `none` nothing is learned.
        remat_group: keep the activations of the backward pass only between groups of this many
            chunks, and recompute inside; None keeps all.
    """
    config, first = model.config, model.first_prime
    n = check_length(config, tokens.shape[0] - 1)
    x, targets = model.embed(tokens[:-1]), tokens[1:].reshape(n, config.chunk)

    memories: list[Any] = list(state.memories)
    for layer in range(first):
        x, memories[layer] = model.blocks[layer](x, memories[layer], state.seen)
    x = x.reshape(n, config.chunk, -1)

    def score(
        fast: Fast, x: Float[Array, "b d"], targets: Int[Array, " b"], memories: Any, seen: Array
    ) -> tuple[Array, tuple[Array, Any]]:
        """Mean loss of a chunk under the fast weights; its losses and the memories after it."""
        tuned, after = model.tuned(fast), []
        for block, memory in zip(tuned.blocks[first:], memories, strict=True):
            x, memory = block(x, memory, seen)
            after.append(memory)
        losses = optax.softmax_cross_entropy_with_integer_labels(widen(tuned.logits(x)), targets)
        return losses.mean(), (losses, tuple(after))

    def chunk(
        carry: tuple[Fast, Any, Array], given: tuple[Array, Array]
    ) -> tuple[Any, tuple[Array, Array]]:
        fast, memories, seen = carry
        if order == InnerOrder.none:
            _, (losses, memories) = score(fast, *given, memories, seen)
            return (fast, memories, seen + config.chunk), (losses, jnp.zeros(()))
        learned = jax.grad(score, has_aux=True)(fast, *given, memories, seen)
        gradient, (losses, memories) = learned
        if order == InnerOrder.first:
            gradient = jax.lax.stop_gradient(gradient)
        fast, norm = inner_step(fast, gradient, inner_lr, config.inner_clip)
        return (fast, memories, seen + config.chunk), (losses, norm)

    carry = (state.fast, tuple(memories[first:]), state.seen)
    (fast, suffix, seen), (losses, norms) = scan(chunk, carry, (x, targets), remat_group)
    memories[first:] = suffix
    return Reading(losses.reshape(-1), norms, State(fast, tuple(memories), seen))


def inner_step(
    fast: Fast, gradient: Fast, inner_lr: Float[Array, ""] | float, clip: float | None
) -> tuple[Fast, Float[Array, ""]]:
    """W - eta g min(1, clip / |g|), and |g| over all leaves together. Differentiable at g = 0."""
    squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
    norm = jnp.sqrt(squares + 1e-5)
    scale = inner_lr if clip is None else inner_lr * jnp.minimum(1.0, clip / norm)
    return jax.tree.map(lambda w, g: w - scale * g, fast, gradient), norm


def scan(
    body: Callable[..., Any], carry: Any, over: Any, remat_group: int | None
) -> tuple[Any, Any]:
    """`lax.scan`, rematerialised in groups: n / g + g carries are kept instead of n."""
    if remat_group is None:
        return jax.lax.scan(body, carry, over)
    n = jax.tree.leaves(over)[0].shape[0]
    if n % remat_group:
        raise ValueError(
            f"recipe.remat_group={remat_group} does not divide the {n} chunks of a sequence"
        )
    grouped = jax.tree.map(lambda x: x.reshape(-1, remat_group, *x.shape[1:]), over)
    inner = jax.checkpoint(body, prevent_cse=False)
    outer = jax.checkpoint(partial(jax.lax.scan, inner), prevent_cse=False)
    carry, out = jax.lax.scan(outer, carry, grouped)
    return carry, jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), out)


def losses(
    model: TTTE2E,
    tokens: Int[Array, "batch t+1"],
    inner_lr: Float[Array, ""] | float | None = None,
    order: InnerOrder = InnerOrder.second,
    remat_group: int | None = None,
) -> Reading:
    """`read` for each row of a batch from the beginning, each with fast weights of its own.

    `inner_lr=None` takes the model's. Every field of what is returned has a leading batch axis.
    """
    rate = model.config.inner_lr if inner_lr is None else inner_lr
    one = partial(read, model, inner_lr=rate, order=order, remat_group=remat_group)
    return jax.vmap(lambda row: one(row, initial_state(model)))(tokens)


def check_length(config: TTTE2EConfig, length: int) -> int:
    """Number of chunks in `length` tokens. Raises ValueError unless they come out even."""
    if length < config.chunk or length % config.chunk:
        raise ValueError(
            f"{length} tokens are no whole number of chunks of model.chunk={config.chunk}"
        )
    return length // config.chunk


def state_bytes(model: TTTE2E, length: int) -> int:
    """Bytes that a sequence of `length` tokens leaves behind.

    Fast weights and windows of keys and values; with full attention all keys and values.
    """
    if model.config.window is not None:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state(model)))
    heads = model.config.num_layers * model.config.resolved_kv_heads
    return 2 * heads * model.config.resolved_head_dim * length * model.embed.weight.dtype.itemsize
