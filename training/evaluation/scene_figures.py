"""Renders of a scene beside the truth."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

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


@styled
def film_beside_truth(
    times: Float[np.ndarray, " t"],
    truth: Float[np.ndarray, "t h w 3"],
    told: Float[np.ndarray, "t h w 3"],
    nearest: Float[np.ndarray, "t h w 3"],
    third: str = "nearest",
) -> str:
    """SVG: what a camera sees, what was rendered for it, and what there is without a model, such as
    the training image from nearest, at some times."""
    from matplotlib.figure import Figure

    rows = ("truth", truth), ("render", told), (third, nearest)
    figure = Figure(figsize=(4.8, 4.8 * len(rows) / len(times) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(times), squeeze=False)
    for row, (name, images) in zip(axes, rows, strict=True):
        row[0].set_ylabel(name, fontsize=7)
        for here, image in zip(row, images, strict=True):
            here.imshow(image)
            here.set(xticks=[], yticks=[])
    for here, time in zip(axes[0], times, strict=True):
        here.set_title(f"t = {time:.2f}", fontsize=7)
    return svg(figure)


@styled
def paths_beside_truth(
    told: Float[np.ndarray, "t n 3"], true: Float[np.ndarray, "t n 3"], ids: Int[np.ndarray, " n"]
) -> str:
    """SVG: where the middle of each thing's Gaussians goes, from above and from the side, and where
    it should."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    above, side = figure.subplots(1, 2)
    for number, id in enumerate(np.unique(ids)):
        for paths, style in ((true, "-"), (told, ".")):
            x, y, z = paths[:, ids == id].mean(1).T
            about = {"color": f"C{number}", "markersize": 3, "linewidth": 1}
            above.plot(x, y, style, **about)
            side.plot(x, z, style, **about)
    above.set(xlabel="x", ylabel="y", aspect="equal", title="from above (lines: true)")
    side.set(xlabel="x", ylabel="z", aspect="equal", title="from the side")
    return svg(figure)
