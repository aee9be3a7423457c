"""Configuration of models of scenes. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from models.config import ModelConfig


class Beginning(StrEnum):
    """Where the first Gaussians are."""

    random = "random"  # anywhere in the box that the data names
    cloud = "cloud"  # at the points that come with it


@dataclass
class GaussianSplattingConfig(ModelConfig):
    """A set of Gaussians that grows to what a scene needs."""

    name: str = "gaussian_splatting"
    "Which model: the stem of its file."
    capacity: int = 3000
    "Most Gaussians."
    degree: int = 3
    "Of the spherical harmonics that colours are made of, 0 to 3."
    begin: Beginning = Beginning.random
    "random, or cloud: at points that come with the data."
    begin_count: int = 1500
    "Gaussians at the beginning, if their places are random."
    begin_opacity: float = 0.1
    "What they cover at their middle (MCMC: 0.5)."
    begin_scale: float = 1.0
    "How wide they are, relative to how far their nearest neighbours are (MCMC: 0.1)."
    antialiased: bool = False
    "Let what is narrower than a pixel cover less of it."
    tile: int = 16
    "Pixels of a tile, each way: 16, or 8, which is faster for small images without a GPU."

    def __post_init__(self) -> None:
        for key in ("capacity", "begin_count"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        if self.begin == Beginning.random and self.begin_count > self.capacity:
            raise ValueError(
                f"model.begin_count={self.begin_count} must be up to model.capacity={self.capacity}"
            )
        if not 0 <= self.degree <= 3:
            raise ValueError(f"model.degree={self.degree} must be from 0 to 3")
        if not 0 < self.begin_opacity < 1:
            raise ValueError(f"model.begin_opacity={self.begin_opacity} must be between 0 and 1")
        if not self.begin_scale > 0:
            raise ValueError(f"model.begin_scale={self.begin_scale} must be above 0")
        if self.tile not in (8, 16):
            raise ValueError(f"model.tile={self.tile} must be 8 or 16")


class Motion(StrEnum):
    """By what Gaussians move."""

    still = "still"  # they do not
    deformation = "deformation"  # a network of place and time
    hexplane = "hexplane"  # a network of features of planes
    polynomial = "polynomial"  # a polynomial each
    tracked = "tracked"  # from one time to the next


@dataclass
class DynamicGaussiansConfig(GaussianSplattingConfig):
    """A set of Gaussians that moves."""

    name: str = "dynamic_gaussians"
    "Which model: the stem of its file."
    motion: Motion = Motion.tracked
    "still, deformation, hexplane, polynomial or tracked."
    width: int = 64
    "Of the layers of the network that says where Gaussians are."
    layers: int = 4
    "Of that network (Deformable 3D Gaussians: 8 of width 256)."
    frequencies: int = 6
    "Of sines and cosines of places that it is given (10)."
    time_frequencies: int = 4
    "Of times (6)."
    planes: list[int] = field(default_factory=lambda: [32, 32, 32, 12])
    "Cells of planes along x, y, z and time (4D Gaussian Splatting: 64, 64, 64, 25)."
    levels: list[int] = field(default_factory=lambda: [1, 2])
    "How many times as fine planes of each level are, but in time."
    plane_features: int = 16
    "Of each cell (32)."
    plane_weight: float = 1e-4
    "In the loss, of how uneven planes of space are."
    time_weight: float = 1e-2
    "Of how jerky planes of time are."
    change_weight: float = 1e-4
    "Of how far planes of time are from 1."

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("width", "layers", "plane_features"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        for key in ("frequencies", "time_frequencies"):
            if not 0 <= getattr(self, key) <= 16:
                raise ValueError(f"model.{key}={getattr(self, key)} must be from 0 to 16")
        for key in ("plane_weight", "time_weight", "change_weight"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 0 or more")
        if len(self.planes) != 4 or min(self.planes) < 2 or self.planes[3] < 3:
            raise ValueError(
                f"model.planes={list(self.planes)} must be four numbers: of 2 or more along x, y "
                "and z, of 3 or more along time"
            )
        if not self.levels or min(self.levels) < 1:
            raise ValueError(f"model.levels={list(self.levels)} must be numbers of 1 or more")


@dataclass
class MroGwmConfig(ModelConfig):
    """A transformer over objects that are pushed."""

    name: str = "mro_gwm"
    "Which model: the stem of its file."
    objects: int = 3
    "That move."
    history: int = 3
    "Times that are seen, the present one too."
    anchors: int = 8
    "Points of each object, whose places are seen."
    width: int = 128
    "Of a token."
    layers: int = 4
    "Of the transformer."
    heads: int = 4
    "Of its attention."
    members: int = 3
    "Networks of the ensemble."

    def __post_init__(self) -> None:
        for key in ("objects", "history", "anchors", "width", "layers", "heads", "members"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        if self.width % self.heads:
            raise ValueError(
                f"model.heads={self.heads} must divide model.width={self.width} evenly"
            )


@dataclass
class LvsmConfig(ModelConfig):
    """A transformer over patches and their rays, without any 3D."""

    name: str = "lvsm"
    "Which model: the stem of its file."
    patch: int = 4
    "Pixels of a patch, each way."
    width: int = 128
    "Of a token."
    layers: int = 4
    "Of the transformer."
    heads: int = 4
    "Of its attention."

    def __post_init__(self) -> None:
        for key in ("patch", "width", "layers", "heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        if self.width % self.heads:
            raise ValueError(
                f"model.heads={self.heads} must divide model.width={self.width} evenly"
            )


@dataclass
class MvSplatConfig(ModelConfig):
    """A Gaussian for every pixel that is given, as far away as a plane sweep says."""

    name: str = "mvsplat"
    "Which model: the stem of its file."
    width: int = 32
    "Channels of features."
    blocks: int = 3
    "Residual blocks of features, and of what the sweep is refined by."
    sweep: bool = True
    "Compare both views at each depth: without it, depth is guessed from one view alone."
    depths: int = 24
    "Planes of the sweep, evenly in 1 / depth."
    near: float = 1.4
    "Depth of the nearest plane."
    far: float = 6.3
    "Of the furthest."
    tile: int = 8
    "Pixels of a tile of the rasteriser, each way: 16 or 8."

    def __post_init__(self) -> None:
        for key in ("width", "blocks"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        if self.depths < 2:
            raise ValueError(f"model.depths={self.depths} must be 2 or more")
        if not 0 < self.near < self.far:
            raise ValueError(
                f"model.near={self.near} must be above 0 and below model.far={self.far}"
            )
        if self.tile not in (8, 16):
            raise ValueError(f"model.tile={self.tile} must be 8 or 16")
