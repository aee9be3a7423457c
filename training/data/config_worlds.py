"""Configuration of generated worlds: what is seen and done in them. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from training.data.config import DataConfig, require


class Wall(StrEnum):
    """Where the wall between two rooms is."""

    fixed = "fixed"  # column 32, its door at row 18
    random = "random"  # columns 20 to 44, doors at rows 10 to 54


@dataclass
class TwoRoomsConfig(DataConfig):
    """Walks of a dot through two rooms, cut into windows."""

    name: str = "two_rooms"
    "Which data: the stem of its file."
    wall: Wall = Wall.fixed
    "fixed, or random for every walk."
    pool: int = 3
    "Images are averages of the canvas of 65 x 65 over squares of this many pixels."
    walk: int = 91
    "States of a walk, of which windows are cut."
    crossing: float = 0.35
    "Share of the walks that lead through the door."
    walks: int = 1024
    "Walks that are made together and whose windows are shuffled."
    seq_len: int = 25
    "States of a window, T; it has T - 1 actions."
    batch_size: int = 48
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        require(1 <= self.pool <= 16, "pool", self.pool, "1 to 16 pixels", "try 3")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1", "try 48")
        require(0 <= self.crossing <= 1, "crossing", self.crossing, "a share", "try 0.35")
        require(
            2 <= self.seq_len <= self.walk,
            "seq_len",
            self.seq_len,
            f"2 to data.walk={self.walk}",
            "lower it",
        )
        windows = self.walks * (self.walk // self.seq_len)
        require(
            windows >= self.batch_size,
            "walks",
            self.walks,
            f"windows for a batch of data.batch_size={self.batch_size}, they give {windows}",
            "raise it",
        )
