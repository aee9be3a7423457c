"""Configuration of generated worlds: what is seen and done in them. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from training.data.config import DataConfig, require
from training.fields import at_least, span, within


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


@dataclass
class ViewsConfig:
    """How views of an image differ."""

    count: int = 2
    "Global views of an image."
    area: list[float] = field(default_factory=lambda: [1.0, 1.6])
    "[least, largest] area that a global view shows, relative to the image's."
    local_count: int = 0
    "Local views of an image."
    local_area: list[float] = field(default_factory=lambda: [0.05, 0.3])
    "[least, largest] area that a local view shows, relative to the image's."
    local_size: int = 16
    "Height and width of a local view, in pixels."
    aspect: float = 1.0
    "Largest ratio of what a view shows in width and height."
    rotate: float = 20.0
    "Largest turn, in degrees."
    shift: float = 0.1
    "Largest move beyond the image, as a share of its width."
    flip: float = 0.0
    "Share of views that are mirrored."
    jitter: list[float] = field(default_factory=lambda: [0.3, 0.3, 0.0, 0.0])
    "Largest relative change of brightness, contrast and saturation, and turn of the hue."
    jitter_share: float = 0.8
    "Share of views that are changed so."
    grey: float = 0.0
    "Share of views without colour."
    blur: float = 0.0
    "Share of views that are blurred."
    solarise: float = 0.0
    "Share of views whose bright parts are inverted."
    cutout: float = 0.25
    "Largest side of a square that is cut out, as a share of the view's; 0 for none."
    noise: float = 0.1
    "Largest standard deviation of white noise."

    def __post_init__(self) -> None:
        where = "data.views"
        at_least(self, where, 1, "count", "local_size", "aspect")
        at_least(self, where, 0, "local_count", "rotate", "shift", "cutout", "noise")
        within(self, where, 0.0, 1.0, "flip", "jitter_share", "grey", "blur", "solarise")
        span(self, where, 100.0, "area", "local_area")
        if len(self.jitter) != 4 or min(self.jitter) < 0:
            raise ValueError(
                f"{where}.jitter={self.jitter} must be four numbers from 0 on: brightness, "
                "contrast, saturation, hue"
            )


class Source(StrEnum):
    """Small images that need no download."""

    digits = "digits"  # scans, ten classes
    glyphs = "glyphs"  # characters of fonts
    shapes = "shapes"  # drawn, eight classes


@dataclass
class ImagesConfig(DataConfig):
    """What all data of still images has."""

    image_size: int = 32
    "Height and width of an image, in pixels."
    views: ViewsConfig = field(default_factory=ViewsConfig)
    "How views differ."
    batch_size: int = 256
    "Images per optimiser step, over all processes."

    def __post_init__(self) -> None:
        require(self.image_size >= 8, "image_size", self.image_size, "8 or more", "try 32")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2", "try 256")


@dataclass
class SmallImagesConfig(ImagesConfig):
    """Scanned digits, characters and drawn shapes."""

    name: str = "small_images"
    "Which data: the stem of its file."
    sources: list[Source] = field(default_factory=lambda: [Source.digits])
    "digits, glyphs, shapes, or several of them."
    shapes: int = 2000
    "Drawings among the images, if shapes are."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < len(self.sources) == len(set(self.sources)),
            "sources",
            self.sources,
            "digits, glyphs, shapes, each once",
            "try [digits]",
        )
        require(self.shapes >= 32, "shapes", self.shapes, "at least 32", "try 2000")


@dataclass
class HubImagesConfig(ImagesConfig):
    """Photographs with labels: a data set of the Hugging Face hub, or folders of files."""

    name: str = "hub_images"
    "Which data: the stem of its file."
    dataset: str = "uoft-cs/cifar10"
    "A data set of the hub, or imagefolder."
    folder: str | None = None
    "With dataset=imagefolder: where <split>/<class>/<files> are."
    revision: str | None = None
    "Commit of the data set; null takes the newest."
    split: str = "train"
    "The part that is trained on."
    heldout_split: str = "test"
    "The part that probes are judged by."
    image_field: str = "img"
    "Column of the images."
    label_field: str = "label"
    "Column of the classes."
    exam: int = 10000
    "Images of each part that a probe is fitted to and judged by."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.exam >= 16, "exam", self.exam, "at least 16", "try 10000")
        require(
            (self.dataset == "imagefolder") == (self.folder is not None),
            "folder",
            self.folder,
            "set with data.dataset=imagefolder, and only then",
            "set both",
        )


class Movers(StrEnum):
    """What moves."""

    digits = "digits"  # straight on through each other, reflected at the frame
    balls = "balls"  # discs that collide with each other and the frame


@dataclass
class MovingConfig(DataConfig):
    """Films of digits or balls that move by themselves."""

    name: str = "moving"
    "Which data: the stem of its file."
    movers: Movers = Movers.digits
    "digits or balls."
    mnist: bool = False
    "Take the digits from MNIST, on the hub, in place of those that scikit-learn carries."
    objects: int = 2
    "How many there are in a film."
    image_size: int = 64
    "Height and width of a frame, in pixels."
    digit_size: int = 28
    "Height and width of a digit, in pixels."
    radius: list[float] = field(default_factory=lambda: [3.0, 5.0])
    "[least, largest] radius of a ball, in pixels."
    speed: list[float] = field(default_factory=lambda: [2.0, 5.0])
    "[least, largest] speed at the start, in pixels per frame."
    seq_len: int = 10
    "Frames of a film, T."
    batch_size: int = 64
    "Films per optimiser step, over all processes."

    def __post_init__(self) -> None:
        require(self.objects >= 1, "objects", self.objects, "at least 1", "try 2")
        require(self.seq_len >= 3, "seq_len", self.seq_len, "at least 3 frames", "try 10")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1", "try 64")
        size = self.image_size
        require(
            4 <= self.digit_size < size,
            "digit_size",
            self.digit_size,
            f"from 4 pixels on, and below data.image_size={size}: what fills a frame cannot move",
            "lower it",
        )
        require(
            not self.mnist or self.digit_size == 28,
            "digit_size",
            self.digit_size,
            "28 pixels, MNIST's, with data.mnist=true",
            "set it so",
        )
        span(self, "data", size, "radius", "speed")
        room = self.objects * (2 * self.radius[1]) ** 2
        require(
            self.movers == Movers.digits or room < 0.5 * size**2,
            "radius",
            self.radius,
            f"room for data.objects={self.objects} balls in a frame of {size}",
            "lower either",
        )


@dataclass
class WalksConfig(DataConfig):
    """Walks through a world that is acted in, cut into windows."""

    image_size: int = 224
    "Height and width of a frame, in pixels."
    walk: int = 93
    "States of a walk, of which windows are cut."
    skip: int = 5
    "Steps, and actions, from one state of a window to the next."
    seq_len: int = 4
    "States of a window, T; it has T - 1 blocks of actions."
    batch_size: int = 128
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 16, "image_size")
        at_least(self, "data", 1, "skip")
        at_least(self, "data", 2, "batch_size")
        most = (self.walk - 1) // self.skip + 1
        require(
            2 <= self.seq_len < most,
            "seq_len",
            self.seq_len,
            f"2 to {most - 1} states, data.skip={self.skip} apart, of data.walk={self.walk}",
            "lower it",
        )


@dataclass
class TwoRoomsRGBConfig(WalksConfig):
    """A dot that walks through two rooms in colour."""

    name: str = "two_rooms_rgb"
    "Which data: the stem of its file."


class Pushing(StrEnum):
    """How a disc pushes a block about."""

    weak = "weak"  # actions at random, near the block
    strokes = "strokes"  # round the block, then into it


@dataclass
class PushTConfig(WalksConfig):
    """A disc that pushes a T about."""

    name: str = "push_t"
    "Which data: the stem of its file."
    pushing: Pushing = Pushing.strokes
    "weak: actions at random, near the block; strokes: round the block, then into it."
    walks: int = 2000
    "Walks that are trained on."
    walk: int = 101
    "States of a walk, of which windows are cut."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "data", 1, "walks")


@dataclass
class TrajectoriesConfig(DataConfig):
    """Recorded films, with what was done and where the actor was."""

    name: str = "trajectories"
    "Which data: the stem of its file."
    path: str | None = None
    "Directory of .npz files, one per trajectory."
    image_size: int = 256
    "Height and width of a frame, in pixels."
    action_dim: int = 7
    "Components of an action."
    state_dim: int = 7
    "Components of a state."
    skip: int = 1
    "Frames from one of a window to the next; the actions between are added up."
    seq_len: int = 8
    "Frames of a window, T."
    heldout: float = 0.05
    "Share of the files that is held out, by the hash of their names; one at least."
    batch_size: int = 256
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "action_dim", "state_dim", "skip", "batch_size")
        at_least(self, "data", 2, "seq_len")
        at_least(self, "data", 16, "image_size")
        within(self, "data", 0.0, 0.9, "heldout")


@dataclass
class RecordedFilmsConfig(DataConfig):
    """Films in one file, of which nothing is known but how they look."""

    name: str = "recorded_films"
    "Which data: the stem of its file."
    path: str | None = None
    "A .npy file of grey frames, uint8 [frames, films, height, width], as Moving MNIST's."
    image_size: int = 64
    "Height and width of a frame, in pixels."
    seq_len: int = 10
    "Frames of a window, T."
    heldout: float = 0.1
    "Share of the films that is held out, the last of the file; two at least."
    batch_size: int = 64
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 1, "batch_size")
        at_least(self, "data", 3, "seq_len")
        at_least(self, "data", 16, "image_size")
        within(self, "data", 0.0, 0.9, "heldout")


class Variant(StrEnum):
    """What there is in the world of Pinfall (training/envs/pinfall.py)."""

    uniform = "uniform"  # one ball in a closed box
    collide = "collide"  # three of different sizes
    gravity = "gravity"  # one that falls
    occlude = "occlude"  # one, and a screen that it passes behind
    paddle = "paddle"  # one, over a paddle that an action moves
    fork = "fork"  # the same, but that it leaves for the left or the right, and nothing says which


class Split(StrEnum):
    """Which balls of Pinfall: those that are trained on, or others."""

    shown = "shown"
    speed = "speed"  # faster than any that are trained on
    size = "size"  # larger
    pairs = "pairs"  # hues and speeds that were trained on, but not together


@dataclass
class PinfallConfig(DataConfig):
    """Clips of a ball and a paddle, with exact physics."""

    name: str = "pinfall"
    "Which data: the stem of its file."
    variant: Variant = Variant.paddle
    "uniform, collide, gravity, occlude, paddle or fork."
    hang: int = 4
    "Frames that a ball hangs for, before a fork."
    image_size: int = 32
    "Height and width of a frame, in pixels."
    oracles: float = 0.5
    "Share of the worlds that someone acts in who knows where the ball will land."
    noise: float = 0.3
    "Share of the actions that these draw at random."
    worlds: int = 256
    "Worlds that are made together, and whose windows are trained on together."
    length: int = 64
    "Frames of each."
    seq_len: int = 5
    "Frames of a window, T; it has T - 1 actions."
    batch_size: int = 32
    "Windows per optimiser step, over all processes."

    def __post_init__(self) -> None:
        at_least(self, "data", 16, "image_size")
        at_least(self, "data", 1, "worlds", "batch_size", "hang")
        at_least(self, "data", 2, "seq_len")
        within(self, "data", 0.0, 1.0, "oracles", "noise")
        require(
            self.length >= self.seq_len,
            "length",
            self.length,
            f"at least data.seq_len={self.seq_len}",
            "raise it",
        )
