"""What COLMAP reconstructed: cameras, images and points, binary or as text.

    sparse/0/cameras.bin     lenses: pinholes, and others whose images are straight all the same
    sparse/0/images.bin      world to camera of each image: quaternion wxyz, then where it goes
    sparse/0/points3D.bin    what a scene is begun with

https://colmap.github.io/format.html; the folder may be sparse/ itself, or the scene's.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from training.data.config_scenes import ColmapConfig
from training.data.corpus import DataError
from training.data.posed import Cloud
from training.data.posed_files import Frame, PosedFilesData, pinhole, undistorted

PARAMETERS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}
"Models by their number, in COLMAP's order."


class ColmapData(PosedFilesData[ColmapConfig]):
    """Every `data.heldout_every`th image is held out."""

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        sparse = self.sparse()
        form = ".bin" if (sparse / "images.bin").is_file() else ".txt"
        read = BINARY if form == ".bin" else TEXT
        try:
            cameras = read[0](sparse / f"cameras{form}")
            images = read[1](sparse / f"images{form}")
            points = read[2](sparse / f"points3D{form}")
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
        except (struct.error, ValueError, IndexError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{sparse}: its {form} files are no whole reconstruction: {error}"
            ) from None
        if len(points[0]):
            self.cloud = Cloud(*(x.astype(np.float32) for x in points))
        found = []
        for name, quat, move, camera in images:
            if camera not in cameras:
                raise DataError(
                    f"{sparse}: image {name} is of camera {camera}, which is not listed"
                )
            viewmat = np.eye(4)
            viewmat[:3, :3] = Rotation.from_quat(quat, scalar_first=True).as_matrix()
            viewmat[:3, 3] = move
            found.append(Frame(self.folder / self.config.images / name, viewmat, cameras[camera]))
        return self.divided(found)

    def sparse(self) -> Path:
        """Where the reconstruction is. Raises DataError."""
        for below in ("sparse/0", "sparse", "."):
            if any((self.folder / below / f"images{form}").is_file() for form in (".bin", ".txt")):
                return self.folder / below
        raise DataError(f"data.path={self.config.path} has no sparse/0/images.bin, nor images.txt")


def lens(model: str, values: list[float], file: Path) -> np.ndarray:
    """[3, 3]. Raises DataError for one that bends, or is not known."""
    if model not in PARAMETERS:
        raise DataError(f"{file}: a camera is {model}; {', '.join(PARAMETERS)} are read")
    named = dict(zip(PARAMETERS[model], values, strict=True))
    undistorted({k: v for k, v in named.items() if k[0] in "kp"}, file)
    fx, fy = (named.get(key, named.get("f", 0.0)) for key in ("fx", "fy"))
    return pinhole(fx, fy, named["cx"], named["cy"], file)


class Reader:
    """Numbers one after the other, from bytes that may end too early."""

    def __init__(self, file: Path) -> None:
        self.content, self.at = file.read_bytes(), 0

    def take(self, form: str) -> tuple:
        found = struct.unpack_from("<" + form, self.content, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.content):
            raise ValueError("a file is cut short")

    def name(self) -> str:
        end = self.content.index(b"\0", self.at)
        found = self.content[self.at : end].decode()
        self.at = end + 1
        return found


def binary_cameras(file: Path) -> dict[int, np.ndarray]:
    reader, models, found = Reader(file), list(PARAMETERS), {}
    for _ in range(reader.take("Q")[0]):
        number, model, _, _ = reader.take("iiQQ")
        name = models[model] if 0 <= model < len(models) else f"of model {model}"
        found[number] = lens(name, list(reader.take("d" * len(PARAMETERS.get(name, ())))), file)
    return found


def binary_images(file: Path) -> list[tuple[str, np.ndarray, np.ndarray, int]]:
    reader, found = Reader(file), []
    for _ in range(reader.take("Q")[0]):
        _, *pose, camera = reader.take("i7di")
        name = reader.name()
        reader.skip(24 * reader.take("Q")[0])
        found.append((name, np.array(pose[:4]), np.array(pose[4:]), camera))
    return found


def binary_points(file: Path) -> tuple[np.ndarray, np.ndarray]:
    reader, points, colors = Reader(file), [], []
    for _ in range(reader.take("Q")[0]):
        _, x, y, z, red, green, blue, _ = reader.take("Q3d3Bd")
        reader.skip(8 * reader.take("Q")[0])
        points.append((x, y, z))
        colors.append((red, green, blue))
    return np.array(points).reshape(-1, 3), np.array(colors).reshape(-1, 3) / 255


def lines(file: Path) -> list[list[str]]:
    """Words of the lines that are no comments."""
    return [line.split() for line in file.read_text().splitlines() if not line.startswith("#")]


def text_cameras(file: Path) -> dict[int, np.ndarray]:
    return {
        int(number): lens(model, [float(x) for x in values], file)
        for number, model, _, _, *values in filter(None, lines(file))
    }


def text_images(file: Path) -> list[tuple[str, np.ndarray, np.ndarray, int]]:
    found = []
    for words in lines(file)[::2]:  # every other line lists what was seen
        if words:
            pose = np.array([float(x) for x in words[1:8]])
            found.append((" ".join(words[9:]), pose[:4], pose[4:], int(words[8])))
    return found


def text_points(file: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [[float(x) for x in words[1:7]] for words in lines(file) if words]
    values = np.array(rows).reshape(-1, 6)
    return values[:, :3], values[:, 3:] / 255


BINARY = binary_cameras, binary_images, binary_points
TEXT = text_cameras, text_images, text_points
