"""Small grey images that need no download: scanned digits, characters of fonts, drawn shapes.

    digits   1,797 scans of 8 x 8 by 13 writers (scikit-learn's copy of the UCI test set;
             E. Alpaydin and C. Kaynak, 1998), enlarged; ten classes
    glyphs   letters and digits of the fonts that matplotlib carries; held-out ones are of fonts
             that training never sees
    shapes   disc, ring, square, frame, triangle, cross, star and crescent, drawn at four times the
             size and averaged

White on black, [n, 1, s, s] uint8.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from training.seeding import numpy_rng

HELD_OUT = 0.3  # of the digits and shapes, and of the fonts
OVER = 4  # samples per pixel along each axis
CHARACTERS = string.digits + string.ascii_letters
LIKE = {"o": "O", "c": "C", "s": "S", "v": "V", "w": "W", "x": "X", "z": "Z", "0": "O", "l": "I"}
"Characters that are others once they may have any size."


class Gallery(NamedTuple):
    """Images, the class of each, and which are held out."""

    images: UInt8[np.ndarray, "n 1 s s"]
    labels: Int64[np.ndarray, " n"]
    held: Bool[np.ndarray, " n"]
    names: tuple[str, ...]

    def part(self, held: bool) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one part."""
        rows = self.held == held
        return self.images[rows], self.labels[rows]


@lru_cache(4)
def digits(size: int, seed: int) -> Gallery:
    """Every scan, enlarged bilinearly; a stream of the seed says which are held out."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    scans = load_digits()
    small = torch.from_numpy(scans.images).float()[:, None] / 16  # [n, 1, 8, 8] in [0, 1]
    inner = size * 3 // 4  # a margin, so that turning cuts nothing off
    large = F.interpolate(small, size=(inner, inner), mode="bilinear", align_corners=False)
    left = (size - inner) // 2
    large = F.pad(large, (left, size - inner - left, left, size - inner - left))
    images = (large.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    labels = scans.target.astype(np.int64)
    return Gallery(images, labels, some(len(labels), seed, "digits"), tuple("0123456789"))


def some(count: int, seed: int, stream: str) -> Bool[np.ndarray, " n"]:
    """Which of `count` are held out."""
    order = numpy_rng(seed, f"data/galleries/{stream}").permutation(count)
    return order < round(HELD_OUT * count)


@lru_cache(4)
def glyphs(size: int, seed: int) -> Gallery:
    """Every character in every font that has them all, fitted into three quarters of the image."""
    from PIL import Image, ImageDraw, ImageFont

    kept = [c for c in CHARACTERS if c not in LIKE]
    fonts = font_files()
    held_fonts = some(len(fonts), seed, "fonts")
    images, labels, held = [], [], []
    for file, out in zip(fonts, held_fonts, strict=True):
        font = ImageFont.truetype(str(file), size * OVER)
        for label, character in enumerate(kept):
            left, top, right, bottom = font.getbbox(character)
            side = round(max(right - left, bottom - top) * 4 / 3)
            canvas = Image.new("L", (side, side))
            corner = (side - right - left) // 2, (side - bottom - top) // 2
            ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font)
            images.append(np.asarray(canvas.resize((size, size), Image.Resampling.BOX)))
            labels.append(label)
            held.append(out)
    return Gallery(np.stack(images)[:, None], np.array(labels), np.array(held), tuple(kept))


def font_files() -> list[Path]:
    """The fonts for text among those that matplotlib carries, by name."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [*folder.glob("DejaVu*.ttf"), *folder.glob("STIXGeneral*.ttf"), *folder.glob("cm*.ttf")]
    left_out = ("Display", "cmex", "cmsy", "cmmi")  # symbols
    return sorted(file for file in found if not any(part in file.name for part in left_out))


Field = Float[np.ndarray, "n s s"]


def polar(x: Field, y: Field) -> tuple[Field, Field]:
    return np.hypot(x, y), np.arctan2(y, x)


def star(x: Field, y: Field, thick: Field) -> Field:
    """Five points."""
    radius, angle = polar(x, y)
    return radius < 0.62 + 0.38 * np.cos(5 * angle)


def triangle(x: Field, y: Field, thick: Field) -> Field:
    radius, angle = polar(x, y)
    sector = np.mod(angle, 2 * np.pi / 3) - np.pi / 3
    return radius * np.cos(sector) < 0.5


SHAPES: dict[str, Callable[[Field, Field, Field], Field]] = {
    "disc": lambda x, y, thick: np.hypot(x, y) < 0.85,
    "ring": lambda x, y, thick: np.abs(np.hypot(x, y) - 0.9 + thick / 2) < thick / 2,
    "square": lambda x, y, thick: np.maximum(abs(x), abs(y)) < 0.7,
    "frame": lambda x, y, thick: np.abs(np.maximum(abs(x), abs(y)) - 0.75 + thick / 2) < thick / 2,
    "triangle": triangle,
    "cross": lambda x, y, thick: (
        (np.minimum(abs(x), abs(y)) < thick / 2) & (np.maximum(abs(x), abs(y)) < 0.9)
    ),
    "star": star,
    "crescent": lambda x, y, thick: (np.hypot(x, y) < 0.9) & (np.hypot(x - 0.45, y) > 0.7),
}
"Name -> whether a point of [-1, 1]^2 is inside; `thick` is that of lines."


@lru_cache(4)
def shapes(size: int, seed: int, count: int) -> Gallery:
    """`count` drawings with random size, stretch, rotation, line and brightness."""
    rng = numpy_rng(seed, "data/galleries/shapes")
    labels = np.arange(count) % len(SHAPES)
    axis = (np.arange(size * OVER) + 0.5) / (size * OVER) * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle, radius = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.5, 0.75, count)
    stretch, thick = rng.uniform(0.75, 1.0, count), rng.uniform(0.25, 0.45, count)
    level = rng.uniform(0.5, 1.0, count)
    images = np.empty((count, 1, size, size), np.uint8)
    for i, label in enumerate(labels):
        cos, sin = np.cos(angle[i]) / radius[i], np.sin(angle[i]) / radius[i]
        u, v = (cos * x + sin * y) / stretch[i], cos * y - sin * x
        inside = list(SHAPES.values())[label](u, v, thick[i])
        means = inside.reshape(size, OVER, size, OVER).mean(axis=(1, 3))
        images[i, 0] = np.round(255 * level[i] * means)
    return Gallery(images, labels, some(count, seed, "shapes"), tuple(SHAPES))


def join(parts: list[Gallery]) -> Gallery:
    """All images of several galleries; their classes follow each other."""
    first = np.cumsum([0, *(len(part.names) for part in parts)])
    return Gallery(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels + start for part, start in zip(parts, first, strict=False)]),
        np.concatenate([part.held for part in parts]),
        tuple(name for part in parts for name in part.names),
    )
