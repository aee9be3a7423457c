"""Films that were recorded, or made once for all: one array of grey frames in a .npy file.

    [t, n, h, w] uint8    n films of t frames, time first

So is Moving MNIST published (Srivastava et al., 2015, arXiv:1502.04681; `mnist_test_seq.npy`, 20
frames of 10,000 films of 64 x 64). Every window of every film is visited once an epoch, in an exact
shuffled order; the last films are held out. The file is mapped into memory, never unpickled, and
read whole only once, for its checksum.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from training.data.config_worlds import RecordedFilmsConfig
from training.data.corpus import DataError
from training.data.generated import GeneratedData
from training.data.order import visit


class RecordedFilmsData(GeneratedData[RecordedFilmsConfig]):
    """Windows of `data.seq_len` frames.

    Raises:
        DataError: the file cannot be read, or is of another shape.
    """

    item = "window"

    def __init__(
        self, config: RecordedFilmsConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.films = mapped(config)
        frames, films = self.films.shape[:2]
        self.frames, self.starts = frames, frames - config.seq_len + 1
        self.trained = films - max(2, round(films * config.heldout))
        self.count = self.trained * self.starts

    @cached_property
    def content_hash(self) -> str:
        """Of the file, wherever it is."""
        assert self.config.path is not None
        with open(self.config.path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        whole = json.dumps([{**asdict(self.config), "path": None}, found])
        return hashlib.sha256(whole.encode()).hexdigest()

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`frames` [b, T, 1, s, s] uint8."""
        size = self.config.batch_size
        film, first = np.divmod(
            self.mine(visit(step * size, size, self.count, self._seed)), self.starts
        )
        return {"frames": self.cut(film, first, self.config.seq_len)}

    def heldout(self, count: int, frames: int) -> dict[str, np.ndarray]:
        """The beginnings of films that training never shows, spread over them."""
        last = self.films.shape[1] - 1
        held = last + 1 - self.trained
        film = np.linspace(self.trained, last, min(count, held)).astype(np.int64)
        return {"frames": self.cut(film, np.zeros_like(film), frames)}

    def cut(
        self, film: Int64[np.ndarray, " b"], first: Int64[np.ndarray, " b"], frames: int
    ) -> UInt8[np.ndarray, "b t 1 s s"]:
        time = first[:, None] + np.arange(frames)
        return self.films[time, film[:, None]][:, :, None]


def mapped(config: RecordedFilmsConfig) -> UInt8[np.ndarray, "t n s s"]:
    """The file's array, not yet read. Raises DataError."""
    size = config.image_size
    wanted = f"uint8 [frames, films, {size}, {size}]"
    if config.path is None:
        raise DataError(f"data.path=null: name a .npy file of {wanted}, such as Moving MNIST's")
    if not Path(config.path).is_file():
        raise DataError(f"data.path={config.path}: there is no such file")
    try:
        films = np.load(config.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data.path={config.path} is no .npy file of {wanted}: {error}") from error
    if not isinstance(films, np.ndarray):
        raise DataError(f"data.path={config.path} holds several arrays, not one of {wanted}")
    if films.dtype != np.uint8 or films.ndim != 4 or films.shape[2:] != (size, size):
        raise DataError(
            f"data.path={config.path} must be {wanted}, it is {films.dtype} {list(films.shape)}: "
            "convert it, or set data.image_size"
        )
    if films.shape[0] < config.seq_len:
        raise DataError(
            f"data.path={config.path} has films of {films.shape[0]} frames (its first axis), fewer "
            f"than data.seq_len={config.seq_len}: lower it, or put time first"
        )
    if films.shape[1] < 4:
        raise DataError(
            f"data.path={config.path} has {films.shape[1]} films (its second axis), 4 are expected"
        )
    return films
