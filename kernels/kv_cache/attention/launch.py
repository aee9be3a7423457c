"""The Triton kernel of attention over pages as custom operators of torch.

    afferent::paged_attention    out, lse = ...     decode_paged, extend_paged
    afferent::paged_cascade      out, lse = ...     decode_cascade
                                         tiles: tuned/paged_{decode,extend}.json, merge_states.json

They trace under `torch.compile(fullgraph=True)` and export, read no tensor on the host, and have no
gradient. Arguments are as in `op.py`, checked there; a cache and a table travel as their tensors:

    cache   data, scales, key_scales, key_zeros, value_scales, value_zeros, tail
    table   pages, lengths, tails
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from types import MappingProxyType

import torch
from torch import Tensor

from kernels.attention import merge
from kernels.attention.intervals import UNBOUNDED
from kernels.dispatch import arch
from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.language import LOG2E
from kernels.launch import dense_rows, launch, padded, precision
from kernels.tiles import Tile, pick

FEW_ROWS = 16
"Of the smallest tile that tensor cores multiply."
PROGRAMS_PER_PROCESSOR = 2
TILES_PER_SPLIT = 4
"At least, of the longest request that a table can hold: less work would not pay for a merge."

Tensors = Sequence[Tensor | None]


def tensors_of(cache: PagedKV) -> list[Tensor | None]:
    return [
        cache.data, cache.scales, cache.key_scales, cache.key_zeros,
        cache.value_scales, cache.value_zeros, cache.tail,
    ]  # fmt: skip


def tensors_of_table(table: BlockTable) -> list[Tensor | None]:
    return [table.pages, table.lengths, table.tails]


def value_width(d: int, group: int) -> int:
    """int4: columns of out that are accumulated together, inside one half and one group."""
    return gcd(d // 2, group)


@dataclass(frozen=True)
class Options:
    """What one pass over keys depends on besides tensors."""

    before: int
    after: int
    scale: float
    softcap: float


def splits_of(
    rows: int, groups: int, kv: int, tokens: int, options: Options, tile: Tile, device: torch.device
) -> int:
    """Programs that share the keys of a block of rows: enough for the chip, from shapes alone.

    Args:
        rows: of all requests. groups: requests. tokens: most that a request can have.
    """
    blocks = rows // tile.blocks["BLOCK_M"] + groups
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // max(1, blocks * kv))
    tiles = min(tokens, options.before + 1) // tile.blocks["BLOCK_N"]
    return max(1, min(wanted, tiles // TILES_PER_SPLIT))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_of(q: Tensor, cache: Tensors, rows: int) -> Tile:
    """The tile for requests of about `rows` rows: 16 of them, which is all that decoding mostly has
    and what float32 has registers for, or many. For int4 it lies in one page."""
    data, chip, d = cache[0], arch(q.device), q.shape[2]
    bits = 8 * data.itemsize if cache[4] is None else 4
    if rows <= FEW_ROWS or q.itemsize == 4:
        tile = pick("paged_decode", chip, bytes=q.itemsize, head_dim=d)
    else:
        tile = pick("paged_extend", chip, head_dim=d, bits=bits)
    if bits == 4:
        blocks = {**tile.blocks, "BLOCK_N": min(tile.blocks["BLOCK_N"], data.shape[2])}
        tile = replace(tile, blocks=MappingProxyType(blocks))
    return tile


def attend(
    q: Tensor,
    cache: Tensors,
    table: Tensors,
    cu_seqlens: Tensor | None,
    ahead: Tensor | None,
    sinks: Tensor | None,
    outs: Tensor,
    lses: Tensor,
    options: Options,
    tile: Tile,
) -> None:
    """Attention of q [n, h, d] over the pages of `table`, in parts: the splits.

    Args:
        cu_seqlens: where the queries of each request begin; None: one query per request.
        ahead: tokens between the keys and each query, itself included; None: queries are last keys.
        outs, lses: [splits, n, h, d] and [splits, h, n], which are written.
    """
    from kernels.kv_cache.attention.triton import paged_attention

    data, scales, key_scales, key_zeros, value_scales, value_zeros, tail = cache
    pages, lengths, tails = dense_rows(table[0]), table[1].contiguous(), table[2]
    (n, h, d), (page, kv) = q.shape, data.shape[2:4]
    group = h // kv
    kind = "none" if scales is None else "fp8" if data.is_floating_point() else "int8"
    width = d
    if value_scales is not None:
        kind, width = "int4", value_width(d, d // value_scales.shape[3])
    block_m = tile.blocks["BLOCK_M"]
    blocks = n * group // block_m + len(lengths)
    if cu_seqlens is None:
        blocks = n * -(-group // block_m)
    launch(
        paged_attention,
        (blocks * kv, len(outs)),
        tile,
        q=q, cu_seqlens=cu_seqlens, ahead=ahead, sinks=sinks, data=data, scales=scales,
        key_scales=key_scales, key_zeros=key_zeros, value_scales=value_scales,
        value_zeros=value_zeros, tail=tail, pages=pages, lengths=lengths, tails=tails,
        out=outs, lse=lses, requests=len(lengths),
        **strides("q", q, "nh"), **strides("data", data, ("page", "side", "token", "h")),
        **strides("scales", scales, ("page", "side", "token", "h")),
        **strides("channels", key_scales, ("page", "h")),
        **strides("groups", value_scales, ("page", "token", "h")),
        **strides("tail", tail, ("slot", "token", "h")), pages_r=pages.stride(0),
        **strides("out", outs, ("split", "n", "h")), **strides("lse", lses, ("split", "h")),
        before=options.before, after=options.after, softcap=options.softcap,
        scale=options.scale if options.softcap else options.scale * LOG2E.value,
        KIND=kind, KV=kv, GROUP=group, D=d, PAGE=page, WIDTH=width,
        VALUE_GROUP=1 if value_scales is None else d // value_scales.shape[3],
        BLOCK_D=padded(d if value_scales is None else d // 2), BLOCK_W=padded(width),
        PACKED=cu_seqlens is not None, AHEAD=ahead is not None,
        WINDOW=options.before < UNBOUNDED, SINKS=sinks is not None, SOFTCAP=options.softcap > 0,
        PRECISION=precision(q.dtype),
    )  # fmt: skip


def strides(name: str, x: Tensor | None, letters: Sequence[str]) -> dict[str, int]:
    """Strides of the leading dimensions by name; 0 for a tensor that there is not."""
    values = [0] * len(letters) if x is None else x.stride()
    return {f"{name}_{letter}": stride for letter, stride in zip(letters, values, strict=False)}


def forward(
    q: Tensor,
    cache: Tensors,
    table: Tensors,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    splits: int | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out [n, h, d] in the dtype of q, and lse float32 [h, n]."""
    q = dense_rows(q)
    (n, h, _), kv, requests = q.shape, cache[0].shape[3], len(table[1])
    tile = tile_of(q, cache, rows_of(n, requests, h // kv, cu_seqlens is not None, splits))
    if splits is None:
        tokens = table[0].shape[1] * cache[0].shape[2]
        splits = splits_of(n * h // kv, requests, kv, tokens, options, tile, q.device)
    out, lse = q.new_empty(q.shape), q.new_empty(h, n, dtype=torch.float32)
    if splits == 1:
        attend(
            q, cache, table, cu_seqlens, None, sinks, out[None], lse[None], options, tile
        )  # fmt: skip
        return out, lse
    outs, lses = partial(q, splits)
    attend(q, cache, table, cu_seqlens, None, None, outs, lses, options, tile)
    merge.forward(outs[:, None], lses[:, None], out[None], lse[None], sinks)
    return out, lse


def cascade(
    q: Tensor,
    cache: Tensors,
    table: Tensors,
    prefix: Tensors,
    groups: Tensor,
    sinks: Tensor | None,
    splits: int | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out [r, h, d] in the dtype of q, and lse float32 [h, r]: parts of both passes, merged."""
    q = dense_rows(q)
    (n, h, _), (page, kv), shared = q.shape, cache[0].shape[2:4], len(prefix[1])
    windowed = options.before < UNBOUNDED
    tiles, parts = [], []
    for requests, each, pages in ((shared, True, prefix[0]), (n, False, table[0])):
        tiles.append(tile_of(q, cache, rows_of(n, requests, h // kv, each, splits)))
        tokens = pages.shape[1] * page
        chosen = splits_of(n * h // kv, requests, kv, tokens, options, tiles[-1], q.device)
        parts.append(chosen if splits is None else splits)
    outs, lses = partial(q, sum(parts))
    everything = replace(options, after=UNBOUNDED)
    attend(
        q, cache, prefix, groups, table[1] if windowed else None, None,
        outs[: parts[0]], lses[: parts[0]], everything, tiles[0],
    )  # fmt: skip
    attend(
        q, cache, table, None, None, None, outs[parts[0] :], lses[parts[0] :], options, tiles[1]
    )  # fmt: skip
    out, lse = q.new_empty(q.shape), q.new_empty(h, n, dtype=torch.float32)
    merge.forward(outs[:, None], lses[:, None], out[None], lse[None], sinks)
    return out, lse


def rows_of(n: int, requests: int, group: int, packed: bool, splits: int | None) -> int:
    """Rows of a request, in the mean. Pinned splits promise a result that does not depend on the
    batch, so neither may the tile: then as if there were many."""
    if not packed:
        return group
    return FEW_ROWS + 1 if splits is not None else -(-n // max(1, requests)) * group


def partial(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Parts of out [splits, n, h, d] and of lse [splits, h, n], in float32."""
    n, h, d = q.shape
    outs = q.new_empty(splits, n, h, d, dtype=torch.float32)
    return outs, q.new_empty(splits, h, n, dtype=torch.float32)


@torch.library.custom_op("afferent::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor,
    cache: Sequence[Tensor | None],
    table: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    splits: int | None,
    before: int,
    after: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    options = Options(before, after, scale, softcap)
    return forward(q, cache, table, cu_seqlens, sinks, splits, options)


@paged_attention.register_fake
def _(q, cache, table, cu_seqlens, sinks, splits, before, after, scale, softcap):
    n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(h, n, dtype=torch.float32)


@torch.library.custom_op("afferent::paged_cascade", mutates_args=())
def paged_cascade(
    q: Tensor,
    cache: Sequence[Tensor | None],
    table: Sequence[Tensor | None],
    prefix: Sequence[Tensor | None],
    groups: Tensor,
    sinks: Tensor | None,
    splits: int | None,
    before: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    options = Options(before, 0, scale, softcap)
    return cascade(q, cache, table, prefix, groups, sinks, splits, options)


@paged_cascade.register_fake
def _(q, cache, table, prefix, groups, sinks, splits, before, scale, softcap):
    n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(h, n, dtype=torch.float32)
