"""Pages of a cache moved to pinned host memory and back.

    device pages, anywhere  --index_select-->  staging, contiguous  --copies-->  runs of host pages

A page of one layer is some 64 KB, too little to keep a bus busy one call at a time: pages are first
gathered on the device, in the order of the host pages they go to, and every run of consecutive host
pages is then one copy; so take host pages in runs (`PagePool.alloc` does from a fresh pool). Back
it goes the other way round. All tensors of a page move, as bits: keys and values, scales and zero
points; the tails of int4 belong to requests, not to pages, and stay.

On a GPU both directions are asynchronous on a stream of the caller's choice and return an event.
For a cache in host memory, as on a machine without a GPU, they are plain copies, done on return.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels.kv_cache.layout import PagedKV


def host_cache(cache: PagedKV, pages: int) -> PagedKV:
    """An empty cache of `pages` pages laid out as those of `cache`, in host memory: pinned if there
    is a GPU, so that it can copy by itself. Without the tails of int4."""
    if pages < 1:
        raise ValueError(f"host_cache: pages={pages} must be at least 1")
    pinned = torch.cuda.is_available()
    new = {
        name: torch.empty((pages, *x.shape[1:]), dtype=x.dtype, pin_memory=pinned)
        for name, x in _page_tensors(cache).items()
    }
    return replace(cache, **new, tail=None)


def swap_out(
    cache: PagedKV,
    pages: Sequence[int],
    host: PagedKV,
    host_pages: Sequence[int],
    *,
    stream: torch.cuda.Stream | None = None,
) -> torch.cuda.Event | None:
    """Copy pages[i] of `cache` to host_pages[i] of `host`, bit by bit; no other page is touched.

    Args:
        pages, host_pages: different page ids, as many of both.
        host: from `host_cache`.
        stream: where the copies run, after what the current stream has done so far; None: on the
            current stream.
    Returns:
        On a GPU an event: until it has happened, neither read the host pages nor let the pages be
        overwritten (another stream waits with `stream.wait_event`). On the CPU None: it is done.
    Raises:
        ValueError: layouts that differ, page ids that are out of range, listed twice or not as
            many on both sides, or a host cache that is not pinned host memory.
    """
    order, runs = _plan(cache, pages, host, host_pages)
    with _on(stream, cache.device):
        taken = torch.tensor(order, dtype=torch.int64, device=cache.device)
        for ours, theirs in _paired(cache, host):
            staging = ours.index_select(0, taken)
            for first, begin, end in runs:
                theirs[first : first + end - begin].copy_(staging[begin:end], non_blocking=True)
        return _event(cache.device)


def swap_in(
    cache: PagedKV,
    pages: Sequence[int],
    host: PagedKV,
    host_pages: Sequence[int],
    *,
    stream: torch.cuda.Stream | None = None,
) -> torch.cuda.Event | None:
    """Copy host_pages[i] of `host` to pages[i] of `cache`: arguments and errors as for `swap_out`.

    Returns:
        On a GPU an event: until it has happened, neither read the pages nor write the host pages.
        On the CPU None: it is done.
    """
    order, runs = _plan(cache, pages, host, host_pages)
    with _on(stream, cache.device):
        taken = torch.tensor(order, dtype=torch.int64, device=cache.device)
        for ours, theirs in _paired(cache, host):
            staging = ours.new_empty(len(order), ours.shape[1])
            for first, begin, end in runs:
                staging[begin:end].copy_(theirs[first : first + end - begin], non_blocking=True)
            ours.index_copy_(0, taken, staging)
        return _event(cache.device)


def _plan(
    cache: PagedKV, pages: Sequence[int], host: PagedKV, host_pages: Sequence[int]
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Pages in the order of their host pages, and runs (first host page, begin, end) of those."""
    _check_layouts(cache, host)
    pages, host_pages = [int(i) for i in pages], [int(i) for i in host_pages]
    if len(pages) != len(host_pages):
        raise ValueError(f"swap: {len(pages)} pages do not fit {len(host_pages)} host pages")
    for name, ids, limit in (("page", pages, cache.pages), ("host page", host_pages, host.pages)):
        for i in ids:
            if not 0 <= i < limit:
                raise ValueError(f"swap: {name} {i} is out of range: there are {limit}")
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"swap: {name} {twice} is listed twice: each page moves once")
    pairs = sorted(zip(host_pages, pages, strict=True))
    runs: list[tuple[int, int, int]] = []
    for at, (host_page, _) in enumerate(pairs):
        if runs and host_page == runs[-1][0] + at - runs[-1][1]:
            runs[-1] = (*runs[-1][:2], at + 1)
        else:
            runs.append((host_page, at, at + 1))
    return [page for _, page in pairs], runs


def _check_layouts(cache: PagedKV, host: PagedKV) -> None:
    def layout(x: PagedKV) -> dict[str, tuple]:
        return {name: (*y.shape[1:], y.dtype) for name, y in _page_tensors(x).items()}

    if cache.quant != host.quant or layout(cache) != layout(host):
        raise ValueError(
            f"swap: the host cache is laid out as {layout(host)}, the cache as {layout(cache)}: "
            "make it with host_cache(cache, pages)"
        )
    for name, x in [*_page_tensors(cache).items(), *_page_tensors(host).items()]:
        if not x.is_contiguous():
            raise ValueError(f"swap: {name} must be contiguous, got strides {x.stride()}")
    for name, x in _page_tensors(host).items():
        if x.device.type != "cpu" or (cache.device.type == "cuda" and not x.is_pinned()):
            raise ValueError(
                f"swap: the host cache's {name} is on {x.device} and must be pinned host memory: "
                "make it with host_cache(cache, pages)"
            )


def _page_tensors(cache: PagedKV) -> dict[str, Tensor]:
    """The tensors of a cache whose first dimension is the page."""
    tensors = {field.name: getattr(cache, field.name) for field in fields(cache)}
    return {name: x for name, x in tensors.items() if isinstance(x, Tensor) and name != "tail"}


def _paired(cache: PagedKV, host: PagedKV) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of both caches as [pages, words]: every page is a multiple of 4 bytes."""
    return [
        tuple(x.view(len(x), -1).view(torch.int32) for x in pair)
        for pair in zip(_page_tensors(cache).values(), _page_tensors(host).values(), strict=True)
    ]


def _on(stream: torch.cuda.Stream | None, device: torch.device):
    """Run on `stream` what follows, after what the current stream was given."""
    if stream is None or device.type != "cuda":
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
