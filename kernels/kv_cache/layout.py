"""How keys and values are laid out in pages, and which pages belong to which request.

A cache is a pool of pages; a page holds `page` tokens of all key/value heads of one layer
(PagedAttention: Kwon et al., 2023, arXiv:2309.06180). A block table lists the pages of each request
in order: token j of request r is at slot j % page of page pages[r, j // page].

    data   [pages, 2, page, kv, d]      keys, then values: vLLM's NHD layout

    quantised   data                 scales
    none        the model's dtype
    fp8         float8_e4m3fn        scales [pages, 2, page, kv] float32: one per token and head,
    int8        int8                   x = code * scale, symmetric
    int4        uint8, d / 2 bytes   keys: key_scales, key_zeros [pages, kv, d] float16, one of a
                                       page, head and channel (KIVI: Liu et al., 2024,
                                       arXiv:2402.02750); a page is quantised when it is full, until
                                       then its keys are in tail [slots, page, kv, d]
                                     values: value_scales, value_zeros [pages, page, kv, d / group]
                                       float16, one per token, head and group of channels
                                     x = (code - zero) * scale, codes 0..15

A byte of int4 holds channel c in its low and channel c + d/2 in its high half, so that a tile of
bytes unpacks into two contiguous tiles of channels.

Dimensions: r requests, kv key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32
from torch import Tensor

KINDS = ("none", "fp8", "int8", "int4")


@dataclass(frozen=True)
class QuantSpec:
    """How cached values are stored."""

    kind: str = "none"
    "none: the model's dtype. fp8: e4m3. int8. int4: keys per channel, values per group."
    group: int = 64
    "int4: channels of a value that share a scale; divides d (the whole head if it is narrower)."

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"quant kind={self.kind!r} is unknown: use {', '.join(KINDS)}")
        if self.group < 1:
            raise ValueError(f"quant group={self.group} must be at least 1")


@dataclass(frozen=True)
class PagedKV:
    """The pool of one layer. The tensors are written in place; see the module for their shapes."""

    data: Tensor
    quant: QuantSpec
    dtype: torch.dtype
    "Of what is appended and read: the model's activations."
    scales: Float[Tensor, "pages 2 page kv"] | None = None
    key_scales: Float[Tensor, "pages kv d"] | None = None
    key_zeros: Float[Tensor, "pages kv d"] | None = None
    value_scales: Float[Tensor, "pages page kv groups"] | None = None
    value_zeros: Float[Tensor, "pages page kv groups"] | None = None
    tail: Float[Tensor, "slots page kv d"] | None = None

    @classmethod
    def create(
        cls,
        pages: int,
        page: int,
        kv: int,
        d: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        quant: QuantSpec | None = None,
        slots: int = 0,
        device: torch.device | str = "cpu",
    ) -> PagedKV:
        """An empty pool of `pages` pages of `page` tokens; nothing of it is initialised.

        Args:
            page: a power of two, at least 16.
            d: head width; even for int4.
            slots: int4 only: tails, one for each request that is served at a time.
        Raises:
            ValueError: a size or dtype that is not supported; it says which.
        """
        quant = quant or QuantSpec()
        if page < 16 or page & (page - 1):
            raise ValueError(f"page={page} must be a power of two, at least 16")
        if min(pages, kv, d) < 1:
            raise ValueError(f"pages={pages}, kv={kv}, d={d} must all be at least 1")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype={dtype}: a cache serves float16, bfloat16, float32, float64")
        stored = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
        width = d // 2 if quant.kind == "int4" else d

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        data = empty(pages, 2, page, kv, width, dtype=stored.get(quant.kind, dtype))
        if quant.kind in ("fp8", "int8"):
            scales = empty(pages, 2, page, kv, dtype=torch.float32)
            return cls(data, quant, dtype, scales=scales)
        if quant.kind == "none":
            return cls(data, quant, dtype)
        group = min(quant.group, d)
        if d % 2 or d % group:
            raise ValueError(f"int4 needs an even head width that group={group} divides, got d={d}")
        if slots < 1:
            raise ValueError("int4 keeps the keys of unfinished pages in slots: slots >= 1")
        per_channel, per_group = (pages, kv, d), (pages, page, kv, d // group)
        return cls(
            data,
            replace(quant, group=group),
            dtype,
            key_scales=empty(*per_channel, dtype=torch.float16),
            key_zeros=empty(*per_channel, dtype=torch.float16),
            value_scales=empty(*per_group, dtype=torch.float16),
            value_zeros=empty(*per_group, dtype=torch.float16),
            tail=empty(slots, page, kv, d, dtype=dtype),
        )

    @property
    def pages(self) -> int:
        return self.data.shape[0]

    @property
    def page(self) -> int:
        return self.data.shape[2]

    @property
    def kv(self) -> int:
        return self.data.shape[3]

    @property
    def d(self) -> int:
        return self.data.shape[4] * (2 if self.quant.kind == "int4" else 1)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token takes in this layer, scales included, tails not."""
        parts = (self.data, self.scales, self.key_scales, self.key_zeros)
        parts += (self.value_scales, self.value_zeros)
        return sum(x.numel() * x.itemsize for x in parts if x is not None) / (
            self.pages * self.page
        )


