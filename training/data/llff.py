"""Scenes of Local Light Field Fusion (2019, arXiv:1905.00889).

    poses_bounds.npy [n, 17]: 3 x 5 [R | t | height, width, focal length], least and largest depth

of the images of a folder, in the order of their names. Columns of R: down, right, backwards.
"""

from __future__ import annotations

import numpy as np

from training.data.config_scenes import LlffConfig
from training.data.corpus import DataError
from training.data.posed_files import Frame, PosedFilesData, pinhole, world_to_camera

ENDINGS = (".png", ".jpg", ".jpeg")


class LlffData(PosedFilesData[LlffConfig]):
    """Every `data.heldout_every`th image is held out."""

    def frames(self) -> tuple[list[Frame], list[Frame]]:
        file = self.folder / "poses_bounds.npy"
        try:
            rows = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        if rows.ndim != 2 or rows.shape[1] != 17:
            raise DataError(f"{file} is {list(rows.shape)}, expected [images, 17]")
        folder = self.folder / self.config.images
        images = sorted(x for x in folder.glob("*") if x.suffix.lower() in ENDINGS)
        if len(images) != len(rows):
            raise DataError(f"{file} has {len(rows)} cameras, {folder} {len(images)} images")
        found = []
        for image, row in zip(images, rows, strict=True):
            pose = row[:15].reshape(3, 5)
            down, right, back, eye, (height, width, focal) = pose.T
            matrix = np.stack([right, down, -back, eye], axis=1)
            K = pinhole(focal, focal, width / 2, height / 2, file)
            found.append(Frame(image, world_to_camera(matrix, file, opengl=False), K))
        return self.divided(found)
