"""Random cases of append: every kind of cache with every option, written over poison.

The cache is poison with guard bands around each of its tensors, except for what the requests hold
already. Afterwards every value that the definition left alone must be as it was, and those that it
wrote must be the same: exactly, where no key is normalised or rotated. Else the order of a sum and
fused products change last bits, which moves a value to the neighbouring code now and then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_cache.append import op, reference
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.quantise import unpack
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

PAGES = {"small": (16, 32), "large": (16, 64, 128, 256)}
WIDTHS = {"small": (16, 20, 64), "large": (64, 80, 128, 256)}
HEADS = {"small": ((1, 1), (2, 1), (4, 2)), "large": ((8, 8), (8, 2), (32, 8))}
KINDS = ("none", "fp8", "int8", "int4")
POSITIONS = 4096
"Rows of the rotation's tables."

STORED = ("data", "scales", "key_scales", "key_zeros", "value_scales", "value_zeros", "tail")
CODES = 0.02
"Share of codes that may be neighbours of the right ones, where any may."


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases; "small" suits the interpreter, "large" a GPU."""
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        cache, table, inputs, options = draw(size, SEEDS + index, dtype, kind)
        name = describe(cache, table, inputs, options)
        yield Case("append_kv", name, dtype, runner(cache, table, inputs, options))


def draw(
    size: str, seed: int, dtype: torch.dtype, kind: str
) -> tuple[PagedKV, BlockTable, dict[str, Tensor], dict[str, Any]]:
    """A poisoned cache that holds something, the table of a step, its tensors, other options."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    page, d = rng.choice(PAGES[size]), rng.choice(WIDTHS[size])
    h, kv = rng.choice(HEADS[size])
    r = rng.choice([1, 2, 3, 5])
    held = [rng.choice([0, 1, page - 1, page, rng.randint(0, 3 * page)]) for _ in range(r)]
    new = [rng.choice([0, 1, page, rng.randint(1, 3 * page + 3)]) for _ in range(r)]
    if not any(new):
        new[0] = 3
    group = rng.choice([g for g in (4, 5, 16, 32, 64, d) if d % g == 0 and g * 8 >= d])
    cache, table = poisoned_cache(rng, page, kv, d, dtype, QuantSpec(kind, group), held, new)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        x *= 10.0 ** torch.randint(-2, 3, (*shape[:-1], 1), generator=generator)
        flat = torch.rand(*shape[:-1], 1, generator=generator)
        x = torch.where(flat < 0.1, x[..., :1], x)  # rows that do not vary
        return torch.where(flat < 0.05, 0.0, x).to(dtype)

    fill(cache, table, held, normal(sum(held), kv, d), normal(sum(held), kv, d))
    n = sum(new)
    fused = normal(n, h + 2 * kv, d)  # as a fused projection gives them: strided
    q, k, v = fused.split([h, kv, kv], dim=1)
    inputs = {"k": k, "v": v, "cu_seqlens": ends(new)}
    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        inputs["q"] = q
    if rng.random() < 0.6:
        inputs |= tables(d)
        if rng.random() < 0.3:
            inputs["positions"] = torch.randint(0, POSITIONS, (n,), generator=generator)
    if rng.random() < 0.4:
        inputs["k_norm"] = 1 + 0.1 * torch.randn(d, generator=generator)
        if "q" in inputs:
            inputs["q_norm"] = 1 + 0.1 * torch.randn(d, generator=generator)
        options["norm_eps"] = rng.choice([1e-6, 1e-3])
    return cache, table, inputs, options


def ends(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def tables(d: int) -> dict[str, Tensor]:
    """Cosines and sines of POSITIONS positions, as the model makes them."""
    frequency = 1e4 ** -(torch.arange(0, d, 2) / d)
    angle = torch.outer(torch.arange(POSITIONS).float(), frequency)
    cos, sin = angle.cos(), angle.sin()
    return {"cos": torch.cat([cos, cos], 1), "sin": torch.cat([-sin, sin], 1)}


def poisoned_cache(
    rng: random.Random,
    page: int,
    kv: int,
    d: int,
    dtype: torch.dtype,
    quant: QuantSpec,
    held: list[int],
    new: list[int],
) -> tuple[PagedKV, BlockTable]:
    """A cache of poison within guard bands, and permuted pages for held + new tokens a request."""
    lengths = [a + b for a, b in zip(held, new, strict=True)]
    used = [-(-length // page) for length in lengths]
    slots = len(held) + 1
    cache = PagedKV.create(sum(used) + 2, page, kv, d, dtype=dtype, quant=quant, slots=slots)
    cache = mapped(cache, poison)
    ids = rng.sample(range(cache.pages), sum(used))
    pages = torch.full((len(held), max(used) + 1), -1)
    for i, count in enumerate(used):
        pages[i, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int64)
    tails = torch.tensor(rng.sample(range(slots), len(held))) if quant.kind == "int4" else None
    return cache, BlockTable.create(pages, torch.tensor(lengths), cache, tails)


def poison(x: Tensor) -> Tensor:
    """Shaped as x, guarded: NaN; in int8 -128, which is no code of it."""
    if x.itemsize > 1:
        return guarded(torch.full_like(x, float("nan")))
    byte = -128 if x.dtype == torch.int8 else 127  # NaN in fp8
    return guarded(torch.full_like(x.view(torch.int8), byte)).view(x.dtype)


def mapped(cache: PagedKV, function) -> PagedKV:
    """The cache with `function` applied to each of its tensors."""
    present = [f.name for f in fields(cache) if isinstance(getattr(cache, f.name), Tensor)]
    return replace(cache, **{name: function(getattr(cache, name)) for name in present})


def fill(cache: PagedKV, table: BlockTable, held: list[int], k: Tensor, v: Tensor) -> None:
    """Write the tokens that the requests hold before the step."""
    before = replace(table, lengths=torch.tensor(held, dtype=torch.int32))
    op.append_kv(cache, before, k, v, cu_seqlens=ends(held), impl="torch")


def describe(cache: PagedKV, table: BlockTable, inputs: dict[str, Tensor], options) -> str:
    new = inputs["cu_seqlens"].diff()
    held = (table.lengths - new).tolist()
    parts = [f"{cache.quant.kind} page {cache.page} kv{cache.kv} d{cache.d}"]
    parts += [f"group {cache.quant.group}"] if cache.quant.kind == "int4" else []
    parts += [f"held {held} new {new.tolist()}"]
    parts += [f"h{inputs['q'].shape[1]}"] if "q" in inputs else []
    parts += [name for name in ("cos", "k_norm", "positions") if name in inputs]
    return ", ".join(parts).replace("cos", "rope")


def call(function, cache: PagedKV, table: BlockTable, inputs: dict[str, Tensor], **more) -> Any:
    """`function` on inputs by name, the rotation's tables as a pair."""
    named = dict(inputs)
    if "cos" in named:
        named["rope"] = (named.pop("cos"), named.pop("sin"))
    return function(cache, table, named.pop("k"), named.pop("v"), **named, **more)


