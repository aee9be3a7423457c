"""Pictures of what an image encoder sees, finds alike, and keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from training.evaluation.plots import COLOURS, FAINT, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES = 18  # that are told apart in a scatter: six colours, three marks
MARKS = "o^s"


def picture(axes: Axes, image: Float[np.ndarray, "c s s"]) -> None:
    """One image, grey if it has one channel; what is darkest is black."""
    low, high = image.min(), image.max()
    shown = (image - low) / max(high - low, 1e-6)
    axes.imshow(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0), cmap="gray")
    axes.set(xticks=[], yticks=[])


@styled
def views_chart(images: Float[np.ndarray, "n v c s s"]) -> str:
    """SVG: a row for each image: itself, then views of it."""
    from matplotlib.figure import Figure

    n, v = images.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * n / v), layout="constrained")
    axes = figure.subplots(n, v, squeeze=False)
    for row, views in zip(axes, images, strict=True):
        for here, view in zip(row, views, strict=True):
            picture(here, view)
    axes[0][0].set_title("image", fontsize=8)
    axes[0][1].set_title("views", fontsize=8)
    return svg(figure)


@styled
def neighbours_chart(images: Float[np.ndarray, "n k c s s"], right: Bool[np.ndarray, "n k"]) -> str:
    """SVG: a row for each image: itself, then those with the nearest latents, framed if of its
    class."""
    from matplotlib.figure import Figure

    n, k = images.shape[:2]
    figure = Figure(figsize=(4.8, 4.8 * n / k), layout="constrained")
    axes = figure.subplots(n, k, squeeze=False)
    for row, found, same in zip(axes, images, right, strict=True):
        for i, (here, image, good) in enumerate(zip(row, found, same, strict=True)):
            picture(here, image)
            for spine in here.spines.values():
                spine.set(
                    visible=i > 0, color=COLOURS[2] if good else FAINT, linewidth=2.5 if good else 1
                )
    axes[0][0].set_title("image", fontsize=8)
    axes[0][1].set_title("nearest", fontsize=8)
    return svg(figure)


@styled
def scatter_chart(
    z: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], names: Sequence[str]
) -> str:
    """SVG: latents along their first two principal axes, by class."""
    from matplotlib.figure import Figure

    centred = z - z.mean(axis=0)
    _, _, axes_of = np.linalg.svd(centred, full_matrices=False)
    x, y = (centred @ axes_of[:2].T).T
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, name in list(enumerate(names))[:CLASSES]:
        rows = labels == label
        style = {"color": COLOURS[label % len(COLOURS)], "marker": MARKS[label // len(COLOURS)]}
        axes.scatter(x[rows], y[rows], s=7, alpha=0.7, linewidths=0, label=name, **style)
    axes.set(xlabel="first principal axis", ylabel="second")
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return svg(figure)
