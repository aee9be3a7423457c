"""Steps that are graphs dream what steps without one dream; caches stay values."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from models.worlds.video.graphs import Graphs, capture, graphed
from models.worlds.video.self_forcing import SelfForcing
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.distributed import Processes

STEPS = 12  # further than any window
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def capture_on_cpu(f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """As a graph is: it reads and writes the same memory every time."""
    told = f()

    def replay() -> None:
        for place, x in zip(tree_leaves(told), tree_leaves(f()), strict=True):
            place.copy_(x)

    return told, replay


@pytest.mark.parametrize(
    ("device", "capture"),
    [("cpu", capture_on_cpu), pytest.param("cuda", capture, marks=needs_gpu)],
)
@pytest.mark.parametrize("name", [*SMALL_PINFALL, "self_forcing"])
def test_graphs_dream_the_same_and_caches_stay_values(
    name: str, device: str, capture: Callable[..., Any]
) -> None:
    forced = name == "self_forcing"
    name = "diffusion_forcing" if forced else name
    config = compose([*SMALL_PINFALL[name], *SMALL_WORLD, f"scale.device={device}"])
    recipe = importlib.import_module(f"training.recipes.{config.recipe.name}")
    made = recipe.build(config, Processes(), torch.device(device))
    exam, model = made.exam(), made.model
    if forced:
        model = SelfForcing(model.config).to(device)
        model.initialise(torch.Generator(device).manual_seed(0))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is zero at first would hide what it multiplies
            parameter += 0.02 * torch.randn_like(parameter)
    actions = torch.from_numpy(exam.clips.actions).to(device)
    captured = []
    graphs = Graphs(lambda f: captured.append(f) or capture(f))

    def begun(rows: int) -> Any:
        seen = exam.frames[:rows, : model.context]
        episodes = torch.arange(rows, device=device)
        return model.init_cache(seen, actions[:rows, : model.context - 1], episodes)

    def dreams(cache: Any, rows: int) -> list[torch.Tensor]:
        told = []
        for step in range(STEPS):
            done = actions[:rows, step % actions.shape[1]]
            frame, cache = model.step(cache, done)
            told.append(frame)
        return told

    direct = [dreams(begun(rows), rows) for rows in (1, 3)]
    with graphed(model, graphs):
        first = begun(1)
        for cache, rows, wanted in ((first, 1, direct[0]), (begun(3), 3, direct[1])):
            for frame, exact in zip(dreams(cache, rows), wanted, strict=True):
                torch.testing.assert_close(frame, exact, atol=1e-4, rtol=1e-4)
        count = len(captured)
        again = dreams(first, 1)  # the cache of before, after many replays
        dreams(begun(1), 1)
        assert len(captured) == count > 0, "what has been captured once serves other dreams"
    for frame, exact in zip(again, direct[0], strict=True):
        torch.testing.assert_close(frame, exact, atol=1e-4, rtol=1e-4)
    dreams(first, 1)
    dreams(first, 1)
    assert len(captured) == count, "outside, there is no graph"
