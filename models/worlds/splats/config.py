"""Configuration of models of scenes. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass
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
