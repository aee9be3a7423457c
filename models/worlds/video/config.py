"""Configuration of video world models. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.config import ModelConfig

HEAD = 8  # width of a head of attention


@dataclass
class DiamondConfig(ModelConfig):
    """A U-Net that takes the noise out of the next frame, beside the frames before it."""

    name: str = "diamond"
    "Which model: the stem of its file."
    context: int = 4
    "Frames that it sees, each with the action after it."
    widths: list[int] = field(default_factory=lambda: [16, 32, 64])
    "Channels of the levels, each of half the height and width of the one before."
    patch: int = 1
    "Pixels are gathered into squares of this side first, and told apart again at the end."
    depth: int = 1
    "Residual blocks of a level, on the way down; one more on the way up."
    attention: bool = True
    "Two residual blocks with self-attention at the bottom."
    condition: int = 64
    "Width of what blocks are told of the noise and the actions."
    outcome_width: int = 16
    "Channels of the network that tells rewards and ends (Atari: 32)."
    sigma_data: float = 0.5
    "Standard deviation of a pixel, in [-1, 1]."
    sigma_offset: float = 0.1
    "Standard deviation of the noise that is one number for a channel (Atari: 0.3, CS:GO: 0.1)."
    sigma_mean: float = -0.4
    "Mean of the logarithm of the noise that is trained on (CS:GO: -1.2)."
    sigma_spread: float = 1.2
    "Its standard deviation."
    sigma_min: float = 0.002
    "Least noise, of training and of drawing a frame."
    sigma_max: float = 5.0
    "Noise that drawing a frame starts from; training goes up to 20."
    steps: int = 3
    "Steps in which a frame is drawn."
    rho: float = 7.0
    "How much denser the steps are where there is little noise."
    unit_start: bool = False
    "Start from noise of 1 while telling the network sigma_max, as the published code does."
    channels: int | None = None
    "Channels of a frame; null takes the data's."
    image_size: int | None = None
    "Height and width of a frame; null takes the data's."
    actions: int | None = None
    "How many actions there are; null takes the data's."

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"model.widths={self.widths} must be one width or more, from 1 on")
        for key in ("context", "patch", "depth", "condition", "steps", "outcome_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        for key in ("sigma_data", "sigma_spread", "sigma_min", "rho"):
            if getattr(self, key) <= 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be above 0")
        if self.attention and self.widths[-1] % HEAD:
            raise ValueError(
                f"model.widths={self.widths}: with model.attention the last must be a multiple of "
                f"{HEAD}"
            )
        if self.sigma_offset < 0:
            raise ValueError(f"model.sigma_offset={self.sigma_offset} must be 0 or more")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                f"model.sigma_max={self.sigma_max} must be above model.sigma_min={self.sigma_min}"
            )
        if self.condition % (2 * self.context):
            raise ValueError(
                f"model.condition={self.condition} must be a multiple of "
                f"2 model.context={2 * self.context}"
            )
