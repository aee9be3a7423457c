"""Moving the kept tokens of each key/value head to pages of their own: eviction that frees memory.

Heads keep different numbers of tokens, so a page that holds a token of every head cannot shrink.
A page of `cache` is as large as kv pages of one head, and the same memory is seen as both:

    cache         data [pages,      2, page, kv, d]     token j of a request: pages[r, j // page]
    compacted     data [pages * kv, 2, page,  1, d]     rank n of a request's head: a block table
                                                        with a row for each (request, head)

    page 7 of 2 heads    | k0 k1 | v0 v1 | x page tokens
    = head pages 14, 15  | k | v | k | v |   two runs of `page` tokens, each of one head

So one pool of pages serves requests before and after: a compacted request takes whole pages from
it, deals out their head pages, and its old pages are free for others. (Where heads differ, NVIDIA's
kvpress masks what a head evicts, and keeps the memory.)

    impl        what runs
    triton      one kernel that moves keys, values and scales (`triton.py`), on a GPU
    interpret   the same, interpreted on the CPU, for tests
    torch       indexing, on any device
    auto        triton on a GPU, else torch

Dimensions: r requests, kv key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import resolve
from kernels.kv_cache.attention.op import gather
from kernels.kv_cache.compaction.selection import Kept
from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.pool import PagePool, pages_of


@dataclass(frozen=True)
class Compacted:
    """A selection in pages of its own: for attention, r * kv requests of one key/value head."""

    cache: PagedKV
    "The memory of the source, seen as pages of one head."
    table: BlockTable
    "Its rows: head 0 of request 0, head 1, ...; with the columns that `room` asked for."
    pages: list[list[int]]
    "Pages of the pool that each request holds now: give them to `PagePool.free` when it is done."


def compact_kv(
    cache: PagedKV,
    table: BlockTable,
    kept: Kept,
    pool: PagePool,
    *,
    rope: tuple[Float[Tensor, "positions d"], Float[Tensor, "positions d"]] | None = None,
    room: int = 0,
    impl: str = "auto",
) -> Compacted:
    """Copy what each head keeps to pages taken from `pool`; the source pages stay as they are.

    Afterwards let go of the source: `for pages in pages_of(table, cache): pool.free(pages)`. A pool
    serves one layer, as layers keep different tokens. Queries of the compacted cache come as
    `rearrange(q, "r (kv g) d -> (r kv) g d", kv=kv)`.

    What has been compacted can be compacted again, with the same pool: pass its cache and table,
    and a selection of r * kv requests of one head; then free its `pages`.

    Args:
        cache: of kind none, fp8 or int8 (codes and scales move as they are).
        table: the requests' pages, all of them held in `pool`.
        kept: ascending tokens of each request, below its length; `select_top` returns such.
        pool: of the pages of `cache`, or of the cache that `cache` is a view of.
        rope: cosines and sines of the rotation by position, float32, as for `append_kv`, up to the
            length of the longest request. The key of token j, which was rotated to position j,
            moves to its rank among the kept, and new tokens of a head go on at its count. None:
            keys stay at their positions, and new tokens go on where the whole request would.
        room: tokens that each head can append before it needs more pages.
        impl: one of those above.
    Returns:
        The compacted requests. Reads table and selection: waits for the GPU.
    Raises:
        ValueError: an int4 cache, a quantised one with `rope`, shapes, tokens or pages that
            contradict each other, or an `impl` that cannot run; nothing was taken or written.
        OutOfPages: the pool has too few free pages; nothing was taken or written.
    """
    _check_cache(cache, pool, rope, room)
    _check_kept(cache, table, kept)
    _check_held(cache, table, pool)
    if rope is not None:
        _check_rope(cache, table, rope)
    chosen = resolve(
        "compact_kv", impl, device=cache.device, table="kv_gather", refusal=_refusal(cache)
    )
    pages, head_pages = _allocate(cache, kept, pool, room)
    cos, sin = (None, None) if rope is None else rope
    compacted = head_view(cache)
    new_table = BlockTable.create(head_pages, kept.counts.flatten().cpu(), compacted)
    arguments = (table.pages, kept.tokens, kept.counts, new_table.pages, cos, sin)
    if chosen == "torch":
        _gather(cache, *arguments)
    else:
        from kernels.kv_cache.compaction.launch import gather_kept

        gather_kept(cache.data, cache.scales, *arguments)
    return Compacted(compacted, new_table, pages)


def read_pages(
    cache: PagedKV, table: BlockTable
) -> tuple[Float[Tensor, "r s kv d"], Float[Tensor, "r s kv d"]]:
    """Keys and values of each request side by side, zero past its length, in `cache.dtype`: for
    scoring what is in pages already.

    A copy of one layer's requests for as long as it is needed; after a prefill the keys are at hand
    without it. s: whole pages, enough for the longest request (which is read: waits for the GPU).
    """
    return gather(cache, table)


def head_view(cache: PagedKV) -> PagedKV:
    """The same memory as pages of one head: page p of kv heads is head pages p kv, p kv + 1, ..."""
    pages, kv, scales = cache.pages * cache.kv, 1, cache.scales
    data = cache.data.view(pages, 2, cache.page, kv, cache.d)
    scales = None if scales is None else scales.view(pages, 2, cache.page, kv)
    return replace(cache, data=data, scales=scales)


def _allocate(
    cache: PagedKV, kept: Kept, pool: PagePool, room: int
) -> tuple[list[list[int]], Tensor]:
    """Pages of the pool for each request, and their head pages dealt to its heads, [r * kv, most]:
    -1 where a head has no more."""
    shared = cache.pages // pool.pages  # rows of the table that share pages: heads, once compacted
    width = shared * cache.kv  # head pages in a page of the pool
    counts = kept.counts.reshape(-1, width).tolist()
    needed = [[-(-(n + room) // cache.page) for n in row] for row in counts]
    whole = [-(-sum(row) // width) for row in needed]
    taken = iter(pool.alloc(sum(whole)))
    pages = [[next(taken) for _ in range(count)] for count in whole]
    most = max((n for row in needed for n in row), default=0)
    rows = []
    for own, row in zip(pages, needed, strict=True):
        head_pages = (p * width + i for p in own for i in range(width))
        for count in row:
            rows.append([next(head_pages) for _ in range(count)] + [-1] * (most - count))
    return pages, torch.tensor(rows, dtype=torch.int32).view(len(rows), most)


def _gather(
    cache: PagedKV,
    pages: Tensor,
    tokens: Tensor,
    counts: Tensor,
    head_pages: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """What the kernel does, with indices of every kept token."""
    kv, page = cache.kv, cache.page
    rank = torch.arange(tokens.shape[2], device=tokens.device)
    request, head, rank = (rank < counts[..., None]).nonzero(as_tuple=True)
    token = tokens[request, head, rank].long()
    slot, column = token % page, token // page
    source = (pages[request, column].long(), slice(None), slot, head)
    target = head_pages[request * kv + head, rank // page].long()
    target = (target, slice(None), rank % page, 0)

    data, view = _indexable(cache.data), head_view(cache)
    both = data[source]  # [kept, 2, d]
    if cos is not None and sin is not None:
        both[:, 0] = _turn_back(both[:, 0], cos[token - rank], sin[token - rank])
    _indexable(view.data)[target] = both
    if cache.scales is not None and view.scales is not None:
        view.scales[target] = cache.scales[source]


def _turn_back(keys: Float[Tensor, "n d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n d"]:
    """Keys turned by minus the given angles, in float32 (float64 for float64)."""
    first, second = keys.to(torch.promote_types(keys.dtype, torch.float32)).chunk(2, dim=-1)
    half = first.shape[-1]
    cos, sin = cos[:, :half], sin[:, half:]  # the first half of the sines is negated
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1).to(keys.dtype)


def _indexable(data: Tensor) -> Tensor:
    """Codes of 8 bits as plain bytes: torch does not index every float8."""
    return data.view(torch.uint8) if data.itemsize == 1 else data


INT4 = (
    "int4 keys share a scale for each channel of a whole page, which a selection tears apart: "
    "compact before quantising, or keep the cache in fp8 or int8"
)


def _refusal(cache: PagedKV) -> str | None:
    if cache.data.dtype == torch.float64:
        return "the kernels move values of up to 32 bits, not torch.float64"
    return f"the kernels take heads of up to 256, not {cache.d}" if cache.d > 256 else None


def _check_cache(cache: PagedKV, pool: PagePool, rope, room: int) -> None:
    kind = cache.quant.kind
    if kind == "int4":
        raise ValueError(f"compact_kv: {INT4}")
    if rope is not None and kind != "none":
        raise ValueError(
            f"compact_kv: rope would quantise the rotated keys of this {kind} cache anew: pass "
            "rope=None, or compact before quantising"
        )
    if cache.pages != pool.pages and (cache.kv > 1 or cache.pages % pool.pages):
        raise ValueError(
            f"compact_kv: the pool has {pool.pages} pages, the cache {cache.pages}: pass its own"
        )
    if not cache.data.is_contiguous() or not (cache.scales is None or cache.scales.is_contiguous()):
        raise ValueError(
            "compact_kv: pages can be seen as pages of one head only if the cache is contiguous, "
            f"as PagedKV.create makes it; got strides {cache.data.stride()}"
        )
    if room < 0:
        raise ValueError(f"compact_kv: room={room} must be >= 0")


def _check_kept(cache: PagedKV, table: BlockTable, kept: Kept) -> None:
    heads = (len(table.lengths), cache.kv)
    if kept.tokens.ndim != 3 or kept.tokens.shape[:2] != heads or kept.counts.shape != heads:
        raise ValueError(
            f"compact_kv: kept must have tokens [r, kv, most] and counts [r, kv] = {list(heads)}, "
            f"got {list(kept.tokens.shape)} and {list(kept.counts.shape)}"
        )
    for name, x in (("tokens", kept.tokens), ("counts", kept.counts)):
        if x.dtype != torch.int32 or x.device != cache.device:
            raise ValueError(
                f"compact_kv: kept.{name} must be torch.int32 on {cache.device}, as the cache, got "
                f"{x.dtype} on {x.device}"
            )
    most = kept.tokens.shape[2]
    rank = torch.arange(most, device=kept.tokens.device)
    before = torch.nn.functional.pad(kept.tokens, (1, 0), value=-1)[..., :most]
    inside = rank < kept.counts[..., None]
    right = (kept.tokens > before) & (kept.tokens < table.lengths[:, None, None])
    counted = (kept.counts >= 0) & (kept.counts <= most)
    if not bool((right | ~inside).all() & counted.all()):
        raise ValueError(
            "compact_kv: the kept tokens of each head must be ascending, different, and from 0 to "
            "the length of its request, as many as its count says"
        )


def _check_held(cache: PagedKV, table: BlockTable, pool: PagePool) -> None:
    shared = cache.pages // pool.pages
    if len(table.lengths) % shared:
        raise ValueError(
            f"compact_kv: {shared} rows of a compacted table, one for each head, share pages: "
            f"compact them together, not {len(table.lengths)} rows"
        )
    for pages in pages_of(table, cache):
        for page in pages:
            if not pool.holders(page // shared):
                raise ValueError(
                    f"compact_kv: page {page // shared} is in the table but free in the pool, so "
                    "it could be overwritten: pass the pool that its pages were taken from"
                )


def _check_rope(cache: PagedKV, table: BlockTable, rope: tuple[Tensor, Tensor]) -> None:
    cos, sin = rope
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != cache.d or cache.d % 2:
        raise ValueError(
            f"compact_kv: rope must be cosines and sines [positions, d], d = {cache.d} even, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    for x in rope:
        if x.dtype != torch.float32 or x.device != cache.device or not x.is_contiguous():
            raise ValueError(
                f"compact_kv: rope must be contiguous float32 on {cache.device}, as the cache, got "
                f"{x.dtype} on {x.device} with strides {x.stride()}"
            )
    longest = max(table.lengths.tolist(), default=0)
    if len(cos) < longest:
        raise ValueError(
            f"compact_kv: rope has angles of {len(cos)} positions, a request has {longest}"
        )
