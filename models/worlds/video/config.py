"""Configuration of video world models. Loads no framework."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from models.config import ModelConfig


class Schedule(StrEnum):
    """How the signal fades from noise level to noise level."""

    cosine = "cosine"
    sigmoid = "sigmoid"
    linear = "linear"


class Objective(StrEnum):
    """What a network tells of a noisy frame."""

    v = "v"
    x = "x"


HEAD = 8  # width of a head of attention
HEAD_OVER_TIME = 16  # and of one over the frames of a film, in a U-Net


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
    action_parts: list[int] = field(default_factory=list)
    "Of an action of several parts, how many values each has; the data decides."

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

    @property
    def multiple(self) -> int:
        """What the height and width of a frame must be a multiple of."""
        return self.patch * 2 ** (len(self.widths) - 1)


@dataclass
class FilmTransformerConfig:
    """A transformer over the tokens of films."""

    dim: int = 96
    "Width of a token."
    depth: int = 6
    "Blocks."
    heads: int = 3
    "Heads; they divide dim, into an even width."
    mlp_ratio: int = 4
    "Hidden width of an MLP over dim."
    time_every: int = 2
    "Every so manyth block is over time, the others over space."
    window: int = 16
    "Frames that one sees in time, itself included."
    sinks: int = 0
    "First frames of a film that are never forgotten."

    def __post_init__(self) -> None:
        for key in ("dim", "depth", "heads", "mlp_ratio", "time_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.transformer.{key}={getattr(self, key)} must be at least 1")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"model.transformer.heads={self.heads} must divide "
                f"model.transformer.dim={self.dim} into even parts"
            )
        if self.depth < self.time_every:
            raise ValueError(
                f"model.transformer.time_every={self.time_every}: of "
                f"model.transformer.depth={self.depth} blocks none would be over time"
            )
        if self.window < 2 or self.sinks < 0:
            raise ValueError(
                f"model.transformer.window={self.window} must be at least 2, and "
                f"model.transformer.sinks={self.sinks} at least 0"
            )


@dataclass
class FilmWorldConfig(ModelConfig):
    """What models over film transformers have in common."""

    transformer: FilmTransformerConfig = field(default_factory=FilmTransformerConfig)
    "Over patches of frames."
    patch: int = 4
    "Height and width of a patch, in pixels."
    margin: int = 0
    "Pixels around a patch that its token sees too: what moves is followed from one to the next."
    context: int = 4
    "Frames that a dream begins from, at least."
    steps: int = 4
    "Steps in which a frame is drawn."
    outcome_width: int = 16
    "Channels of the network that tells rewards and ends."
    channels: int | None = None
    "Channels of a frame; null takes the data's."
    image_size: int | None = None
    "Height and width of a frame; null takes the data's."
    actions: int | None = None
    "How many actions there are; null takes the data's."
    action_parts: list[int] = field(default_factory=list)
    "Of an action of several parts, how many values each has; the data decides."

    def __post_init__(self) -> None:
        for key in ("patch", "context", "steps", "outcome_width"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.margin < 0:
            raise ValueError(f"model.margin={self.margin} must be at least 0")
        if self.context > self.transformer.window + self.transformer.sinks:
            raise ValueError(
                f"model.context={self.context} must be at most the frames that are remembered, "
                f"model.transformer.window={self.transformer.window} + sinks"
            )

    @property
    def multiple(self) -> int:
        """What the height and width of a frame must be a multiple of."""
        return self.patch


@dataclass
class DiffusionForcingConfig(FilmWorldConfig):
    """A causal network that tells films whose frames are each as noisy as they like."""

    name: str = "diffusion_forcing"
    "Which model: the stem of its file."
    widths: list[int] = field(default_factory=list)
    """Channels of the levels of a U-Net (Diffusion Forcing), which takes window, sinks and dim (of
    its condition) from `transformer`; none: the transformer (Oasis)."""
    depth: int = 1
    "Residual blocks of a level of the U-Net, on the way down and on the way up."
    schedule: Schedule = Schedule.cosine
    "cosine, sigmoid or linear."
    objective: Objective = Objective.v
    "v, or the clean frame: v has all of the noise in it, which must fit through transformer.dim."
    stabilise: int = 15
    "Noise level, from 1 on, that frames of the past are told as; 0 tells them as clean."
    fade_context: bool = True
    "And their signal is as weak as it would be then (Diffusion Forcing; in Oasis it is not)."
    guidance: float = 1.0
    "History guidance: how far to go from what is told without a past to what is told with it."
    fresh: bool = False
    "Noise is drawn anew at every step, as students of few steps have learned (self_forcing)."

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < HEAD_OVER_TIME or width % HEAD_OVER_TIME for width in self.widths):
            raise ValueError(
                f"model.widths={self.widths} must be multiples of {HEAD_OVER_TIME}, or none at all"
            )
        if self.widths and self.margin:
            raise ValueError(
                f"model.margin={self.margin} is of the transformer's patches, and "
                f"model.widths={self.widths} are a U-Net's, which sees around them by itself"
            )
        if self.depth < 1:
            raise ValueError(f"model.depth={self.depth} must be at least 1")
        if not 0 <= self.stabilise <= 1000:
            raise ValueError(f"model.stabilise={self.stabilise} must be 0 to 1000")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"model.guidance={self.guidance} must be 0 or more, and finite")

    @property
    def multiple(self) -> int:
        return self.patch * 2 ** max(0, len(self.widths) - 1)


@dataclass
class MaskedTokenizerConfig:
    """A masked autoencoder of frames, through a few latent tokens."""

    latents: int = 0
    "Tokens that a frame is to the dynamics; 0: none, it sees patches of pixels."
    channels: int = 16
    "Numbers of each."
    dim: int = 128
    "Width of its own tokens."
    depth: int = 4
    "Blocks of the encoder, and of the decoder."
    heads: int = 4
    "Heads; they divide dim."
    masked: float = 0.9
    "Largest share of the patches of a frame that are masked in training; the least is none."

    def __post_init__(self) -> None:
        for key, least in (
            ("latents", 0),
            *((k, 1) for k in ("channels", "dim", "depth", "heads")),
        ):
            if getattr(self, key) < least:
                given = getattr(self, key)
                raise ValueError(f"model.tokenizer.{key}={given} must be at least {least}")
        if self.dim % self.heads:
            raise ValueError(
                f"model.tokenizer.heads={self.heads} must divide model.tokenizer.dim={self.dim}"
            )
        if not 0 <= self.masked < 1:
            raise ValueError(f"model.tokenizer.masked={self.masked} must be from 0 to below 1")


@dataclass
class Dreamer4Config(FilmWorldConfig):
    """A causal transformer that tells clean frames, in steps of any size."""

    name: str = "dreamer4"
    "Which model: the stem of its file."
    tokenizer: MaskedTokenizerConfig = field(default_factory=MaskedTokenizerConfig)
    "What makes latents of frames, if it has any."
    most: int = 8
    "Smallest steps from noise to a frame, a power of two; k_max of the paper."
    registers: int = 1
    "Tokens of a frame for the model's own use."
    objective: Objective = Objective.x
    "What the network tells, and its loss is of: the clean frame, or v, the way to it from noise."
    context_noise: float = 0.1
    "Share of noise that frames of the past are shown with, and told by."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 1 or self.most & (self.most - 1):
            raise ValueError(f"model.most={self.most} must be a power of two")
        if self.most % self.steps:
            raise ValueError(f"model.steps={self.steps} must divide model.most={self.most}")
        if self.registers < 0:
            raise ValueError(f"model.registers={self.registers} must be 0 or more")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"model.context_noise={self.context_noise} must be from 0 to below 1")
        if self.margin and self.tokenizer.latents:
            raise ValueError(
                f"model.margin={self.margin} is of patches of pixels: give 0 with "
                f"model.tokenizer.latents={self.tokenizer.latents}"
            )


@dataclass
class GenieConfig(FilmWorldConfig):
    """Tokens of frames, drawn many at a time, beside actions that nobody labelled."""

    name: str = "genie"
    "Which model: the stem of its file."
    steps: int = 8
    "Steps in which the tokens of a frame are drawn (published: 25)."
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    "Levels of the numbers of a token's code: their product is how many codes there are."
    tokenizer_depth: int = 2
    "Blocks of the tokenizer's encoder, and of its decoder."
    local: bool = False
    "Codes are told from a patch and its margin, latent actions from two frames: not from films."
    latent_levels: list[int] = field(default_factory=lambda: [2, 2, 2])
    "Levels of a latent action's numbers; []: the dynamics is told the actions of the data."
    latent_depth: int = 2
    "Blocks of what tells latent actions from frames, and of what tells frames from them."
    temperature: float = 1.0
    "Of drawing tokens; 0 takes the likeliest."
    choice: float = 2.0
    "How much chance there is in which tokens are kept first."

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tokenizer_depth", "latent_depth"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        for key, least in (("levels", 1), ("latent_levels", 0)):
            levels = getattr(self, key)
            if len(levels) < least or any(level < 2 for level in levels):
                raise ValueError(f"model.{key}={levels} must be numbers of 2 or more")
        if self.latent_levels and self.latent_depth < self.transformer.time_every:
            raise ValueError(
                f"model.latent_depth={self.latent_depth} must be at least "
                f"model.transformer.time_every={self.transformer.time_every}, or none of its "
                "blocks is over time"
            )
        for key in ("temperature", "choice"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 0 or more")
