"""What a run would cost, without running it: sizes from the meta device or from abstract values.

Memory is what one process must hold at once: weights, gradients, optimiser state, averaged weights
and others without a gradient, and the activations that the backward pass of one micro-batch needs.
Buffers of single operations and the framework's own overhead come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.schema import OptimConfig, Optimiser, ScaleConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run; memory in bytes per process, FLOPs and units per step of all processes."""

    parameters: int
    flops_per_step: float
    units_per_step: int
    unit: str
    memory: dict[str, int]


def state_memory(
    parameters: int, matrix_parameters: int, optim: OptimConfig, scale: ScaleConfig
) -> dict[str, int]:
    """Bytes of weights, gradients, optimiser state and averages, all fp32, sharded over processes.

    AdamW keeps two moments of a parameter, Muon one of the matrices inside blocks.
    """
    shards = max(1, (scale.devices or 1) // scale.replicas)
    moments = 2 * parameters
    if optim.name == Optimiser.muon:
        moments -= matrix_parameters
    found = {"weights": parameters, "gradients": parameters, "optimiser": moments}
    if optim.ema_decay is not None:
        found["averages"] = parameters
    return {name: 4 * count // shards for name, count in found.items()}


def torch_activations(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, by running `loss` on meta."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or a later tensor could take its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def torch_flops(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of `loss` and of its backward pass, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def torch_estimate(
    model: nn.Module,
    loss: Callable[[], Tensor],
    rows: int,
    config: TrainConfig,
    units: int,
    unit: str,
) -> Estimate:
    """A model on meta without sharded blocks; `loss` is of `rows` rows of data.batch_size.

    Args:
        units: of experience per step of all processes; `unit` names them.
    """
    parameters, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad == wanted)
        for wanted in (True, False)
    )
    memory = state_memory(parameters, 0, config.optim, config.scale)
    if frozen:
        memory["frozen weights"] = 4 * frozen
    return Estimate(
        parameters,
        torch_flops(loss) * (config.data.batch_size / rows),
        units,
        unit,
        {**memory, "activations": torch_activations(model, loss)},
    )


def rows_at_once(config: TrainConfig, least: int = 1) -> int:
    """Rows of a batch that one process sees at once."""
    devices = config.scale.devices or 1
    return max(least, config.data.batch_size // devices // config.optim.accumulate)


def jax_activations(loss: Callable[[Any], Any], params: Any) -> int:
    """Bytes that the backward pass of `loss(params)` keeps; `params` may be abstract."""
    import jax

    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward)]
    own = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return max(0, sum(sizes) - own)
