"""Configuration of every recipe. Pure Python: importing it loads no framework."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Any, TypeVar

from models.config import ModelConfig
from models.language.config import InnerOrder
from models.worlds.jepa.config import EncoderConfig, EncoderKind
from training.errors import UserError
from training.fields import at_least, checkpoint, free, within

Model = TypeVar("Model", bound=ModelConfig)


def check_parts(config: Any, models: tuple[str, ...], data: tuple[type, ...], use: str) -> None:
    """Raise UserError unless a run's recipe, model and data belong together.

    Args:
        config: a TrainConfig.
        models: names of the models it trains.
        data: configuration classes of the data it takes; `use` names them.
    """
    name = config.recipe.name
    if config.model.name not in models:
        raise UserError(
            f"recipe={name} trains model={' or '.join(models)}, not model={config.model.name}"
        )
    if not isinstance(config.data, data):
        raise UserError(f"recipe={name} takes data={use}, not data={config.data.name}")


def with_decided(model: Model, **decided: Any) -> Model:
    """A model's configuration with what the data decides of it.

    Raises:
        UserError: something else was set.
    """
    own = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(model)
    }
    for key, value in decided.items():
        given = getattr(model, key)
        if given not in (own[key], value):
            raise UserError(f"model.{key}={given}: the data decides it ({value}), leave it out")
    return replace(model, **decided)


def check_patch(encoder: EncoderConfig, what: str, size: int) -> None:
    """Raise UserError unless a transformer's patches cut images of `size`, which `what` decides."""
    if encoder.kind == EncoderKind.vit and size % encoder.patch:
        raise UserError(f"model.encoder.patch={encoder.patch} must divide {what} {size}")


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
    start_from: str | None = checkpoint()
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
    "Weight of the loss for naming earlier tokens from the outputs of early blocks; 0 for none."
    hint_block: int = 0
    "The block whose output names the two tokens before; the next one's names what was stated."
    eval_documents: int = 64
    "Held-out documents per number of statements at the end; a quarter of them during training."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "eval_documents")
        at_least(self, "recipe", 0, "hint_weight", "hint_block")


class Start(StrEnum):
    """What the rows of a cartridge are before they are trained."""

    first = "first"  # the document's first tokens
    chunks = "chunks"  # tokens sampled from all over the document
    unrelated = "unrelated"  # the first tokens of another document
    random = "random"  # normal vectors


class Objective(StrEnum):
    """What a cartridge is trained towards."""

    distill = "distill"  # the answers of a model that sees the document: their distribution
    labels = "labels"  # the answers' tokens
    next_token = "next_token"  # the document itself


class Adapter(StrEnum):
    """Where the document goes."""

    rows = "rows"  # rows of keys and values before the sequence: a cartridge
    lora = "lora"  # low-rank changes of the weights, of as many bytes


