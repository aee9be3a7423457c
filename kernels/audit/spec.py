"""One thing to compile and what must be true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kernels.launch import Compilation, capture
from kernels.tiles import Row, override, rows, serves

SHARED_MEMORY = {
    80: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
    "gfx942": 65_536,
}
"Bytes that one program may use."

TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"SASS mnemonic of each chip's widest 16-bit tensor-core instruction."


@dataclass(frozen=True)
class Spec:
    """A compilation, and which instructions must be in it."""

    name: str
    compilation: Compilation
    tensor_cores: str | None
    "wide: the chip's own (TENSOR_CORES); any: HMMA will do (tiles of 16 rows); None: has no dot."


def served(table: str, row: Row) -> list[Row]:
    """The row for every audited chip that takes it: its own, and newer ones without rows."""
    if row.candidate or not isinstance(row.arch, int):
        return [row]
    chips = [chip for chip in (80, 90, 100) if chip >= row.arch]
    newest = {
        chip: max(r.arch for r in rows(table) if not r.candidate and serves(r.arch, chip))
        for chip in chips
    }
    return [replace(row, arch=chip) for chip in chips if newest[chip] == row.arch]


def specs_of(
    row: Row,
    tables: tuple[str, ...],
    call: Callable[[], Any],
    name: str,
    tensor_cores: dict[str, str | None],
) -> list[Spec]:
    """Specs of what `call` launches on the row's chip, with its tile for each of `tables`.

    Args:
        call: a launcher, on meta tensors.
        name: what distinguishes the call; the kernel, the chip and the blocks are added.
        tensor_cores: kernel name -> as in Spec; kernels that are not named are left out.
    """
    with capture(row.arch) as launched:
        stack = [override(table, row.tile) for table in tables]
        for context in stack:
            context.__enter__()
        try:
            call()
        finally:
            for context in reversed(stack):
                context.__exit__(None, None, None)
    found = []
    for compilation in launched:
        kernel = compilation.kernel.rpartition(":")[2]
        if kernel in tensor_cores:
            label = f"{kernel} {name} {_chip(row.arch)} {_tile(row)}"
            found.append(Spec(label, compilation, tensor_cores[kernel]))
    return found


def _chip(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def _tile(row: Row) -> str:
    tile = row.tile
    marks = [mark for mark, on in (("tma", tile.descriptors), ("ws", tile.warp_specialize)) if on]
    sizes = "x".join(str(size) for size in tile.blocks.values())
    return " ".join([f"{sizes} w{tile.num_warps} s{tile.num_stages}", *marks])
