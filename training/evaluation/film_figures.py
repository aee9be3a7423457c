"""Strips of films, and of what was told of them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

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
