"""Next-token prediction with the flax.nnx decoder: the jax twin of `language_model.py`.

Same configuration, data, evaluation and files; the exported weights carry the torch names. It
generates no sample: the twin keeps no KV cache.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.language.config import TransformerConfig, flops_per_token
from models.language.transformer_jax import Transformer, num_parameters
from training.data.config import CorpusConfig
from training.data.language import LanguageData, for_run
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, jax_activations, state_memory
from training.evaluation.floors import require_bytes
from training.evaluation.language import (
    bits_per_byte,
    config_without_data,
    fill_vocabulary,
    heldout_batches,
    language_summary,
)
from training.jax_step import Batch, JaxStep
from training.recipes.config import LanguageModelConfig, check_parts
from training.schema import Precision, TrainConfig
from training.seeding import jax_key

FRAMEWORK = "jax"


def token_losses(model: Transformer, batch: Batch) -> jax.Array:
    """[b, t] nats of each next token. Separators count: a document's end is predicted too."""
    tokens, segments = batch["tokens"], batch.get("segments")
    segments = None if segments is None else segments[:, :-1]
    logits = model(tokens[:, :-1], segments=segments)  # [b, t, vocab]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    )


class LanguageModelJax:
    """Trains a `Transformer` on windows of a corpus."""

    framework = FRAMEWORK
    unit = "tokens"
    remedy = "Lower optim.lr or set optim.clip_norm"
    alarm = None

    def __init__(self, config: TrainConfig, data: LanguageData, processes: Processes) -> None:
        assert isinstance(config.recipe, LanguageModelConfig)
        assert isinstance(config.model, TransformerConfig)
        if config.recipe.sample_tokens:
            raise UserError(
                "recipe.sample_tokens needs recipe=language_model: the jax twin keeps no KV cache; "
                "set recipe.sample_tokens=0"
            )
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes = processes
        if config.recipe.floors:
            require_bytes(data)  # now, not after the training
        self.model_config = fill_vocabulary(config.model, data)
        model = Transformer(self.model_config, rngs=nnx.Rngs(params=jax_key(config.seed, "init")))
        model.checkpoint_blocks = config.recipe.activation_checkpointing
        self.parameters = num_parameters(model)
        self.trainer = JaxStep(
            model,
            lambda model, batch: (token_losses(model, batch).mean(), {}),
            lambda name: name.startswith("blocks."),
            config.optim,
            config.scale,
            config.loop.steps,
        )
        if config.recipe.eval_batch_size % self.trainer.local_devices:
            raise UserError(
                f"recipe.eval_batch_size={config.recipe.eval_batch_size} does not divide over the "
                f"{self.trainer.local_devices} devices: make it a multiple of them"
            )
        seq_len = data.config.seq_len
        self.units_per_step = data.config.batch_size * seq_len
        self.flops_per_step = self.units_per_step * flops_per_token(self.model_config, seq_len)

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return self.trainer.update(batch)

    @cached_property
    def scored(self) -> Any:
        """Compiled: parameters, batch -> summed weighted nats of every window, [b]."""

        def nats(params: Any, batch: Batch) -> jax.Array:
            losses = token_losses(self.trainer.merge(params), batch)
            return (losses * batch["weight"]).sum(axis=1)

        return jax.jit(nats, out_shardings=self.trainer.rows)

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Held-out nats per token and bits per byte; all of the held-out text if `final`."""
        nats, tokens, limit = 0.0, 0.0, None if final else self.recipe.eval_batches
        for batch in heldout_batches(self.data, self.recipe.eval_batch_size, limit, self.processes):
            tokens += float(batch["weight"].sum())
            rows = self.scored(self.trainer.evaluated, self.trainer.to_device(batch))
            mine = [np.asarray(shard.data, np.float64) for shard in rows.addressable_shards]
            nats += float(sum(part.sum() for part in mine))
        return bits_per_byte(nats, tokens, self.data, self.processes)

    def summary(self) -> dict[str, Any]:
        """What else the finished run reports: sizes, floors."""
        return language_summary(self.data, self.parameters, self.trainer.count, self.recipe.floors)

    def export(self, directory: Path) -> None:
        """Write model.safetensors (torch names) and model.json, for exchange."""
        self.trainer.export(directory, self.model_config, self.processes)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    corpora = "stdlib, files or hub"
    check_parts(config, ("transformer",), (CorpusConfig,), corpora)
    assert isinstance(config.model, TransformerConfig)
    if config.model.mixing.pattern:
        raise UserError(
            "model.mixing.pattern needs recipe=language_model or recipe=fast_weights: the jax "
            "twin has attention only"
        )


def build(config: TrainConfig, processes: Processes, device: None = None) -> LanguageModelJax:
    """The recipe of `config` with its data, its model initialised on the mesh."""
    check(config)
    return LanguageModelJax(config, for_run(config, processes), processes)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from abstract values. No data is read."""
    check(config)
    assert isinstance(config.data, CorpusConfig)
    assert isinstance(config.recipe, LanguageModelConfig)
    model_config = config_without_data(config)
    model = nnx.eval_shape(lambda: Transformer(model_config, rngs=nnx.Rngs(0)))
    model.checkpoint_blocks = config.recipe.activation_checkpointing
    graph, params = nnx.split(model, nnx.Param)
    seq_len, shards = config.data.seq_len, config.scale.devices or 1
    rows = max(1, config.data.batch_size // shards // config.optim.accumulate)
    tokens = jnp.zeros((rows, seq_len + 1), jnp.int32)

    if config.scale.precision == Precision.bf16:
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)

    def loss(params: Any) -> jax.Array:
        return token_losses(nnx.merge(graph, params), {"tokens": tokens}).mean()

    matrices = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.blocks)) if leaf.ndim == 2)
    memory = state_memory(num_parameters(model), matrices, config.optim, config.scale)
    units = config.data.batch_size * seq_len
    return Estimate(
        num_parameters(model),
        units * flops_per_token(model_config, seq_len),
        units,
        LanguageModelJax.unit,
        {**memory, "activations": jax_activations(loss, params)},
    )
