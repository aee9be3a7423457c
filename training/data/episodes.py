"""Recorded episodes: films, what was done between their frames, and what it was worth.

A directory of files, one per episode, of any of these kinds:

    .npz, .h5, .hdf5   arrays by name: frames [t, h, w, 3] uint8; actions [t-1] or [t] integers,
                       what was done after each; if there are any, rewards [t-1] or [t] and ends
    .parquet           a row per frame: `frame`, the bytes of a PNG or JPEG file (or a struct with
                       `bytes`, as datasets has them), `action`; if there are any, `reward`, `end`
    .mp4, .mkv, .avi   frames; the rest in a .npz of the same name, without `frames`

HDF5 and video want the extra `films` (h5py, av). Frames are scaled to data.image_size. Windows of
every file are visited in an exact shuffled order; some files are held out, by the hash of their
names. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from training.data.config_episodes import EpisodesConfig, PlayedConfig
from training.data.corpus import DataError
from training.data.generated import GeneratedData
from training.data.order import visit
from training.data.trajectories import UNREADABLE, members
from training.seeding import stream_seed

ARRAYS, HDF5, TABLES, FILMS = (".npz",), (".h5", ".hdf5"), (".parquet",), (".mp4", ".mkv", ".avi")
KEPT = 32  # episodes that stay in memory
LARGEST = 1e6  # magnitude of a reward
Config = TypeVar("Config", bound=PlayedConfig)


class Played(NamedTuple):
    """Frames, and what was done after each but the last; [n, ...] of windows of several."""

    frames: UInt8[np.ndarray, "... t s s 3"]
    actions: Int64[np.ndarray, "... t-1"]
    rewards: Float32[np.ndarray, "... t-1"]
    ends: Bool[np.ndarray, "... t-1"]


class PlayedData(GeneratedData[Config]):
    """Windows of episodes, however they are come by."""

    item = "window"
    lengths: list[int]  # frames of every episode
    held: list[bool]  # which are held out
    known: tuple[str, ...] = ()  # what is known of each frame beside how it looks: ball_x, ..
    screen: tuple[float, float]  # in which units: width and height of a frame

    def states(
        self, windows: Int64[np.ndarray, "w 2"], frames: int
    ) -> Float32[np.ndarray, "w t k"]:
        """What is known of the frames of windows, in the order of `known`; NaN: not in the picture,
        or nothing is known."""
        return np.full((len(windows), frames, len(self.known)), np.nan, np.float32)

    def episode(self, number: int) -> Played:
        """One of them, whole."""
        raise NotImplementedError

    def part(self, number: int, first: int, frames: int) -> Played:
        """So many frames of an episode, from `first` on."""
        one = self.episode(number)
        after = slice(first, first + frames - 1)
        return Played(one.frames[first : first + frames], *(x[after] for x in one[1:]))

    def windows(self, frames: int, held: bool) -> Int64[np.ndarray, "w 2"]:
        """Episode and first frame of every window of so many frames. Raises DataError."""
        room = np.maximum(np.array(self.lengths) - frames + 1, 0) * (np.array(self.held) == held)
        if not room.sum():
            longest = max(self.lengths, default=0)
            raise DataError(
                f"no episode {'that is held out ' if held else ''}has the {frames} frames of a "
                f"window, the longest of all has {longest}: lower data.seq_len, or recipe.horizon"
            )
        number = np.repeat(np.arange(len(room)), room)
        first = np.arange(len(number)) - np.repeat(room.cumsum() - room, room)
        return np.stack([number, first], 1)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The fields of `Played`, of this process's windows."""
        size = self.config.batch_size
        rows = self.mine(visit(step * size, size, len(self.shown), self._seed))
        return self.gather(self.shown[rows], self.config.seq_len)._asdict()

    @cached_property
    def shown(self) -> Int64[np.ndarray, "w 2"]:
        """Windows that are trained on."""
        return self.windows(self.config.seq_len, held=False)

    def heldout(self, count: int, frames: int) -> Played:
        """`count` windows of so many frames, or as many as there are, spread over what there is."""
        return self.gather(self.spread(count, frames, held=True), frames)

    def bank(self, count: int, frames: int) -> Played:
        """The same of those that are trained on."""
        return self.gather(self.spread(count, frames, held=False), frames)

    def spread(self, count: int, frames: int, held: bool) -> Int64[np.ndarray, "w 2"]:
        """Which windows these are."""
        every = self.windows(frames, held)
        return every[np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)]

    def gather(self, windows: Int64[np.ndarray, "w 2"], frames: int) -> Played:
        parts = [self.part(number, first, frames) for number, first in windows.tolist()]
        return Played(*(np.stack(part) for part in zip(*parts, strict=True)))