def runner(cache: PagedKV, table: BlockTable, inputs: dict[str, Tensor], options: dict[str, Any]):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        expected = mapped(cache, lambda x: copied(x, "cpu"))
        q = call(reference.append_kv, expected, table, inputs, **options)
        got = mapped(cache, lambda x: copied(x, device))
        moved = BlockTable(
            guarded(table.pages.to(device)),
            guarded(table.lengths.to(device)),
            None if table.tails is None else guarded(table.tails.to(device)),
        )
        dense = ("cos", "sin")
        here = {n: x.to(device) if n in dense else guarded(x.to(device)) for n, x in inputs.items()}
        with poisoned():
            turned = call(op.append_kv, got, moved, here, impl=impl, **options)
        results = compare_caches(cache, expected, got, "cos" in inputs or "k_norm" in inputs)
        if q is not None:
            wide = {n: x.double() if n in ("q", "k", "v") else x for n, x in inputs.items()}
            sizes = cache.pages, cache.page, cache.kv, cache.d
            plain = PagedKV.create(*sizes, dtype=torch.float64)
            exact = call(reference.append_kv, plain, replace(table, tails=None), wide, **options)
            results.append(compare("q", turned, q, exact, cache.dtype))
        return results

    return run


def copied(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of x and of the guard bands around it."""
    return whole(x).clone().to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def compare_caches(
    before: PagedKV, expected: PagedKV, got: PagedKV, turned: bool
) -> list[Comparison]:
    """What the definition wrote, tensor by tensor, and how many other values were changed."""
    results, changed = [], 0
    for name in STORED:
        if getattr(before, name) is None:
            continue
        old, right, new = (copied(getattr(cache, name), "cpu") for cache in (before, expected, got))
        left_alone = bits(whole(old)) == bits(whole(right))
        changed += int((left_alone & (bits(whole(old)) != bits(whole(new)))).sum())
        written = bits(old) != bits(right)
        if name == "data" and before.quant.kind != "none":
            results.append(difference_of_codes("codes", new, right, written, turned))
        elif name.endswith("zeros"):
            results.append(difference_of_codes(name, new, right, written, turned))
        else:
            eps = max(torch.finfo(x).eps for x in (right.dtype, before.dtype))
            allowed = 4 * eps if turned else 0.0
            results.append(difference(name, new[written], right[written], allowed))
    return [*results, Comparison("changed besides", changed, 0, 0.0, 0.0)]


def whole(x: Tensor) -> Tensor:
    """The storage of x, guard bands included, as one row."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def bits(x: Tensor) -> Tensor:
    """x as integers."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def difference(what: str, got: Tensor, right: Tensor, allowed: float) -> Comparison:
    """Of float values, relative to the largest, and of their norms."""
    if not right.numel():
        return Comparison(what, 0.0, 0.0, 0.0, 0.0)
    right = right.double()
    off = got.double() - right
    error = off.abs().max().item() / (right.abs().max().item() or 1.0)
    relative = off.norm().item() / (right.norm().item() or 1.0)
    return Comparison(what, error, allowed, relative, allowed)


def difference_of_codes(
    what: str, got: Tensor, right: Tensor, written: Tensor, turned: bool
) -> Comparison:
    """Of codes, in steps from one to the next: none, or one, for a small share of them."""
    if right.dtype == torch.uint8:
        got, right, written = unpack(got), unpack(right), torch.cat([written, written], -1)
    elif right.dtype == torch.float8_e4m3fn:
        got, right = steps(got), steps(right)
    off = (got.double() - right.double()).abs()[written]
    if not off.numel():
        return Comparison(what, 0.0, 0.0, 0.0, 0.0)
    share = (off > 0).double().mean().item()
    return Comparison(what, off.max().item(), float(turned), share, CODES if turned else 0.0)


def steps(x: Tensor) -> Tensor:
    """fp8 as integers in the order of the values: neighbours differ by one."""
    byte = x.view(torch.uint8).int()
    return torch.where(byte < 128, byte, 128 - byte)
