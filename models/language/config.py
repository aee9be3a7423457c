"""Configuration of the decoder transformer, shared by the torch model and its jax twin.

Pure Python: importing it loads no framework.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from models.config import ModelConfig


@dataclass
class RopeScaling:
    """Llama-3.1 frequency scaling: stretches low rotary frequencies beyond the trained context."""

    factor: float = 8.0
    "By how much the longest wavelengths are stretched."
    low_freq_factor: float = 1.0
    "Wavelengths above original_context / this are stretched fully."
    high_freq_factor: float = 4.0
    "Wavelengths below original_context / this are left alone."
    original_context: int = 8192
    "Context the unscaled model was trained on, in tokens."


class Mixer(StrEnum):
    """What carries information between the tokens of a block."""

    full = "full"  # attention over all earlier tokens
    sliding = "sliding"  # attention over model.window tokens
    ttt_linear = "ttt_linear"
    ttt_mlp = "ttt_mlp"
    lact = "lact"  # large chunks, beside sliding attention in the same layer
    delta = "delta"
    gated_delta = "gated_delta"
    titans = "titans"


@dataclass
class MixingConfig:
    """Which mixer each block has, and what the ones with fast weights are like."""

    pattern: list[Mixer] = field(default_factory=list)
    "Mixers of the blocks, repeated to their number; [] is attention, sliding if there is a window."
    num_heads: int | None = None
    "Heads of fast weights, each with a state of its own; null means model.num_heads."
    conv: int = 4
    "Width of the causal convolution on queries, keys and values; 0 for none."
    chunk: int = 16
    "Tokens per inner step: the mini-batch of TTT, the chunk of LaCT and Titans."
    base_lr: float = 1.0
    "TTT: largest learning rate of a token, times the width of a head (papers: Linear 1, MLP 0.1)."
    expansion: float = 2.0
    "Hidden width of a fast MLP (TTT-MLP, LaCT, Titans) relative to the width of a head."
    muon: bool = True
    "LaCT: orthogonalise the update."
    momentum: bool = True
    "LaCT: keep a momentum of the gradients."
    max_lr: float = 0.1
    "Titans: largest step size of a token."
    fade_rate: float = 16.0
    "Gated delta: upper end of the initial rates of fading, uniform from 1/16 of it (Mamba-2)."

    def __post_init__(self) -> None:
        if self.conv < 0 or self.chunk < 1 or (self.num_heads is not None and self.num_heads < 1):
            raise ValueError(
                f"model.mixing.conv={self.conv} must be at least 0, model.mixing.chunk="
                f"{self.chunk} and model.mixing.num_heads={self.num_heads} at least 1"
            )
        for key in ("base_lr", "expansion", "max_lr", "fade_rate"):
            if not getattr(self, key) > 0:
                raise ValueError(f"model.mixing.{key}={getattr(self, key)} must be > 0")


@dataclass
class TransformerConfig(ModelConfig):
    """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU (Llama, Qwen3)."""

    name: str = "transformer"
    "Which model: the stem of its file."
    vocab_size: int | None = None
    "Number of token ids V; null takes the data's."
    d_model: int = 128
    "Width D of the residual stream."
    num_layers: int = 4
    "Number of blocks L."
    num_heads: int = 4
    "Query heads H."
    num_kv_heads: int | None = None
    "Key/value heads (grouped-query attention); divides num_heads; null means num_heads."
    head_dim: int | None = None
    "Width of one head, even; null means d_model / num_heads."
    d_ff: int | None = None
    "Hidden width of the SwiGLU; null means 8/3 d_model rounded to a multiple of 16."
    rope_theta: float = 10000.0
    "Base of the rotary wavelengths."
    rope_scaling: RopeScaling | None = None
    "Llama-3.1 stretching of the rotary wavelengths; null for none."
    qk_norm: bool = False
    "RMS-normalise each query and key head before the rotation (Qwen3)."
    window: int | None = None
    "Sliding window in tokens: a query sees itself and the window - 1 before it; null sees all."
    tie_embeddings: bool = True
    "Use the input embedding as the output head."
    norm_eps: float = 1e-6
    "Added to the mean square inside RMSNorm."
    ngram_orders: list[int] = field(default_factory=list)
    "Orders n >= 2 of the hashed n-gram input tables; [] for none."
    ngram_buckets: int = 16384
    "Rows of each hashed n-gram table."
    mixing: MixingConfig = field(default_factory=MixingConfig)
    "The mixers of the blocks, if they are not all attention."

    def __post_init__(self) -> None:
        for key in ("d_model", "num_layers", "num_heads", "ngram_buckets"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        for key in ("vocab_size", "num_kv_heads", "head_dim", "d_ff", "window"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value} must be at least 1, or null")
        if self.head_dim is None and self.d_model % self.num_heads:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = sorted(sorted(fits, key=lambda h: abs(h - self.num_heads))[:3])
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}: "
                f"set model.num_heads to {', '.join(map(str, near))}, or give model.head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(
                f"the head width is {self.resolved_head_dim}, rotary embeddings need an even one: "
                "change model.head_dim, or model.d_model / model.num_heads"
            )
        if self.num_heads % self.resolved_kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}"
            )
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError("model.rope_theta and model.norm_eps must be > 0")
        if any(order < 2 for order in self.ngram_orders):
            raise ValueError(
                f"model.ngram_orders={list(self.ngram_orders)}: each must be at least 2"
            )
        self.check_mixing()

    def check_mixing(self) -> None:
        """Refuse a pattern that the blocks or the window do not fit."""
        pattern, mixing = self.mixing.pattern, self.mixing
        names = [str(mixer) for mixer in pattern]
        if pattern and self.num_layers % len(pattern):
            raise ValueError(
                f"model.mixing.pattern={names} has {len(pattern)} mixers, which do not divide "
                f"model.num_layers={self.num_layers}"
            )
        if {Mixer.sliding, Mixer.lact} & set(pattern) and self.window is None:
            raise ValueError(f"model.mixing.pattern={names} needs a window: set model.window")
        if Mixer.lact in pattern and self.window is not None and self.window < mixing.chunk:
            raise ValueError(
                f"model.window={self.window} is smaller than model.mixing.chunk={mixing.chunk}: "
                "within a chunk of LaCT only attention carries what was read"
            )
        if set(pattern) - {Mixer.full, Mixer.sliding}:
            if self.d_model % self.resolved_mixing_heads:
                raise ValueError(
                    f"model.mixing.num_heads={self.resolved_mixing_heads} does not divide "
                    f"model.d_model={self.d_model}"
                )
            if self.d_model // self.resolved_mixing_heads % 2:
                raise ValueError(
                    "the heads of fast weights have an odd width, rotary embeddings need an even "
                    "one: change model.mixing.num_heads"
                )

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each block."""
        if not self.mixing.pattern:
            return [Mixer.full if self.window is None else Mixer.sliding] * self.num_layers
        return list(self.mixing.pattern) * (self.num_layers // len(self.mixing.pattern))

    @property
    def resolved_mixing_heads(self) -> int:
        return self.num_heads if self.mixing.num_heads is None else self.mixing.num_heads

    @property
    def resolved_kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_d_ff(self) -> int:
        return max(16, round(8 * self.d_model / 3 / 16) * 16) if self.d_ff is None else self.d_ff

    @property
    def resolved_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is null: set it, or build the model for some data")
        return self.vocab_size


def matmul_parameters(config: TransformerConfig) -> int:
    """Weights that multiply activations, head included (also when tied), lookups and norms not."""
    d, hd = config.d_model, config.resolved_head_dim
    attention = 2 * d * hd * (config.num_heads + config.resolved_kv_heads)  # q, o and k, v
    block = attention + 3 * d * config.resolved_d_ff
    return config.num_layers * block + config.resolved_vocab_size * d


def flops_per_token(config: TransformerConfig, seq_len: int) -> int:
    """Forward and backward floating-point operations per token of a sequence of `seq_len` tokens.

        6 N + 12 H hd sum over blocks of min(window, seq_len), or of seq_len for full attention

    N is `matmul_parameters`: 2 N forward, 4 N backward. The second term is q k^T and the weighted
    sum of values; it counts every position of the window as seen, although causality hides half of
    them. That is the convention of PaLM (arXiv:2204.02311, appendix B) and nanoGPT, so that
    utilisations compare. A layer of fast weights is counted as the attention it stands for.
    """
    sliding = seq_len if config.window is None else min(config.window, seq_len)
    spans = sum(seq_len if mixer == Mixer.full else sliding for mixer in config.mixers)
    width = config.num_heads * config.resolved_head_dim
    return 6 * matmul_parameters(config) + 12 * width * spans


class InnerOrder(StrEnum):
    """How the outer gradient treats the inner steps of a model that learns while it reads."""

    second = "second"  # differentiates through them
    first = "first"  # takes inner gradients as constants
    none = "none"  # there are no inner steps


@dataclass
class TTTE2EConfig(TransformerConfig):
    """The decoder of TTT-E2E: sliding-window attention, fast prime MLPs in the last blocks."""

    name: str = "ttt_e2e"
    "Which model: the stem of its file."
    qk_norm: bool = True
    "RMS-normalise each query and key head before the rotation."
    window: int | None = 16
    "Sliding window in tokens; null is full attention, which can only be trained without learning."
    prime_layers: int = 1
    "Blocks, counted from the last, that carry a prime MLP (the paper: a quarter of them)."
    prime_d_ff: int | None = None
    "Hidden width of the prime MLP; null means that of the normal one."
    chunk: int = 16
    "Tokens per inner step, b; at most the window."
    inner_lr: float = 1.0
    "Step size of the inner SGD, eta."
    inner_clip: float | None = 1.0
    "Largest global norm of an inner gradient, over all fast weights together; null for none."
    fast: str = "blocks.*.prime.*.weight"
    "Glob over dotted parameter names: the weights that the inner steps change."
    fast_attention: bool = False
    "Allow `fast` to match attention weights, whose keys in memory then stem from older weights."
    init_std: float = 0.02
    "Standard deviation of every initial matrix."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ngram_orders or self.rope_scaling is not None or self.mixing.pattern:
            raise ValueError(
                "model=ttt_e2e has no n-gram tables, no stretched rotary positions and no "
                "model.mixing.pattern"
            )
        if not 1 <= self.prime_layers <= self.num_layers:
            raise ValueError(
                f"model.prime_layers={self.prime_layers} must be between 1 and "
                f"model.num_layers={self.num_layers}"
            )
        if self.chunk < 1 or (self.window is not None and self.window < self.chunk):
            raise ValueError(
                f"model.chunk={self.chunk} must be at least 1 and at most "
                f"model.window={self.window}: within a chunk only attention carries what was read"
            )
        if not self.inner_lr >= 0 or (self.inner_clip is not None and not self.inner_clip > 0):
            raise ValueError(
                f"model.inner_lr={self.inner_lr} must be at least 0 and "
                f"model.inner_clip={self.inner_clip} above 0, or null"
            )
        if not self.init_std > 0:
            raise ValueError(f"model.init_std={self.init_std} must be > 0")

    @property
    def resolved_prime_d_ff(self) -> int:
        return self.resolved_d_ff if self.prime_d_ff is None else self.prime_d_ff


def ttt_e2e_flops_per_token(config: TTTE2EConfig, seq_len: int, order: InnerOrder) -> int:
    """Training FLOPs per token: every backward pass is counted as twice what it differentiates.

    The blocks before the prime ones cost forward and backward, 3 F of a forward pass F. The rest
    cost that without inner steps; with them F and 2 F for the inner gradient, whose own backward
    pass doubles once more: 3 (F + 2 F) = 9 F to second order, F + 2 F + 2 F = 5 F to first.
    """
    span = seq_len if config.window is None else min(config.window, seq_len)
    d, width = config.d_model, config.num_heads * config.resolved_head_dim
    attention = 2 * d * config.resolved_head_dim * (config.num_heads + config.resolved_kv_heads)
    block = 2 * (attention + 3 * d * config.resolved_d_ff) + 4 * width * span  # forward
    prime = config.prime_layers * (block + 6 * d * config.resolved_prime_d_ff)
    suffix = prime + 2 * config.resolved_vocab_size * d
    times = {InnerOrder.none: 3, InnerOrder.first: 5, InnerOrder.second: 9}[order]
    return 3 * (config.num_layers - config.prime_layers) * block + times * suffix
