"""A TTT-E2E model that goes on learning while it writes.

Reading and writing are one process: tokens are fed one by one through the windows of keys and
values, under the fast weights of the last whole chunk; as soon as a chunk and the token after it
are known, whether they were given or generated, the chunk is learned from. Feeding a text token by
token therefore leaves the same state as `read` does.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.language.config import InnerOrder
from models.language.ttt_e2e import TTTE2E, Memory, State, initial_state, read


class Reader:
    """A batch of sequences of equal length in the course of being read, each with its own state.

    Args:
        model: its fast weights are where every sequence starts.
        batch: number of sequences.
        inner_lr: eta; None takes the model's, 0 learns nothing.

    Attributes:
        state: `State` with a leading batch axis, after the last whole chunk.
        logits: [batch, vocab] of the token after the last one; None before the first.
    """

    def __init__(self, model: TTTE2E, batch: int, inner_lr: float | None = None) -> None:
        self.model, self.chunk = model, model.config.chunk
        self.inner_lr = model.config.inner_lr if inner_lr is None else inner_lr
        first = initial_state(model)
        self.state: State = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), first)
        self.memories, self.fed = self.state.memories, 0
        self.pending: list[np.ndarray] = []  # tokens [batch] since the last whole chunk
        self.logits: Float[Array, "batch vocab"] | None = None

    def extend(self, tokens: Int[np.ndarray, "batch t"]) -> None:
        """Read further tokens: whole chunks at once where that can be, the rest one by one."""
        tokens = np.asarray(tokens)
        n = (tokens.shape[1] - 1) // self.chunk if not self.pending else 0
        if n:
            self.learn(tokens[:, : n * self.chunk + 1])
            tokens = tokens[:, n * self.chunk :]
        for column in tokens.T:
            self.append(column)

    def append(self, token: Int[np.ndarray, " batch"]) -> None:
        """Read one token of every sequence."""
        if len(self.pending) == self.chunk:
            self.learn(np.stack([*self.pending, token], axis=1))
            self.pending.clear()
        self.pending.append(np.asarray(token))
        seen = self.state.seen + len(self.pending) - 1
        state = State(self.state.fast, self.memories, seen)
        self.logits, self.memories = feed(self.model, state, jnp.asarray(token))

    def learn(self, tokens: Int[np.ndarray, "batch t+1"]) -> None:
        """Whole chunks and the token after them -> the state that `read` leaves."""
        self.state = learned(
            self.model, self.state, jnp.asarray(tokens), jnp.float32(self.inner_lr)
        )
        self.memories = self.state.memories


@nnx.jit
def learned(
    model: TTTE2E, state: State, tokens: Int[Array, "batch t+1"], inner_lr: Float[Array, ""]
) -> State:
    """The states after reading whole chunks."""
    one = partial(read, model, inner_lr=inner_lr, order=InnerOrder.first)
    return jax.vmap(lambda tokens, state: one(tokens, state).state)(tokens, state)


@nnx.jit
def feed(
    model: TTTE2E, state: State, token: Int[Array, " batch"]
) -> tuple[Float[Array, "batch vocab"], tuple[Memory, ...]]:
    """Logits after one more token of each sequence, and the windows that now hold it."""

    def one(token: Int[Array, ""], state: State) -> tuple[Array, tuple[Memory, ...]]:
        tuned, x, memories = model.tuned(state.fast), model.embed(token[None]), []
        for block, memory in zip(tuned.blocks, state.memories, strict=True):
            x, memory = block(x, memory, state.seen)
            memories.append(memory)
        return tuned.logits(x)[0], tuple(memories)

    return jax.vmap(one)(token, state)


def generate(
    model: TTTE2E,
    tokens: Int[np.ndarray, "batch t"],
    max_new_tokens: int,
    *,
    inner_lr: float | None = None,
    temperature: float = 1.0,
    key: Array | None = None,
) -> Int[np.ndarray, "batch t+max_new_tokens"]:
    """Continue token sequences of equal length, learning from the prompt and from what is written.

    Args:
        inner_lr: eta; None takes the model's, 0 writes with the weights as they are.
        temperature: 0 takes the most likely token, otherwise `key` must be given.
    Raises:
        ValueError: empty prompt, negative temperature, or no key to draw with.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [batch, t] with t >= 1, got {list(tokens.shape)}")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature} must be >= 0, and a key given where it is > 0")
    reader = Reader(model, len(tokens), inner_lr)
    reader.extend(tokens)
    written = [tokens]
    for index in range(max_new_tokens):
        assert reader.logits is not None
        if temperature == 0:
            token = jnp.argmax(reader.logits, axis=-1)
        else:
            assert key is not None
            draw = jax.random.fold_in(key, index)
            token = jax.random.categorical(draw, reader.logits / temperature)
        written.append(np.asarray(token)[:, None])
        if index + 1 < max_new_tokens:
            reader.append(np.asarray(token))
    return np.concatenate(written, axis=1)
