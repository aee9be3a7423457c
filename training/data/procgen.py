"""Games of Procgen (2020, arXiv:1912.01588), such as CoinRun, recorded in Parquet files.

A directory of .parquet files, in the order of their names, with a row per frame and episode after
episode (Hugging Face: EpicPinkPenguin/procgen, the files of one game):

    observation   [64, 64, 3] nested lists of uint8, or {bytes}: a picture as a PNG file has it
    action        what was done after it, 0 to 14
    reward        of that step
    done          a row that is done (or `terminated`, or `truncated`) is the last of its episode,
                  and what was done after it is not known to have led anywhere

What stands before the first "-" of a file's name is a part of its own (test-*, train-*): no episode
goes on from one to another. CoinRun rewards nothing but its end, so that its rewards are all 0
here. Groups of rows are read as they are asked for.
"""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import pairwise
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
COLUMNS = "observation", "action", "reward"
ENDS = "done", "terminated", "truncated"  # of these one of the first two at least


class ProcgenData(RecordedData[ProcgenConfig]):
    """Windows of it. Raises DataError: no files, or not these."""

    def __init__(self, config: ProcgenConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.files = files_in(config.path, TABLES, least=1)
        opened = [table(file) for file in self.files]
        found = [each(file, f.read, columns=[*COLUMNS[1:], *ends_in(f)]) for file, f in opened]
        self.action, self.reward = (
            np.concatenate([one[name].to_numpy() for one in found]) for name in COLUMNS[1:]
        )
        self.done = np.concatenate(
            [np.any([one[name].to_numpy() for name in ends_in(f)], axis=0)
             for one, (_, f) in zip(found, opened, strict=True)]
        )  # fmt: skip
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
        lengths = np.cumsum([f.metadata.num_rows for _, f in opened])
        parts = [file.name.split("-")[0] for file in self.files]
        turns = [at for at, (a, b) in zip(lengths, pairwise(parts), strict=False) if a != b]
        edges = np.unique([0, *turns, *ends, len(self.done)])
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
        if hasattr(flat, "field"):  # of records
            return np.stack([picture(file, one) for one in flat.field("bytes").to_pylist()])
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
    names = found.schema_arrow.names
    missing = [name for name in COLUMNS if name not in names]
    if not {*ENDS[:2]} & {*names}:
        missing.append(ENDS[0])
    if missing:
        raise DataError(f"{file} has no column `{missing[0]}`, only {names}")
    return file, found


def ends_in(content: Any) -> list[str]:
    """Columns that say that an episode ended."""
    return [name for name in ENDS if name in content.schema_arrow.names]


def picture(file: Any, content: bytes | None) -> UInt8[np.ndarray, "64 64 3"]:
    """Of the bytes of an image file. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content or b"")) as found:
            if found.size != (SIDE, SIDE):
                raise ValueError(f"{found.size} pixels")
            return np.asarray(found.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file}: a picture of {SIDE} x {SIDE} is none: {error}") from error


def each(file: Any, read: Any, *given: Any, **more: Any) -> Any:
    """What was read. Raises DataError."""
    import pyarrow

    try:
        return read(*given, **more)
    except (*UNREADABLE, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
