"""Configuration of recorded episodes, and of games that are recorded first. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from training.data.config import DataConfig
from training.fields import at_least, within


class Part(NamedTuple):
    """One of several parts of an action."""

    name: str
    values: int
    rest: int  # the value of nobody touching it


@dataclass
class PlayedConfig(DataConfig):
    """Windows of episodes, whatever they are of."""

    image_size: int = 64
    "Height and width of a frame, in pixels; frames of other sizes are scaled."
    seq_len: int = 5
    "Frames of a window, T."
    heldout: float = 0.05
    "Share of the episodes that is held out; one at least."
    batch_size: int = 32
    "Windows per optimiser step, over all processes."
    parts: ClassVar[tuple[Part, ...]] = ()
    "The parts of an action, if it has several."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "batch_size")
        at_least(self, "data", 2, "seq_len")
        at_least(self, "data", 8, "image_size")
        within(self, "data", 0.0, 0.9, "heldout")


@dataclass
class EpisodesConfig(PlayedConfig):
    """Films with what was done between their frames, a file each."""

    name: str = "episodes"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .npz, .h5, .parquet or video files, one per episode (training/data/episodes.py)."
    actions: int = 3
    "How many actions there are: numbers from 0 on."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 1, "actions")


@dataclass
class AtariConfig(PlayedConfig):
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
    heldout: float = 0.1
    "Share of the episodes that is held out, the last; one at least."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 1, "frame_skip")
        at_least(self, "data", 100, "frames")
        within(self, "data", 0.0, 1.0, "sticky")


@dataclass
class ProcgenConfig(PlayedConfig):
    """A game of Procgen, such as CoinRun, recorded in Parquet files."""

    name: str = "procgen"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .parquet files (training/data/procgen.py)."
    actions: ClassVar[int] = 15
    "Kinds of action; every game has the same."


KEYS = "forward", "left", "back", "right", "jump", "crouch", "walk", "1", "2", "3", "reload"


@dataclass
class CsgoConfig(PlayedConfig):
    """Counter-Strike: Global Offensive, recorded in HDF5 files (extra: films)."""

    name: str = "csgo"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .hdf5 files (training/data/csgo.py)."
    parts: ClassVar[tuple[Part, ...]] = (
        *(Part(name, 2, 0) for name in (*KEYS, "fire", "aim")),
        Part("turn", 23, 11),
        Part("look", 15, 7),
    )
    "Keys and buttons, and how far the mouse went."


BUTTONS = (
    "forward", "left", "back", "right", "jump", "sneak", "sprint", "attack", "use", "drop",
    "inventory", *(str(n) for n in range(1, 10)), "swap", "pick", "escape",
)  # fmt: skip


@dataclass
class VptConfig(PlayedConfig):
    """Minecraft as people played it for VPT, in video files (extra: films)."""

    name: str = "vpt"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .mp4 files, each beside a .jsonl of the same name (training/data/vpt.py)."
    parts: ClassVar[tuple[Part, ...]] = (
        *(Part(name, 2, 0) for name in BUTTONS),
        Part("turn", 11, 5),
        Part("look", 11, 5),
    )
    "Keys and buttons, and how far the mouse went."
