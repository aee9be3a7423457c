"""Attention over a paged cache: decoding, chunked prefill, and decoding behind shared prefixes.

    decode_paged      one query for each request, its last token
    extend_paged      several for each, its last tokens: chunked prefill, speculative decoding
    decode_cascade    decoding where groups of requests share a prefix, which is read once a group

    impl       what runs                                            without
    triton     our kernels (`triton.py`), on a GPU                  gradients, float64
    interpret  the same, interpreted on the CPU, for tests          gradients, float64
    torch      pages gathered, then matmuls and a softmax           -
    auto       triton on a GPU, else torch

The definition is in `reference.py`. What has been cached is final: to learn through keys and values
use `kernels.attention`.

Dimensions: n queries, r requests, g groups of them, h query heads, kv key/value heads, d head
width, s keys.
"""

from __future__ import annotations

from math import gcd

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from kernels.attention.intervals import UNBOUNDED, reach
from kernels.attention.merge import merge_states
from kernels.attention.op import masked_attention
from kernels.dispatch import arch, resolve
from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.quantise import decode_keys, decode_rows, decode_values

Result = Float[Tensor, "n h d"] | tuple[Float[Tensor, "n h d"], Float[Tensor, "h n"]]


def decode_paged(
    q: Float[Tensor, "r h d"],
    cache: PagedKV,
    table: BlockTable,
    *,
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    impl: str = "auto",
) -> Result:
    """Attention of one query for each request: its last token, which is in the cache already.

    Args:
        q: in the dtype that the cache serves (under autocast it is cast to it); kv divides h, and
            query head i reads head i // (h / kv).
        cache: keys and values of one layer; quantised ones are read as what they stand for.
        table: pages and lengths of the r requests.
        window: tokens a query sees, itself included, counting back. None: all.
        sinks: a logit per query head that takes part in the softmax and whose value is zero.
        softcap: c > 0 replaces each score x by c tanh(x / c).
        scale: factor > 0 on the scores; None: 1 / sqrt(d).
        return_lse: return the log-sum-exp of the scores too, natural logarithm.
        splits: programs that share the keys of a request (kernels only). None: what fills the chip,
            from the shapes. A number pins the order of every sum: the bits of a request's result no
            longer depend on the batch it is in.
        impl: one of those above.
    Returns:
        The attended values in the dtype of q; 0 for a request without tokens. With `return_lse`
        also LSE [h, r] in float32 (float64 for float64), -inf for such a request.
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, an unknown `impl`, or one
            that cannot run; the message says why.
    """
    q = _autocast(q, cache)
    _check(q, cache, table, window, sinks, softcap, scale, splits)
    if len(q) != len(table.lengths):
        raise ValueError(
            f"decode_paged takes one query per request: q has {len(q)}, the table "
            f"{len(table.lengths)} requests; extend_paged takes several"
        )
    return _paged(
        "decode_paged", q, cache, table, None, True, window, sinks, softcap, scale, return_lse,
        splits, impl,
    )  # fmt: skip


def extend_paged(
    q: Float[Tensor, "n h d"],
    cache: PagedKV,
    table: BlockTable,
    *,
    cu_seqlens: Int32[Tensor, " r+1"],
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    impl: str = "auto",
) -> Result:
    """Attention of several queries for each request: its last tokens, which are in the cache.

    Args:
        q: the queries of all requests, one request after the other.
        cu_seqlens: where the queries of each request begin and where the last end: ascending from
            0 to n, none with more queries than tokens. Checked if it is on the CPU.
        causal: a query sees no token after its own.
        Others as in `decode_paged`; `window` needs `causal`.
    Returns:
        As `decode_paged`, LSE [h, n].
    Raises:
        ValueError: as `decode_paged`.
    """
    q = _autocast(q, cache)
    _check(q, cache, table, window, sinks, softcap, scale, splits)
    if window is not None and not causal:
        raise ValueError(f"window={window} needs causal=True: it counts back from the query")
    _check_bounds("cu_seqlens", cu_seqlens, len(table.lengths), len(q), "queries")
    if not (cu_seqlens.is_meta or cu_seqlens.is_cuda or torch.compiler.is_compiling()):
        short = torch.nonzero(cu_seqlens.diff() > table.lengths.cpu())
        if len(short):
            i = int(short[0])
            raise ValueError(
                f"request {i} has {int(cu_seqlens[i + 1] - cu_seqlens[i])} queries in cu_seqlens "
                f"but {int(table.lengths[i])} tokens in the table: append its keys first"
            )
    return _paged(
        "extend_paged", q, cache, table, cu_seqlens, causal, window, sinks, softcap, scale,
        return_lse, splits, impl,
    )  # fmt: skip


