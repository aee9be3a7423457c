"""Which process this is, and what processes agree on. One process needs no set-up at all.

Several processes come from `torchrun` (torch) or from jax's distributed runtime; nothing here
starts any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.errors import RunStopped, UserError
from training.schema import Device, ScaleConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int = 0
    world: int = 1
    backend: str = "single"  # "single", "torch" or "jax"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.backend == "torch":
            import torch.distributed as dist

            dist.barrier()
        elif self.backend == "jax":
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("afferent")

    def broadcast(self, value: Any) -> Any:
        """The main process's `value` (anything JSON can hold), in every process."""
        if self.backend == "torch":
            import torch.distributed as dist

            box = [value]
            dist.broadcast_object_list(box)
            return box[0]
        if self.backend == "jax":
            import json

            import numpy as np
            from jax.experimental import multihost_utils

            size = 1 << 16
            raw = json.dumps(value).encode()
            padded = np.zeros(size, np.uint8)
            padded[: len(raw)] = np.frombuffer(raw, np.uint8)
            shared = multihost_utils.broadcast_one_to_all(padded)
            return json.loads(bytes(np.asarray(shared)).rstrip(b"\0"))
        return value

    def main_only(self, action: Callable[[], None]) -> None:
        """Run `action` in the main process; its UserError is raised in every process."""
        failed: UserError | None = None
        if self.is_main:
            try:
                action()
            except UserError as error:
                failed = error
        if self.world > 1:
            told = self.broadcast([str(failed), failed.code] if failed else None)
            if told and not self.is_main:
                raise RunStopped(*told)
        if failed:
            raise failed

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise float64 sum over the processes, in every process."""
        if self.backend == "torch":
            import torch
            import torch.distributed as dist

            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            box = torch.tensor(values, dtype=torch.float64, device=device)
            dist.all_reduce(box)
            return box.tolist()
        if self.backend == "jax":
            import numpy as np
            from jax.experimental import multihost_utils

            gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
            return np.asarray(gathered, np.float64).reshape(self.world, -1).sum(0).tolist()
        return values

    def any(self, flag: bool) -> bool:
        """True in every process where one of them says True."""
        return self.sum([float(flag)])[0] > 0


def torch_device(scale: ScaleConfig) -> torch.device:
    """The device of this process. Raises UserError where scale.device cannot be had."""
    import torch

    has_gpu = torch.cuda.is_available()
    if scale.device == Device.cpu or (scale.device == Device.auto and not has_gpu):
        return torch.device("cpu")
    if not has_gpu:
        raise UserError(
            "scale.device=cuda, but torch sees no GPU on this machine: use scale=cpu, "
            "or scale.device=cpu to run these sizes on the CPU"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"there are more processes than devices: local rank {local}, but {count} GPU(s); "
            f"start at most {count} processes per node (torchrun --nproc-per-node {count})"
        )
    return torch.device("cuda", local)


def initialise(scale: ScaleConfig, framework: str) -> tuple[Processes, torch.device | None]:
    """This process's place in the run, and its torch device (None for jax)."""
    return initialise_torch(scale) if framework == "torch" else (initialise_jax(scale), None)


def initialise_torch(scale: ScaleConfig) -> tuple[Processes, torch.device]:
    """Join torchrun's process group if there is one; set threads, determinism and device."""
    import torch

    device = torch_device(scale)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if scale.devices is not None and scale.devices != world:
        raise UserError(
            f"scale.devices={scale.devices}, but {world} process(es) run: start it with "
            f"torchrun --nproc-per-node {scale.devices} -m scripts.train ..., or drop scale.devices"
        )
    if world % scale.replicas:
        raise UserError(f"scale.replicas={scale.replicas} does not divide the {world} processes")
    if scale.threads is not None:
        torch.set_num_threads(scale.threads)
    if scale.deterministic:
        from training.seeding import deterministic_torch

        deterministic_torch()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world == 1:
        return Processes(), device
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), world, "torch"), device


def initialise_jax(scale: ScaleConfig) -> Processes:
    """Join jax's distributed runtime where its environment is set; check the devices."""
    import jax

    if scale.device == Device.cpu:
        jax.config.update("jax_platforms", "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if scale.threads is not None or scale.deterministic or scale.replicas > 1:
        raise UserError(
            "scale.threads, scale.deterministic and scale.replicas are for torch recipes: unset "
            "them for this jax recipe"
        )
    if world > 1 and not jax.distributed.is_initialized():
        # The environment of torchrun or of scripts/slurm: one process per device.
        port = int(os.environ["MASTER_PORT"]) + 1  # torchrun listens on MASTER_PORT itself
        jax.distributed.initialize(
            f"{os.environ['MASTER_ADDR']}:{port}",
            num_processes=world,
            process_id=int(os.environ["RANK"]),
            local_device_ids=[int(os.environ.get("LOCAL_RANK", "0"))],
        )
    if scale.device == Device.cuda and jax.default_backend() != "gpu":
        raise UserError(
            "scale.device=cuda, but jax sees no GPU on this machine: use scale=cpu, "
            "or scale.device=cpu to run these sizes on the CPU"
        )
    world, found = jax.process_count(), len(jax.devices())
    wanted = found if scale.devices is None else scale.devices
    if wanted > found or (world > 1 and wanted != found):  # one process may take fewer
        raise UserError(
            f"scale.devices={wanted}, but the {world} process(es) of this run see {found} "
            f"device(s): set scale.devices={found}, or drop it"
        )
    return Processes(jax.process_index(), world, "jax" if world > 1 else "single")


def shut_down(processes: Processes) -> None:
    """Leave the process group."""
    if processes.backend == "torch":
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
