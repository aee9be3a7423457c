"""Still images and the views of them, for every step the same however often it is asked for."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from training.data.config_worlds import ImagesConfig
from training.data.generated import GeneratedData
from training.data.order import visit
from training.data.views import Views, draw_views
from training.seeding import numpy_rng

Config = TypeVar("Config", bound=ImagesConfig)
LOCAL = "local_"  # prefix of what shows the local views


class Exam(NamedTuple):
    """Images that probes are fitted to, and others that they are judged by."""

    images: UInt8[np.ndarray, "n c s s"]
    labels: Int64[np.ndarray, " n"]
    other_images: UInt8[np.ndarray, "m c s s"]
    other_labels: Int64[np.ndarray, " m"]


class ImageData(GeneratedData[Config]):
    """Batches of images in a shuffled order, with numbers that say how their views look.

    A subclass says how many images there are and gives them by their numbers.

    Attributes:
        channels: of an image.
        count: of images that are trained on.
        names: of the classes.
        mean, std: of each channel, for normalisation.
    """

    item = "image"
    channels: int
    count: int
    names: tuple[str, ...]
    mean: Float32[np.ndarray, " c"]
    std: Float32[np.ndarray, " c"]

    def images(self, rows: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n c s s"]:
        """Training images by number."""
        raise NotImplementedError

    def exam(self) -> Exam:
        """The same for every model of the seed; nothing of the second part is trained on."""
        raise NotImplementedError

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`images` of this process, and the fields of `Views`, once more with `local_` before."""
        config = self.config
        rows = self.mine(visit(step * config.batch_size, config.batch_size, self.count, self._seed))
        views = self.views(numpy_rng(self._seed, "data/views", step), config.batch_size)
        return {"images": self.images(rows)} | {k: self.mine(v) for k, v in views.items()}

    def views(self, rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        """What the training views of `count` images are, global ones and local ones."""
        views = self.config.views
        found = self.some_views(rng, count, views.count)._asdict()
        if views.local_count:
            local = draw_views(
                views, rng, count, views.local_count, views.local_area, views.local_size,
                self.channels,
            )  # fmt: skip
            found |= {f"{LOCAL}{name}": value for name, value in local._asdict().items()}
        return found

    def some_views(self, rng: np.random.Generator, count: int, each: int) -> Views:
        """Global views."""
        config = self.config
        return draw_views(
            config.views, rng, count, each, config.views.area, config.image_size, self.channels
        )

    def exam_views(self, part: int, count: int, each: int) -> Views:
        """Views of one part of the exam, the same for every model of the seed."""
        return self.some_views(numpy_rng(self._seed, "eval/views", part), count, each)
