"""Meta-learning of TTT-E2E: the outer loop of `models/language/ttt_e2e.py`.

End-to-End Test-Time Training for Long Context, 2025, arXiv:2512.23675. A step:

    for each document of the batch, from W_0:
        for each chunk: score it, then one clipped SGD step of the fast weights on its loss
    theta <- AdamW(theta, gradient of the mean of all scores)        theta holds W_0

`order=second` differentiates through the inner steps; `first` does not; `none` takes none, which
trains the same network as a plain sliding-window decoder (or, with model.window=null, as full
attention). All four are evaluated by one path: held-out documents are read with the model's inner
learning rate (`learning`), with none (`static`), and with every rate of `eval_inner_lrs` (the best
is `naive`: test-time training of weights that were not trained for it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.language.config import InnerOrder, TTTE2EConfig, ttt_e2e_flops_per_token
from models.language.transformer_jax import fill
from models.language.ttt_e2e import (
    TTTE2E,
    check_length,
    losses,
    matches_fast,
    num_parameters,
    read,
    state_bytes,
)
from training.data.config import CorpusConfig, MarkovConfig
from training.data.language import LanguageData, documents_for_run
from training.data.markov import MarkovData
from training.distributed import Processes
from training.errors import RunStopped, UserError
from training.estimate import Estimate, jax_activations, state_memory
from training.evaluation.cost import prefill_cost
from training.evaluation.language import config_without_data, fill_vocabulary
from training.evaluation.positions import Score, read_documents, reading_summary
from training.jax_step import Batch, JaxStep, dotted
from training.recipes.config import TTTE2ERecipeConfig, check_parts
from training.schema import Precision, TrainConfig
from training.seeding import jax_key

FRAMEWORK = "jax"


def token_losses(
    model: TTTE2E,
    batch: Batch,
    inner_lr: jax.Array | float,
    order: InnerOrder,
    remat_group: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """[b, t] nats of each next token, and [b, n] norms of the inner gradients (0 without)."""
    if order == InnerOrder.none and model.config.window is None:
        return model.static_losses(batch["tokens"]), jnp.zeros(())
    reading = losses(model, batch["tokens"], inner_lr, order, remat_group)
    if "reread" in batch:
        again = partial(read, model, inner_lr=inner_lr, order=order)
        reading = jax.vmap(again)(batch["tokens"], reading.state)
    return reading.losses, reading.gradient_norms


class TTTE2ERecipe:
    """Trains a `TTTE2E` on documents."""

    framework = FRAMEWORK
    unit = "tokens"
    remedy = "Lower model.inner_lr or optim.lr, or set model.inner_clip, optim.clip_norm"
    alarm = None

    def __init__(
        self, config: TrainConfig, data: LanguageData | MarkovData, processes: Processes
    ) -> None:
        assert isinstance(config.recipe, TTTE2ERecipeConfig)
        assert isinstance(config.model, TTTE2EConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes, self.reading = processes, None
        self.lengths = list(config.recipe.eval_lengths) or [data.config.seq_len]
        self.model_config = fill_vocabulary(config.model, data)
        model = build_model(self.model_config, nnx.Rngs(params=jax_key(config.seed, "init")))
        if self.recipe.start_from is not None:
            model = loaded(model, self.recipe.start_from)
        self.parameters = num_parameters(model)
        self.trainer = JaxStep(
            model,
            self.loss,
            lambda name: name.startswith("blocks."),
            config.optim,
            config.scale,
            config.loop.steps,
            wide=partial(matches_fast, self.model_config),
        )
        if self.recipe.eval_batch_size % self.trainer.mesh.size:
            raise UserError(
                f"recipe.eval_batch_size={self.recipe.eval_batch_size} does not divide over the "
                f"{self.trainer.mesh.size} devices: make it a multiple of them"
            )
        self.units_per_step = data.config.batch_size * data.config.seq_len
        per_token = ttt_e2e_flops_per_token(
            self.model_config, data.config.seq_len, self.recipe.order
        )
        self.flops_per_step = self.units_per_step * per_token

    def loss(self, model: TTTE2E, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The outer loss of the documents, and how large the inner gradients were."""
        rate = batch["inner_lr"][0]
        nats, norms = token_losses(model, batch, rate, self.recipe.order, self.recipe.remat_group)
        if self.recipe.order == InnerOrder.none:
            return nats.mean(), {}
        return nats.mean(), {"inner/grad_norm": norms.mean(), "inner/lr": rate}

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rate = np.full(len(batch["tokens"]), self.inner_lr(self.trainer.count), np.float32)
        return self.trainer.update({"tokens": batch["tokens"], "inner_lr": rate})

    def inner_lr(self, step: int) -> float:
        """The inner learning rate of a training step: a linear warm-up, then the model's."""
        steps, start = self.recipe.inner_warmup_steps, self.recipe.inner_warmup_from
        grown = 1.0 if step >= steps else start + (1.0 - start) * step / steps
        return self.model_config.inner_lr * grown

    @cached_property
    def scored(self) -> Any:
        """Compiled: parameters, batch, inner learning rate, order -> nats [b, t], everywhere."""

        def nats(params: Any, batch: Batch, rate: jax.Array, order: InnerOrder) -> jax.Array:
            return token_losses(self.trainer.merge(params), batch, rate, order)[0]

        # No outer gradient is taken here, so the first order costs and gives the same.
        return jax.jit(nats, static_argnums=3)

    def score(self, rate: float | None, reread: bool = False) -> Score:
        """Reads documents with an inner learning rate; None learns nothing.

        `reread` scores a second reading, by what the first has left.
        """
        order = InnerOrder.none if rate is None else InnerOrder.first
        size = self.recipe.eval_batch_size
        mine = slice(
            self.processes.rank * size // self.processes.world,
            (self.processes.rank + 1) * size // self.processes.world,
        )

        def nats(tokens: np.ndarray) -> np.ndarray:
            found = []
            for first in range(0, len(tokens), size):
                rows = tokens[np.arange(first, first + size) % len(tokens)]  # the last is filled up
                batch = {"tokens": rows[mine], **({"reread": rows[mine, 0]} if reread else {})}
                batch = self.trainer.to_device(batch)
                out = self.scored(self.trainer.evaluated, batch, jnp.float32(rate or 0.0), order)
                found.append(np.asarray(self.trainer.on_every_process(out), np.float32))
            return np.concatenate(found)[: len(tokens)]

        return nats

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Loss along held-out documents, as the model reads them; all arms and lengths if `final`.

        Raises RunStopped where learning diverges.
        """
        own = "static" if self.recipe.order == InnerOrder.none else "learning"
        rate = None if own == "static" else self.model_config.inner_lr
        arms = {own: self.score(rate)}
        count, lengths = -(-self.recipe.eval_documents // 4), self.lengths[:1]
        if final:
            count, lengths = self.recipe.eval_documents, self.lengths
            arms |= {"static": self.score(None)}
            arms |= {f"lr_{rate:g}": self.score(rate) for rate in self.recipe.eval_inner_lrs}
            if self.recipe.eval_reread:
                arms |= {"reread": self.score(rate, reread=True)}
        reading, series = read_documents(self.data, count, lengths, arms)
        found = reading[str(lengths[0])][own]
        self.check_diverged(found["mean"])
        if final:
            self.reading = best_of_rates(reading, series)
        return {f"eval/{key}": found[key] for key in ("mean", "first_eighth", "last_eighth")}

    def check_diverged(self, mean: float) -> None:
        uniform = float(np.log(self.model_config.resolved_vocab_size))
        if self.recipe.order != InnerOrder.none and not mean < uniform + 1.0:
            raise RunStopped(
                f"the inner loop diverges: with model.inner_lr={self.model_config.inner_lr:g} the "
                f"held-out loss is {mean:.4g} nats, a uniform guess has {uniform:.4g}. "
                "Lower model.inner_lr or set model.inner_clip"
            )

    def summary(self) -> dict[str, Any]:
        """Sizes, and the loss along held-out documents by length and arm."""
        cost = self.cost() if self.recipe.cost_lengths else None
        vocab = self.model_config.resolved_vocab_size
        return reading_summary(self.parameters, vocab, self.data, self.reading, cost)

    def cost(self) -> dict[str, Any]:
        """Seconds to read one sequence of each length, and bytes of what is kept of it."""
        model, rate = self.trainer.merge(self.trainer.evaluated), self.model_config.inner_lr
        none = self.recipe.order == InnerOrder.none
        order = InnerOrder.none if none else InnerOrder.first  # there is no outer gradient

        def prepare(length: int) -> Callable[[], object]:
            batch = {"tokens": jnp.zeros((1, length + 1), jnp.int32)}
            params, eta = self.trainer.evaluated, jnp.float32(rate)
            return lambda: self.scored(params, batch, eta, order).block_until_ready()

        return prefill_cost(prepare, partial(state_bytes, model), self.recipe.cost_lengths)

    def export(self, directory: Path) -> None:
        """Write model.safetensors (dotted names) and model.json, for exchange."""
        self.trainer.export(directory, self.model_config, self.processes)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def best_of_rates(reading: dict[str, Any], series: dict[str, list[float]]) -> dict[str, Any]:
    """Adds the arm `naive`: the reading of the inner learning rate with the best last eighth."""
    for length, arms in reading.items():
        swept = [arm for arm in arms if arm.startswith("lr_")]
        if swept:
            best = min(swept, key=lambda arm: finite(arms[arm]["last_eighth"]))
            arms["naive"] = {**arms[best], "inner_lr": float(best.removeprefix("lr_"))}
            series[f"{length}/naive"] = series[f"{length}/{best}"]
    return {"reading": reading, "series": series}


def finite(loss: float) -> float:
    """The loss, or infinity where it is no number: what diverged is never the best."""
    return loss if np.isfinite(loss) else np.inf


def build_model(config: TTTE2EConfig, rngs: nnx.Rngs) -> TTTE2E:
    """The model. Raises UserError where the glob of fast weights does not fit it."""
    try:
        return TTTE2E(config, rngs=rngs)
    except ValueError as error:
        raise UserError(str(error)) from error


def loaded(model: TTTE2E, file: str) -> TTTE2E:
    """The model with the weights of a safetensors file. Raises UserError if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return fill(model, load_file(file))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"recipe.start_from={file}: {error}") from error


