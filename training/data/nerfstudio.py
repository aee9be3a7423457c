"""Scenes as Nerfstudio (2023, arXiv:2302.04264) describes them.

    transforms.json
    {"fl_x": .., "cx": .., "cy": .., "frames": [{"file_path": .., "transform_matrix": ..}]}

Numbers of the lens are the scene's, or those of an image; matrices as in Blender's. Points come
from the file that `ply_file_path` names, if it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.data.config_scenes import NerfstudioConfig
from training.data.corpus import DataError
from training.data.posed import Cloud
from training.data.posed_files import (
    Frame,
    PosedFilesData,
    document,
    pinhole,
    undistorted,
    world_to_camera,
)

BENT = ("k1", "k2", "k3", "k4", "p1", "p2")


class NerfstudioData(PosedFilesData[NerfstudioConfig]):
    """Every `data.heldout_every`th image is held out."""

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        file = self.folder / "transforms.json"
        content = document(file)
        try:
            found = [self.frame({**content, **row}, file) for row in content["frames"]]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} lacks {error}") from None
        if name := content.get("ply_file_path"):
            self.cloud = points_of(self.folder / str(name))
        return self.divided(found)

    def frame(self, row: dict[str, Any], file: Path) -> Frame:
        undistorted({name: float(row.get(name, 0)) for name in BENT}, file)
        fx = float(row["fl_x"])
        fy, cx, cy = float(row.get("fl_y", fx)), float(row["cx"]), float(row["cy"])
        viewmat = world_to_camera(row["transform_matrix"], file)
        return Frame(self.folder / str(row["file_path"]), viewmat, pinhole(fx, fy, cx, cy, file))


def points_of(file: Path) -> Cloud:
    """x, y, z and red, green, blue of a PLY. Raises DataError."""
    from training.formats.ply import table

    try:
        found = table(file.read_bytes())
        points, colors = (
            np.stack([found[name] for name in names], axis=-1).astype(np.float32)
            for names in (("x", "y", "z"), ("red", "green", "blue"))
        )
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise DataError(f"{file} holds no coloured points: {error}") from None
    return Cloud(points, colors / 255)
