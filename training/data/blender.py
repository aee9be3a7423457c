"""Scenes of NeRF (2020, arXiv:2003.08934), rendered with Blender.

    transforms_train.json, transforms_test.json
    {"camera_angle_x": 0.69, "frames": [{"file_path": "./train/r_0", "transform_matrix": ..}]}

Matrices [4 x 4] take cameras to the world, with the axes of OpenGL. PNG are transparent, and over
white as is usual.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from training.data.config_scenes import BlenderConfig
from training.data.corpus import DataError
from training.data.posed_files import Frame, PosedFilesData, document, pinhole, world_to_camera


class BlenderData(PosedFilesData[BlenderConfig]):
    """The split is that of the files."""

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        return self.listed("train"), self.listed("test")

    def listed(self, part: str) -> list[Frame]:
        """Of one file. Raises DataError."""
        file = self.folder / f"transforms_{part}.json"
        content = document(file)
        try:
            angle, rows = float(content["camera_angle_x"]), list(content["frames"])
            return [self.frame(row, angle, file) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} lacks {error}") from None

    def frame(self, row: dict[str, Any], angle: float, file: Path) -> Frame:
        """Its focal length is that of its image, as wide as `angle`."""
        image = self.folder / str(row["file_path"])
        image = image if image.suffix else image.with_suffix(".png")
        width, height = extent(image)
        focal = 0.5 * width / math.tan(0.5 * angle) if 0 < angle < math.pi else 0.0
        K = pinhole(focal, focal, width / 2, height / 2, file)
        return Frame(image, world_to_camera(row["transform_matrix"], file), K)


def extent(file: Path) -> tuple[int, int]:
    """Width and height of an image; 2 x 2 of one that is not there, which nobody will read."""
    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        return 2, 2
    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} is no image that can be read: {error}") from None
