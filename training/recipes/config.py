"""Configuration of every recipe. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.language.config import InnerOrder
from training.errors import UserError
from training.fields import at_least, free, within


def check_parts(
    config: Any, recipe: type, models: tuple[str, ...], data: tuple[type, ...], use: str
) -> None:
    """Raise UserError unless a run's recipe, model and data belong together.

    Args:
        config: a TrainConfig.
        recipe: the recipe's own configuration class.
        models: names of the models it trains.
        data: configuration classes of the data it takes; `use` names them.
    """
    name = config.recipe.name
    if not isinstance(config.recipe, recipe):
        raise UserError(f"recipe.name={name} is no name to be set: choose recipe={name}")
    if config.model.name not in models:
        raise UserError(
            f"recipe={name} trains model={' or '.join(models)}, not model={config.model.name}"
        )
    if not isinstance(config.data, data):
        raise UserError(f"recipe={name} takes data={use}, not data={config.data.name}")


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


@dataclass
class FastWeightsConfig(LanguageModelConfig):
    """Next-token prediction on documents, judged by the loss along them."""

    name: str = "fast_weights"
    "Which recipe: the stem of its file."
    eval_documents: int = 64
    "Held-out documents per length at the end; a quarter of them during training."
    eval_lengths: list[int] = field(default_factory=list)
    "Lengths of held-out documents in tokens; [] takes data.seq_len."
    cost_lengths: list[int] = field(default_factory=list)
    "Context lengths to time reading at, after the training; [] for none."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "eval_documents")
        check_reading(self.eval_lengths, self.cost_lengths)


def check_reading(eval_lengths: list[int], cost_lengths: list[int]) -> None:
    """Refuse lengths that cannot be cut into eighths or compared."""
    if any(length < 8 for length in eval_lengths):
        raise ValueError(f"recipe.eval_lengths={eval_lengths}: each must be at least 8")
    if len(cost_lengths) == 1 or sorted(set(cost_lengths)) != cost_lengths:
        raise ValueError(f"recipe.cost_lengths={cost_lengths} must be two or more, in rising order")


@dataclass
class TTTE2ERecipeConfig(RecipeConfig):
    """Meta-learning of a decoder that trains its fast weights on what it reads."""

    name: str = "ttt_e2e"
    "Which recipe: the stem of its file."
    order: InnerOrder = InnerOrder.second
    "second differentiates through the inner steps, first takes them as constants, none takes none."
    start_from: str | None = None
    "A model.safetensors to begin with, of a run with the same model; null draws the weights."
    inner_warmup_steps: int = 0
    "Steps over which the inner learning rate grows to model.inner_lr."
    inner_warmup_from: float = 0.1
    "Where it starts, relative to model.inner_lr."
    remat_group: int | None = None
    "Chunks per group of rematerialisation, best near their square root; null keeps everything."
    eval_documents: int = 64
    "Held-out documents per length at the end; a quarter of them during training."
    eval_batch_size: int = 16
    "Documents that are scored together."
    eval_lengths: list[int] = field(default_factory=list)
    "Lengths of held-out documents in tokens; [] takes data.seq_len."
    eval_inner_lrs: list[float] = field(default_factory=list)
    "Further inner learning rates that the final evaluation reads with; the best is `naive`."
    eval_reread: bool = False
    "Also score a second reading of the same documents: a leak by construction, below any floor."
    cost_lengths: list[int] = field(default_factory=list)
    "Context lengths to time reading at, after the training; [] for none."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 1, "remat_group", "eval_documents", "eval_batch_size")
        at_least(self, "recipe", 0, "inner_warmup_steps")
        within(self, "recipe", 0.0, 1.0, "inner_warmup_from")
        check_reading(self.eval_lengths, self.cost_lengths)
        if any(not rate > 0 for rate in self.eval_inner_lrs):
            raise ValueError(f"recipe.eval_inner_lrs={self.eval_inner_lrs}: each must be above 0")


@dataclass
class CartridgesTeacherConfig(LanguageModelConfig):
    """Training of a small decoder that answers from statements in its context."""

    name: str = "cartridges_teacher"
    "Which recipe: the stem of its file."
    hint_weight: float = 1.0
    "Weight of the loss for naming the two tokens before from an early block; 0 for none."
    hint_block: int = 0
    "The block whose output names them."
    eval_documents: int = 64
    "Held-out documents per number of statements at the end; a quarter of them during training."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "eval_documents")
        at_least(self, "recipe", 0, "hint_weight", "hint_block")
