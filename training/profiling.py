"""How fast and how large: peak rates of known chips, memory in use, traces of chosen steps."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Dense bf16 matrix rate in FLOP/s, from the vendors' data sheets (without sparsity).
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a chip by its name, or None where it is not known (CPUs are not)."""
    for chip in sorted(PEAK_BF16_FLOPS, key=len, reverse=True):
        if all(word.lower() in device_name.lower() for word in chip.split()):
            return PEAK_BF16_FLOPS[chip]
    return None


def device_name(framework: str) -> str:
    """The accelerator this process computes on, or '' for a CPU."""
    if framework == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    import jax

    device = jax.local_devices()[0]
    return "" if device.platform == "cpu" else device.device_kind


def peak_memory_gb(framework: str) -> float:
    """Peak memory: of the GPU where there is one, else of this process (GB of 1e9 bytes)."""
    if framework == "torch" and "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() / 1e9
    if framework == "jax" and "jax" in sys.modules:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def hardware() -> dict[str, Any]:
    """What this machine is, without loading a framework that is not loaded already."""
    facts: dict[str, Any] = {"cpus": os.cpu_count(), "cpu": cpu_name()}
    if "torch" in sys.modules:
        import torch

        facts["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpus"] = [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ]
    return facts


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


@contextmanager
def trace(framework: str, directory: Path) -> Iterator[None]:
    """Trace what runs inside: a Chrome trace (torch) or a profile folder (jax)."""
    directory.mkdir(parents=True, exist_ok=True)
    if framework == "jax":
        import jax

        with jax.profiler.trace(str(directory / "trace_jax")):
            yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
    profiler.export_chrome_trace(str(directory / "trace.json"))