def decode_cascade(
    q: Float[Tensor, "r h d"],
    cache: PagedKV,
    table: BlockTable,
    *,
    prefix: BlockTable,
    groups: Int32[Tensor, " g+1"],
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    impl: str = "auto",
) -> Result:
    """`decode_paged` over a prefix that a group of requests shares, followed by their own tokens.

    Exact (Hydragen: Juravsky et al., 2024, arXiv:2402.05099): attention over the prefix, whose
    queries are those of the whole group, and over each request's own tokens, put together as
    `merge_states` does. The prefix is read once for a group instead of once for a request.

    Args:
        q: the queries, the requests of a group next to each other.
        table: pages and lengths of each request's own tokens, those after the prefix.
        prefix: pages and lengths of the g prefixes; a length need not fill its last page.
        groups: the requests groups[i] .. groups[i + 1] share prefix i; ascending from 0 to r.
        splits: pinned for both passes alike.
        Others as in `decode_paged`. A window counts back through the own tokens into the prefix.
    Returns:
        As `decode_paged`.
    Raises:
        ValueError: as `decode_paged`.
    """
    q = _autocast(q, cache)
    _check(q, cache, table, window, sinks, softcap, scale, splits)
    if len(q) != len(table.lengths):
        raise ValueError(
            f"decode_cascade takes one query per request: q has {len(q)}, the table "
            f"{len(table.lengths)} requests"
        )
    _check_table(prefix, cache, "prefix")
    _check_bounds("groups", groups, len(prefix.lengths), len(q), "requests")
    chosen = resolve(
        "decode_cascade",
        impl,
        device=q.device,
        table="paged_decode",
        refusal=kernel_refusal(q, cache, table),
    )
    before, _ = reach(True, window)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if chosen == "torch":
        shared = _attend(
            q, cache, prefix, groups, before, UNBOUNDED, table.lengths, None, softcap, scale
        )
        own = _attend(q, cache, table, None, before, 0, None, sinks, softcap, scale)
        out, lse = merge_states([shared, own], impl="torch")
    else:
        from kernels.kv_cache.attention import launch

        out, lse = launch.paged_cascade(
            q, launch.tensors_of(cache), launch.tensors_of_table(table),
            launch.tensors_of_table(prefix), groups.to(q.device, torch.int32), sinks, splits,
            before, scale, softcap or 0.0,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _paged(
    op, q, cache, table, cu_seqlens, causal, window, sinks, softcap, scale, return_lse, splits, impl
) -> Result:
    chosen = resolve(
        op, impl, device=q.device, table="paged_decode", refusal=kernel_refusal(q, cache, table)
    )
    before, after = reach(causal, window)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if chosen == "torch":
        out, lse = _attend(q, cache, table, cu_seqlens, before, after, None, sinks, softcap, scale)
    else:
        from kernels.kv_cache.attention import launch

        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device, torch.int32)
        out, lse = launch.paged_attention(
            q, launch.tensors_of(cache), launch.tensors_of_table(table), cu_seqlens, sinks, splits,
            before, after, scale, softcap or 0.0,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def kernel_refusal(q: Tensor, cache: PagedKV, table: BlockTable) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    chip, kind, d = arch(q.device), cache.quant.kind, cache.d
    if d > 256:
        return f"the kernels take heads of up to 256, not {d}"
    if cache.data.stride(-1) != 1:
        return f"channels of the cache must be contiguous, their stride is {cache.data.stride(-1)}"
    if isinstance(chip, str):
        return f"no tiles have been chosen for {chip}"
    if kind == "fp8" and 0 < chip < 89:
        return f"sm_{chip} has no float8 e4m3fn, sm_89 and later do: use quant kind int8"
    if kind == "int4":
        width = gcd(d // 2, cache.quant.group)
        if width < 16 and width < d // 2:
            return (
                f"int4 values in groups of {cache.quant.group} cut a head of {d} into parts of "
                f"{width} channels, the kernels need 16: use a wider group"
            )
    return None


def _attend(
    q: Float[Tensor, "n h d"],
    cache: PagedKV,
    table: BlockTable,
    cu_seqlens: Int32[Tensor, " r+1"] | None,
    before: int,
    after: int,
    ahead: Int32[Tensor, " n"] | None,
    sinks: Float[Tensor, " h"] | None,
    softcap: float | None,
    scale: float,
) -> tuple[Float[Tensor, "n h d"], Float[Tensor, "h n"]]:
    """The torch path: requests side by side, [r, most queries], on gathered pages.

    ahead: tokens between a request's keys and each query, itself included; None: queries are among
        the keys, the last of them.
    """
    n, lengths = len(q), table.lengths.long()[:, None]  # [r, 1]
    if n == 0:
        return q.clone(), q.new_empty(
            q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32)
        )
    if cu_seqlens is None:
        index = torch.arange(n, device=q.device)[:, None]  # [r, 1]
        position = lengths - 1
    else:
        begins = cu_seqlens.to(q.device, torch.int64)
        counts = begins.diff()
        slot = torch.arange(_largest(counts, n), device=q.device)
        index = (begins[:-1, None] + slot).clamp(max=n - 1)
        position = lengths - counts[:, None] + slot
    if ahead is not None:
        position = lengths + ahead.long()[index] - 1
    k, v = gather(cache, table)
    j = torch.arange(k.shape[1], device=q.device)
    seen: Bool[Tensor, "r t s"] = (j < lengths)[:, None] & (j <= (position + after)[..., None])
    seen = seen & (j >= (position - before)[..., None])
    out, lse = masked_attention(
        q[index], k, v, seen, sinks, softcap, scale
    )  # [r, t, h, d], [r, h, t]
    if cu_seqlens is None:
        return out[:, 0], lse[..., 0].mT
    query = torch.arange(n, device=q.device)
    request = torch.searchsorted(begins, query, right=True) - 1
    slot = query - begins[request]
    return out[request, slot], lse[request, :, slot].mT


def gather(
    cache: PagedKV, table: BlockTable
) -> tuple[Float[Tensor, "r s kv d"], Float[Tensor, "r s kv d"]]:
    """Keys and values of the requests side by side, zero after the last of each; s tokens each, at
    least as many as the longest has."""
    page, dtype = cache.page, cache.dtype
    wide = torch.promote_types(dtype, torch.float32)
    lengths = table.lengths.long()[:, None]
    most = -(-_largest(lengths, table.pages.shape[1] * page) // page)
    column = torch.arange(most, device=cache.device)
    pages = torch.where(column * page < lengths, table.pages[:, :most].long(), 0)  # [r, most]
    stored = cache.data[pages]  # [r, most, 2, page, kv, width]
    k, v = stored[:, :, 0], stored[:, :, 1]
    if cache.scales is not None:
        scales = cache.scales[pages]
        k, v = (decode_rows(x, scales[:, :, i], wide) for i, x in enumerate((k, v)))
    elif cache.tail is not None:
        k = decode_keys(k, cache.key_scales[pages], cache.key_zeros[pages], wide)
        v = decode_values(v, cache.value_scales[pages], cache.value_zeros[pages], wide)
        unfinished = column == lengths // page
        tail = cache.tail[table.tails.long()]  # [r, page, kv, d]
        k = torch.where(unfinished[..., None, None, None], tail[:, None].to(wide), k)
    written = torch.arange(most * page, device=cache.device) < lengths  # [r, s]
    return tuple(
        torch.where(written[..., None, None], x.flatten(1, 2).to(dtype), 0.0) for x in (k, v)
    )


def _largest(x: Int[Tensor, " *shape"], bound: int) -> int:
    """The largest value, or where values cannot be read a bound of it."""
    if torch.compiler.is_compiling() or x.is_meta:
        return bound
    return int(x.max()) if x.numel() else 0


def _autocast(q: Tensor, cache: PagedKV) -> Tensor:
    kind = q.device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return q.to(cache.dtype) if active else q


def _check(q, cache, table, window, sinks, softcap, scale, splits) -> None:
    if q.ndim != 3 or q.shape[2] != cache.d:
        raise ValueError(
            f"expected q [queries, h, d] with d={cache.d} as in the cache, got {list(q.shape)}"
        )
    h = q.shape[1]
    if h == 0 or h % cache.kv:
        raise ValueError(f"the cache's {cache.kv} key/value heads do not divide {h} query heads")
    if q.dtype != cache.dtype:
        raise ValueError(f"q is {q.dtype}, the cache serves {cache.dtype}: cast q to it")
    if q.device != cache.device:
        raise ValueError(f"q is on {q.device}, the cache on {cache.device}: move q there")
    _check_table(table, cache, "table")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for no window")
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"sinks must be [h] = [{h}], got {list(sinks.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be > 0, or None")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be > 0, or None for 1 / sqrt(d)")
    if splits is not None and splits < 1:
        raise ValueError(f"splits={splits} must be at least 1, or None to let the shapes decide")


def _check_table(table: BlockTable, cache: PagedKV, name: str) -> None:
    pages, lengths = table.pages, table.lengths
    if pages.ndim != 2 or lengths.shape != pages.shape[:1]:
        raise ValueError(
            f"{name} must have pages [r, most] and lengths [r], got {list(pages.shape)} and "
            f"{list(lengths.shape)}"
        )
    if pages.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(
            f"{name} must hold int32, got {pages.dtype} and {lengths.dtype}: BlockTable.create does"
        )
    if pages.device != cache.device or lengths.device != cache.device:
        raise ValueError(
            f"{name} is on {pages.device}, the cache on {cache.device}: BlockTable.create moves it"
        )
    if (table.tails is None) != (cache.tail is None):
        raise ValueError(
            f"{name} has tails exactly if the cache is int4: one slot for each request"
        )


def _check_bounds(name: str, bounds: Tensor, requests: int, total: int, what: str) -> None:
    if bounds.shape != (requests + 1,) or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must hold {requests + 1} integers for {requests} requests or prefixes, got "
            f"{list(bounds.shape)} of {bounds.dtype}"
        )
    if bounds.is_meta or bounds.is_cuda or torch.compiler.is_compiling():
        return
    if int(bounds[0]) != 0 or int(bounds[-1]) != total or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"{name} must ascend from 0 to the {total} {what} of q, got {bounds.tolist()}"
        )
