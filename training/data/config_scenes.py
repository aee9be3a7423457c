"""Configuration of scenes that cameras have seen. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass

from training.data.config import DataConfig
from training.fields import at_least, within


@dataclass
class PosedConfig(DataConfig):
    """Images whose cameras are known, some of which are held out."""

    batch_size: int = 1
    "Images per optimiser step."
    shuffled: bool = False
    "Give images the cameras of others: a control, which must fail."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "batch_size")


@dataclass
class TabletopConfig(PosedConfig):
    """Things on a table, ray-traced from all around: another scene for every seed."""

    name: str = "tabletop"
    "Which data: the stem of its file."
    image_size: int = 64
    "Height and width of the images, in pixels."
    views: int = 60
    "Cameras that are trained on."
    heldout: int = 20
    "Cameras that are judged by."
    things: int = 8
    "On the table."
    samples: int = 3
    "Rays through a pixel, each way."
    pose_noise: float = 0.0
    "How wrong the cameras that are trained on are said to be: radians, and units of the scene."
    exposure_noise: float = 0.0
    "Images that are trained on are as bright as 1 - 2 x this to 1, those held out as 1 - this."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 12, "image_size")
        at_least(self, "data", 2, "views")
        at_least(self, "data", 1, "heldout", "samples")
        within(self, "data", 0, 12, "things")
        within(self, "data", 0.0, 0.5, "pose_noise", "exposure_noise")


@dataclass
class PushTableConfig(TabletopConfig):
    """Box, cylinder, T and pusher of PushWorld3D on their table, before anything is pushed."""

    name: str = "push_table"
    "Which data: the stem of its file."
    things: int = 4
    "Always four."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.things != 4:
            raise ValueError(f"data.things={self.things}: there are 4, leave it out")


@dataclass
class TimedConfig(PosedConfig):
    """Images that have a time, too."""

    first_steps: int = 0
    "Steps about the first time, if one time comes after the other."
    steps_per_time: int = 0
    "Steps about each of the other times, in their order; 0: all times, at random."
    shuffled_times: bool = False
    "Give images the times of others: a control, which must fail."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 0, "first_steps", "steps_per_time")
        if (self.first_steps > 0) != (self.steps_per_time > 0):
            raise ValueError(
                f"data.first_steps={self.first_steps} and data.steps_per_time={self.steps_per_time}"
                " must both be above 0 (one time after the other), or both 0 (at random)"
            )


@dataclass
class MovingTabletopConfig(TimedConfig):
    """Things that move on a table, ray-traced from all around: another scene for every seed."""

    name: str = "moving_tabletop"
    "Which data: the stem of its file."
    image_size: int = 48
    "Height and width of the images, in pixels."
    cameras: int = 12
    "That are trained on."
    heldout: int = 2
    "Cameras that are judged by, at all times."
    times: int = 24
    "Evenly from 0 to 1."
    heldout_every: int = 4
    "One time of so many is held out in all cameras: the third of the first four, and so on."
    things: int = 5
    "On the table."
    samples: int = 2
    "Rays through a pixel, each way."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 12, "image_size")
        at_least(self, "data", 2, "cameras", "heldout_every")
        at_least(self, "data", 1, "heldout", "samples")
        at_least(self, "data", 3, "times")
        within(self, "data", 1, 8, "things")


@dataclass
class PosedFilesConfig(PosedConfig):
    """Images in files, beside what says where their cameras were."""

    path: str | None = None
    "The scene's folder."
    downscale: int = 1
    "Images are averages over squares of this many pixels."
    heldout_every: int = 8
    "Every so many images, in the order of their names, are held out; the first one is."
    white: bool = True
    "What shows through transparent images: white, or black."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 1, "downscale")
        at_least(self, "data", 2, "heldout_every")


@dataclass
class BlenderConfig(PosedFilesConfig):
    """NeRF's synthetic scenes: transforms_train.json and transforms_test.json."""

    name: str = "blender"
    "Which data: the stem of its file."


@dataclass
class ColmapConfig(PosedFilesConfig):
    """What COLMAP reconstructed: sparse/0 with its cameras, images and points."""

    name: str = "colmap"
    "Which data: the stem of its file."
    images: str = "images"
    "Folder of the images, in the scene's (Mip-NeRF 360: images_4)."


@dataclass
class NerfstudioConfig(PosedFilesConfig):
    """transforms.json with focal lengths, of the scene or of each image."""

    name: str = "nerfstudio"
    "Which data: the stem of its file."


@dataclass
class LlffConfig(PosedFilesConfig):
    """poses_bounds.npy of Local Light Field Fusion."""

    name: str = "llff"
    "Which data: the stem of its file."
    images: str = "images"
    "Folder of the images, in the scene's."


@dataclass
class DnerfConfig(TimedConfig, BlenderConfig):
    """D-NeRF's synthetic scenes: NeRF's, whose frames have a time."""

    name: str = "dnerf"
    "Which data: the stem of its file."


@dataclass
class PushWorldConfig(DataConfig):
    """Episodes of somebody who pushes things over a table, in MuJoCo."""

    name: str = "push_world"
    "Which data: the stem of its file."
    batch_size: int = 128
    "Windows per optimiser step."
    episodes: int = 1000
    "That are trained on."
    heldout: int = 100
    "Episodes that are judged by."
    steps: int = 20
    "Of an episode, each a tenth of a second."
    moving: float = 0.7
    "Share of the windows in which something moves."
    shuffled_pushers: bool = False
    "Give windows the pusher of others, and what it did: a control, which must fail."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "batch_size", "episodes", "heldout")
        at_least(self, "data", 12, "steps")
        within(self, "data", 0.0, 1.0, "moving")


@dataclass
class RandomTablesConfig(DataConfig):
    """Two views each of tables that nobody has seen, and a third that is asked for."""

    name: str = "random_tables"
    "Which data: the stem of its file."
    batch_size: int = 16
    "Scenes per optimiser step."
    image_size: int = 32
    "Height and width of the images, in pixels."
    scenes: int = 2000
    "That are trained on."
    heldout: int = 64
    "Scenes that are judged by."
    things: int = 5
    "On a table, at most."
    apart: float = 40.0
    "Degrees between the two cameras, about the table."
    scale: float = 1.0
    "Scenes are up to so many times as large or as small, cameras' ways too: no image shows it."
    samples: int = 2
    "Rays through a pixel, each way."
    shuffled: bool = False
    "Ask for the views of other scenes: a control, which must fail."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "batch_size", "scenes", "samples")
        at_least(self, "data", 2, "heldout", *(("batch_size", "scenes") if self.shuffled else ()))
        at_least(self, "data", 16, "image_size")
        within(self, "data", 1, 12, "things")
        within(self, "data", 5.0, 120.0, "apart")
        within(self, "data", 1.0, 4.0, "scale")