def check(config: TrainConfig) -> None:
    """Raise UserError where recipe, model and data do not belong together, or where a length does
    not come out in chunks."""
    documents = (CorpusConfig, MarkovConfig)
    check_parts(config, ("ttt_e2e",), documents, "markov, stdlib, files or hub")
    assert isinstance(config.recipe, TTTE2ERecipeConfig) and isinstance(config.model, TTTE2EConfig)
    assert isinstance(config.data, CorpusConfig | MarkovConfig)
    full = config.model.window is None
    if full and (config.recipe.order != InnerOrder.none or config.recipe.eval_inner_lrs):
        raise UserError(
            "model.window=null is full attention, which cannot learn while it reads: set "
            "recipe.order=none and recipe.eval_inner_lrs=[], or give a window"
        )
    for key, length in [
        ("data.seq_len", config.data.seq_len),
        *(("recipe.eval_lengths", length) for length in config.recipe.eval_lengths),
        *(("recipe.cost_lengths", length) for length in config.recipe.cost_lengths),
    ]:
        try:
            check_length(config.model, length) if not full else None
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error
    chunks, group = config.data.seq_len // config.model.chunk, config.recipe.remat_group
    if group is not None and chunks % group and config.recipe.order != InnerOrder.none:
        raise UserError(
            f"recipe.remat_group={group} does not divide the {chunks} chunks of data.seq_len="
            f"{config.data.seq_len}"
        )


