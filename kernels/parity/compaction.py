"""Random cases of KV compaction: scores of ragged requests, and selections moved between pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_cache.compaction import op, reference, scores
from kernels.kv_cache.compaction.selection import Kept
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.kv_cache.pool import PagePool
from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned

LENGTHS = {"small": (1, 16, 33, 47, 70), "large": (1, 127, 128, 1000, 5000)}
WINDOWS = {"small": (1, 5, 16, 20), "large": (1, 16, 32, 64, 100)}
WIDTHS = {"small": (16, 20, 64), "large": (64, 80, 128, 256)}
HEADS = {"small": ((2, 2), (3, 1), (4, 2)), "large": ((8, 8), (32, 8), (7, 1))}


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases, of both scores and the gather in turn; "small" suits the interpreter."""
    kinds = (window_case, expected_case, gather_case)
    for index in range(count):
        yield kinds[index % len(kinds)](size, SEEDS + index, dtype)


class Draw:
    """Random numbers of one case."""

    def __init__(self, size: str, seed: int) -> None:
        self.size, self.rng = size, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, table: dict[str, tuple]) -> Any:
        return self.rng.choice(table[self.size])

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def ragged(self, b: int, s: int) -> Tensor | None:
        """Lengths of b requests of at most s keys; None in a third of the cases."""
        if self.rng.random() < 1 / 3:
            return None
        return torch.tensor([self.rng.choice([s, self.rng.randint(0, s)]) for _ in range(b)])


