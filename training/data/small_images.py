"""Scanned digits, characters and drawn shapes: see `galleries.py`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt8

from training.data.config_worlds import SmallImagesConfig, Source
from training.data.galleries import digits, glyphs, join, shapes
from training.data.images import Exam, ImageData


class SmallImagesData(ImageData[SmallImagesConfig]):
    """All images are in memory; part of each source is held out."""

    channels = 1

    def __init__(
        self, config: SmallImagesConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        size = config.image_size
        known = {
            Source.digits: lambda: digits(size, seed),
            Source.glyphs: lambda: glyphs(size, seed),
            Source.shapes: lambda: shapes(size, seed, config.shapes),
        }
        gallery = join([known[source]() for source in config.sources])
        self.names = gallery.names
        self._train, self._labels = gallery.part(held=False)
        self._held = gallery.part(held=True)
        self.count = len(self._train)
        values = self._train.astype(np.float32) / 255
        self.mean, self.std = (np.array([f(values)], np.float32) for f in (np.mean, np.std))

    def images(self, rows: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n 1 s s"]:
        return self._train[rows]

    def exam(self) -> Exam:
        return Exam(self._train, self._labels, *self._held)
