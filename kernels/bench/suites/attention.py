"""Attention: forward, backward, over a shared prefix; against SDPA's backends, flex, the tutorial.

Floating-point operations: 4 d for each query, head and key that the query sees, forward; 10 d
backward (five matrix products for two); both together 14 d. Exponentials are not counted.
Bytes: q, k, v, out and LSE once; backward also the gradients of out, q, k and v.

The first case decides between the rows of the tile table (descriptors, warp specialisation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels import attention
from kernels.attention import reference
from kernels.bench.cases import (
    Case,
    Entry,
    Inputs,
    Parts,
    Setting,
    Target,
    Work,
    generator,
    normal,
    picked,
    variants,
    with_tile,
)
from kernels.bench.peers import Attention, flex, sdpa, tutorials
from kernels.parity.case import CAPS

SOURCES = ("attention/*.py", "tuned/attention_*.json", "language.py", "launch.py", "tiles.py")
CHECKED_ROWS = 256
"Of the first and of the last queries of one group of heads."

FORWARD = (
    Target("forward >= 1.2x tutorial-style", 1.2, over="tutorial"),
    Target("forward >= 1.15x flex", 1.15, over="flex"),
    Target("forward >= 0.9x cuDNN", 0.9, over="sdpa cudnn", stretch=1.0),
)
BACKWARD = (
    Target("backward >= 1.25x flex", 1.25, over="flex"),
    Target("backward >= 0.8x cuDNN", 0.8, over="sdpa cudnn"),
)
OVER_FLEX = (Target("forward >= 1.15x flex", 1.15, over="flex"),)
PREFIX = (Target("prefix >= 1.3x flex with concatenation", 1.3, over="flex"),)
AGAIN = "triton again"
STEADY = (
    Target("control: the same call again, not slower", 0.97, entry=AGAIN, over="triton"),
    Target("control: the same call again, not faster", 0.97, entry="triton", over=AGAIN),
)

ALL_PEERS = ("tutorial", "flash", "cudnn", "efficient", "flex")


@dataclass(frozen=True)
class Problem:
    """One call of attention; t = s."""

    name: str
    b: int
    t: int
    h: int
    kv: int
    d: int
    mode: str = "forward"
    causal: bool = True
    window: int | None = None
    documents: int = 1
    p: int = 0
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    peers: tuple[str, ...] = ALL_PEERS
    targets: tuple[Target, ...] = ()
    decides: bool = False
    "Between the rows of the tile tables."
    extra: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it is differentiated by."""
        return ("q", "k", "v", "prefix_k", "prefix_v") if self.p else ("q", "k", "v")

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}

    @property
    def keys(self) -> dict[str, int]:
        """Of the tile tables."""
        softcap = int(self.softcap is not None)
        return {"bytes": self.dtype.itemsize, "head_dim": self.d, "softcap": softcap}


def problems(at: Setting) -> Iterator[Problem]:
    """The most telling first: a call that ends early has the answers that were asked for."""
    n, d, few = at.length, at.size(128, 16), at.size(2, 1)
    h = at.size(16, 2)
    dense = {"b": few, "t": n(8192, 48), "h": h, "kv": h, "d": d}
    yield Problem("forward causal d128", **dense, targets=(*FORWARD, *STEADY), decides=True)
    yield Problem("backward causal d128", **dense, mode="backward", targets=BACKWARD, decides=True)
    long = {"b": at.size(8, 2), "t": n(2048, 40), "h": at.size(32, 4), "kv": at.size(8, 2), "d": d}
    shared = {**long, "p": n(4096, 24), "peers": ("efficient", "flex"), "targets": PREFIX}
    yield Problem("prefix forward", **shared)
    yield Problem("prefix forward and backward", **shared, mode="both")
    half = {**dense, "d": at.size(64, 32), "decides": True}
    yield Problem("forward causal d64", **half, targets=FORWARD)
    yield Problem("backward causal d64", **half, mode="backward", targets=BACKWARD)
    grouped = {"b": few, "t": n(4096, 48), "h": at.size(32, 4), "kv": at.size(8, 2), "d": d}
    grouped["peers"] = ALL_PEERS[1:]
    yield Problem("forward causal grouped d128", **grouped, targets=FORWARD[1:])

    dense["extra"] = grouped["extra"] = True
    yield Problem("forward full d128", **dense, causal=False, targets=FORWARD)
    yield Problem("backward causal grouped d128", **grouped, mode="backward", targets=BACKWARD)
    wide = {**dense, "t": n(16384, 64), "b": 1, "peers": ("flex", "mask and flex")}
    yield Problem("forward window 1024 d128", **wide, window=n(1024, 8), targets=OVER_FLEX)
    yield Problem("forward 8 documents d128", **wide, documents=8, targets=OVER_FLEX)
    capped = {**dense, "peers": ("flex",), "softcap": 30.0}
    yield Problem("forward softcap d128", **capped, targets=OVER_FLEX)
    short = {**dense, "t": n(512, 32), "b": at.size(32, 2)}
    yield Problem("forward causal short d128", **short, targets=FORWARD)
    broad = {**dense, "d": at.size(256, 64), "h": at.size(8, 2), "kv": at.size(8, 2)}
    broad |= {"peers": ALL_PEERS[1:], "decides": True}
    yield Problem("forward causal d256", **broad, targets=FORWARD[1:])
    yield Problem("forward causal d128 fp16", **dense, dtype=torch.float16, targets=FORWARD)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        yield case(problem, at)


