"""Configuration of recorded episodes, and of games that are recorded first. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass

from training.data.config import DataConfig
from training.fields import at_least, within


@dataclass
class EpisodesConfig(DataConfig):
    """Films with what was done between their frames, a file each."""

    name: str = "episodes"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .npz, .h5, .parquet or video files, one per episode (training/data/episodes.py)."
    image_size: int = 64
    "Height and width of a frame, in pixels; frames of other sizes are scaled."
    actions: int = 3
    "How many actions there are: numbers from 0 on."
    seq_len: int = 5
    "Frames of a window, T."
    heldout: float = 0.05
    "Share of the files that is held out, by the hash of their names; one at least."
    batch_size: int = 32
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "actions", "batch_size")
        at_least(self, "data", 2, "seq_len")
        at_least(self, "data", 8, "image_size")
        within(self, "data", 0.0, 0.9, "heldout")


@dataclass
class AtariConfig(DataConfig):
    """A game of the Arcade Learning Environment, played before the run begins (extra: atari)."""

    name: str = "atari"
    "Which data: the stem of its file."
    game: str = "breakout"
    "Name of the game, as ale-py has it."
    frames: int = 10_000
    "Frames that are recorded, after skipping."
    frame_skip: int = 4
    "Frames that an action lasts; what is seen is the brighter of the last two."
    sticky: float = 0.25
    "How often the player, who plays at random, draws another action."
    image_size: int = 64
    "Height and width of a frame, in pixels."
    seq_len: int = 5
    "Frames of a window, T."
    heldout: float = 0.1
    "Share of the episodes that is held out, the last; one at least."
    batch_size: int = 32
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "frame_skip", "batch_size")
        at_least(self, "data", 2, "seq_len")
        at_least(self, "data", 100, "frames")
        at_least(self, "data", 8, "image_size")
        within(self, "data", 0.0, 1.0, "sticky")
        within(self, "data", 0.0, 0.9, "heldout")