def unread(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [b, s, ...] with NaN past each length."""
    x = x.clone()
    for row, length in zip(x, [] if lengths is None else lengths.tolist(), strict=False):
        row[length:] = float("nan")
    return x


def window_case(size: str, seed: int, dtype: torch.dtype) -> Case:
    draw = Draw(size, seed)
    b, s, d = draw.rng.choice([1, 2]), draw.choose(LENGTHS), draw.choose(WIDTHS)
    (h, kv), w = draw.choose(HEADS), min(draw.choose(WINDOWS), s)
    q = draw.normal(b, w, h, d, dtype=dtype) * draw.rng.choice([1.0, 6.0])
    k = draw.normal(b, s, kv, d, dtype=dtype)
    options = {
        "lengths": draw.ragged(b, s),
        "pooling": draw.rng.choice(["avg", "max"]),
        "kernel_size": draw.rng.choice([1, 5, 7]),
        "keep_window": draw.rng.random() < 0.5,
        "scale": draw.rng.choice([None, 0.3]),
    }
    name = f"window {w}, b{b} s{s} h{h} kv{kv} d{d}{_described(options)}"
    run = scored("score_window_attention", {"q_window": q, "k": k}, options, dtype)
    return Case("score_window_attention", name, dtype, run)


def expected_case(size: str, seed: int, dtype: torch.dtype) -> Case:
    draw = Draw(size, seed)
    b, s, d = draw.rng.choice([1, 2]), draw.choose(LENGTHS), draw.choose(WIDTHS)
    h, kv = draw.choose(HEADS)
    root = draw.normal(b, h, d, d, dtype=torch.float64)
    # The kernel reads the covariance in the dtype of the keys.
    covariance = (root @ root.mT / d).to(dtype).float() if draw.rng.random() < 0.8 else None
    inputs = {
        "mean_q": draw.normal(b, h, d, dtype=torch.float32),
        "cov_q": covariance,
        "k": draw.normal(b, s, kv, d, dtype=dtype),
        "v": draw.normal(b, s, kv, d, dtype=dtype) if draw.rng.random() < 0.7 else None,
    }
    options = {
        "lengths": draw.ragged(b, s),
        "sink": draw.rng.choice([0, 4]),
        "epsilon": draw.rng.choice([0.0, 0.02]),
    }
    plain = "" if covariance is not None else " mean alone"
    name = f"expected{plain}, b{b} s{s} h{h} kv{kv} d{d}{_described(options)}"
    return Case(
        "score_expected_attention",
        name,
        dtype,
        scored("score_expected_attention", inputs, options, dtype),
    )


def _described(options: dict[str, Any]) -> str:
    shown = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in options.items()}
    return "".join(f", {name} {value}" for name, value in shown.items() if value is not None)


def scored(function: str, inputs: dict[str, Tensor | None], options, dtype: torch.dtype):
    """Compare scores: those of the kernel see NaN around the inputs and past the lengths."""

    def run(impl: str, device: torch.device) -> list[Comparison]:
        given = {name: x for name, x in inputs.items() if x is not None}
        missing = {name: None for name in inputs if name not in given}
        lengths = options["lengths"]
        exact = getattr(reference, function)(
            **{name: x.double() for name, x in given.items()}, **missing, **options
        )
        here = {
            name: guarded((unread(x, lengths) if name in ("k", "v") else x).to(device))
            for name, x in given.items()
        }
        results = []
        for which in ("torch", impl):
            with poisoned():
                results.append(getattr(scores, function)(**here, **missing, **options, impl=which))
        eager, got = results
        # Scores are float32 whatever the keys are: products of 16 bits are exact in it.
        cap = None if dtype == torch.float32 else 1e-4
        return [compare("scores", got, eager, exact, dtype, cap=cap)]

    return run


def gather_case(size: str, seed: int, dtype: torch.dtype) -> Case:
    draw = Draw(size, seed)
    rng = draw.rng
    kind = rng.choice(["none", "none", "none", "fp8", "int8"])
    r, kv, page = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([16, 32])
    d, rotated = draw.choose(WIDTHS), kind == "none" and rng.random() < 0.6
    lengths = [draw.choose(LENGTHS) * (rng.random() < 0.8) for _ in range(r)]
    kept = []
    for length in lengths:
        counts = [rng.choice([0, length, rng.randint(0, length)]) for _ in range(kv)]
        kept.append([sorted(rng.sample(range(length), n)) for n in counts])
    options = {"kind": kind, "kv": kv, "page": page, "d": d, "rotated": rotated, "seed": seed}
    name = f"gather {kind}, lengths {lengths}, kept {[[len(x) for x in row] for row in kept]}"
    name += f", kv{kv} page {page} d{d}" + (", rotated" if rotated else "")
    return Case("compact_kv", name, dtype, moved(lengths, kept, options, dtype))


def moved(lengths: list[int], kept: list[list[list[int]]], options, dtype: torch.dtype):
    """Compare the whole memory after a compaction, guard pages and tokens not kept included."""

    def run(impl: str, device: torch.device) -> list[Comparison]:
        rope = None
        if options["rotated"]:
            rope = tuple(x.to(device) for x in turns(max(lengths), options["d"]))
        memories = []
        for which in ("torch", impl):
            cache, table, pool, memory = filled(lengths, kept, options, dtype, device)
            before = [x.clone() for x in memory]
            with poisoned():
                compacted = op.compact_kv(
                    cache, table, packed(kept, device), pool, rope=rope, impl=which
                )
            memories.append(memory)
        want, exact = expected_memory(cache, before, table, compacted.table, kept, rope)
        eager, got = memories
        comparisons = []
        if rope is not None:  # keys that were turned are compared by themselves
            turned = [x[0][want[0].isinf()] for x in (got, eager)]
            comparisons.append(compare("turned keys", *turned, exact, dtype))
            got[0].masked_fill_(want[0].isinf(), float("inf"))
        for what, x, y in zip(("pages", "scales"), got, want, strict=False):
            same = torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            error = 0.0 if same else float("inf")
            comparisons.append(Comparison(what, error, 0.0, error, 0.0))
        return comparisons

    return run


def turns(positions: int, d: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0, 1, ..., as `rope` of `append_kv`."""
    frequency = 100.0 ** -(torch.arange(0, d, 2) / d)
    angle = torch.outer(torch.arange(positions).float(), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def packed(kept: list[list[list[int]]], device: torch.device) -> Kept:
    most = max((len(tokens) for heads in kept for tokens in heads), default=0)
    tokens = [[x + [-1] * (most - len(x)) for x in heads] for heads in kept]
    counts = [[len(x) for x in heads] for heads in kept]
    shape = (len(kept), len(kept[0]), most)
    return Kept(
        torch.tensor(tokens, dtype=torch.int32, device=device).view(shape),
        torch.tensor(counts, dtype=torch.int32, device=device),
    )


def filled(
    lengths: list[int], kept, options, dtype: torch.dtype, device: torch.device
) -> tuple[PagedKV, BlockTable, PagePool, list[Tensor]]:
    """A cache whose kept tokens alone are finite, between two guard pages, its requests' pages in
    random order; and the memory of all of it: data, and scales if there are any."""
    rng = random.Random(options["seed"])
    kv, page, d, kind = (options[name] for name in ("kv", "page", "d", "kind"))
    used = sum(-(-n // page) for n in lengths)
    pages = used + sum(-(-sum(-(-len(x) // page) for x in row) // kv) for row in kept) + 2
    spec = QuantSpec(kind)
    cache = PagedKV.create(pages + 2, page, kv, d, dtype=dtype, quant=spec, device=device)
    memory = [x for x in (cache.data, cache.scales) if x is not None]
    for x in memory:
        x.fill_(float("nan") if x.is_floating_point() else 77)
    inside = [x[1:-1] for x in memory]
    cache = replace(cache, data=inside[0], scales=inside[1] if len(inside) > 1 else None)

    pool = PagePool(pages)
    ids = pool.alloc(used)
    rng.shuffle(ids)
    rows = [[ids.pop() for _ in range(-(-n // page))] for n in lengths]
    width = max(len(row) for row in rows) + 1
    numbers = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)
    table = BlockTable.create(numbers, torch.tensor(lengths), cache)
    generator = torch.Generator().manual_seed(options["seed"])
    for row, heads in zip(rows, kept, strict=True):
        for head, tokens in enumerate(heads):
            for j in tokens:
                at = (row[j // page], slice(None), j % page, head)
                new = torch.randn(2, d, generator=generator, dtype=torch.float64)
                if kind == "none":
                    cache.data[at] = new.to(dtype).to(device)
                else:
                    cache.data[at] = (new * 30).to(cache.data.dtype).to(device)
                    cache.scales[at] = new[:, 0].float().to(device)
    return cache, table, pool, memory


def expected_memory(
    cache: PagedKV, before: list[Tensor], table: BlockTable, new_table: BlockTable, kept, rope
) -> tuple[list[Tensor], Tensor]:
    """`before` with what the definition writes, and with `rope` infinity in place of keys, which
    come in float64 besides, in the order of the memory."""
    source = replace(cache, data=before[0][1:-1], scales=before[1][1:-1] if before[1:] else None)
    rows = reference.compact(source, table, kept, rope)
    want, exact = [x.clone() for x in before], torch.zeros(before[0].shape, dtype=torch.float64)
    inside = op.head_view(
        replace(cache, data=want[0][1:-1], scales=want[1][1:-1] if want[1:] else None)
    )
    exact_inside = exact[1:-1].view(inside.data.shape)
    for row, (keys, values, scales) in enumerate(rows):
        for rank in range(len(keys)):
            page, slot = int(new_table.pages[row, rank // cache.page]), rank % cache.page
            exact_inside[page, 0, slot, 0] = keys[rank].double()
            inside.data[page, 0, slot, 0] = float("inf") if rope is not None else keys[rank]
            inside.data[page, 1, slot, 0] = values[rank]
            if scales is not None:
                inside.scales[page, :, slot, 0] = scales[rank]
    turned = want[0].isinf().cpu() if rope is not None else torch.zeros_like(exact).bool()
    return want, exact[turned]
