"""Configuration of joint-embedding predictive architectures. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from models.config import ModelConfig


class EncoderKind(StrEnum):
    """What turns an image into a latent."""

    conv = "conv"  # convolutions of stride 2, then an MLP
    impala = "impala"  # IMPALA's residual stages, then a matrix
    resnet18 = "resnet18"  # with the stem for small images; `dim` is 512 without a matrix after it
    vit = "vit"  # a vision transformer, its class token the latent


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
    "conv, impala, resnet18 or vit."
    channels: list[int] = field(default_factory=lambda: [16, 32, 32])
    "Channels after each stage, every one of which halves the image (conv, impala)."
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    "Widths of the MLP between the last stage and the latent; [] is one matrix (conv, impala)."
    dim: int = 64
    "Width D of a latent."
    patch: int = 4
    "Height and width of a patch (vit)."
    depth: int = 6
    "Blocks (vit)."
    heads: int = 3
    "Heads of attention; they divide dim (vit)."
    norm: Norm = Norm.none
    "none, or layer: LayerNorm, which the predictor then shares."

    def __post_init__(self) -> None:
        if not self.channels or min([*self.channels, *self.hidden, self.dim]) < 1:
            raise ValueError(
                f"model.encoder.channels={self.channels} must not be empty, and channels, "
                f"model.encoder.hidden={self.hidden} and model.encoder.dim={self.dim} at least 1"
            )
        at_least("model.encoder", self, "patch", "depth", "heads")
        if self.kind == EncoderKind.vit and self.dim % self.heads:
            raise ValueError(
                f"model.encoder.heads={self.heads} must divide model.encoder.dim={self.dim}"
            )
        if self.kind == EncoderKind.resnet18 and self.dim != 512:
            raise ValueError(
                f"model.encoder.dim={self.dim} must be 512, the width of kind=resnet18"
            )


def at_least(group: str, config: object, *keys: str) -> None:
    """Raise ValueError unless these fields are 1 or more."""
    for key in keys:
        if getattr(config, key) < 1:
            raise ValueError(f"{group}.{key}={getattr(config, key)} must be at least 1")


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


@dataclass
class LeJEPAConfig(ModelConfig):
    """An encoder of images, and a projector into the space of the loss."""

    name: str = "lejepa"
    "Which model: the stem of its file."
    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(channels=[32, 64, 128, 128], hidden=[], dim=128)
    )
    "From an image to a latent."
    projector: list[int] = field(default_factory=lambda: [512, 512, 128])
    "Widths of the MLP between latent and loss, with BatchNorm before each ReLU; [] for none."
    predictor: list[int] = field(default_factory=lambda: [512])
    "Widths of the MLP that foretells the average's projection (recipe.target=ema)."
    channels: int | None = None
    "Channels of an image; null takes the data's."
    image_size: int | None = None
    "Height and width of an image; null takes the data's."

    def __post_init__(self) -> None:
        for key in ("projector", "predictor"):
            if any(width < 1 for width in getattr(self, key)):
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")


@dataclass
class IJEPAConfig(ModelConfig):
    """A vision transformer, and a narrow one that tells masked latents."""

    name: str = "ijepa"
    "Which model: the stem of its file."
    patch: list[int] = field(default_factory=lambda: [4, 4])
    "Extent of a patch along each axis: [height, width], of clips [frames, height, width]."
    dim: int = 96
    "Width of the encoder."
    depth: int = 4
    "Blocks of the encoder."
    heads: int = 3
    "Heads of the encoder; they divide dim."
    predictor_dim: int = 48
    "Width of the predictor."
    predictor_depth: int = 2
    "Blocks of the predictor."
    predictor_heads: int = 3
    "Heads of the predictor; they divide predictor_dim."
    channels: int | None = None
    "Channels of an image; null takes the data's."
    size: list[int] | None = None
    "Extent of an image or clip along each axis of `patch`; null takes the data's."

    def __post_init__(self) -> None:
        at_least("model", self, "dim", "depth", "heads")
        at_least("model", self, "predictor_dim", "predictor_depth", "predictor_heads")
        if len(self.patch) not in (2, 3) or min(self.patch) < 1:
            raise ValueError(f"model.patch={self.patch} must be two or three numbers from 1 on")
        for prefix in ("", "predictor_"):
            dim, heads = getattr(self, f"{prefix}dim"), getattr(self, f"{prefix}heads")
            if dim % heads:
                raise ValueError(f"model.{prefix}heads={heads} must divide model.{prefix}dim={dim}")


@dataclass
class JEPAVideoConfig(ModelConfig):
    """An encoder that keeps the map, and a predictor of the next map from two."""

    name: str = "jepa_video"
    "Which model: the stem of its file."
    encoder_width: int = 32
    "Channels of the encoder."
    dim: int = 16
    "Channels of a latent map."
    stride: int = 1
    "Of the encoder's first convolution."
    predictor_width: int = 32
    "Channels of the U-Net at full resolution; twice that below."
    projector: list[int] = field(default_factory=lambda: [64, 64])
    "Widths of the MLP between a place of the map and the loss."
    passes: int = 4
    "Frames that are told from what was told before, in training."
    channels: int | None = None
    "Channels of a frame; null takes the data's."

    def __post_init__(self) -> None:
        at_least("model", self, "encoder_width", "dim", "stride", "predictor_width", "passes")
        if any(width < 1 for width in self.projector):
            raise ValueError(f"model.projector={self.projector} must be at least 1")


@dataclass
class LeWMConfig(ModelConfig):
    """A vision transformer, and a causal one that is conditioned on actions."""

    name: str = "lewm"
    "Which model: the stem of its file."
    patch: int = 14
    "Height and width of a patch."
    width: int = 192
    "Width of the encoder."
    depth: int = 12
    "Blocks of the encoder."
    heads: int = 3
    "Heads of the encoder; they divide width."
    dim: int = 192
    "Width D of a latent."
    projector: int = 2048
    "Width of the layer, with BatchNorm, before a latent, and before a predicted one."
    predictor_dim: int = 192
    "Width of the predictor."
    predictor_depth: int = 6
    "Blocks of the predictor."
    predictor_heads: int = 16
    "Heads of the predictor."
    predictor_head_dim: int = 64
    "Width of one of them."
    predictor_mlp: int = 2048
    "Width of the predictor's MLP."
    dropout: float = 0.1
    "Of the predictor."
    history: int = 3
    "States that it looks back at."
    channels: int | None = None
    "Channels of a frame; null takes the data's."
    image_size: int | None = None
    "Height and width of a frame; null takes the data's."
    action_dim: int | None = None
    "Components of a block of actions; null takes the data's."

    def __post_init__(self) -> None:
        at_least("model", self, "patch", "width", "depth", "heads", "dim", "projector", "history")
        at_least("model", self, "predictor_dim", "predictor_depth", "predictor_heads")
        at_least("model", self, "predictor_head_dim", "predictor_mlp")
        if self.width % self.heads:
            raise ValueError(f"model.heads={self.heads} must divide model.width={self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")


@dataclass
class VJEPA2ACConfig(ModelConfig):
    """A predictor, causal by frames, on an encoder that comes with its own configuration."""

    name: str = "vjepa2_ac"
    "Which model: the stem of its file."
    predictor_dim: int = 1024
    "Width of the predictor."
    predictor_depth: int = 24
    "Blocks of the predictor."
    predictor_heads: int = 16
    "Heads of the predictor; they divide predictor_dim."
    standardise: bool = False
    "Latents of a patch have mean 0 and standard deviation 1 over frames; not in the paper."

    def __post_init__(self) -> None:
        at_least("model", self, "predictor_dim", "predictor_depth", "predictor_heads")
        if self.predictor_dim % self.predictor_heads:
            raise ValueError(
                f"model.predictor_heads={self.predictor_heads} must divide "
                f"model.predictor_dim={self.predictor_dim}"
            )
