"""Pictures of two rooms: where plans led, from what runs recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from training.envs.two_rooms import HALF_DOOR, HALF_WALL, HIGH, LOW
from training.evaluation.plots import COLOURS, FAINT, INK, styled, svg

ROW = 3  # rooms side by side


@styled
def paths_chart(series: Mapping[str, Sequence[float]], keys: Mapping[str, str]) -> str:
    """SVG: one room per episode, in it the way of each policy.

    Args:
        series: `paths/rooms` [n, 2] wall and door, `paths/goals` [n, 2], and paths [n, t, 2], flat.
        keys: name -> key of its paths.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rooms = np.array(series["paths/rooms"]).reshape(-1, 2)
    goals = np.array(series["paths/goals"]).reshape(-1, 2)
    rows = -(-len(rooms) // ROW)
    figure = Figure(figsize=(4.8, 1.7 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, ROW, squeeze=False)
    for i, ((wall, door), goal) in enumerate(zip(rooms, goals, strict=True)):
        here = axes[i // ROW][i % ROW]
        for low, high in ((LOW, door - HALF_DOOR), (door + HALF_DOOR, HIGH)):
            corner = (wall - HALF_WALL, low)
            here.add_patch(Rectangle(corner, 2 * HALF_WALL, high - low, color=INK, linewidth=0))
        for (name, key), colour in zip(keys.items(), COLOURS, strict=False):
            path = np.array(series[key]).reshape(len(rooms), -1, 2)[i]
            label = name if i == 0 else None
            here.plot(*path.T, color=colour, linewidth=1.1, label=label, zorder=2)
            here.plot(*path[0], "o", color=colour, markersize=3.5, zorder=3)
        here.plot(*goal, "*", color=COLOURS[2], markersize=8, zorder=4)
        here.set(xlim=(LOW, HIGH), ylim=(HIGH, LOW), xticks=[], yticks=[], aspect="equal")
        for spine in here.spines.values():
            spine.set(visible=True, color=FAINT)
    for spare in axes.flat[len(rooms) :]:
        spare.set_axis_off()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return svg(figure)
