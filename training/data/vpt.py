"""Minecraft as people played it for VPT (2022, arXiv:2206.11795).

A directory of <name>.mp4 (20 frames per second), each beside <name>.jsonl: a line per frame with
`mouse` {dx, dy, buttons, newButtons}, `keyboard` {keys} and `hotbar`; early ones lack the last, and
may have null for what rests. An action is a number of 25 parts: keys and buttons, and how far the
view turns, after VPT in eleven steps of a logarithm up to ten degrees. Two faults of the recordings
are mended as there: a button that hangs from the first frame on is let go, and what the mouse wheel
chose is taken for a key. Films of one session (<alias>-<session>-<date>-<time>) are held out
together. Frames show no mouse pointer. Only the frames of a window are decoded.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from models.worlds.video.actions import packed
from training.data.config_episodes import BUTTONS, VptConfig
from training.data.corpus import DataError
from training.data.episodes import Played, RecordedData, extra, files_in, held_out, scaled
from training.data.trajectories import UNREADABLE

KEYS = {
    "w": "forward", "a": "left", "s": "back", "d": "right", "space": "jump", "left.shift": "sneak",
    "left.control": "sprint", "q": "drop", "e": "inventory", "f": "swap", "escape": "escape",
    **{str(n): str(n) for n in range(1, 10)},
}  # fmt: skip
MOUSE = "attack", "use", "pick"
REST = {"dx": 0, "dy": 0, "buttons": (), "newButtons": ()}
NO_KEYS = {"keys": ()}
DEGREES = 360 / 2400  # of the view, for each pixel of the mouse
FARTHEST, STEPS, LOG = 10.0, 11, 10.0  # degrees; places; how much denser they are near 0
KEPT = 64  # files whose actions stay in memory


class VptData(RecordedData[VptConfig]):
    """Windows of it. Raises DataError: no files, or not these."""

    def __init__(self, config: VptConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.files = files_in(config.path, (".mp4",))
        self.actions = lru_cache(KEPT)(lambda number: actions_of(beside(self.files[number])))
        self.lengths = [min(length_of(file), lines_of(beside(file))) for file in self.files]
        self.held = held_out([session(file) for file in self.files], config.heldout)

    def part(self, number: int, first: int, frames: int) -> Played:
        shown = frames_of(self.files[number], first, frames)
        done, nothing = self.actions(number)[first : first + frames - 1], np.zeros(frames - 1)
        pictures = scaled(shown, self.config.image_size)
        return Played(pictures, done, nothing.astype(np.float32), nothing.astype(bool))


def session(film: Path) -> str:
    """What films of the same session have in common."""
    return film.stem.rsplit("-", 2)[0]


def beside(film: Path) -> Path:
    return film.with_suffix(".jsonl")


def lines_of(file: Path) -> int:
    """How many frames something is told of. Raises DataError."""
    try:
        with open(file, "rb") as content:
            return sum(1 for line in content if line.strip())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def actions_of(file: Path) -> Int64[np.ndarray, " t"]:
    """What was done, frame by frame. Raises DataError."""
    parts, hangs, before = [], False, None
    number = 0
    try:
        with open(file) as content:
            for number, line in enumerate(filter(str.strip, content)):
                said = json.loads(line)
                mouse, pressed = said["mouse"] or REST, (said["keyboard"] or NO_KEYS)["keys"]
                hotbar = before if said.get("hotbar") is None else said["hotbar"]
                fresh = 0 in mouse["newButtons"]
                hangs = mouse["newButtons"] == [0] if number == 0 else hangs and not fresh
                held = {KEYS[key] for k in pressed if (key := short(k)) in KEYS}
                held |= {MOUSE[b] for b in mouse["buttons"] if b < len(MOUSE)}
                if hangs:
                    held.discard("attack")
                if before is not None and hotbar != before:
                    held.add(str(hotbar + 1))
                before = hotbar
                view = places(DEGREES * np.array([mouse["dx"], mouse["dy"]], float))
                parts.append([*(name in held for name in BUTTONS), *view])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file}, line {number + 1}, is none of VPT's: {error!r}") from error
    counts = [part.values for part in VptConfig.parts]
    return packed(np.array(parts, np.int64).reshape(len(parts), len(counts)), counts)


def short(key: str) -> str:
    return key.removeprefix("key.keyboard.")


def places(degrees: Float[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Which of eleven steps of a logarithm, the sixth of which is 0."""
    far = np.clip(np.nan_to_num(degrees), -FARTHEST, FARTHEST) / FARTHEST
    bent = np.sign(far) * np.log1p(LOG * np.abs(far)) / np.log1p(LOG)
    return np.round((bent + 1) / 2 * (STEPS - 1)).astype(np.int64)


def rate_of(stream: Any, file: Path) -> Fraction:
    if not stream.average_rate or stream.time_base is None:
        raise DataError(f"{file}: its frames have no rate")
    return stream.average_rate * stream.time_base


def length_of(file: Path) -> int:
    """Frames of a film. Raises DataError."""
    av = extra("av", file)
    try:
        with av.open(str(file)) as content:
            stream = content.streams.video[0]
            if not stream.frames and not stream.duration:
                raise DataError(f"{file} does not say how long it is")
            return stream.frames or int(stream.duration * rate_of(stream, file))
    except (*UNREADABLE, av.FFmpegError, IndexError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def frames_of(file: Path, first: int, count: int) -> UInt8[np.ndarray, "t h w 3"]:
    """So many frames from `first` on, decoded from the last whole one before. Raises DataError."""
    av = extra("av", file)
    found: list[np.ndarray] = []
    try:
        with av.open(str(file)) as content:
            stream = content.streams.video[0]
            rate, start = rate_of(stream, file), stream.start_time or 0
            content.seek(start + int(first / rate), stream=stream)
            for frame in content.decode(stream):
                shown = -1 if frame.pts is None else round((frame.pts - start) * rate)
                if shown < first:
                    continue
                if shown != first + len(found):
                    break  # one is missing: what follows is not what was acted on
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == count:
                    return np.stack(found)
    except (*UNREADABLE, av.FFmpegError, IndexError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    raise DataError(f"{file} has frames {first} to {first + len(found)}, not {first + count}")
