"""What every jax recipe does around its loss: jit, sharding, precision, accumulation, clipping,
schedule, optimisers, weight averaging, and the state of all that. Its torch twin: `torch_step.py`.

A recipe builds one `JaxStep` around its nnx model and calls `update(batch)` in its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from training.distributed import Processes
from training.errors import UserError
from training.schedules import lr_table
from training.schema import OptimConfig, Optimiser, Precision, ScaleConfig

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]  # mean loss, metrics


def device_mesh(scale: ScaleConfig) -> Mesh:
    """All devices (or the first `scale.devices`) in one axis; data and state are split over it."""
    devices = jax.devices()[: scale.devices]
    # Auto axes: the compiler places collectives; explicit ones would need them in every model.
    return jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))


def shard_leaf(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Split a matrix or table along its first divisible dimension, as FSDP does; copy the rest."""
    if np.ndim(leaf) >= 2:
        for axis, size in enumerate(np.shape(leaf)):
            if size % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return NamedSharding(mesh, PartitionSpec())


def place(mesh: Mesh, tree: Any) -> Any:
    """Put a tree of arrays onto the mesh; needed after building it and after loading it."""
    return jax.device_put(tree, jax.tree.map(partial(shard_leaf, mesh), tree))


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves of any pytree by their dotted path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def replace_leaves(tree: Any, named: Mapping[str, Any]) -> Any:
    """`tree` with its leaves taken from `named`, the inverse of `named_leaves`."""
    names = list(named_leaves(tree))
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in names])


def build_optimiser(
    config: OptimConfig, steps: int, in_block: Callable[[str], bool]
) -> optax.GradientTransformation:
    """AdamW for everything, or Muon for the matrices `in_block` names and AdamW for the rest."""
    relative = jnp.asarray(lr_table(config, steps))

    def rate(peak: float) -> Callable[[Any], jax.Array]:
        return lambda count: peak * relative[count]

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    adamw = partial(
        optax.adamw,
        rate(config.lr),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    if config.name == Optimiser.adamw:
        chosen = adamw()
    else:
        # Unlike torch's, optax's Nesterov momentum is bias-corrected and its iteration in float32.
        muon = optax.contrib.muon(
            rate(config.muon_lr),
            beta=config.momentum,
            weight_decay=config.weight_decay,
            # Weights are [out, in], as in torch.
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(1, 0), params
            ),
        )
        chosen = optax.partition(
            {"muon": muon, "adamw": adamw()},
            lambda params: jax.tree.map_with_path(
                lambda path, leaf: "muon" if leaf.ndim == 2 and in_block(dotted(path)) else "adamw",
                params,
            ),
        )
    if config.clip_norm is None:
        return chosen
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)


def dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


