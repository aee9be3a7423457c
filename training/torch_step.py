"""What every torch recipe does around its loss: sharding, precision, accumulation, clipping,
schedule, optimisers, weight averaging, and the state of all that.

A recipe builds one `TorchStep` around its model and calls `update(batch, loss)` in its step.

Muon: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; with several
processes torch gathers the sharded momentum for its Newton-Schulz iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.distributed import Processes
from training.errors import UserError
from training.schedules import lr_scale
from training.schema import OptimConfig, Optimiser, Precision, ScaleConfig

Batch = dict[str, Tensor]


def build_on(
    device: torch.device, build: Callable[[], nn.Module], init: Callable[[nn.Module], None]
) -> nn.Module:
    """Build a model on meta, allocate it on `device`, fill it with `init`."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    init(model)
    return model


def shard(model: nn.Module, blocks: list[nn.Module], scale: ScaleConfig, world: int) -> None:
    """FSDP2: shard `blocks` and the rest of `model` over the processes, in place.

    `scale.replicas` groups each hold the whole state (hybrid sharding).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = next(model.parameters()).device.type
    shape = (scale.replicas, world // scale.replicas)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if scale.replicas == 1 else mesh
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if scale.precision == Precision.bf16 else None,
        reduce_dtype=torch.float32,
    )
    for module in [*blocks, model]:
        # Also the root: what is left gathered after an evaluation could not be averaged or saved.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def split_parameters(
    model: nn.Module, blocks: list[nn.Module]
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside blocks, other matrices and tables, vectors), each once."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    matrices, tables, vectors = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        else:
            (matrices if id(parameter) in inside else tables).append(parameter)
    return matrices, tables, vectors


def build_optimisers(
    model: nn.Module, blocks: list[nn.Module], config: OptimConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside `blocks` and AdamW for the rest."""
    matrices, tables, vectors = split_parameters(model, blocks)
    decay = config.weight_decay
    optimisers: list[torch.optim.Optimizer] = []
    if config.name == Optimiser.muon:
        if not matrices:
            raise UserError(
                "optim.name=muon: this recipe's model has no blocks with matrices of their own: "
                "use optim.name=adamw"
            )
        if any(parameter.ndim != 2 for parameter in matrices):
            raise UserError("optim.name=muon takes matrices only: use optim.name=adamw")
        optimisers.append(
            torch.optim.Muon(
                matrices, lr=config.muon_lr, momentum=config.momentum, weight_decay=decay
            )
        )
        matrices = []
    groups = [
        {"params": [*matrices, *tables], "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        betas = (config.beta1, config.beta2)
        optimisers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
        materialise_state(optimiser)
    return optimisers


def materialise_state(optimiser: torch.optim.Optimizer) -> None:
    """Create the optimiser's state (all zeros) before the first step, so that it can be loaded."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        group["lr"] = 0.0
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for state in optimiser.state.values():
        for value in state.values():
            value.zero_()


class TorchStep:
    """A model, its optimisers and the step count.

    Args:
        model: on its device, initialised; sharded here when there are several processes.
        blocks: the repeated parts of `model`: units of sharding, and whose matrices Muon takes.
        steps: length of the run, for the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        optim: OptimConfig,
        scale: ScaleConfig,
        processes: Processes,
        steps: int,
    ) -> None:
        self.model, self.optim, self.scale = model, optim, scale
        self.processes, self.steps = processes, steps
        self.device = next(model.parameters()).device
        self.count = 0
        self.sharded = processes.world > 1
        if self.sharded:
            shard(model, blocks, scale, processes.world)
        self.optimisers = build_optimisers(model, blocks, optim)
        self.ema: dict[str, Tensor] = {}
        if optim.ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        if scale.compile:
            for block in blocks:
                block.compile()

    def autocast(self) -> Any:
        """bf16 arithmetic where it was asked for.

        Also where FSDP holds weights in bf16: what a model makes itself, such as sines of a
        position, FSDP does not cast.
        """
        if self.scale.precision == Precision.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def to_device(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """numpy arrays -> tensors on the device."""
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        if self.device.type == "cuda":
            tensors = {
                k: v.pin_memory().to(self.device, non_blocking=True) for k, v in tensors.items()
            }
        return tensors

    def update(
        self, batch: Mapping[str, np.ndarray], loss: Callable[[Batch], Tensor]
    ) -> dict[str, Tensor | float]:
        """One optimiser step on the mean of `loss` over the micro-batches and the processes.

        Args:
            batch: arrays [b, ...] of this process; b is divided into `optim.accumulate` parts.
            loss: micro-batch -> mean loss, a scalar.

        Returns:
            train/loss, opt/grad_norm (before clipping) and opt/lr (relative to the peak).
        """
        parts = self.micro_batches(batch)
        total = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            if self.sharded:
                self.model.set_requires_gradient_sync(index == len(parts) - 1)  # type: ignore[operator]
            with self.autocast():
                value = loss(self.to_device(part)) / len(parts)
            value.backward()
            total += value.detach()
        norm = self.clip()
        relative = lr_scale(self.optim, self.count, self.steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * relative
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.count += 1
        self.average()
        return {"train/loss": self.mean(total), "opt/grad_norm": norm, "opt/lr": relative}

    def micro_batches(self, batch: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Equal parts along the first dimension."""
        rows, parts = len(next(iter(batch.values()))), self.optim.accumulate
        if rows % parts:
            raise UserError(
                f"optim.accumulate={parts} does not divide the {rows} rows that each of "
                f"{self.processes.world} process(es) gets: change it, or data.batch_size"
            )
        size = rows // parts
        return [
            {key: value[i * size : (i + 1) * size] for key, value in batch.items()}
            for i in range(parts)
        ]

    def clip(self) -> Tensor:
        """Clip the global gradient norm to `optim.clip_norm`; returns the norm before."""
        limit = self.optim.clip_norm if self.optim.clip_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over the processes."""
        if self.sharded:
            torch.distributed.all_reduce(value)
            value = value / self.processes.world
        return value

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the weights."""
        if self.ema:
            decay = self.optim.ema_decay
            assert decay is not None
            # Early on the average follows closely: decay (1 + n) / (10 + n), as is customary.
            weight = 1 - min(decay, (1 + self.count) / (10 + self.count))
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter.detach(), weight)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has its averaged weights (if it keeps any)."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, parameter in self.model.named_parameters() if self.ema else ():
            kept = parameter.detach().clone()
            parameter.copy_(self.ema[name])
            self.ema[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights, optimiser state, step count."""
        return {
            "count": self.count,
            "model": {name: p for name, p in self.model.named_parameters()},
            "buffers": {name: b for name, b in self.persistent_buffers()},
            "ema": self.ema,
            "optimiser": self.optimiser_state(),
        }

    def persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self.model.state_dict(keep_vars=True)
        return ((name, b) for name, b in self.model.named_buffers() if name in kept)

    def optimiser_state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> {exp_avg, exp_avg_sq, step} or {momentum_buffer}."""
        found = {}
        for name, parameter in self.model.named_parameters():
            for optimiser in self.optimisers:
                if parameter in optimiser.state:
                    found[name] = dict(optimiser.state[parameter])
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state whose tensors may be the very ones `state_dict` handed out."""
        self.count = int(state["count"])
        own, given = self.state_dict(), state
        with torch.no_grad():
            for group in ("model", "buffers", "ema"):
                for name, tensor in own[group].items():
                    tensor.copy_(given[group][name])
            for name, values in own["optimiser"].items():
                for key, tensor in values.items():
                    tensor.copy_(given["optimiser"][name][key])

    def full_weights(self) -> dict[str, Tensor]:
        """(Averaged) weights and kept buffers in full, on the CPU; all processes must call this."""
        with self.averaged_weights():
            found = {}
            for name, p in (*self.model.named_parameters(), *self.persistent_buffers()):
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[operator]
                found[name] = whole.detach().to("cpu", copy=True).contiguous()
        return found
