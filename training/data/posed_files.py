"""Images in files with cameras: what the loaders of every format share.

A loader says of each image where it is, and how its camera stood; here they are read, shrunk, laid
over the background, and divided. Images that are listed and missing are left out, with a warning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32

from training.data.config_scenes import PosedFilesConfig
from training.data.corpus import DataError
from training.data.posed import Posed, PosedData

Config = TypeVar("Config", bound=PosedFilesConfig)
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
"Turns the axes of a camera of OpenGL, which looks along -z with y up, to ours, and back."


@dataclass(frozen=True)
class Frame:
    """An image that is listed, and its camera."""

    file: Path
    viewmat: np.ndarray
    "World to camera, [4, 4]: x to the right, y down, z forward."
    K: np.ndarray
    "[3, 3] in pixels of the file."
    time: float | None = None
    "From 0 to 1, of what moves."

    def at(self, time: float, file: Path) -> Frame:
        """The same, at a time. Raises DataError."""
        if not 0 <= time <= 1:
            raise DataError(f"{file}: time={time} of {self.file.name} is not from 0 to 1")
        return replace(self, time=time)


class PosedFilesData(PosedData[Config]):
    """A scene in a folder. A subclass lists its frames, and may have points.

    Raises:
        DataError: no folder, a file that is missing or is not what it should be.
    """

    def __init__(self, config: Config, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.folder = folder_of(config)
        self.background = (1.0, 1.0, 1.0) if config.white else (0.0, 0.0, 0.0)
        train, heldout = self.frames()
        self.train, self.heldout = self.read(train), self.read(heldout)
        if self.train.images.shape[1:] != self.heldout.images.shape[1:]:
            raise DataError(
                f"{self.folder}: images that are trained on are {size_of(self.train.images)}, "
                f"those that are held out {size_of(self.heldout.images)}: give images of one size"
            )
        self.box = surroundings(self.train.viewmats)

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        """Those that are trained on, and those that are held out."""
        raise NotImplementedError

    def divided(self, frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
        """Every `data.heldout_every`th is held out, by name."""
        frames, every = sorted(frames, key=lambda frame: str(frame.file)), self.config.heldout_every
        held = [frame for i, frame in enumerate(frames) if i % every == 0]
        return [frame for i, frame in enumerate(frames) if i % every], held

    def read(self, frames: Sequence[Frame]) -> Posed:
        """Those that are there."""
        there = [frame for frame in frames if frame.file.is_file()]
        if missing := len(frames) - len(there):
            gone = next(frame.file for frame in frames if not frame.file.is_file())
            warnings.warn(
                f"{missing} of {len(frames)} images that are listed are missing, the first is "
                f"{gone}: they are left out",
                stacklevel=2,
            )
        if not there:
            raise DataError(f"data.path={self.config.path}: none of its images is there")
        images = [self.image(frame.file) for frame in there]
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            (a, b), (c, d) = sorted(sizes)[:2]
            raise DataError(
                f"{self.folder}: images of {b} x {a} and of {d} x {c} pixels: give images of one "
                "size"
            )
        times = [frame.time for frame in there if frame.time is not None]
        shrink = np.diag([1 / self.config.downscale] * 2 + [1.0])
        return Posed(
            np.stack(images),
            np.stack([frame.viewmat for frame in there]).astype(np.float32),
            np.stack([shrink @ frame.K for frame in there]).astype(np.float32),
            tuple(str(frame.file.relative_to(self.folder)) for frame in there),
            times=np.float32(times) if times else None,
        )

    def image(self, file: Path) -> Float32[np.ndarray, "h w 3"]:
        """In [0, 1], shrunk, over the background."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                values = np.asarray(opened.convert("RGBA"), np.float32) / 255
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{file} is no image that can be read: {error}") from None
        by = self.config.downscale
        height, width = (n // by for n in values.shape[:2])
        if not height or not width:
            raise DataError(
                f"data.downscale={by}: {file} has {values.shape[1]} x {values.shape[0]}"
            )
        color, cover = values[..., :3], values[..., 3:]
        color = color * cover + np.float32(self.background) * (1 - cover)
        cells = color[: height * by, : width * by].reshape(height, by, width, by, 3)
        return cells.mean((1, 3))


def size_of(images: np.ndarray) -> str:
    return f"{images.shape[2]} x {images.shape[1]}"


def folder_of(config: PosedFilesConfig) -> Path:
    """Raises DataError for none."""
    if config.path is None:
        raise DataError(f"data={config.name} needs data.path=<the folder of a scene>")
    folder = Path(config.path)
    if not folder.is_dir():
        raise DataError(f"data.path={config.path} is no folder")
    return folder


def document(file: Path) -> dict[str, Any]:
    """An object of JSON. Raises DataError."""
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{file} is no object of JSON")
    return found


def world_to_camera(camera_to_world: Any, file: Path, opengl: bool = True) -> np.ndarray:
    """[4, 4] of a matrix of 3 or 4 rows. Raises DataError for what turns nothing."""
    try:
        given = np.asarray(camera_to_world, np.float64)
    except (TypeError, ValueError):
        given = np.zeros(0)
    if given.shape not in ((4, 4), (3, 4)) or not np.isfinite(given).all():
        raise DataError(f"{file}: a camera's matrix is not 4 x 4 of finite numbers")
    matrix = np.eye(4)
    matrix[:3] = given[:3]
    if opengl:
        matrix = matrix @ OPENGL
    R = matrix[:3, :3]
    if not np.allclose(R @ R.T, np.eye(3), atol=1e-3) or np.linalg.det(R) < 0:
        raise DataError(f"{file}: a camera's matrix is no rotation: {np.round(R, 3).tolist()}")
    return np.linalg.inv(matrix)


def pinhole(fx: float, fy: float, cx: float, cy: float, file: Path) -> np.ndarray:
    """[3, 3]. Raises DataError for focal lengths that are not above 0."""
    if not (np.isfinite([fx, fy, cx, cy]).all() and fx > 0 and fy > 0):
        raise DataError(f"{file}: focal lengths {fx}, {fy} and middle {cx}, {cy} make no camera")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def undistorted(names: dict[str, float], file: Path) -> None:
    """Raises DataError if a lens bends what it shows."""
    if bent := {name: value for name, value in names.items() if abs(value) > 1e-8}:
        raise DataError(
            f"{file}: a lens bends its images "
            f"({', '.join(f'{k}={v:g}' for k, v in bent.items())}): "
            "undistort them before (colmap image_undistorter)"
        )


def surroundings(viewmats: Float32[np.ndarray, "v 4 4"]) -> Float32[np.ndarray, "2 3"]:
    """A cube about what cameras look at, half as wide as they are far."""
    R, t = viewmats[:, :3, :3].astype(np.float64), viewmats[:, :3, 3]
    eyes, towards = -np.einsum("vji,vj->vi", R, t), R[:, 2]
    across = np.eye(3) - towards[:, :, None] * towards[:, None]  # from a line, of its direction
    middle = np.linalg.lstsq(across.sum(0), np.einsum("vij,vj->i", across, eyes), rcond=None)[0]
    half = 0.5 * np.linalg.norm(eyes - middle, axis=1).mean()
    return np.stack([middle - half, middle + half]).astype(np.float32)
