"""Photographs with labels: CIFAR-10, ImageNet, or folders of files, by number.

`datasets` keeps them on disk and finds each at once, so that any image of any step can be read,
whatever the number of processes. Nothing is streamed: epochs are shuffled exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt8

from training.data.config_worlds import HubImagesConfig
from training.data.corpus import DataError
from training.data.images import Exam, ImageData
from training.seeding import numpy_rng

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as is customary


def load(config: HubImagesConfig, split: str) -> Dataset:
    """One part of the data set, on disk.

    Raises:
        DataError: it cannot be had, or lacks the columns.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        if config.folder is None:
            # Asks once, where `load_dataset` would retry for half a minute.
            HfApi().dataset_info(config.dataset, revision=config.revision, timeout=10)
        found = datasets.load_dataset(
            config.dataset, data_dir=config.folder, split=split, revision=config.revision
        )
    except Exception as error:
        summary = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"data.dataset={config.dataset} has no part `{split}` that could be opened "
            f"({type(error).__name__}: {summary}): connect, or name folders with "
            "data.dataset=imagefolder data.folder=..., or take what needs no download "
            "(data=small_images, data.mnist=false)"
        ) from error
    for key in ("image_field", "label_field"):
        if (column := getattr(config, key)) not in found.column_names:
            raise DataError(
                f"data.dataset={config.dataset} has no column data.{key}={column}: it has "
                f"{', '.join(found.column_names)}"
            )
    return found


class HubImagesData(ImageData[HubImagesConfig]):
    """Images are decoded as they are asked for, cut to a square and brought to one size.

    Args:
        open_part: gives a part of the data set; replaced by tests.
    """

    channels = 3
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def __init__(
        self,
        config: HubImagesConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        open_part: Callable[[HubImagesConfig, str], Any] = load,
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self._train = open_part(config, config.split)
        self._open = lru_cache(1)(lambda: open_part(config, config.heldout_split))
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self.count = len(self._train)
        self.names = tuple(self._train.features[config.label_field].names)

    def images(self, rows: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n 3 s s"]:
        return self._decode(self._train, rows)

    def _decode(self, part: Any, rows: np.ndarray) -> UInt8[np.ndarray, "n 3 s s"]:
        pictures = part[rows.tolist()][self.config.image_field]
        size = self.config.image_size
        return np.stack(list(self._threads.map(lambda image: square(image, size), pictures)))

    def exam(self) -> Exam:
        """As many of each part as data.exam says, at random."""
        found = []
        for number, part in enumerate((self._train, self._open())):
            order = numpy_rng(self._seed, "eval/images", number).permutation(len(part))
            rows = np.sort(order[: self.config.exam])
            labels = np.array(part[rows.tolist()][self.config.label_field], np.int64)
            found += [self._decode(part, rows), labels]
        return Exam(*found)


def square(image: Image, size: int) -> UInt8[np.ndarray, "3 s s"]:
    """The middle square of an image, brought to `size`."""
    from PIL.Image import Resampling

    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    part = image.convert("RGB").crop((left, top, left + side, top + side))
    if side != size:
        part = part.resize((size, size), Resampling.BICUBIC)
    return np.asarray(part).transpose(2, 0, 1)
