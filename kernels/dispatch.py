"""Which implementation of an op runs: the one asked for by name, or one picked and reported.

    impl        what runs
    triton      our kernels, on a GPU
    interpret   the same, interpreted on the CPU (in a process with TRITON_INTERPRET=1): for tests
    torch       plain torch operators, any device
    sdpa, flex  torch's scaled_dot_product_attention and flex_attention, where an op has them
    auto        triton where it can, else a torch path; `record` and the log say which, and why

An implementation asked for by name runs, or raises ValueError with the reason: it never falls back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from kernels.tiles import rows, serves

log = logging.getLogger("afferent.kernels")


@dataclass(frozen=True)
class Choice:
    """What ran: the op, its implementation, and why: "asked for", or what "auto" went by."""

    op: str
    impl: str
    reason: str


_recorded: ContextVar[list[Choice] | None] = ContextVar("recorded", default=None)
_assumed_arch: list[int | str] = []  # a stack; torch.compile cannot read a ContextVar
_logged: set[Choice] = set()


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect what every op called inside the block ran as, in order.

    Calls inside a `torch.compile`d graph are not seen: they were chosen when it was traced.
    """
    choices: list[Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


def resolve(
    op: str,
    impl: str,
    *,
    device: torch.device,
    table: str,
    torch_impls: Sequence[str] = ("torch",),
    refusal: str | None = None,
) -> str:
    """The implementation that runs: "triton", "interpret" or one of `torch_impls`.

    Args:
        op: name of the public function, for messages.
        impl: what the caller asked for.
        device: of the tensors.
        table: a tile table of the kernels: they run on the chips it has rows for.
        torch_impls: implementations besides the kernels; the first is what "auto" falls back to.
        refusal: why the kernels cannot compute this call; None if they can.
    Raises:
        ValueError: an unknown `impl`, or one that cannot run here; the message says why.
    """
    known = ("auto", "triton", "interpret", *torch_impls)
    if impl not in known:
        raise ValueError(f"{op}: impl={impl!r} is unknown: use {', '.join(known)}")
    if impl in torch_impls:
        return _report(op, impl, "asked for")
    if impl == "interpret":
        _require(op, impl, _no_interpreter(device) or refusal)
        return _report(op, impl, "asked for")
    reason = _no_gpu(device) or refusal or _no_tiles(table, arch(device))
    if impl == "triton":
        _require(op, impl, reason)
        return _report(op, impl, "asked for")
    if reason is None:
        return _report(op, "triton", "a GPU is there")
    return _report(op, torch_impls[0], reason)


def interpreting() -> bool:
    """Whether kernels of this process are interpreted: decided before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def arch(device: torch.device) -> int | str:
    """The chip that kernels run on: 90 for sm_90, "gfx942" for AMD's, 0 for the interpreter."""
    if _assumed_arch:
        return _assumed_arch[-1]
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return 10 * properties.major + properties.minor


@contextmanager
def assume_arch(value: int | str) -> Iterator[None]:
    """Choose tiles and check limits as if the device were this chip (the audit, tests)."""
    _assumed_arch.append(value)
    try:
        yield
    finally:
        _assumed_arch.pop()


def _no_gpu(device: torch.device) -> str | None:
    if device.type == "cuda" or (_assumed_arch and _assumed_arch[-1]):
        return None
    return f"the tensors are on {device.type}, not on a GPU"


@torch.compiler.assume_constant_result
def _no_tiles(table: str, chip: int | str) -> str | None:
    if any(serves(row.arch, chip) for row in rows(table)):
        return None
    return f"{table} has no tiles for {f'sm_{chip}' if isinstance(chip, int) else chip}"


def _no_interpreter(device: torch.device) -> str | None:
    if not interpreting():
        return "start Python with TRITON_INTERPRET=1, before triton is imported"
    return None if device.type == "cpu" else f"the tensors are on {device.type}, not on the CPU"


def _require(op: str, impl: str, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run here: {reason}")


def _report(op: str, impl: str, reason: str) -> str:
    if torch.compiler.is_compiling():
        return impl
    choice = Choice(op, impl, reason)
    if (recorded := _recorded.get()) is not None:
        recorded.append(choice)
    if choice not in _logged:
        _logged.add(choice)
        log.info("%s runs as %s: %s", op, impl, reason)
    return impl