@dataclass(frozen=True)
class BlockTable:
    """Which pages hold the tokens of each request. Built once per step, used by every layer."""

    pages: Int32[Tensor, "r most"]
    "Page ids in order; entries past a request's last page are never read."
    lengths: Int32[Tensor, " r"]
    "Tokens of each request that are in the cache."
    tails: Int32[Tensor, " r"] | None = None
    "int4 only: the tail slot of each request."

    @classmethod
    def create(
        cls, pages: Tensor, lengths: Tensor, cache: PagedKV, tails: Tensor | None = None
    ) -> BlockTable:
        """Check the table against a cache, then move it to the cache's device.

        Checking reads the values: build it from CPU tensors, else it waits for the GPU.

        Raises:
            ValueError: wrong shapes or dtypes, a length that the pages cannot hold, a page or tail
                out of range.
        """
        _check_vectors(pages, lengths, tails, cache)
        used = -(-lengths.long() // cache.page)  # pages of each request
        if len(lengths) and int(lengths.min()) < 0:
            raise ValueError(f"lengths must be >= 0, got {int(lengths.min())}")
        if len(lengths) and int(used.max()) > pages.shape[1]:
            raise ValueError(
                f"a request of {int(lengths.max())} tokens needs {int(used.max())} pages of "
                f"{cache.page}, the table has {pages.shape[1]} columns"
            )
        read = torch.arange(pages.shape[1], device=pages.device) < used[:, None]
        wrong = pages[read & ((pages < 0) | (pages >= cache.pages))]
        if wrong.numel():
            raise ValueError(f"page {int(wrong[0])} is out of range: the cache has {cache.pages}")
        if tails is not None and cache.tail is not None:
            slots = cache.tail.shape[0]
            if len(tails) and not 0 <= int(tails.min()) <= int(tails.max()) < slots:
                raise ValueError(f"tails must be in 0..{slots - 1}, got {tails.tolist()}")
        move = {"device": cache.device, "dtype": torch.int32}
        tails = None if tails is None else tails.to(**move)
        return cls(pages.to(**move), lengths.to(**move), tails)


def _check_vectors(pages, lengths, tails, cache: PagedKV) -> None:
    named = {"pages": pages, "lengths": lengths} | ({} if tails is None else {"tails": tails})
    for name, x in named.items():
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(f"{name} must hold integers, got {x.dtype}")
    if pages.ndim != 2 or lengths.shape != pages.shape[:1]:
        raise ValueError(
            "expected pages [r, most] and lengths [r], "
            f"got {list(pages.shape)} and {list(lengths.shape)}"
        )
    if (tails is None) != (cache.tail is None):
        raise ValueError("tails are given exactly for an int4 cache: one slot for each request")
    if tails is not None and tails.shape != lengths.shape:
        raise ValueError(f"tails must be [r] = {list(lengths.shape)}, got {list(tails.shape)}")
