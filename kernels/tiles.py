"""Tile tables: which block sizes, warps and pipeline stages a kernel runs with.

`tuned/<kernel>.json` lists rows {arch, <keys>, <BLOCK_...>, num_warps, num_stages, ...}. A lookup
takes the rows of the newest listed chip that is not newer than the device, then, key by key, those
with the smallest value that is not below what was asked. Nothing is tuned at import: a table
changes by a commit, and the audit compiles every row of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

TUNED = Path(__file__).parent / "tuned"
LAUNCH = ("num_warps", "num_stages", "descriptors", "warp_specialize")


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched."""

    blocks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    "Values of the kernel's BLOCK_ arguments."
    num_warps: int = 4
    "Warps of a program."
    num_stages: int = 2
    "Depth of the software pipeline of its loops."
    descriptors: bool = False
    "Read through tensor descriptors (TMA): sm_90 and later, strides of whole 16 bytes."
    warp_specialize: bool = False
    "Split producer and consumer warps (sm_90: needs descriptors, 4 warps and a single loop)."


@dataclass(frozen=True)
class Row:
    """One line of a table: when it applies, and the tile."""

    arch: int | str
    keys: Mapping[str, int]
    tile: Tile
    candidate: bool = False
    "Audited and benchmarked, but not picked until a benchmark has shown that it wins."


_overrides: ContextVar[Mapping[str, Tile]] = ContextVar("overrides", default=MappingProxyType({}))


@cache
def rows(kernel: str) -> tuple[Row, ...]:
    """Every row of a kernel's table, candidates included."""
    table = json.loads((TUNED / f"{kernel}.json").read_text())
    return tuple(_row(line) for line in table["rows"])


def pick(kernel: str, arch: int | str, **keys: int) -> Tile:
    """The tile of `kernel` on a chip for the given keys (bytes of a value, head width, ...).

    Raises:
        ValueError: the table has no row for them.
    """
    if (tile := _overrides.get().get(kernel)) is not None:
        return tile
    found = [row for row in rows(kernel) if not row.candidate and serves(row.arch, arch)]
    # Either one string, AMD's, or numbers.
    newest = max((row.arch for row in found), default=None)  # type: ignore[type-var]
    found = [row for row in found if row.arch == newest]
    for key, asked in keys.items():
        values = {row.keys[key] for row in found if row.keys[key] >= asked}
        found = [row for row in found if values and row.keys[key] == min(values)]
    if not found:
        raise ValueError(f"no tile of {kernel} for arch={arch}, {keys}: add a row to its table")
    return found[0].tile


@contextmanager
def override(kernel: str, tile: Tile) -> Iterator[None]:
    """Launch `kernel` with this tile inside the block (tests, tuning)."""
    token = _overrides.set({**_overrides.get(), kernel: tile})
    try:
        yield
    finally:
        _overrides.reset(token)


def serves(listed: int | str, arch: int | str) -> bool:
    """NVIDIA's chips run tiles of older ones; AMD's and the interpreter (0) only their own."""
    if isinstance(listed, str) or isinstance(arch, str) or 0 in (listed, arch):
        return listed == arch
    return listed <= arch


def _row(line: dict[str, Any]) -> Row:
    blocks = {key: value for key, value in line.items() if key.startswith("BLOCK")}
    launch = {key: line[key] for key in LAUNCH if key in line}
    other = {"arch", "candidate", *blocks, *launch}
    keys = {key: value for key, value in line.items() if key not in other}
    tile = Tile(MappingProxyType(blocks), **launch)
    return Row(line["arch"], keys, tile, line.get("candidate", False))
