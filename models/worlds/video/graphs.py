"""Steps of a dream as CUDA graphs: many small kernels, launched at once.

A step of a world at batch 1 is hundreds of kernels that a GPU has done before the next is launched.
What a model does between its noise and its frame is a function of tensors alone (`Diamond.draw`,
`FilmWorld.advance`), and goes through `model.run`:

    with graphed(model):
        frame, cache = model.step(cache, action)

A graph is captured when tensors of the same shapes come twice in a row, and replayed from then on:
a cache that still grows is not captured, however many dreams begin. What comes out is copied, so
that caches stay values. The weights may change in place; they must not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

WARM_UP = 3  # calls before a capture: libraries plan and allocate at their first


def directly(f: Callable[..., Any], *given: Any) -> Any:
    """f of what is given: without a graph."""
    return f(*given)


def capture(f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What f gives, and what makes it give that anew from the same memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            f()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        told = f()
    return told, graph.replay


class Graphs:
    """Runs functions of tensors as graphs, one for each function and shapes.

    Args:
        capture: gives what a function gives, and what makes it give that anew.
    """

    def __init__(self, capture: Callable[..., tuple[Any, Callable[[], None]]] = capture) -> None:
        self.capture = capture
        self.last: dict[str, Any] = {}
        self.known: dict[Any, tuple[list[Tensor], Any, Callable[[], None]]] = {}

    def __call__(self, f: Callable[..., Any], *given: Any) -> Any:
        leaves, form = tree_flatten(given)
        tensors = [x for x in leaves if x is not None]
        shapes = tuple(x is not None and (x.shape, x.dtype, x.device) for x in leaves)
        key = f.__qualname__, str(form), shapes
        before, self.last[key[0]] = self.last.get(key[0]), key
        if key not in self.known:
            if key != before:
                return f(*given)
            own = iter(held := [x.clone() for x in tensors])
            again = tree_unflatten([x if x is None else next(own) for x in leaves], form)
            self.known[key] = held, *self.capture(lambda: f(*again))
        held, told, replay = self.known[key]
        for place, x in zip(held, tensors, strict=True):
            place.copy_(x)
        replay()
        return tree_map(torch.clone, told)


@contextmanager
def graphed(model: Any, graphs: Graphs | None = None) -> Iterator[None]:
    """Inside, steps of the model are graphs. It must be on a GPU."""
    before, model.run = model.run, graphs or Graphs()
    try:
        yield
    finally:
        model.run = before
