"""Configuration of joint-embedding predictive architectures. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from models.config import ModelConfig


class EncoderKind(StrEnum):
    """What turns an image into a latent."""

    conv = "conv"  # convolutions of stride 2, then an MLP
    impala = "impala"  # IMPALA's residual stages, then a matrix


class PredictorKind(StrEnum):
    """What turns a latent and an action into the next latent."""

    mlp = "mlp"  # z + MLP(z, a)
    gru = "gru"  # one GRU cell, its hidden state the latent


class Norm(StrEnum):
    """What the last layer of an encoder does to a latent."""

    none = "none"
    layer = "layer"


@dataclass
class EncoderConfig:
    """From an image to a latent."""

    kind: EncoderKind = EncoderKind.conv
    "conv or impala."
    channels: list[int] = field(default_factory=lambda: [16, 32, 32])
    "Channels after each stage, every one of which halves the image."
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    "Widths of the MLP between the last stage and the latent; [] is one matrix."
    dim: int = 64
    "Width D of a latent."
    norm: Norm = Norm.none
    "none, or layer: LayerNorm, which the predictor then shares."

    def __post_init__(self) -> None:
        if not self.channels or min([*self.channels, *self.hidden, self.dim]) < 1:
            raise ValueError(
                f"model.encoder.channels={self.channels} must not be empty, and channels, "
                f"model.encoder.hidden={self.hidden} and model.encoder.dim={self.dim} at least 1"
            )


@dataclass
class PredictorConfig:
    """From a latent and an action to the next latent."""

    kind: PredictorKind = PredictorKind.mlp
    "mlp or gru."
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    "Widths of the MLP."

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"model.predictor.hidden={self.hidden} must be at least 1")


@dataclass
class JEPAConfig(ModelConfig):
    """An encoder, and a predictor in the space of its latents."""

    name: str = "jepa"
    "Which model: the folder of its files."
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    "From an image to a latent."
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    "From a latent and an action to the next latent."
    inverse_hidden: list[int] = field(default_factory=lambda: [256])
    "Widths of the MLP that tells the action between two latents."
    channels: int | None = None
    "Channels of an image; null takes the data's."
    image_size: int | None = None
    "Height and width of an image; null takes the data's."
    action_dim: int | None = None
    "Components of an action; null takes the data's."