class JaxStep:
    """An nnx model, its optimiser and the step count, compiled.

    Args:
        model: initialised; its `nnx.Param`s are trained.
        loss: (model, micro-batch) -> mean loss, a scalar, and further metrics, averaged likewise.
        in_block: whether a parameter's dotted name lies in a repeated block (Muon takes matrices).
        steps: length of the run, for the schedule.
        wide: which parameters stay float32 in a bf16 forward pass, by their dotted names.
    """

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        in_block: Callable[[str], bool],
        optim: OptimConfig,
        scale: ScaleConfig,
        steps: int,
        wide: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.optim, self.steps, self.count, self.wide = optim, steps, 0, wide
        self.mesh = device_mesh(scale)
        self.bf16 = scale.precision == Precision.bf16
        self.graph, params = nnx.split(model, nnx.Param)
        self.params = place(self.mesh, nnx.to_pure_dict(params))
        self.optimiser = build_optimiser(optim, steps, in_block)
        self.optimiser_state = place(self.mesh, self.optimiser.init(self.params))
        self.ema = jax.tree.map(jnp.copy, self.params) if optim.ema_decay is not None else {}
        self.relative = lr_table(optim, steps)
        self.rows = NamedSharding(self.mesh, PartitionSpec("data"))
        # What comes out is laid out as what went in, or a resumed run would compile another step.
        state = (self.params, self.optimiser_state, self.ema)
        whole = NamedSharding(self.mesh, PartitionSpec())
        self.compiled = jax.jit(
            partial(self.pure_step, loss),
            donate_argnums=(0, 1, 2),
            out_shardings=(*jax.tree.map(lambda leaf: leaf.sharding, state), whole),
        )

    def merge(self, params: Any) -> Any:
        """The model with these parameters, in the precision of the forward pass."""
        if self.bf16:
            params = jax.tree.map_with_path(
                lambda path, leaf: leaf if self.wide(dotted(path)) else leaf.astype(jnp.bfloat16),
                params,
            )
        return nnx.merge(self.graph, params)

    def pure_step(
        self, loss: Loss, params: Any, state: Any, ema: Any, count: jax.Array, batch: Batch
    ) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """Parameters, optimiser state, averages, step, batch [parts, b, ...] -> the next ones."""

        def of_part(total: Any, part: Batch) -> tuple[Any, dict[str, jax.Array]]:
            differentiated = jax.value_and_grad(lambda p: loss(self.merge(p), part), has_aux=True)
            (value, metrics), grads = differentiated(params)
            return jax.tree.map(jnp.add, total, grads), {"train/loss": value, **metrics}

        total, each = jax.lax.scan(of_part, jax.tree.map(jnp.zeros_like, params), batch)
        grads = jax.tree.map(lambda g: g / self.optim.accumulate, total)
        metrics = jax.tree.map(jnp.mean, each)
        norm = optax.tree.norm(grads)
        updates, state = self.optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if self.optim.ema_decay is not None:
            decay = jnp.minimum(self.optim.ema_decay, (2.0 + count) / (11.0 + count))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        return params, state, ema, {**metrics, "opt/grad_norm": norm}

    def update(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """One optimiser step on this process's rows of the batch; metrics as in `TorchStep`."""
        parts = self.optim.accumulate
        rows = len(next(iter(batch.values())))
        if rows % (parts * self.local_devices):
            raise UserError(
                f"optim.accumulate={parts} times {self.local_devices} device(s) does not divide "
                f"the {rows} rows of each process: change it, scale.devices or data.batch_size"
            )
        split = {k: v.reshape(parts, rows // parts, *v.shape[1:]) for k, v in batch.items()}
        self.params, self.optimiser_state, self.ema, metrics = self.compiled(
            self.params,
            self.optimiser_state,
            self.ema,
            jnp.asarray(self.count, jnp.int32),
            self.to_device(split, axis=1),
        )
        metrics = {**metrics, "opt/lr": float(self.relative[self.count])}
        self.count += 1
        return metrics

    @property
    def local_devices(self) -> int:
        return sum(device.process_index == jax.process_index() for device in self.mesh.devices.flat)

    def to_device(self, batch: Mapping[str, np.ndarray], axis: int = 0) -> Batch:
        """This process's rows -> arrays over all processes, split along `axis`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data"))
        return {
            key: jax.make_array_from_process_local_data(sharding, value)
            for key, value in batch.items()
        }

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: the averaged ones if there are any."""
        return self.ema if self.optim.ema_decay is not None else self.params

    def on_every_process(self, tree: Any) -> Any:
        """The tree with each leaf whole on every device, so that any process may read it."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def export(self, directory: Path, config: Any, processes: Processes) -> None:
        """Write the evaluated weights, model.safetensors under dotted names, and model.json."""
        from safetensors.numpy import save_file

        from training.files import replace_with, write_json
        from training.run_directory import plain

        whole = self.on_every_process(self.evaluated)
        if processes.is_main:
            weights = {name: np.asarray(leaf) for name, leaf in named_leaves(whole).items()}
            replace_with(directory / "model.safetensors", partial(save_file, weights))
            write_json(directory / "model.json", plain(config))

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights, optimiser state, step count."""
        return {
            "count": self.count,
            "model": named_leaves(self.params),
            "ema": named_leaves(self.ema),
            "optimiser": named_leaves(self.optimiser_state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; its arrays are placed on the mesh anew."""
        self.count = int(state["count"])
        self.params = place(self.mesh, replace_leaves(self.params, state["model"]))
        self.ema = place(self.mesh, replace_leaves(self.ema, state.get("ema", {})))
        self.optimiser_state = place(
            self.mesh, replace_leaves(self.optimiser_state, state["optimiser"])
        )