class RecordedData(PlayedData[Config]):
    """Episodes in files that are too large to be held: of each, what a window needs is read."""

    files: list[Path]

    @property
    def content_hash(self) -> str:
        """Of the names and sizes of all files, as they may be terabytes."""
        whole = json.dumps(
            [
                {**asdict(self.config), "path": None},
                [[f.name, f.stat().st_size] for f in self.files],
            ]
        )
        return hashlib.sha256(whole.encode()).hexdigest()

    def episode(self, number: int) -> Played:
        return self.part(number, 0, self.lengths[number])


class EpisodesData(PlayedData[EpisodesConfig]):
    """Episodes of a directory.

    Raises:
        DataError: there are none, or one cannot be read or is not what it should be. Every file is
            looked at before the run begins.
    """

    def __init__(self, config: EpisodesConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.files = episodes_in(config.path)
        self.episode = lru_cache(KEPT)(self.read)  # type: ignore[method-assign]
        self.lengths = [len(self.episode(number).frames) for number in range(len(self.files))]
        self.held = held_out([f.name for f in self.files], config.heldout)

    @property
    def content_hash(self) -> str:
        """Of every file, wherever they are."""
        found = []
        for file in self.files:
            for part in (file, beside(file)) if is_film(file) else (file,):
                with open(part, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
                found.append((part.name, digest.hexdigest()))
        whole = json.dumps([{**asdict(self.config), "path": None}, found])
        return hashlib.sha256(whole.encode()).hexdigest()

    def read(self, number: int) -> Played:
        """One file. Raises DataError."""
        return whole_episode(self.files[number], self.config)


def held_out(names: list[str], share: float) -> list[bool]:
    """Which are held out, by the hash of their names; one at least, and not all.

    What has the same name goes together, unless everything has.
    """
    held = [stream_seed(0, name) / 2**63 < share for name in names]
    if any(held) and not all(held):
        return held
    first = [name == names[0] for name in names]
    return [i == 0 for i in range(len(names))] if all(first) else first


def files_in(path: str | None, kinds: tuple[str, ...], least: int = 2) -> list[Path]:
    """Files of some kinds in a directory, in the order of their names. Raises DataError."""
    found = []
    if path and Path(path).is_dir():
        found = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in kinds)
    if len(found) < least:
        many = "a file" if least == 1 else f"{least} files or more"
        raise DataError(f"data.path={path}: name a directory with {many} ({', '.join(kinds)})")
    return found


def episodes_in(path: str | None) -> list[Path]:
    """Files of episodes, in the order of their names. Raises DataError for fewer than two."""
    known = (*ARRAYS, *HDF5, *TABLES, *FILMS)
    found = sorted(f for f in Path(path or "").iterdir() if f.suffix.lower() in known) if (
        path and Path(path).is_dir()) else []  # fmt: skip
    films = {f.stem for f in found if is_film(f)}
    found = [f for f in found if not (f.suffix.lower() in ARRAYS and f.stem in films)]
    if len(found) < 2:
        raise DataError(
            f"data.path={path}: {len(found)} episodes; name a directory with at least two files "
            f"({', '.join(known)}; training/data/episodes.py says what is in them)"
        )
    return found


def whole_episode(file: Path, config: EpisodesConfig) -> Played:
    """An episode, checked. Raises DataError."""
    kind = file.suffix.lower()
    names = ("frames", "actions", "rewards", "ends")
    if kind in ARRAYS:
        found = members(file, names)
    elif kind in HDF5:
        found = of_hdf5(file, names)
    elif kind in TABLES:
        found = of_table(file)
    else:
        found = members(beside(file), names[1:]) | {"frames": of_film(file)}
    frames = found.get("frames")
    if frames is None or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        what = "none" if frames is None else f"{frames.dtype} {list(frames.shape)}"
        raise DataError(f"{file}: frames must be uint8 [t, h, w, 3], they are {what}")
    count = len(frames)
    if count < 2:
        raise DataError(f"{file}: an episode has two frames or more, this one has {count}")
    actions = row(found, "actions", file, count, "iu")
    bad = np.flatnonzero((actions < 0) | (actions >= config.actions))
    if len(bad):
        raise DataError(
            f"{file}: actions[{bad[0]}] is {actions[bad[0]]}: with data.actions={config.actions} "
            f"they are 0 to {config.actions - 1}"
        )
    rewards = row(found, "rewards", file, count, "fiu", np.zeros(count - 1))
    if not (np.abs(rewards) < LARGEST).all():
        raise DataError(f"{file}: a reward is no number below {LARGEST:g}")
    ends = row(found, "ends", file, count, "biu", np.zeros(count - 1, bool))
    return Played(
        scaled(frames, config.image_size),
        actions.astype(np.int64),
        rewards.astype(np.float32),
        ends.astype(bool),
    )


def row(
    found: dict[str, np.ndarray],
    name: str,
    file: Path,
    frames: int,
    kinds: str,
    without: np.ndarray | None = None,
) -> np.ndarray:
    """One of the arrays beside the frames, [frames - 1]. Raises DataError."""
    value = found.get(name, without)
    if value is None or value.ndim != 1 or value.dtype.kind not in kinds:
        what = "none" if value is None else f"{value.dtype} {list(value.shape)}"
        raise DataError(f"{file}: {name} must be [{frames - 1}], a number each, they are {what}")
    if len(value) not in (frames - 1, frames):
        raise DataError(f"{file}: {frames} frames have {frames - 1} {name}, not {len(value)}")
    return value[: frames - 1]


def is_film(file: Path) -> bool:
    return file.suffix.lower() in FILMS


def beside(film: Path) -> Path:
    """Where the rest of a video is."""
    return film.with_suffix(".npz")


def extra(module: str, file: Path) -> Any:
    """A library that not everybody has. Raises DataError."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{file} is read by {module}, which is not installed: pip install 'afferent[films]'"
        ) from None


def of_hdf5(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    h5py = extra("h5py", file)
    try:
        with h5py.File(file, "r") as content:
            return {name: content[name][()] for name in names if name in content}
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def of_film(file: Path) -> np.ndarray:
    av = extra("av", file)
    try:
        with av.open(str(file)) as content:
            return np.stack([f.to_ndarray(format="rgb24") for f in content.decode(video=0)])
    except (*UNREADABLE, av.FFmpegError, IndexError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def of_table(file: Path) -> dict[str, np.ndarray]:
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    columns = {"frame": "frames", "action": "actions", "reward": "rewards", "end": "ends"}
    try:
        table = pyarrow.parquet.read_table(file)
        found: dict[str, np.ndarray] = {}
        for name in (name for name in columns if name in table.column_names):
            values = table.column(name).to_pylist()
            if name == "frame":
                pictures = [v["bytes"] if isinstance(v, dict) else v for v in values]
                opened = [Image.open(io.BytesIO(p)).convert("RGB") for p in pictures]
                found["frames"] = np.stack([np.asarray(picture) for picture in opened])
            else:
                found[columns[name]] = np.array(values)
        return found
    except (*UNREADABLE, pyarrow.ArrowException, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def scaled(frames: UInt8[np.ndarray, "t h w 3"], size: int) -> UInt8[np.ndarray, "t s s 3"]:
    """Frames of another height and width, smoothly."""
    if frames.shape[1:3] == (size, size):
        return frames
    from PIL import Image

    each = (Image.fromarray(f).resize((size, size), Image.Resampling.BOX) for f in frames)
    return np.stack([np.asarray(picture) for picture in each])
