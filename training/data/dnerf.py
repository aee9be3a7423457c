"""Scenes of D-NeRF (2020, arXiv:2011.13961): NeRF's synthetic ones, whose frames have a time.

    {"file_path": "./train/r_000", "time": 0.0, "transform_matrix": ..}

Its scene Lego is judged by images of something else than what is trained on, so the repositories
that are built on it say: leave it out of means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data.blender import BlenderData
from training.data.config_scenes import DnerfConfig
from training.data.posed_files import Frame
from training.data.timed import TimedData


class DnerfData(TimedData[DnerfConfig], BlenderData):
    """The split is that of the files."""

    def frame(self, row: dict[str, Any], angle: float, file: Path) -> Frame:
        return super().frame(row, angle, file).at(float(row["time"]), file)
