"""What is timed: a problem, the work it needs, and every implementation of it.

A case holds one problem. Its entries are implementations of the same problem on the same inputs:
ours, ours with other rows of the tile table, and peers. Every entry is checked against one oracle
before it is timed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.tiles import Tile, override, pick, rows

KERNELS = Path(__file__).resolve().parent.parent
SCALES = ("h200", "small", "tiny")
"h200: the shapes the targets are for. small: a quarter as long. tiny: to be checked on a CPU."

Inputs = dict[str, Any]
Call = Callable[[], Any]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where a suite is composed for."""

    scale: str
    impl: str
    "Of our entries: triton on a GPU, torch in a dry run."
    arch: int | str
    "The chip whose tiles are candidates; 0: none."

    def length(self, tokens: int, tiny: int) -> int:
        """A sequence length at this scale."""
        return {"h200": tokens, "small": max(tokens // 4, 64), "tiny": tiny}[self.scale]

    def size(self, full: int, tiny: int) -> int:
        """Another dimension at this scale."""
        return tiny if self.scale == "tiny" else full


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid."""

    flops: float
    bytes: float
    "Each input read once, each output written once."


@dataclass(frozen=True)
class Entry:
    """One implementation of a case's problem."""

    name: str
    prepare: Callable[[Inputs], Call]
    "Inputs -> what is timed. What it does itself (a mask, a forward pass) is not."
    ours: bool = False
    variant: bool = False
    "Ours with a tile that is not the one picked: it may fail."
    kernels: tuple[str, ...] = ()
    "Parts of names of GPU kernels: one of them must be seen to run. Empty: nothing is asked."
    on_cpu: bool = False
    "A dry run can call it."
    capturable: bool = True
    "As a CUDA graph: it does not wait for the GPU, nor copy from memory that is not pinned."
    note: str = ""
    work: Work | None = None
    "If it differs from the case's: a cache in another format."
    cap: float | None = None
    "If it differs from the case's."
    expected: Callable[[Inputs], Parts] | None = None
    "If its oracle is not the case's."


@dataclass(frozen=True)
class Target:
    """A ratio that is asked for: of two entries' times, to a ceiling of this machine, or of a time
    that is allowed and that of an entry."""

    name: str
    at_least: float
    entry: str = "triton"
    over: str = ""
    "A peer: time of `over` / time of `entry`; `tutorial`: the fastest of `tutorial ...`."
    ceiling: str = ""
    "copy, matmul or host: the entry's rate / that of the ceiling."
    ms: float | None = None
    "Milliseconds that are allowed, of this machine."
    stretch: float | None = None

    def __post_init__(self) -> None:
        if bool(self.over) + bool(self.ceiling) + (self.ms is not None) != 1:
            raise ValueError(f"target {self.name!r} needs one of `over`, `ceiling` and `ms`")


@dataclass(frozen=True)
class Case:
    """One problem, and who solves it."""

    suite: str
    name: str
    shapes: Mapping[str, int | str]
    dtype: torch.dtype
    work: Work
    inputs: Callable[[torch.device, int], Inputs]
    "device, seed -> random inputs by name"
    expected: Callable[[Inputs], Parts]
    "The oracle: values of some parts of the result, in float64."
    parts: Callable[[Any], Parts]
    "The same parts of what an entry returned."
    cap: float
    "Of ||part - oracle|| / ||oracle||."
    entries: tuple[Entry, ...]
    targets: tuple[Target, ...]
    sources: tuple[str, ...]
    "Files below kernels/ that decide its times; globs."
    footprint: float | None = None
    "Bytes of one set of inputs, if that is not work.bytes."
    through_host: bool = False
    "Its bytes go between the device and the host."
    extra: bool = False
    "Measured after the cases of all suites that are not."

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"

    def fingerprint(self) -> str:
        """Of the kernels' sources and of what is timed: a finished case is skipped by it."""
        digest = hashlib.sha256(f"{self.id} {dict(self.shapes)} {self.dtype}".encode())
        digest.update(" ".join(entry.name for entry in self.entries).encode())
        for pattern in self.sources:
            files = sorted(KERNELS.glob(pattern))
            if not files:
                raise ValueError(f"{self.id}: no file below kernels/ matches {pattern!r}")
            for file in files:
                digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random values: a kernel may be faster on zeros than it ever is on data."""
    return torch.randn(*shape, generator=rng, device=rng.device, dtype=dtype)


def tile_label(tile: Tile) -> str:
    """128x64 w8 s3 tma ws: blocks, warps, stages, descriptors, warp specialisation."""
    marks = [mark for mark, on in (("tma", tile.descriptors), ("ws", tile.warp_specialize)) if on]
    blocks = "x".join(str(size) for size in tile.blocks.values())
    return " ".join([blocks, f"w{tile.num_warps}", f"s{tile.num_stages}", *marks])


def picked(table: str, arch: int | str, **keys: int) -> str:
    """Label of the tile that a call on `arch` uses; '' where there is none, and for no chip."""
    return tile_label(tile) if arch and (tile := _pick(table, arch, keys)) else ""


def _pick(table: str, arch: int | str, keys: Mapping[str, int]) -> Tile | None:
    """None where the table has no such row. A label is not worth the end of a benchmark."""
    try:
        return pick(table, arch, **keys)
    except (ValueError, KeyError, OSError):
        return None


def variants(table: str, arch: int | str, **keys: int) -> Iterator[tuple[str, Tile]]:
    """The other rows of a tile table that `arch` can run for the same keys: candidates first."""
    chosen = _pick(table, arch, keys) if arch else None
    if chosen is None:
        return
    same = next((row.keys for row in rows(table) if row.tile == chosen), {})
    others = [
        row
        for row in rows(table)
        if row.keys == same and row.tile != chosen and _runs(row.arch, arch)
    ]
    seen = set()
    for row in sorted(others, key=lambda row: not row.candidate):
        label = tile_label(row.tile)
        if label not in seen:
            seen.add(label)
            yield label, row.tile


def _runs(listed: int | str, arch: int | str) -> bool:
    if isinstance(listed, str) or isinstance(arch, str):
        return listed == arch
    return 0 < listed <= arch


def with_tile(table: str, tile: Tile, prepare: Callable[[Inputs], Call]) -> Callable:
    """`prepare`, with `tile` in force both then and in every call."""

    def prepared(inputs: Inputs) -> Call:
        with override(table, tile):
            call = prepare(inputs)

        def run() -> Any:
            with override(table, tile):
                return call()

        return run

    return prepared


@contextmanager
def fresh_compilations() -> Iterator[None]:
    """torch.compile forgets earlier cases, as it keeps eight shapes of a function at most; and a
    compiled backward pass may run more than once."""
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()
