"""Renders of a scene beside the truth."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from training.evaluation.plots import styled, svg


@styled
def views_beside_truth(
    truth: Float[np.ndarray, "v h w 3"],
    told: Float[np.ndarray, "v h w 3"],
    nearest: Float[np.ndarray, "v h w 3"],
    depths: tuple[Float[np.ndarray, "v h w"], Float[np.ndarray, "v h w"]] | None,
) -> str:
    """SVG: held-out views, what was rendered for them, the training image from nearest, and how far
    things are in truth and in the render, in the same colours.

    Args:
        depths: true ones, infinite where nothing is, and those told.
    """
    from matplotlib.figure import Figure

    rows: list[tuple[str, np.ndarray]] = [("truth", truth), ("render", told), ("nearest", nearest)]
    if depths is not None:
        there = np.isfinite(depths[0])
        rows += [("depth", np.where(there, depths[0], np.nan)),
                 ("rendered", np.where(there, depths[1], np.nan))]  # fmt: skip
        low, high = depths[0][there].min(), depths[0][there].max()
    count = len(truth)
    figure = Figure(figsize=(4.8, 4.8 * len(rows) / count), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=7)
        for here, image in zip(row, images, strict=True):
            colours = {"vmin": low, "vmax": high, "cmap": "viridis"} if image.ndim == 2 else {}
            here.imshow(image, **colours)
            here.set(xticks=[], yticks=[])
    return svg(figure)
