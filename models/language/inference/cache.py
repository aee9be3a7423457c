"""The decoder's cache: what every layer keeps of the tokens that it has read.

Attention keeps pages of keys and values, a layer with fast weights its `Past`. Every row has its
own pages, in order, from the start; `kernels.append_kv` writes to them and `kernels.extend_paged`
reads them. A sliding window masks old entries rather than dropping them. A cache may begin with the
rows of a prefix, e.g. a cartridge's: then tokens go on at the prefix's position.

Dimensions: b sequences, t tokens of this call, h query heads, kv key/value heads, hd head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.attention.op import extend_paged
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from models.language.config import Mixer, TransformerConfig
from models.language.mixers import Past

if TYPE_CHECKING:
    from models.language.prefix import Prefix


class KVCache:
    """Keys, values, fast weights and tokens of what was read; `Transformer` fills it under no_grad.

    Args:
        config: of the model it serves.
        batch: sequences b.
        max_len: tokens it can hold.
        page: tokens of a page, a power of two, at least 16.
        quant: how keys and values are stored; None: as they are.
        prefix: what stands before the tokens, with as many rows in every layer; copied into pages.
            If all sequences have the same rows (of [p, kv, hd]) and they fill whole pages, as a
            cartridge's do, these pages exist once and every sequence's table begins with them.
        device, dtype: those of the model's activations.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        max_len: int,
        *,
        page: int = 64,
        quant: QuantSpec | None = None,
        prefix: Prefix | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._before = rows = 0 if prefix is None else prefix.rows
        self.shared = 0  # pages that all sequences begin with
        if prefix is not None and rows % page == 0 and prefix.layers[0][0].ndim == 3:
            self.shared = rows // page
        each = -(-(rows + max_len) // page) - self.shared  # pages of a sequence
        total = max(1, self.shared + batch * each)
        self.layers: list[PagedKV | None] = [
            None
            if mixer not in (Mixer.full, Mixer.sliding)
            else PagedKV.create(
                total,
                page,
                config.resolved_kv_heads,
                config.resolved_head_dim,
                dtype=dtype,
                quant=quant,
                slots=batch,
                device=device,
            )
            for mixer in config.mixers
        ]
        self.past: list[Past | None] = [None] * config.num_layers
        self._paged = next((layer for layer in self.layers if layer is not None), None)
        self.tokens = torch.empty(batch, max_len, device=device, dtype=torch.int64)
        self.length = 0
        self._start = 0 if prefix is None else prefix.position
        own = torch.arange(self.shared, self.shared + batch * each).reshape(batch, each)
        self._pages = torch.cat([torch.arange(self.shared).expand(batch, -1), own], dim=1)
        tailed = self._paged is not None and self._paged.tail is not None
        self._slots = torch.arange(batch) if tailed else None
        if prefix is not None:
            prefix.check(config)
            self._write(prefix)

    @property
    def position(self) -> int:
        """Of the next token."""
        return self._start + self.length

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, those that are not full yet included; scales too."""
        return sum(
            round(layer.bytes_per_token * layer.pages * layer.page)
            for layer in self.layers
            if layer is not None
        )

    def check(self, config: TransformerConfig) -> None:
        """Raise ValueError unless it was made for a model of as many layers."""
        if len(self.layers) != config.num_layers:
            raise ValueError(
                f"the cache has {len(self.layers)} layers, the model {config.num_layers}"
            )

    def _write(self, prefix: Prefix) -> None:
        """Put the rows of a prefix into the pages of every sequence, or into those they share."""
        p, b = prefix.rows, 1 if self.shared else self.tokens.shape[0]
        if prefix.counts is not None or any(k.shape[-3] != p for k, _ in prefix.layers):
            raise ValueError("a KVCache holds a prefix with as many rows in every layer and head")
        if p == 0:
            return
        self._advance(p, b)
        for pages, (k, v) in zip(self.layers, prefix.layers, strict=True):
            assert pages is not None
            k, v = (x.expand(b, *x.shape[-3:]).flatten(0, 1).to(pages.dtype) for x in (k, v))
            append_kv(pages, self._table, k, v, cu_seqlens=self._bounds)

    def extend(self, tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b s"]:
        """Make room for new tokens; returns all of them, old and new."""
        b, t = tokens.shape
        end = self.length + t
        if b != self.tokens.shape[0] or end > self.tokens.shape[1]:
            raise ValueError(
                f"the cache holds {list(self.tokens.shape)} [b, max_len] tokens, {self.length} used"
                f": {list(tokens.shape)} more do not fit, build a larger one"
            )
        self.tokens[:, self.length : end] = tokens
        self.length = end
        if self._paged is not None:
            self._advance(t, b)
        return self.tokens[:, :end]

    def _advance(self, t: int, b: int) -> None:
        """The block table of a step that stores the last t tokens of the first b sequences."""
        device = self.tokens.device
        assert self._paged is not None
        lengths = torch.full((b,), self._before + self.length)
        slots = None if self._slots is None else self._slots[:b]
        self._table = BlockTable.create(self._pages[:b], lengths, self._paged, slots)
        self._bounds = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=device)
        self._rows = torch.arange(t, dtype=torch.int32, device=device).repeat(b)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b t h hd"],
        k: Float[Tensor, "b t kv hd"],
        v: Float[Tensor, "b t kv hd"],
        *,
        rope: tuple[Float[Tensor, "t hd"], Float[Tensor, "t hd"]],
        q_norm: Float[Tensor, " hd"] | None = None,
        k_norm: Float[Tensor, " hd"] | None = None,
        norm_eps: float = 1e-6,
        window: int | None = None,
    ) -> Float[Tensor, "b t h hd"]:
        """Store one layer's keys and values of the newest t tokens, then attend to all tokens.

        Args:
            q, k, v: as projected; here they are normalised (with `q_norm`, `k_norm`) and rotated.
            rope: cosines and signed sines of the t new positions.
            window: tokens a query sees, itself included.
        """
        b, t = q.shape[:2]
        pages = cast(PagedKV, self.layers[layer])
        q, k, v = (x.flatten(0, 1).to(pages.dtype) for x in (q, k, v))  # [b t, heads, hd]
        turned = cast(Tensor, append_kv(
            pages, self._table, k, v, q=q, cu_seqlens=self._bounds, rope=rope,
            q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps, positions=self._rows,
        ))  # fmt: skip
        out = extend_paged(turned, pages, self._table, cu_seqlens=self._bounds, window=window)
        return cast(Tensor, out).unflatten(0, (b, t))
