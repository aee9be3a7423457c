"""Random cases of attention over pages: decoding, extending, cascades, on every kind of cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_cache.attention import op, reference
from kernels.kv_cache.layout import KINDS, BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.quantise import encode_keys, encode_rows, encode_values
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

OPS = ("decode_paged", "extend_paged", "decode_cascade")
LENGTHS = {"small": (0, 1, 15, 16, 17, 40, 64, 71), "large": (0, 1, 127, 128, 129, 1000, 4097)}
QUERIES = {"small": (0, 1, 2, 7, 20), "large": (0, 1, 5, 150)}
WIDTHS = {"small": (16, 20, 32, 64), "large": (16, 64, 80, 96, 128, 256)}
HEADS = {"small": ((1, 1), (2, 1), (2, 2), (6, 2)), "large": ((8, 8), (8, 2), (7, 1), (20, 1))}
PAGES = {"small": (16, 32), "large": (16, 64, 128)}
REQUESTS = {"small": (1, 2, 4), "large": (1, 5)}

QUANTISED_CAP = 1e-2
"Of the relative norm, against the definition, which dequantises exactly."


@dataclass(frozen=True)
class Inputs:
    """What an op is called with."""

    op: str
    q: Tensor
    cache: PagedKV
    table: BlockTable
    options: dict[str, Any]

    def to(self, device: torch.device, *, guard: bool = False) -> Inputs:
        """On a device; with `guard` floats and codes sit in larger tensors of poison."""

        def move(x: Any) -> Any:
            if isinstance(x, Tensor):
                x = x.to(device)
                return guarded(x, guard=1) if guard and x.numel() and x.ndim > 2 else x
            if isinstance(x, BlockTable):
                return BlockTable(*(y if y is None else y.to(device) for y in vars(x).values()))
            return x

        cache = PagedKV(**{name: move(x) for name, x in vars(self.cache).items()})
        options = {name: move(x) for name, x in self.options.items()}
        return replace(
            self, q=move(self.q), cache=cache, table=move(self.table), options=options
        )  # fmt: skip

    def double(self) -> Inputs:
        options = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.options.items()
        }
        return replace(self, q=self.q.double(), options=options)


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        inputs = draw(size, SEEDS + index, dtype)
        yield Case(inputs.op, describe(inputs), dtype, runner(inputs, dtype))


def draw(size: str, seed: int, dtype: torch.dtype) -> Inputs:
    """Ops and kinds of cache take turns, everything else is drawn."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    name, kind = OPS[seed % len(OPS)], KINDS[seed // len(OPS) % len(KINDS)]
    d, (h, kv), r = rng.choice(WIDTHS[size]), rng.choice(HEADS[size]), rng.choice(REQUESTS[size])
    page = rng.choice(PAGES[size])
    lengths = [rng.choice(LENGTHS[size]) for _ in range(r)]
    group = rng.choice([64, d // 2, d // 4]) if kind == "int4" and d % 64 == 0 else d
    quant = QuantSpec(kind, group)
    shared = rng.randint(1, r) if name == "decode_cascade" else 0
    lengths += [rng.choice(LENGTHS[size]) for _ in range(shared)]
    keys = [torch.randn(2, n, kv, d, generator=generator, dtype=torch.float64) for n in lengths]
    cache, table = fill(keys, page, dtype, quant, generator)
    options: dict[str, Any] = {}
    n = r
    if name == "decode_cascade":
        cuts = sorted(rng.randint(0, r) for _ in range(shared - 1))
        options["groups"] = torch.tensor([0, *cuts, r], dtype=torch.int32)
        table, options["prefix"] = part(table, 0, r), part(table, r, r + shared)
    if name == "extend_paged":
        counts = [min(length, rng.choice(QUERIES[size])) for length in lengths]
        options["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0).int()
        n, options["causal"] = sum(counts), rng.random() < 0.7
    if options.get("causal", True) and rng.random() < 0.4:
        options["window"] = rng.choice([1, 2, 20, max(lengths) + 1])
    if rng.random() < 0.3:
        options["sinks"] = torch.randn(h, generator=generator).to(dtype)
    if rng.random() < 0.3:
        options["softcap"] = rng.choice([1.0, 30.0])
    if rng.random() < 0.2:
        options["scale"] = 0.3
    if rng.random() < 0.7:
        options["splits"] = rng.choice([1, 2, 3])
    q = torch.randn(n, h, d, generator=generator, dtype=torch.float64).to(dtype)
    return Inputs(name, q, cache, table, options)


def fill(
    pairs: list[Tensor],
    page: int,
    dtype: torch.dtype,
    quant: QuantSpec,
    generator: torch.Generator,
    spare: int = 3,
) -> tuple[PagedKV, BlockTable]:
    """A cache that holds keys and values [2, length, kv, d] of each request, poison elsewhere.

    Pages are in random order, `spare` of them unused. Unused cells are NaN (codes: the largest),
    and so are their scales; table entries past the last page are out of range.
    """
    kv, d = pairs[0].shape[2:]
    used = [-(-pair.shape[1] // page) for pair in pairs]
    cache = PagedKV.create(
        sum(used) + spare, page, kv, d, dtype=dtype, quant=quant,
        slots=len(pairs) + 1 if quant.kind == "int4" else 0,
    )  # fmt: skip
    for x in vars(cache).values():
        if isinstance(x, Tensor):
            x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
    order = torch.randperm(cache.pages, generator=generator).int()
    pages = torch.full((len(pairs), max(used) + 1), 2**31 - 1, dtype=torch.int32)
    slots = torch.randperm(len(pairs) + 1, generator=generator).int()[: len(pairs)]
    taken = 0
    for i, pair in enumerate(pairs):
        pages[i, : used[i]] = order[taken : taken + used[i]]
        taken += used[i]
        for number, first in enumerate(range(0, pair.shape[1], page)):
            _write(
                cache, int(pages[i, number]), int(slots[i]), pair[:, first : first + page].to(dtype)
            )  # fmt: skip
    lengths = torch.tensor([pair.shape[1] for pair in pairs], dtype=torch.int32)
    return cache, BlockTable(pages, lengths, slots if quant.kind == "int4" else None)


def _write(cache: PagedKV, page: int, slot: int, pair: Tensor) -> None:
    """Keys and values [2, up to a page, kv, d] into a page."""
    n = pair.shape[1]
    if cache.quant.kind == "none":
        cache.data[page, :, :n] = pair
    elif cache.quant.kind in ("fp8", "int8"):
        cache.data[page, :, :n], cache.scales[page, :, :n] = encode_rows(pair, cache.quant.kind)
    else:
        byte, scale, zero = encode_values(pair[1], cache.quant.group)
        cache.data[page, 1, :n] = byte
        cache.value_scales[page, :n], cache.value_zeros[page, :n] = scale, zero
        if n < cache.page:
            cache.tail[slot, :n] = pair[0]
        else:
            byte, cache.key_scales[page], cache.key_zeros[page] = encode_keys(pair[0])
            cache.data[page, 0] = byte


def part(table: BlockTable, begin: int, end: int) -> BlockTable:
    """Some of the requests."""
    return BlockTable(*(x if x is None else x[begin:end] for x in vars(table).values()))


def describe(inputs: Inputs) -> str:
    n, h, d = inputs.q.shape
    cache = inputs.cache
    kind = cache.quant.kind + (f"/{cache.quant.group}" if cache.quant.kind == "int4" else "")
    parts = [f"{kind} n{n} h{h} kv{cache.kv} d{d} page {cache.page}"]
    parts.append(f"lengths {inputs.table.lengths.tolist()}")
    for name, value in inputs.options.items():
        if isinstance(value, BlockTable):
            value = value.lengths.tolist()
        elif isinstance(value, Tensor):
            value = value.tolist() if not value.is_floating_point() else "given"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def call(inputs: Inputs, impl: str) -> tuple[Tensor, Tensor]:
    with poisoned():
        return getattr(op, inputs.op)(
            inputs.q, inputs.cache, inputs.table, **inputs.options, return_lse=True, impl=impl
        )  # fmt: skip


def define(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    options = {name: x for name, x in inputs.double().options.items() if name != "splits"}
    return getattr(reference, inputs.op)(inputs.q, inputs.cache, inputs.table, **options)


def runner(inputs: Inputs, dtype: torch.dtype):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        exact = define(inputs)
        here = inputs.to(device, guard=True)
        eager, got = call(here, "torch"), call(here, impl)
        quantised = inputs.cache.quant.kind != "none" and dtype != torch.float32
        # Weights meet codes as bfloat16, whatever the dtype of the queries.
        rule, cap = (torch.bfloat16, QUANTISED_CAP) if quantised else (dtype, None)
        return [
            compare(what, a, b, c, rule, cap=cap)
            for what, a, b, c in zip(("out", "lse"), got, eager, exact, strict=True)
        ]

    return run