@dataclass
class CartridgesConfig(RecipeConfig):
    """Training of cartridges by self-study, each for a document of its own."""

    name: str = "cartridges"
    "Which recipe: the stem of its file."
    weights: str = checkpoint("experiments/cartridges/teacher")
    "The model they are trained in, which stays as it is: a directory, or a name on the hub."
    tokens: int = 64
    "Rows p of a cartridge: the memory of so many tokens. Of LoRA: the rank with as many bytes."
    page: int = 64
    "Rows of a page of the cache, of which a cartridge fills whole ones."
    start: Start = Start.first
    "first, chunks, unrelated or random."
    start_from: str | None = checkpoint()
    "Directory with cartridge_<i>.safetensors to go on from, as when a document has changed; null."
    frozen: int = 1
    "First rows that are not trained: the attention sink."
    adapter: Adapter = Adapter.rows
    "rows or lora."
    objective: Objective = Objective.distill
    "distill, labels or next_token."
    top_k: int = 20
    "Most likely tokens of the teacher that are distilled."
    jitter: int = 0
    "Conversations begin at a position up to this many after the cartridge, in training."
    distractors: int = 0
    "Other documents' cartridges that stand before a conversation in some of the steps."
    distracted: float = 0.25
    "Share of those steps (mixed visibility)."
    eval_offsets: list[int] = field(default_factory=list)
    "Positions after the cartridge at which the final exam is repeated."
    eval_composed: list[int] = field(default_factory=list)
    "Numbers of cartridges that stand together in further final exams."
    activation_checkpointing: bool = False
    "Recompute each block in the backward pass instead of keeping its activations."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 1, "tokens", "page", "top_k")
        at_least(self, "recipe", 0, "frozen", "jitter", "distractors")
        within(self, "recipe", 0.0, 1.0, "distracted")
        if self.frozen >= self.tokens:
            raise ValueError(
                f"recipe.frozen={self.frozen} must be below recipe.tokens={self.tokens}"
            )
        if self.tokens % self.page and self.adapter == Adapter.rows:
            raise ValueError(
                f"recipe.tokens={self.tokens} must be a multiple of recipe.page={self.page}: a "
                "cartridge fills whole pages of the cache, so that requests can share them"
            )
        standing = self.distractors or self.eval_composed or self.start_from
        if self.adapter == Adapter.lora and standing:
            raise ValueError(
                "recipe.adapter=lora has no rows that could stand together or be gone on from: set "
                "recipe.distractors=0, recipe.eval_composed=[] and recipe.start_from=null"
            )


PRESS_NAMES = (
    *("random", "random_per_head", "streaming_llm", "key_norm", "snapkv", "snapkv_adaptive"),
    *("tova", "h2o", "expected_attention", "keydiff", "kvzip", "kvzip_adaptive"),
)
"Presses that do not see the question."
CHOOSING = tuple(name for name in PRESS_NAMES if not name.startswith("random"))
"Those of them that look at what they keep."
MEMORIES = (
    *("full", "none", "window", "bm25", "embedding", "compaction"),
    *PRESS_NAMES,
    *("snapkv_aware", "int8", "int4", "int2", "cartridge", "lora"),
)
"Names of memories; fast weights come by the directory of their model."


@dataclass
class MemoryBudgetConfig(RecipeConfig):
    """Every memory of the same documents, at equal resident bytes."""

    name: str = "memory_budget"
    "Which recipe: the stem of its file."
    weights: str = checkpoint("experiments/cartridges/teacher")
    "The model that reads and answers: a directory, or a name on the hub."
    memories: list[str] = field(default_factory=lambda: list(MEMORIES))
    "Which ones."
    ratios: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    "Budgets: the bytes of the document's keys and values divided by each."
    fast_weights: list[str] = field(default_factory=list, metadata={"weights": True})
    "Directories of models with fast weights, each a memory of its name."
    study_steps: int = 200
    "Training steps of a cartridge and of LoRA."
    cartridge_lr: float = 0.1
    "Peak learning rate of a cartridge's rows."
    lora_lr: float = 0.01
    "Peak learning rate of LoRA's factors."
    window: int = 16
    "Queries of SnapKV's window, at most half of the budget."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 1, "study_steps", "window")
        if unknown := [name for name in self.memories if name not in MEMORIES]:
            raise ValueError(f"recipe.memories={unknown} are unknown: use {', '.join(MEMORIES)}")
        names = [PurePath(where).name for where in self.fast_weights]
        if len({*names, *MEMORIES}) != len(names) + len(MEMORIES):
            raise ValueError(
                f"recipe.fast_weights={self.fast_weights} must be directories of different names, "
                "none of them a memory's"
            )
        if any(ratio < 2 for ratio in self.ratios) or len(set(self.ratios)) != len(self.ratios):
            raise ValueError(f"recipe.ratios={self.ratios} must be different numbers from 2 on")
        if not (self.cartridge_lr > 0 and self.lora_lr > 0):
            raise ValueError("recipe.cartridge_lr and recipe.lora_lr must be > 0")
