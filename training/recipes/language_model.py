"""Next-token prediction with a torch decoder: the recipe behind `recipe=language_model`.

    loss = mean over the window of -log p(token_{t+1} | token_1..t)

Evaluation scores every held-out token once and reports nats per token and bits per byte, the unit
in which models with different vocabularies, n-grams and compressors can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import TransformerConfig, flops_per_token
from models.language.inference.generation import generate
from models.language.transformer import Transformer, num_parameters
from training.data.config import CorpusConfig, FactsConfig, MarkovConfig, StatementsConfig
from training.data.facts import FactsData
from training.data.language import LanguageData, for_run
from training.data.markov import MarkovData
from training.data.statements import StatementsData
from training.distributed import Processes
from training.estimate import Estimate, state_memory, torch_activations
from training.evaluation.floors import require_bytes
from training.evaluation.language import (
    bits_per_byte,
    config_without_data,
    fill_vocabulary,
    heldout_batches,
    language_summary,
)
from training.exchange import write_model
from training.recipes.config import LanguageModelConfig, check_parts
from training.schema import Precision, TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch, TorchStep, build_on

FRAMEWORK = "torch"
CORPORA = "stdlib, files or hub"


class DecoderTraining:
    """Trains a `Transformer` to predict the next token; a recipe adds how it is judged."""

    framework = FRAMEWORK
    unit = "tokens"
    remedy = "Lower optim.lr or set optim.clip_norm"
    alarm = None

    def __init__(
        self,
        config: TrainConfig,
        data: LanguageData | MarkovData | FactsData | StatementsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, LanguageModelConfig)
        assert isinstance(config.model, TransformerConfig)
        self.config, self.processes = config, processes
        self.model_config = fill_vocabulary(config.model, data)
        self.model = build_on(
            device,
            lambda: Transformer(self.model_config),
            lambda model: model.init_weights(torch_generator(config.seed, "init", device=device)),
        )
        self.model.checkpoint_blocks = config.recipe.activation_checkpointing
        self.parameters = num_parameters(self.model)
        self.trainer = TorchStep(
            self.trained(),
            list(self.model.blocks),
            config.optim,
            config.scale,
            processes,
            config.loop.steps,
        )
        seq_len = data.config.seq_len
        self.units_per_step = data.config.batch_size * seq_len
        self.flops_per_step = self.units_per_step * flops_per_token(self.model_config, seq_len)

    def trained(self) -> nn.Module:
        """What the optimiser moves: the model, and what a recipe adds to it."""
        return self.model

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor | float]:
        return self.trainer.update(batch, self.loss)

    def loss(self, batch: Batch) -> Tensor:
        """Mean nats of the next token, weighted where the data has weights."""
        losses, weight = self.token_losses(batch), batch.get("weight")
        return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()

    def token_losses(self, batch: Batch) -> Tensor:
        """[b, t] nats of each next token. Separators count: a document's end is predicted too."""
        tokens, segments = batch["tokens"], batch.get("segments")
        segments = None if segments is None else segments[:, :-1]
        logits = self.model(tokens[:, :-1], segments=segments)  # [b, t, vocab]
        return F.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none"
        ).view(tokens.shape[0], -1)

    def export(self, directory: Path) -> None:
        """Write model.safetensors and model.json, for exchange."""
        whole, own = self.trainer.full_weights(), dict(self.trainer.model.named_parameters())
        named = {id(parameter): name for name, parameter in own.items()}
        weights = {name: whole[named[id(p)]] for name, p in self.model.named_parameters()}
        if self.processes.is_main:
            write_model(directory, weights, self.model_config)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


class LanguageModel(DecoderTraining):
    """Windows of a corpus; judged by held-out bits per byte beside the floors of counting."""

    def __init__(
        self, config: TrainConfig, data: LanguageData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, LanguageModelConfig)
        self.recipe, self.data = config.recipe, data
        if config.recipe.floors:
            require_bytes(data)  # now, not after the training
        super().__init__(config, data, processes, device)

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Held-out nats per token and bits per byte; all of the held-out text if `final`."""
        nats, tokens, size = 0.0, 0.0, self.recipe.eval_batch_size
        limit = None if final else self.recipe.eval_batches
        with self.trainer.averaged_weights(), self.trainer.autocast():
            for batch in heldout_batches(self.data, size, limit, self.processes):
                weight = torch.from_numpy(batch.pop("weight")).to(self.trainer.device)
                losses = self.token_losses(self.trainer.to_device(batch))
                nats += (losses.double() * weight).sum().item()
                tokens += weight.sum().item()
        return bits_per_byte(nats, tokens, self.data, self.processes)

    def summary(self) -> dict[str, Any]:
        """What else the finished run reports: sizes, floors, a sample."""
        found = language_summary(self.data, self.parameters, self.trainer.count, self.recipe.floors)
        if self.recipe.sample_tokens:
            found["sample"] = self.sample()
        return found

    @torch.no_grad()
    def sample(self) -> str:
        """A continuation of `recipe.sample_prompt`, drawn at temperature 0.8."""
        if self.trainer.sharded:
            return ""
        prompt = [self.data.separator, *self.data.encode(self.recipe.sample_prompt).tolist()]
        with self.trainer.averaged_weights():
            tokens = generate(
                self.model,
                torch.tensor([prompt], device=self.trainer.device),
                self.recipe.sample_tokens,
                temperature=0.8,
                generator=torch_generator(self.config.seed, "sample", device=self.trainer.device),
                stop_token=self.data.separator,
            )
        return self.data.decode(tokens[0, 1:].tolist())


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("transformer",), (CorpusConfig,), CORPORA)


def build(config: TrainConfig, processes: Processes, device: torch.device) -> LanguageModel:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    return LanguageModel(config, for_run(config, processes), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is read."""
    check(config)
    return estimate_decoder(config)


def estimate_decoder(config: TrainConfig) -> Estimate:
    """Sizes of a run that trains a decoder on whatever data."""
    assert isinstance(config.data, CorpusConfig | MarkovConfig | FactsConfig | StatementsConfig)
    model_config = config_without_data(config)
    with torch.device("meta"):
        model = Transformer(model_config)
    seq_len, shards = config.data.seq_len, config.scale.devices or 1
    rows = max(1, config.data.batch_size // shards // config.optim.accumulate)
    tokens = torch.zeros(rows, seq_len, dtype=torch.long, device="meta")

    if config.scale.precision == Precision.bf16:
        model.to(torch.bfloat16)  # there is no autocast on meta

    def loss() -> Tensor:
        logits = model(tokens).float().flatten(0, 1)
        return F.cross_entropy(logits, tokens.flatten())

    model.checkpoint_blocks = config.recipe.activation_checkpointing  # type: ignore[attr-defined]
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    memory = state_memory(num_parameters(model), matrices, config.optim, config.scale)
    units = config.data.batch_size * seq_len
    return Estimate(
        num_parameters(model),
        units * flops_per_token(model_config, seq_len),
        units,
        DecoderTraining.unit,
        {**memory, "activations": torch_activations(model, loss)},
    )