def case(problem: Problem, at: Setting) -> Case:
    shapes = {"b": problem.b, "t": problem.t, "h": problem.h, "kv": problem.kv, "d": problem.d}
    shapes |= {"p": problem.p} if problem.p else {}
    oracle = oracle_of_values if problem.mode == "forward" else oracle_of_gradients
    parts = parts_of_values if problem.mode == "forward" else parts_of_gradients
    return Case(
        "attention",
        problem.name,
        shapes,
        problem.dtype,
        work(problem),
        partial(draw, problem),
        partial(oracle, problem),
        partial(parts, problem),
        CAPS[problem.dtype][problem.mode != "forward"],
        tuple(entries(problem, at)),
        problem.targets,
        SOURCES,
        extra=problem.extra,
    )


def lengths(problem: Problem) -> list[int]:
    """Of the documents of a sequence: uneven, together t."""
    ends = [
        problem.t * (i * i + i) // (problem.documents**2 + problem.documents)
        for i in range(problem.documents + 1)
    ]
    return [end - begin for begin, end in pairwise(ends)]


def pairs(problem: Problem) -> int:
    """Queries times the keys that each of them sees, in one sequence and head."""
    own = 0
    for n in lengths(problem):
        w = min(n, problem.window or n)
        own += n * (n if not problem.causal else w) - (w * (w - 1) // 2 if problem.causal else 0)
    return own + problem.t * problem.p


def work(problem: Problem) -> Work:
    b, t, h, kv, d = problem.b, problem.t, problem.h, problem.kv, problem.d
    products = {"forward": 4, "backward": 10, "both": 14}[problem.mode]
    queries, keys = b * t * h * d, 2 * b * t * kv * d + 2 * problem.p * kv * d
    passes = {"forward": 2 * queries + keys, "backward": 4 * queries + 2 * keys}
    passes["both"] = passes["forward"] + passes["backward"]
    lse = 4 * b * t * h * (2 if problem.mode == "both" else 1)
    size = problem.dtype.itemsize
    return Work(products * d * h * b * pairs(problem), size * passes[problem.mode] + lse)


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    rng, dtype = generator(device, seed), problem.dtype
    b, t, h, kv, d = problem.b, problem.t, problem.h, problem.kv, problem.d
    inputs: Inputs = {
        name: normal(rng, b, t, heads, d, dtype=dtype)
        for name, heads in (("q", h), ("k", kv), ("v", kv), ("dout", h))
    }
    for name in ("prefix_k", "prefix_v") if problem.p else ():
        inputs[name] = normal(rng, problem.p, kv, d, dtype=dtype)
    if problem.documents > 1:
        sizes = torch.tensor(lengths(problem), device=device)
        ids = torch.arange(problem.documents, device=device).repeat_interleave(sizes)
        inputs["segments"] = ids.expand(b, t)
    return inputs


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    ours = ours_of(problem, at)
    yield ours.entry(problem.mode, problem.inputs)
    if STEADY[0] in problem.targets:
        again = ours.entry(problem.mode, problem.inputs)
        yield Entry(AGAIN, again.prepare, kernels=again.kernels, on_cpu=True)
    for peer in problem.peers:
        if peer == "tutorial":
            yield from tutorials(problem.d, causal=problem.causal, mode=problem.mode)
        else:
            yield attention_peer(peer, problem).entry(problem.mode, problem.inputs)
    if problem.decides:
        yield from tile_variants(problem, at)


def ours_of(problem: Problem, at: Setting) -> Attention:
    def prepare(inputs: Inputs) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
            return attention(
                q,
                k,
                v,
                prefix_kv=prefix or None,
                segments=inputs.get("segments"),
                impl=at.impl,
                **problem.options,
            )

        return attend

    table = "attention_dq" if problem.mode == "backward" else "attention_forward"
    note = picked(table, at.arch, **problem.keys)
    kernels = (("attention_forward",), ("attention_dk_dv",))
    return Attention("triton", prepare, kernels, ours=True, note=note)


def attention_peer(name: str, problem: Problem) -> Attention:
    if name in ("flex", "mask and flex"):
        score = None
        if problem.softcap is not None:
            score = partial(soft_cap, problem.softcap)
        return flex(mask_of(problem), score, build=name != "flex")
    dense = partial(dense_mask, problem) if problem.p else None
    return sdpa(name, causal=problem.causal, mask=dense)


def soft_cap(cap: float, score: Tensor, *_: Tensor) -> Tensor:
    return cap * torch.tanh(score / cap)


def mask_of(problem: Problem) -> Any:
    """inputs -> flex's mask function; None where everything is seen."""
    if not problem.causal:
        return None
    p, window = problem.p, problem.window

    def mask(inputs: Inputs) -> Any:
        segments = inputs["segments"][0] if "segments" in inputs else None

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            visible = j - p <= i
            if window is not None:
                visible = visible & (j > i - window)
            if segments is not None:
                visible = visible & (segments[i] == segments[j])
            return visible

        return seen

    return mask


def dense_mask(problem: Problem, inputs: Inputs) -> Tensor:
    """Which key each query sees, the prefix's first: bool [t, p + t]."""
    position = torch.arange(problem.t, device=inputs["q"].device)[:, None]
    key = torch.arange(problem.p + problem.t, device=inputs["q"].device)[None]
    return key - problem.p <= position


def tile_variants(problem: Problem, at: Setting) -> Iterator[Entry]:
    """Ours with the other tiles of the table; backward with one table at a time."""
    if problem.mode == "forward":
        entry = ours_of(problem, at).entry("forward", problem.inputs)
        for label, tile in variants("attention_forward", at.arch, **problem.keys):
            prepare = with_tile("attention_forward", tile, entry.prepare)
            yield variant(f"triton [{label}]", prepare, "attention_forward")
    elif problem.mode == "backward":
        for table in ("attention_dq", "attention_dk_dv"):
            for label, tile in variants(table, at.arch, **problem.keys):
                prepare = with_tile(table, tile, partial(backward_operator, problem))
                yield variant(f"triton {table} [{label}]", prepare, table)


def variant(name: str, prepare: Any, kernel: str) -> Entry:
    return Entry(name, prepare, ours=True, variant=True, kernels=(kernel,))


def backward_operator(problem: Problem, inputs: Inputs) -> Any:
    """The backward operator itself: autograd calls it from a thread that no override reaches."""
    from kernels.attention import launch
    from kernels.attention.intervals import reach

    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    before, after = reach(problem.causal, problem.window)
    numbers = before, after, problem.d**-0.5, problem.softcap or 0.0
    out, lse = launch.attention(q, k, v, None, None, None, None, *numbers)
    dlse = torch.zeros_like(lse)
    return lambda: launch.attention_backward(
        dout, dlse, q, k, v, None, None, None, None, out, lse, *numbers
    )[:3]


def _rows(problem: Problem) -> int:
    return min(CHECKED_ROWS, problem.t)


def oracle_of_values(problem: Problem, inputs: Inputs) -> Parts:
    """The last and the first queries of the first group of heads of the last sequence."""
    rows, group = _rows(problem), problem.h // problem.kv
    q = inputs["q"][-1:, :, :group].double()
    k, v = (inputs[name][-1:, :, :1].double() for name in ("k", "v"))
    more = dict(problem.options)
    if problem.p:
        more["prefix_kv"] = tuple(inputs[n][:, :1].double() for n in ("prefix_k", "prefix_v"))
    ids = inputs["segments"][-1:] if "segments" in inputs else None
    last, _ = reference.attention(q[:, -rows:], k, v, segments=ids, **more)
    if problem.causal:
        k, v, ids = k[:, :rows], v[:, :rows], None if ids is None else ids[:, :rows]
    first, _ = reference.attention(q[:, :rows], k, v, segments=ids, **more)
    return {"last rows": last, "first rows": first}


def parts_of_values(problem: Problem, out: Tensor) -> Parts:
    rows, group = _rows(problem), problem.h // problem.kv
    return {"last rows": out[-1:, -rows:, :group], "first rows": out[-1:, :rows, :group]}


def oracle_of_gradients(problem: Problem, inputs: Inputs) -> Parts:
    """Gradients of one group of heads: in the last sequence, or over the batch with a prefix."""
    batch = slice(None) if problem.p else slice(-1, None)
    group = problem.h // problem.kv
    heads = {"q": group, "dout": group, "k": 1, "v": 1}
    own = {name: inputs[name][batch, :, :n].double() for name, n in heads.items()}
    dout = own.pop("dout")
    for name in problem.inputs[3:]:
        own[name] = inputs[name][:, :1].double()
    leaves = {name: x.requires_grad_() for name, x in own.items()}
    prefix = tuple(leaves[name] for name in problem.inputs[3:])
    out, _ = reference.attention(
        leaves["q"], leaves["k"], leaves["v"], prefix_kv=prefix or None, **problem.options
    )
    names = problem.inputs
    gradients = torch.autograd.grad(out, [leaves[name] for name in names], dout)
    return {f"d {name}": dx for name, dx in zip(names, gradients, strict=True)}


def parts_of_gradients(problem: Problem, gradients: tuple[Tensor, ...]) -> Parts:
    group, parts = problem.h // problem.kv, {}
    for name, dx in zip(problem.inputs, gradients, strict=True):
        heads = group if name == "q" else 1
        if name.startswith("prefix"):
            parts[f"d {name}"] = dx[:, :heads]
        else:
            parts[f"d {name}"] = dx[slice(None) if problem.p else slice(-1, None), :, :heads]
    return parts
