"""Memories by name, within a budget: those that need no training.

full, none                       everything, and nothing but the first token
window, bm25, embedding,         text that is read again
compaction
random, random_per_head, ...     presses (`models/language/presses.py`); _adaptive: the heads of
snapkv, kvzip, ..._adaptive      a layer compete for its rows
snapkv_aware                     with the question in view
int8, int4, int2                 all keys and values in few bits
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from models.language import presses
from models.language.memory_budget import (
    ContextMemory,
    FullContext,
    NoContext,
    Pressed,
    Quantised,
    QueryAware,
)
from models.language.presses import PRESSES
from models.language.retrieval import Compaction, Lookup, Window
from models.language.transformer import Transformer

BITS = {"int8": 8, "int4": 4, "int2": 2}
WHOLE = ("full", "none", *BITS)
"Memories whose size is what it is."


def memory(
    name: str,
    model: Transformer,
    rows: int,
    texts: Tensor,
    *,
    ends: Collection[int] = (),
    window: int = 16,
    generator: torch.Generator | None = None,
) -> ContextMemory:
    """The memory of a name.

    Args:
        rows: tokens whose keys and values it may take while it answers; of no meaning to `WHOLE`.
        texts: token ids [b, t] that will be absorbed, which KVzip repeats.
        ends: tokens that end a sentence, for memories of text.
        window: queries of SnapKV's window, at most half of the rows.
        generator: of the random presses.
    """
    if name in ("full", "none"):
        return FullContext(model) if name == "full" else NoContext(model)
    if name in BITS:
        return Quantised(model, BITS[name])
    if name == "window":
        return Window(model, rows)
    if name in ("bm25", "embedding"):
        return Lookup(model, rows, ends, embed=name == "embedding")
    if name == "compaction":
        return Compaction(model, rows, ends)
    if name == "snapkv_aware":
        return QueryAware(model, rows)
    sink = min(presses.SINK, rows - 1)
    scores = {
        "random": partial(presses.random, generator=generator),
        "random_per_head": partial(presses.random, generator=generator, per_head=True),
        "streaming_llm": partial(presses.streaming_llm, sink=sink),
        "snapkv": partial(presses.snapkv, window=max(1, min(window, rows // 2))),
        "expected_attention": partial(presses.expected_attention, sink=sink),
        "kvzip": partial(presses.kvzip, model=model, repeat=texts[:, 1:]),
    }
    press = name.removesuffix("_adaptive")
    score = scores.get(press) or PRESSES[press]
    readings = 2 if press == "kvzip" else 1
    return Pressed(model, rows, score, adaptive=name.endswith("_adaptive"), readings=readings)
