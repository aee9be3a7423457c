"""Keys and values that stand before a sequence: a context that was read, or what replaces it.

Everything that a decoder with attention can know of an earlier context is its keys and values, in
each layer, and the position at which the next token stands. A context that was read, a part of it
that a press has kept, the trained rows of a cartridge: all of them are a `Prefix`, and the model
reads on after it as after the context itself (prefix tuning: Li and Liang, 2021, arXiv:2101.00190).

    reading = read(model, context)              keys, values and queries of every layer
    logits = model(tokens, cache=reading.prefix())     as if the context stood before the tokens

Keys are kept after the rotation (and qk-norm): a row keeps its position wherever it goes.

Dimensions: b sequences, p rows, t tokens, h query heads, kv key/value heads, hd head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.op import attention
from models.language.config import Mixer, TransformerConfig
from models.language.layers import rms_norm, rotate

HEADS = "b s kv hd -> (b kv) s 1 hd"
KeysValues = tuple[Float[Tensor, "*b p kv hd"], Float[Tensor, "*b p kv hd"]]


@dataclass(frozen=True)
class Prefix:
    """What stands before the tokens of a call; the model takes it as `cache` and adds nothing.

    Differentiable in its rows. Layers may have different numbers of them.
    """

    layers: tuple[KeysValues, ...]
    "Of each block: [p, kv, hd], the same rows for all sequences, or [b, p, kv, hd]."
    position: int
    "At which the first token after it stands."
    counts: tuple[Int[Tensor, "*b kv"], ...] | None = None
    "Rows that each head of a layer has, if they differ: its last ones, those before are absent."

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError unless it fits a model of this configuration."""
        if set(config.mixers) != {Mixer.full} or config.ngram_orders:
            raise ValueError(
                "a prefix holds keys and values of attention to all tokens, and nothing else: this "
                f"model has mixers {sorted(set(config.mixers))} and model.ngram_orders="
                f"{list(config.ngram_orders)}"
            )
        if len(self.layers) != config.num_layers:
            raise ValueError(
                f"the prefix has {len(self.layers)} layers, the model {config.num_layers}: it was "
                "made for another model"
            )
        heads = (config.resolved_kv_heads, config.resolved_head_dim)
        for k, v in self.layers:
            if k.shape != v.shape or k.ndim not in (3, 4) or tuple(k.shape[-2:]) != heads:
                raise ValueError(
                    f"the prefix has rows {list(k.shape)} and {list(v.shape)}, the model has "
                    f"[kv, hd] = {list(heads)}: it was made for another model"
                )

    def extend(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """All tokens that are known; those before the prefix's end are not."""
        return tokens

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t kv hd"],
        v: Float[Tensor, "b t kv hd"],
        **turning: Any,
    ) -> Float[Tensor, "b t h hd"]:
        """Attention of one layer's new tokens to the prefix and to each other; as `KVCache`'s."""
        q, k = turned(q, k, **turning)
        return self.attend_turned(layer, q, k, v)

    def attend_turned(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same, of queries and keys that have been rotated."""
        keys, values = (x.to(q.dtype) for x in self.layers[layer])
        if keys.shape[-3] == 0:
            return attention(q, k, v)
        if self.counts is not None:
            return self._attend_by_head(self.counts[layer], keys, values, q, k, v)
        if keys.ndim == 3:
            return attention(q, k, v, prefix_kv=(keys, values))
        return attention(q, torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1))

    def _attend_by_head(
        self, counts: Tensor, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Each key/value head as a sequence of its own, whose absent rows are another document."""
        b, t, kv = k.shape[:3]
        most = keys.shape[-3]
        rows = [
            rearrange(torch.cat([old.expand(b, *old.shape[-3:]), new], dim=1), HEADS)
            for old, new in ((keys, k), (values, v))
        ]
        place = torch.arange(most + t, device=q.device)
        absent = most - counts.expand(b, kv).reshape(b * kv, 1)
        queries = rearrange(q, "b t (kv g) hd -> (b kv) t g hd", kv=kv)
        out = attention(queries, *rows, segments=(place >= absent).long())
        return rearrange(out, "(b kv) t g hd -> b t (kv g) hd", kv=kv)

    @property
    def rows(self) -> int:
        """Most rows of a layer."""
        return max((k.shape[-3] for k, _ in self.layers), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that are there, for all sequences that it holds."""
        if self.counts is None:
            return sum(x.numel() * x.itemsize for layer in self.layers for x in layer)
        return sum(
            2 * int(count.sum()) * k.shape[-1] * k.itemsize
            for count, (k, _) in zip(self.counts, self.layers, strict=True)
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """A prefix of changed keys and values."""
        return replace(self, layers=tuple((change(k), change(v)) for k, v in self.layers))


def no_prefix(config: TransformerConfig, like: Tensor, position: int = 0) -> Prefix:
    """No rows; tokens begin at `position`. Of the dtype and on the device of `like`."""
    row = like.new_empty(0, config.resolved_kv_heads, config.resolved_head_dim)
    return Prefix(((row, row),) * config.num_layers, position)


def join(prefixes: Sequence[Prefix], position: int) -> Prefix:
    """The rows of several prefixes one after the other, as they are; tokens begin at `position`.

    Independently trained cartridges are put together like this: every one keeps the positions that
    it was trained at, so they overlap.
    """
    layers = zip(*(prefix.layers for prefix in prefixes), strict=True)
    joined = tuple(
        (torch.cat([k for k, _ in parts], dim=-3), torch.cat([v for _, v in parts], dim=-3))
        for parts in layers
    )
    return Prefix(joined, position)


class Reading:
    """What every layer computed of some tokens; the model takes it as `cache`, once.

    Args:
        before: what stands before the tokens.

    Attributes:
        config: of the model that has read them.
        queries, keys: of each layer, after the rotation, [b, t, h, hd] and [b, t, kv, hd].
        values: of each layer, [b, t, kv, hd].
    """

    def __init__(self, before: Prefix | None = None) -> None:
        self.before = before
        self.start = 0 if before is None else before.position
        self.position = self.start
        self.config: TransformerConfig
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError unless its prefix fits the model, and it is unused."""
        if self.queries:
            raise ValueError("a Reading takes the tokens of one call: make another one")
        (self.before or no_prefix(config, torch.empty(0))).check(config)
        self.config = config

    def extend(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        self.position = self.start + tokens.shape[1]
        return tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **turning: Any) -> Tensor:
        q, k = turned(q, k, **turning)
        self.queries.append(q)
        self.keys.append(k)
        self.values.append(v)
        if self.before is None:
            return attention(q, k, v)
        return self.before.attend_turned(layer, q, k, v)

    def prefix(self) -> Prefix:
        """The keys and values of its tokens, [b, t, kv, hd]; those before them not included."""
        return Prefix(tuple(zip(self.keys, self.values, strict=True)), self.position)


def read(model: Any, tokens: Int[Tensor, "b t"], before: Prefix | None = None) -> Reading:
    """Read some tokens with a `Transformer` and keep what every layer computed."""
    reading = Reading(before)
    model.hidden(tokens, cache=reading)
    return reading


def turned(
    q: Float[Tensor, "b t h hd"],
    k: Float[Tensor, "b t kv hd"],
    *,
    rope: tuple[Float[Tensor, "t hd"], Float[Tensor, "t hd"]],
    q_norm: Float[Tensor, " hd"] | None = None,
    k_norm: Float[Tensor, " hd"] | None = None,
    norm_eps: float = 1e-6,
    window: int | None = None,
) -> tuple[Float[Tensor, "b t h hd"], Float[Tensor, "b t kv hd"]]:
    """Queries and keys, normalised if the model does that, and rotated.

    Raises:
        ValueError: a window, out of which a prefix would fall.
    """
    if window is not None:
        raise ValueError(
            f"a prefix would fall out of the window of {window} tokens that this model attends to"
        )
    cos, sin = (x[:, None].to(q.dtype) for x in rope)
    q = q if q_norm is None else rms_norm(q, q_norm, norm_eps)
    k = k if k_norm is None else rms_norm(k, k_norm, norm_eps)
    return rotate(q, cos, sin), rotate(k, cos, sin)
