"""Recorded trajectories: films with what was done and where the actor was, a file each.

A directory of .npz files (DROID and other robots' data converts to it):

    frames    [t, h, w, 3] uint8
    actions   [t, a] or [t-1, a] floats: what was done after each frame
    states    [t, s] floats: where the actor was; if s = a, an action is what it adds to the state

Windows of every file, `data.skip` frames apart, are visited in an exact shuffled order; between two
of their frames the actions are added up. Files are read as arrays, never unpickled. Films without
actions need frames only.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from training.data.config_worlds import TrajectoriesConfig
from training.data.corpus import DataError
from training.data.generated import GeneratedData
from training.data.order import visit
from training.seeding import stream_seed

LARGEST = 1e6  # magnitude of an action or a state; beyond it training overflows
KEPT = 8  # files that stay in memory
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)


class TrajectoriesData(GeneratedData[TrajectoriesConfig]):
    """Windows of recorded trajectories; some files are held out, by the hash of their names.

    Args:
        acted: whether actions and states are wanted.
    """

    item = "window"

    def __init__(
        self,
        config: TrajectoriesConfig,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        acted: bool = True,
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.acted = acted
        self._read = lru_cache(KEPT)(self.read)
        files = sorted(Path(config.path or "").glob("*.npz")) if config.path else []
        if len(files) < 2:
            raise DataError(
                f"data.path={config.path}: {len(files)} .npz files; name a directory with at "
                "least two trajectories (training/data/trajectories.py says what is in them)"
            )
        held = [stream_seed(0, file.name) / 2**63 < config.heldout for file in files]
        if all(held) or not any(held):
            held = [i == 0 for i in range(len(files))]
        frames = [self.checked(file) for file in files]
        self._windows, self._held = (
            self.windows(
                [(f, t) for f, t, out in zip(files, frames, held, strict=True) if out == wanted]
            )
            for wanted in (False, True)
        )
        self.count = len(self._windows)

    @property
    def content_hash(self) -> str:
        """Of every file, by the checksums that its directory of contents holds."""
        files = sorted({file for file, _ in self._windows + self._held})
        found = [(file.name, checksums(file)) for file in files]
        whole = json.dumps([{**asdict(self.config), "path": None}, found])
        return hashlib.sha256(whole.encode()).hexdigest()

    def windows(self, files: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
        """Where every window begins, in files of so many frames."""
        reach = self.config.skip * (self.config.seq_len - 1)
        found = [(file, i) for file, frames in files for i in range(max(0, frames - reach))]
        if not found:
            longest = max((frames for _, frames in files), default=0)
            raise DataError(
                f"data.path={self.config.path}: no trajectory of a part has the {reach + 1} frames "
                f"of a window, the longest has {longest}: lower data.seq_len={self.config.seq_len} "
                f"or data.skip={self.config.skip}"
            )
        return found

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`frames` [b, T, 3, s, s] uint8, `actions` [b, T-1, a], `states` [b, T, s]."""
        size = self.config.batch_size
        rows = self.mine(visit(step * size, size, self.count, self._seed))
        return self.gather([self._windows[row] for row in rows])

    def heldout(self, count: int) -> dict[str, np.ndarray]:
        """Windows of the held-out files, spread over them."""
        rows = np.linspace(0, len(self._held) - 1, min(count, len(self._held))).astype(int)
        return self.gather([self._held[row] for row in rows])

    def gather(self, windows: list[tuple[Path, int]]) -> dict[str, np.ndarray]:
        skip, reach = self.config.skip, self.config.skip * (self.config.seq_len - 1)
        parts: dict[str, list[np.ndarray]] = {}
        for file, first in windows:
            read = self._read(file)
            frames = read["frames"][first : first + reach + 1 : skip].transpose(0, 3, 1, 2)
            parts.setdefault("frames", []).append(frames)
            if self.acted:
                done = read["actions"][first : first + reach]
                parts.setdefault("actions", []).append(done.reshape(-1, skip, done.shape[1]).sum(1))
                states = read["states"][first : first + reach + 1 : skip]
                parts.setdefault("states", []).append(states)
        return {name: np.stack(rows) for name, rows in parts.items()}

    def checked(self, file: Path) -> int:
        """Frames of a file whose frames are of the right kind and whose numbers are numbers.

        The frames themselves are not read.
        """
        size = self.config.image_size
        shape, dtype = frames_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (size, size, 3):
            raise DataError(
                f"{file}: frames must be uint8 [t, {size}, {size}, 3], they are {dtype} "
                f"{list(shape)}: convert them, or set data.image_size"
            )
        if self.acted:
            self.acts(file, shape[0])
        return shape[0]

    def acts(self, file: Path, frames: int) -> dict[str, Float32[np.ndarray, "rows components"]]:
        """`actions` and `states` of a file of so many frames. Raises DataError."""
        config, found = self.config, members(file, ("actions", "states"))
        result = {}
        for name, width, counts in (
            ("actions", config.action_dim, (frames - 1, frames)),
            ("states", config.state_dim, (frames,)),
        ):
            rows = found.get(name)
            whole = rows is not None and rows.ndim == 2 and rows.dtype.kind in "fiu"
            if rows is None or not whole or rows.shape[1] != width or len(rows) not in counts:
                what = "none" if rows is None else f"{rows.dtype} {list(rows.shape)}"
                raise DataError(
                    f"{file}: {name} must be numbers [{counts[0]}, {width}], they are {what}: "
                    f"convert them, or set data.{name.removesuffix('s')}_dim"
                )
            small = (np.abs(rows) < LARGEST).all(axis=1)  # nan is not
            if not small.all():
                bad = int(np.flatnonzero(~small)[0])
                raise DataError(
                    f"{file}: {name}[{bad}] is {rows[bad]}: a number below {LARGEST:g} is expected"
                )
            result[name] = rows.astype(np.float32)
        return result

    def read(self, file: Path) -> dict[str, UInt8[np.ndarray, ...] | Float32[np.ndarray, ...]]:
        """One file. Raises DataError."""
        frames = members(file, ("frames",))["frames"]
        return {"frames": frames} | (self.acts(file, len(frames)) if self.acted else {})


def members(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that a file has; the others are not read. Raises DataError."""
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in names if name in content.files}
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def checksums(file: Path) -> list[tuple[str, int]]:
    """What a file holds, by name, with the CRC-32 of each; nothing is read but the directory."""
    with zipfile.ZipFile(file) as archive:
        return sorted((part.filename, part.CRC) for part in archive.infolist())


def frames_header(file: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a file's frames, from its header alone. Raises DataError."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("frames.npy") as part:
            version = np.lib.format.read_magic(part)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(part)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(part)
    except UNREADABLE as error:
        raise DataError(f"{file} is no .npz file with `frames`: {error}") from error
    return shape, dtype
