"""Games of Procgen (2020, arXiv:1912.01588), such as CoinRun, recorded in Parquet files.

A directory of .parquet files, in the order of their names, with a row per frame and episode after
episode (Hugging Face: EpicPinkPenguin/procgen, the files of one game):

    observation   [64, 64, 3] nested lists of uint8
    action        what was done after it, 0 to 14
    reward, done  of that step: a row that is done is the last of its episode, and what was done
                  after it is not known to have led anywhere

Groups of rows are read as they are asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from training.data.config_episodes import ProcgenConfig
from training.data.corpus import DataError
from training.data.episodes import (
    TABLES,
    Played,
    RecordedData,
    files_in,
    held_out,
    scaled,
)
from training.data.trajectories import UNREADABLE

SIDE = 64
GROUPS = 16  # groups of rows that stay in memory
COLUMNS = "observation", "action", "reward", "done"


class ProcgenData(RecordedData[ProcgenConfig]):
    """Windows of it. Raises DataError: no files, or not these."""

    def __init__(self, config: ProcgenConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.files = files_in(config.path, TABLES, least=1)
        opened = [table(file) for file in self.files]
        found = [each(file, f.read, columns=["action", "reward", "done"]) for file, f in opened]
        self.action, self.reward, self.done = (
            np.concatenate([one[name].to_numpy() for one in found])
            for name in ("action", "reward", "done")
        )
        if self.action.dtype.kind not in "iu" or self.action.max() >= config.actions:
            raise DataError(f"data.path={config.path}: actions must be 0 to {config.actions - 1}")
        # Where groups of rows begin: file, number in it, first row of all.
        sizes = [
            (file, f, group, f.metadata.row_group(group).num_rows)
            for file, f in opened
            for group in range(f.num_row_groups)
        ]
        self.groups = [part[:3] for part in sizes]
        self.begin = np.cumsum([0, *(part[3] for part in sizes)])
        ends = np.flatnonzero(self.done) + 1
        edges = np.unique([0, *ends, len(self.done)])
        self.first, self.lengths = edges[:-1], np.diff(edges).tolist()
        names = [f"episode {number}" for number in range(len(self.lengths))]
        self.held = held_out(names, config.heldout)
        self.pictures = lru_cache(GROUPS)(self.read)

    def read(self, group: int) -> UInt8[np.ndarray, "n 64 64 3"]:
        """The frames of a group of rows. Raises DataError."""
        file, f, number = self.groups[group]
        column = each(file, f.read_row_group, number, columns=["observation"])["observation"]
        flat: Any = column.combine_chunks()
        rows = len(flat)
        while hasattr(flat, "storage") or hasattr(flat.type, "value_type"):
            flat = flat.storage if hasattr(flat, "storage") else flat.flatten()
        flat = flat.to_numpy(zero_copy_only=False)
        if flat.dtype != np.uint8 or len(flat) != rows * SIDE * SIDE * 3:
            raise DataError(f"{file}: observation must be uint8 [{SIDE}, {SIDE}, 3]")
        return flat.reshape(rows, SIDE, SIDE, 3)

    def part(self, number: int, first: int, frames: int) -> Played:
        start = self.first[number] + first
        rows = np.arange(start, start + frames)
        group = np.searchsorted(self.begin, rows, side="right") - 1
        shown = np.concatenate(
            [self.pictures(g)[rows[group == g] - self.begin[g]] for g in np.unique(group)]
        )
        after = rows[:-1]
        return Played(
            scaled(shown, self.config.image_size),
            self.action[after].astype(np.int64),
            self.reward[after].astype(np.float32),
            self.done[after].astype(bool),
        )


def table(file: Any) -> tuple[Any, Any]:
    """A file, opened. Raises DataError: it cannot be, or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.ParquetFile(file)
    except (*UNREADABLE, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    for name in COLUMNS:
        if name not in found.schema_arrow.names:
            raise DataError(f"{file} has no column `{name}`, only {found.schema_arrow.names}")
    return file, found


def each(file: Any, read: Any, *given: Any, **more: Any) -> Any:
    """What was read. Raises DataError."""
    import pyarrow

    try:
        return read(*given, **more)
    except (*UNREADABLE, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
