"""Configuration of models that act. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.config import ModelConfig


@dataclass
class ActorCriticConfig(ModelConfig):
    """What to do, and what it will be worth, told from the last frames."""

    name: str = "actor_critic"
    "Which model: the stem of its file."
    context: int = 4
    "Frames that it sees."
    widths: list[int] = field(default_factory=lambda: [16, 32, 32])
    "Channels of the convolutions, each of which halves height and width."
    hidden: int = 128
    "Width of the layer after them."
    channels: int | None = None
    "Channels of a frame; null takes the data's."
    image_size: int | None = None
    "Height and width of a frame; null takes the data's."
    actions: int | None = None
    "How many actions there are; null takes the data's."

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"model.widths={self.widths} must be one width or more, from 1 on")
        for key in ("context", "hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.image_size is not None and self.image_size % 2 ** len(self.widths):
            raise ValueError(
                f"model.widths={self.widths}: frames of {self.image_size} cannot be halved "
                f"{len(self.widths)} times"
            )
