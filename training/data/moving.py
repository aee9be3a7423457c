"""Films of digits or balls that move by themselves: where they are, not what that looks like."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from training.data.config_worlds import HubImagesConfig, Movers, MovingConfig
from training.data.galleries import digits
from training.data.generated import GeneratedData
from training.data.hub_images import load
from training.envs.discs import scatter
from training.envs.moving import collide, drift
from training.seeding import numpy_rng


class Films(NamedTuple):
    """Centres in pixels, which digit each object is, and its radius."""

    positions: Float32[np.ndarray, "n t k 2"]
    sprite: Int64[np.ndarray, "n k"]  # row of `MovingData.sprites`; 0 for balls
    radius: Float32[np.ndarray, "n k"]


class MovingData(GeneratedData[MovingConfig]):
    """The seed's `data/moving` stream gives the training films, `eval/moving` others.

    Attributes:
        sprites: [m, s, s] float32 in [0, 1], those of training first.
        labels: [m] the digit that each shows.
        trained: how many of them training shows.
    """

    item = "film"

    def __init__(self, config: MovingConfig, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        self.sprites = np.zeros((1, 4, 4), np.float32)
        self.labels = np.zeros(1, np.int64)
        self.trained = 1
        if config.movers == Movers.digits:
            parts = mnist() if config.mnist else shipped(config.digit_size, seed)
            scans, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
            self.sprites, self.labels = scans.astype(np.float32) / 255, labels
            self.trained = len(parts[0][0])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's films of the batch of `step`: the fields of `Films`."""
        rng = numpy_rng(self._seed, "data/moving", step)
        films = self.films(rng, self.config.batch_size, self.config.seq_len, held=False)
        return {name: self.mine(rows) for name, rows in films._asdict().items()}

    def heldout(self, count: int, frames: int) -> Films:
        """Films of digits that training never shows, the same for every model of the seed."""
        rng = numpy_rng(self._seed, "eval/moving", frames)
        return self.films(rng, count, frames, held=True)

    def for_probes(self, count: int, frames: int) -> Films:
        """Other films than training shows, of the digits that it shows."""
        rng = numpy_rng(self._seed, "eval/moving/probes", frames)
        return self.films(rng, count, frames, held=False)

    def films(self, rng: np.random.Generator, n: int, frames: int, held: bool) -> Films:
        """`n` films."""
        config, shape = self.config, (n, self.config.objects)
        size = float(config.image_size)
        low = self.trained if held and len(self.sprites) > self.trained else 0
        high = len(self.sprites) if low else self.trained
        sprite = rng.integers(low, high, size=shape)
        angle, pace = rng.uniform(0, 2 * np.pi, shape), rng.uniform(*config.speed, shape)
        speed = pace[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        if config.movers == Movers.digits:
            radius = np.full(shape, config.digit_size / 2)
            start = rng.uniform(radius[..., None], size - radius[..., None], (*shape, 2))
            positions = drift(start, speed, radius, frames, size)
        else:
            radius = rng.uniform(*config.radius, shape)
            positions, _ = collide(scatter(rng, radius, size, size), speed, radius, frames, size)
        return Films(positions.astype(np.float32), sprite, radius.astype(np.float32))


Scans = tuple[UInt8[np.ndarray, "m s s"], Int64[np.ndarray, " m"]]


def shipped(size: int, seed: int) -> list[Scans]:
    """Scans and labels of training, and others."""
    gallery = digits(size, seed)
    parts = [gallery.part(held) for held in (False, True)]
    return [(images[:, 0], labels) for images, labels in parts]


def mnist() -> list[Scans]:
    """The same from MNIST, in its own size.

    Raises:
        DataError: the hub cannot be reached.
    """
    config = HubImagesConfig(dataset="ylecun/mnist", image_field="image")
    found = []
    for part in ("train", "test"):
        rows = load(config, part)
        images = np.stack([np.asarray(image) for image in rows["image"]])
        found.append((images, np.array(rows["label"], np.int64)))
    return found
