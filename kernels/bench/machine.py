"""Which GPU this is and how it is set, as read; nothing is changed."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

QUERIED = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "most_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def no_gpu() -> str | None:
    """Why no kernel can be timed here, or None."""
    if torch.cuda.is_available():
        return None
    return "torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size and, from nvidia-smi, driver and clocks (just after whatever ran before)."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **smi(str(getattr(properties, "uuid", ""))),
    }


def smi(uuid: str) -> dict[str, str]:
    """Driver and clocks; a sentence in their place if nvidia-smi does not answer."""
    why = ""
    for device in (f"GPU-{uuid}", "0"):  # an index counts GPUs that are hidden from torch
        command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(QUERIED.values())}"]
        command.append("--format=csv,noheader")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            why = type(error).__name__
            continue
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        return dict(zip(QUERIED, values, strict=True))
    return {"nvidia_smi": f"did not answer: {why}"}
