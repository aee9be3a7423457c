"""Launching a Triton kernel, or noting what the launch would compile.

Every launcher goes through `launch`. Inside `capture` nothing runs: the arguments are turned into
the signature that Triton would compile for them (types, 16-byte divisibility, ones as constants),
so that the audit compiles what is really launched, from meta tensors and without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import arch, assume_arch
from kernels.tiles import Tile

GRID_ROWS = 65_535
"Most that the second and the third axis of a CUDA grid have."

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compilation:
    """What Triton compiles for one launch; plain values, so that it travels between processes."""

    kernel: str  # module:function
    arch: int | str
    signature: dict[str, str]  # every argument in order: "*bf16", "i32", "fp32", "constexpr"
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int
    num_stages: int
    descriptors: bool
    warp_specialize: bool


_captured: ContextVar[list[Compilation] | None] = ContextVar("captured", default=None)


@contextmanager
def capture(chip: int | str) -> Iterator[list[Compilation]]:
    """Note launches for `chip` instead of running them; give the launchers meta tensors."""
    compilations: list[Compilation] = []
    token = _captured.set(compilations)
    try:
        with assume_arch(chip):
            yield compilations
    finally:
        _captured.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Run `kernel` over `grid` with `tile`; an empty grid runs nothing.

    Args:
        kernel: what `@triton.jit` returned.
        grid: one to three sizes, the second and third up to GRID_ROWS.
        tile: its blocks are passed as constants of those names.
        arguments: every other argument of the kernel by name. None is a constant.

    Raises:
        ValueError: a grid that CUDA does not launch.
    """
    if any(size > GRID_ROWS for size in grid[1:]):
        raise ValueError(
            f"{kernel.__name__}: a grid of {grid} has more than {GRID_ROWS} rows: give it less of "
            "the batch, or fewer heads, at a time"
        )
    arguments = {**arguments, **tile.blocks}
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    captured = _captured.get()
    if captured is not None:
        captured.append(_compilation(kernel, arch(device), tile, arguments))
    elif 0 not in grid:
        if tile.descriptors:
            _give_descriptors_memory()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


def cdiv(rows: int, block: int) -> int:
    """Blocks that hold so many rows."""
    return -(-rows // block)


def dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of [b, t, h, ...] tensors, by the names that the kernels give them."""
    return {
        f"{name}_{axis}": x.stride(index)
        for name, x in tensors.items()
        for index, axis in enumerate("bth")
    }


def misaligned(x: Tensor) -> int | None:
    """Bytes of a stride, or of the offset, that is no multiple of 16; None if a tensor descriptor
    can read x. Rows that are not dense are copied before, and sizes of 1 have no stride."""
    if x.stride(-1) != 1:
        return None if x.shape[-1] * x.itemsize % 16 == 0 else x.shape[-1] * x.itemsize
    apart = [n for n, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    steps = [n * x.itemsize for n in [*apart, x.storage_offset()]]
    return next((step for step in steps if step % 16), None)


def readable(x: Tensor) -> Tensor:
    """x as a tensor descriptor can read it, copied only if it has to be."""
    return x.contiguous() if misaligned(x) is not None or x.stride(-1) != 1 else x


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores multiply: float32 exactly, unless torch was told otherwise."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def padded(d: int) -> int:
    """Width of a tile for heads of d: a power of two that `tl.dot` takes."""
    return max(16, 1 << (d - 1).bit_length())


def _compilation(kernel: Any, chip: int | str, tile: Tile, arguments: dict) -> Compilation:
    declared_constants = {kernel.arg_names[index] for index in kernel.constexprs}
    signature, constants, divisible = {}, {}, []
    for name in kernel.arg_names:
        value = arguments[name]
        if name in declared_constants or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:  # Triton compiles ones in
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    return Compilation(
        f"{kernel.fn.__module__}:{kernel.fn.__name__}",
        chip,
        signature,
        constants,
        tuple(divisible),
        tile.num_warps,
        tile.num_stages,
        tile.descriptors,
        tile.warp_specialize,
    )


def _give_descriptors_memory() -> None:
    """Descriptors made in a kernel live in scratch memory, from torch's (capturable) allocator."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)
