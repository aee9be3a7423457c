"""Images of a scene and their cameras, by the name of the data."""

from __future__ import annotations

import importlib
from typing import Any

from training.data.config_scenes import (
    BlenderConfig,
    ColmapConfig,
    DnerfConfig,
    LlffConfig,
    MovingTabletopConfig,
    NerfstudioConfig,
    PosedConfig,
    PushTableConfig,
    TabletopConfig,
)
from training.data.posed import PosedData

SCENES: dict[str, tuple[type[PosedConfig], str]] = {
    "tabletop": (TabletopConfig, "TabletopData"),
    "push_table": (PushTableConfig, "PushTableData"),
    "blender": (BlenderConfig, "BlenderData"),
    "colmap": (ColmapConfig, "ColmapData"),
    "llff": (LlffConfig, "LlffData"),
    "nerfstudio": (NerfstudioConfig, "NerfstudioData"),
    "moving_tabletop": (MovingTabletopConfig, "MovingTabletopData"),
    "dnerf": (DnerfConfig, "DnerfData"),
}
"Data by name: its configuration, and the class in training/data/<name>.py."


def scene_data(config: Any, *, seed: int) -> PosedData[Any]:
    """What cameras saw of the scene that `config` describes. Raises DataError."""
    module = importlib.import_module(f"training.data.{config.name}")
    return getattr(module, SCENES[config.name][1])(config, seed=seed)
