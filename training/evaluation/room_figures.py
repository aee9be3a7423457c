"""Pictures of two rooms: where plans led, what a model imagines, how far it says things are.

Nothing here was in any loss: pictures are those of the simulator, at places that a probe read off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from training.envs import two_rooms_rgb
from training.envs.two_rooms import HALF_DOOR, HALF_WALL, HIGH, LOW, Rooms, render
from training.evaluation.plots import COLOURS, FAINT, INK, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

ROW = 3  # rooms side by side


@styled
def paths_chart(series: Mapping[str, Sequence[float]], keys: Mapping[str, str]) -> str:
    """SVG: one room per episode, in it the way of each policy.

    Args:
        series: `paths/rooms` [n, 2] wall and door, `paths/goals` [n, 2], and paths [n, t, 2], flat.
        keys: name -> key of its paths.
    """
    from matplotlib.figure import Figure

    rooms = np.array(series["paths/rooms"]).reshape(-1, 2)
    goals = np.array(series["paths/goals"]).reshape(-1, 2)
    rows = -(-len(rooms) // ROW)
    figure = Figure(figsize=(4.8, 1.7 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, ROW, squeeze=False)
    for i, ((wall, door), goal) in enumerate(zip(rooms, goals, strict=True)):
        here = axes[i // ROW][i % ROW]
        draw_room(here, wall, door)
        for (name, key), colour in zip(keys.items(), COLOURS, strict=False):
            path = np.array(series[key]).reshape(len(rooms), -1, 2)[i]
            label = name if i == 0 else None
            here.plot(*path.T, color=colour, linewidth=1.1, label=label, zorder=2)
            here.plot(*path[0], "o", color=colour, markersize=3.5, zorder=3)
        here.plot(*goal, "*", color=COLOURS[2], markersize=8, zorder=4)
    for spare in axes.flat[len(rooms) :]:
        spare.set_axis_off()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return svg(figure)


@styled
def rgb_paths_chart(series: Mapping[str, Sequence[float]]) -> str:
    """SVG: the coloured rooms once per episode, in them the ways of plans and of random actions.

    Args:
        series: `paths/goals` [n, 2], `paths/model` and `paths/random` [n, t, 2], flat.
    """
    from matplotlib.figure import Figure

    goals = np.array(series["paths/goals"]).reshape(-1, 2)
    side = int(two_rooms_rgb.CANVAS)
    empty = two_rooms_rgb.render(torch.full((2,), -1e3), side).permute(1, 2, 0).numpy()
    rows = -(-len(goals) // ROW)
    figure = Figure(figsize=(4.8, 1.7 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, ROW, squeeze=False)
    ways = {"plans": ("paths/model", COLOURS[0]), "random actions": ("paths/random", COLOURS[4])}
    for i, (here, goal) in enumerate(zip(axes.flat, goals, strict=False)):
        here.imshow(empty, extent=(0, side, side, 0))
        here.add_patch(near(goal))
        for name, (key, colour) in ways.items():
            if key in series:
                path = np.array(series[key]).reshape(len(goals), -1, 2)[i]
                label = name if i == 0 else None
                here.plot(*path.T, color=colour, linewidth=1.1, label=label, zorder=2)
                here.plot(*path[0], "o", color=INK, markersize=3.5, zorder=3)
        here.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    for spare in axes.flat[len(goals) :]:
        spare.set_axis_off()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return svg(figure)


def near(goal: Float[np.ndarray, " 2"]) -> Patch:
    """The circle in which a goal is reached."""
    from matplotlib.patches import Circle

    return Circle(tuple(goal), two_rooms_rgb.NEAR, color=COLOURS[2], alpha=0.6, linewidth=0)


def draw_room(axes: Axes, wall: float, door: float) -> None:
    """The wall and the frame around both rooms, y downwards."""
    from matplotlib.patches import Rectangle

    for low, high in ((LOW, door - HALF_DOOR), (door + HALF_DOOR, HIGH)):
        corner = (wall - HALF_WALL, low)
        axes.add_patch(Rectangle(corner, 2 * HALF_WALL, high - low, color=INK, linewidth=0))
    axes.set(xlim=(LOW, HIGH), ylim=(HIGH, LOW), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT)


@styled
def distance_maps(
    maps: Float[np.ndarray, "n y x"],
    goals: Float[np.ndarray, "n 2"],
    rooms: Float[np.ndarray, "n 2"],
    names: Sequence[str] = (),
) -> str:
    """SVG: how far from each goal the latents of all places are; a star is the goal.

    Args:
        names: of models, each of which has a map and a range of its own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 1.9), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    around = (LOW, HIGH, HIGH, LOW)
    for i, (here, distance, goal, (wall, door)) in enumerate(
        zip(axes, maps, goals, rooms, strict=True)
    ):
        shown = distance / max(distance.max(), 1e-12) if names else distance
        image = here.imshow(shown, extent=around, cmap="viridis_r")
        draw_room(here, wall, door)
        here.plot(*goal, "*", color=COLOURS[1], markersize=8)
        if names:
            here.set_title(names[i], fontsize=8)
    label = "distance, furthest 1" if names else "distance of latents"
    figure.colorbar(image, ax=axes.tolist(), label=label, shrink=0.8)
    return svg(figure)


@styled
def imagined_film(
    truth: Float[np.ndarray, "t 2"],
    told: Float[np.ndarray, "t 2"],
    steps: Sequence[int],
    wall: float,
    door: float,
) -> str:
    """SVG: frames of a walk above, below them those of the places read off predicted latents."""
    from matplotlib.figure import Figure

    shown = Rooms(torch.tensor([wall]), torch.tensor([door]))
    figure = Figure(figsize=(4.8, 1.75), layout="constrained")
    axes = figure.subplots(2, len(steps), squeeze=False)
    for row, (path, name) in enumerate(((truth, "seen"), (told, "imagined"))):
        places = torch.tensor(path[list(steps)], dtype=torch.float32)[None]
        for here, image, step in zip(axes[row], render(places, shown)[0], steps, strict=True):
            here.imshow(image.amax(dim=0).numpy(), cmap="gray_r", vmin=0, vmax=1)
            here.set(xticks=[], yticks=[])
            if row == 0:
                here.set_title(f"{step}", fontsize=8)
        axes[row][0].set_ylabel(name, fontsize=8)
    return svg(figure)


@styled
def energy_maps(
    energies: Float[np.ndarray, "n k k"],
    bound: float,
    straight: Float[np.ndarray, "n 2"],
    around: Float[np.ndarray, "n 2"],
) -> str:
    """SVG: the predicted cost of holding an action, over its components.

    Args:
        bound: the components are in [-bound, bound], y downwards.
        straight, around: unit vectors towards the goal, and along the shortest walk to it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.1), layout="constrained")
    axes = figure.subplots(1, len(energies), squeeze=False)[0]
    for i, (here, energy) in enumerate(zip(axes, energies, strict=True)):
        here.imshow(energy, extent=(-bound, bound, bound, -bound), cmap="viridis_r")
        arrows = ((straight[i], COLOURS[1], "straight"), (around[i], COLOURS[5], "by the door"))
        for (dx, dy), colour, name in arrows:
            here.plot(
                [0, bound * dx], [0, bound * dy], color=colour, label=name if i == 0 else None
            )
        here.set(xticks=[-bound, 0, bound], yticks=[-bound, 0, bound])
        here.tick_params(labelsize=7)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return svg(figure)
