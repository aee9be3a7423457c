"""Counter-Strike: Global Offensive, as Pearce and Zhu recorded it (2021, arXiv:2104.04258).

A directory of their files (Hugging Face: TeaPearce/CounterStrike_Deathmatch), a thousand frames at
16 per second in each:

    frame_<i>_x           [150, 280, 3] uint8, blue first
    frame_<i>_y           [51] what was done then: 11 keys, 2 buttons, which of 23 turns of the
                          mouse and which of 15 looks up or down, one of each set
    frame_<i>_helperarr   [2] whether somebody was killed, whether the player died

An action is a number of 15 parts (CsgoConfig.parts). A kill is worth 1, a death -1; both are told
with the frame that follows. Only the frames of a window are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from models.worlds.video.actions import packed
from training.data.config_episodes import CsgoConfig
from training.data.corpus import DataError
from training.data.episodes import (
    HDF5,
    Played,
    RecordedData,
    extra,
    files_in,
    held_out,
    scaled,
)
from training.data.trajectories import UNREADABLE

KEYS, TURNS, LOOKS = 13, 23, 15  # keys and buttons; places of the mouse
WIDTH = KEYS + TURNS + LOOKS


class CsgoData(RecordedData[CsgoConfig]):
    """Windows of it. Raises DataError: no files, or not these."""

    def __init__(self, config: CsgoConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.files = files_in(config.path, HDF5)
        self.lengths = [frames_of(file) for file in self.files]
        self.held = held_out([file.name for file in self.files], config.heldout)

    def part(self, number: int, first: int, frames: int) -> Played:
        file, rows = self.files[number], range(first, first + frames)
        with opened(file) as content:
            try:
                shown = np.stack([content[f"frame_{i}_x"][()] for i in rows])
                done = np.stack([content[f"frame_{i}_y"][()] for i in rows[:-1]])
                # What a frame tells of itself happened between it and the one before.
                met = np.stack([content[f"frame_{i}_helperarr"][()] for i in rows[1:]])
            except (*UNREADABLE, TypeError, AttributeError) as error:
                raise DataError(f"{file} cannot be read: {error}") from error
        if shown.dtype != np.uint8 or shown.ndim != 4 or shown.shape[3] != 3:
            raise DataError(
                f"{file}: frame_{first}_x must be uint8 [h, w, 3], it is {shown.dtype} "
                f"{list(shown.shape[1:])}"
            )
        if met.shape[1:] != (2,):
            raise DataError(f"{file}: frame_{first}_helperarr must be [2]")
        kill, death = met.astype(np.float32).T
        pictures = scaled(np.ascontiguousarray(shown[..., ::-1]), self.config.image_size)
        return Played(pictures, done_of(done, file), kill - death, death > 0)


def done_of(y: Float[np.ndarray, "t 51"], file: Path) -> Int64[np.ndarray, " t"]:
    """Actions, each of one number. Raises DataError."""
    if y.ndim != 2 or y.shape[1] != WIDTH or not np.isin(y, (0, 1)).all():
        raise DataError(f"{file}: what is done must be {WIDTH} of 0 and 1")
    keys, turn, look = np.split(y.astype(np.int64), [KEYS, KEYS + TURNS], axis=1)
    if (turn.sum(1) != 1).any() or (look.sum(1) != 1).any():
        raise DataError(f"{file}: the mouse must be in one place of {TURNS}, and one of {LOOKS}")
    parts = np.concatenate([keys, turn.argmax(1)[:, None], look.argmax(1)[:, None]], axis=1)
    return packed(parts, [part.values for part in CsgoConfig.parts])


def opened(file: Path) -> Any:
    h5py = extra("h5py", file)
    try:
        return h5py.File(file, "r")
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def frames_of(file: Path) -> int:
    """How many a file has. Raises DataError."""
    with opened(file) as content:
        count = sum(name.startswith("frame_") and name.endswith("_x") for name in content)
    if not count:
        raise DataError(f"{file} has no frame_0_x: it is no file of this data set")
    return count