def build(config: TrainConfig, processes: Processes, device: None = None) -> TTTE2ERecipe:
    """The recipe of `config` with its data, its model initialised on the mesh."""
    check(config)
    return TTTE2ERecipe(config, documents_for_run(config, processes), processes)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from abstract values. No data is read."""
    check(config)
    assert isinstance(config.recipe, TTTE2ERecipeConfig)
    assert isinstance(config.data, CorpusConfig | MarkovConfig)
    model_config = config_without_data(config)
    assert isinstance(model_config, TTTE2EConfig)
    recipe, seq_len = config.recipe, config.data.seq_len
    model = nnx.eval_shape(lambda: build_model(model_config, nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    rows = max(1, config.data.batch_size // (config.scale.devices or 1) // config.optim.accumulate)
    if config.scale.precision == Precision.bf16:
        params = jax.tree.map_with_path(
            lambda path, p: (
                p
                if matches_fast(model_config, dotted(path))
                else jax.ShapeDtypeStruct(p.shape, jnp.bfloat16)
            ),
            params,
        )

    def loss(params: Any) -> jax.Array:
        batch = {"tokens": jnp.zeros((rows, seq_len + 1), jnp.int32)}
        model = nnx.merge(graph, params)
        return token_losses(model, batch, 1.0, recipe.order, recipe.remat_group)[0].mean()

    matrices = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.blocks)) if leaf.ndim == 2)
    memory = state_memory(num_parameters(model), matrices, config.optim, config.scale)
    units = config.data.batch_size * seq_len
    return Estimate(
        num_parameters(model),
        units * ttt_e2e_flops_per_token(model_config, seq_len, recipe.order),
        units,
        TTTE2ERecipe.unit,
        {**memory, "activations": jax_activations(loss, params)},
    )
