"""Configuration of every recipe. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass

from training.fields import at_least, free


@dataclass
class RecipeConfig:
    """Base of every recipe's configuration: the objective and how it is evaluated."""

    name: str = "???"
    "Which recipe: the stem of its file in training/recipes/."


@dataclass
class LanguageModelConfig(RecipeConfig):
    """Next-token prediction; the torch recipe and its jax twin share this configuration."""

    name: str = "language_model"
    "Which recipe: language_model (torch) or language_model_jax."
    eval_batch_size: int = 16
    "Windows per evaluation batch."
    eval_batches: int | None = 16
    "Batches per evaluation during training; the last one always covers all held-out text."
    floors: bool = False
    "Evaluate n-gram and compression floors on the same held-out bytes at the end (byte corpora)."
    sample_tokens: int = free(0)
    "Tokens of the sample that the end of the run generates; 0 for none."
    sample_prompt: str = free("def ")
    "What the sample continues."
    activation_checkpointing: bool = False
    "Recompute each block in the backward pass instead of keeping its activations."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 1, "eval_batch_size", "eval_batches")
        at_least(self, "recipe", 0, "sample_tokens")
