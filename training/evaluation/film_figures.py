"""Strips of films, and of what was told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from training.envs import push_t
from training.evaluation.plots import FAINT, styled, svg


@styled
def detection_film(
    seen: Float[np.ndarray, "n t s s"],
    told: Float[np.ndarray, "n h g g"],
    copied: Float[np.ndarray, "n h g g"],
    context: int,
) -> str:
    """SVG: for each film its frames, and below, where a detector finds something in predicted
    latents, and in the last one seen."""
    from matplotlib.figure import Figure

    n, t = seen.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * (3 * n + 0.5) / t), layout="constrained")
    axes = figure.subplots(3 * n, t, squeeze=False)
    for i in range(n):
        rows = (("seen", seen[i], 0, "gray"), ("told", told[i], context, "viridis"),
                ("last", copied[i], context, "viridis"))  # fmt: skip
        for j, (name, images, first, colours) in enumerate(rows):
            for k, here in enumerate(axes[3 * i + j]):
                here.set(xticks=[], yticks=[])
                if k < first:
                    here.set_visible(k == 0)
                    for spine in here.spines.values():
                        spine.set_visible(False)
                    continue
                here.imshow(images[k - first], cmap=colours, vmin=0, vmax=1)
                if i + j == 0:
                    here.set_title(f"{k}", fontsize=7)
            axes[3 * i + j][0].set_ylabel(name, fontsize=7)
    return svg(figure)


@styled
def masked_film(clips: Float[np.ndarray, "n t s s"], seen: Bool[np.ndarray, "m t s s"]) -> str:
    """SVG: the frames of each clip, and below what each mask leaves of them."""
    from matplotlib.figure import Figure

    n, t = clips.shape[:2]
    rows = n * (1 + len(seen))
    figure = Figure(figsize=(4.8, 4.8 * rows / t), layout="constrained")
    axes = iter(figure.subplots(rows, t, squeeze=False))
    for clip in clips:
        for name, mask in (("clip", None), *(("seen", part) for part in seen)):
            row = next(axes)
            row[0].set_ylabel(name, fontsize=7)
            for k, here in enumerate(row):
                image = clip[k] if mask is None else np.where(mask[k], clip[k], np.nan)
                here.imshow(image, cmap="gray", vmin=0, vmax=1)
                here.set(xticks=[], yticks=[], facecolor=FAINT)
    return svg(figure)


@styled
def dream_film(
    truth: Float[np.ndarray, "n t s s 3"], told: Float[np.ndarray, "n t s s 3"], every: int
) -> str:
    """SVG: for each clip what happened, every so many frames from the last one that was seen on,
    and below what was dreamed."""
    from matplotlib.figure import Figure

    n, t = truth.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * (2 * n + 0.5) / t), layout="constrained")
    axes = figure.subplots(2 * n, t, squeeze=False)
    for i in range(n):
        for row, name, film in ((2 * i, "truth", truth[i]), (2 * i + 1, "dream", told[i])):
            for k, here in enumerate(axes[row]):
                here.imshow(film[k])
                here.set(xticks=[], yticks=[])
                if not row:
                    here.set_title(f"{k * every}", fontsize=7)
            axes[row][0].set_ylabel(name, fontsize=7)
    return svg(figure)


FILMED, EVERY, PIXELS = 3, 10, 96  # episodes, steps from one image to the next, size of an image


@styled
def goal_films(series: Mapping[str, Sequence[float]]) -> str:
    """SVG: Push-T, every tenth step of some episodes by plans and by random actions, and the goal.

    Args:
        series: `paths/goals` [n, 7], `paths/model` and `paths/random` [n, t, 7], flat.
    """
    from matplotlib.figure import Figure

    goals = torch.tensor(series["paths/goals"]).view(-1, push_t.STATE)
    films = {}
    for name, key in (("plans", "paths/model"), ("random", "paths/random")):
        if key in series:
            states = torch.tensor(series[key]).view(len(goals), -1, push_t.STATE)
            films[name] = states[:FILMED, ::EVERY]
    count = min(FILMED, len(goals))
    length = max(film.shape[1] for film in films.values())
    rows = count * len(films)
    figure = Figure(figsize=(4.8, 4.8 * rows / (length + 1)), layout="constrained")
    axes = iter(figure.subplots(rows, length + 1, squeeze=False))
    for i in range(count):
        for name, film in films.items():
            row = next(axes)
            row[0].set_ylabel(name, fontsize=7)
            shown = push_t.render(torch.cat([film[i], goals[i : i + 1]]), PIXELS)
            for k, (here, image) in enumerate(zip(row, shown, strict=True)):
                here.imshow(image.permute(1, 2, 0).numpy())
                here.set(xticks=[], yticks=[])
                if row[0].get_subplotspec().rowspan.start == 0:
                    here.set_title("goal" if k == length else f"{EVERY * k}", fontsize=7)
    return svg(figure)
