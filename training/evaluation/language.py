"""Held-out evaluation of language models: every real token scored once, in bits per byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from models.language.config import TransformerConfig
from training.data.config import CorpusConfig, FactsConfig, MarkovConfig, StatementsConfig
from training.distributed import Processes
from training.errors import UserError
from training.evaluation.floors import language_floors
from training.schema import TrainConfig

if TYPE_CHECKING:
    from training.data.language import LanguageData


ModelT = TypeVar("ModelT", bound=TransformerConfig)


def fill_vocabulary(model: ModelT, data: Any) -> ModelT:
    """The model's configuration, with the data's vocabulary where it names none."""
    if model.vocab_size is not None and model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the data's {data.vocab_size}: "
            "set model.vocab_size=null"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or data.vocab_size)


def config_without_data(config: TrainConfig) -> TransformerConfig:
    """The model's configuration, its vocabulary taken from the tokenizer where it names none."""
    from training.data.tokenizer import build_tokenizer

    assert isinstance(config.model, TransformerConfig)
    if config.model.vocab_size is not None:
        return config.model
    if isinstance(config.data, MarkovConfig | FactsConfig | StatementsConfig):
        return dataclasses.replace(config.model, vocab_size=config.data.vocab_size)
    assert isinstance(config.data, CorpusConfig)
    vocab_size = build_tokenizer(config.data.tokenizer).vocab_size
    return dataclasses.replace(config.model, vocab_size=vocab_size)


def heldout_batches(
    data: LanguageData, rows: int, limit: int | None, processes: Processes
) -> Iterator[dict[str, np.ndarray]]:
    """This process's `rows` windows of each held-out batch: {"tokens": [b, t+1], "weight": [b, t]}.

    The last batch is padded with windows of zero weight, so every process gets as many batches.
    A `limit` takes about that many of them, evenly spaced over the held-out text.
    """
    mine = slice(processes.rank * rows, (processes.rank + 1) * rows)
    together = rows * processes.world
    count = -(-data.num_heldout_windows // together)
    every = 1 if limit is None else -(-count // limit)
    for batch in islice(data.heldout_batches(together), 0, None, every):
        yield {key: value[mine] for key, value in batch.items()}


def language_summary(
    data: LanguageData, parameters: int, steps: int, floors: bool
) -> dict[str, Any]:
    """Sizes, facts about the data and, if asked for, its floors after `steps` steps."""
    found: dict[str, Any] = {
        "parameters": parameters,
        "uniform_bpb": math.log2(data.vocab_size),
        "data": data.describe(),
    }
    if floors:
        found["floors"] = language_floors(data, steps)
    return found


def bits_per_byte(
    nats: float, tokens: float, data: LanguageData, processes: Processes
) -> dict[str, float]:
    """Totals of this process -> eval/loss (nats per token) and eval/bpb, over all processes.

    A token of a byte corpus is a byte; otherwise the held-out corpus's bytes per token convert.
    """
    nats, tokens = processes.sum([nats, tokens])
    heldout_tokens = len(data.heldout.tokens) - len(data.heldout.names)
    loss = nats / max(tokens, 1.0)
    return {
        "eval/loss": loss,
        "eval/bpb": loss / math.log(2) * heldout_tokens / data.heldout_bytes,
    }
