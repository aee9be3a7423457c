"""What this machine can do at most, measured in the call that uses it.

    copy     GB/s: a large device-to-device copy, bytes read plus bytes written
    matmul   TFLOP/s: 8192 x 8192 x 8192 in bfloat16, random data, through torch
    host     GB/s: pinned memory to the device and back, the slower of the two directions

Bytes are decimal (GB = 1e9). The data are random: products of zeros run faster than real ones.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.bench.timing import gpu_sampler, interleave, summary

COPIED = 2 << 30
"Bytes of the copied tensor: many times any L2 cache."

HOST_COPIED = 1 << 30
SIDE = 8192


def measure(device: torch.device) -> dict[str, Any]:
    """The three ceilings, each with the times it comes from."""
    stream = torch.cuda.Stream(device)
    found = {}
    for name, (build, amount, unit) in CEILINGS.items():
        with torch.cuda.stream(stream):
            calls = build(device)
        samplers = {
            label: gpu_sampler([call], stream, capturable=False)[0] for label, call in calls.items()
        }
        times = {
            label: summary(samples)
            for label, samples in interleave(samplers, seconds=0.3, least=10, most=40).items()
        }
        found[name] = {"unit": unit, "amount": amount, "ms": times, "rate": rate(amount, times)}
        del calls, samplers
        torch.cuda.empty_cache()
    return found


def rate(amount: float, times: dict[str, Any]) -> float:
    """Bytes or operations per second, from median milliseconds, of the slowest direction."""
    return min(amount / time["p50"] * 1e3 for time in times.values())


def _copy(device: torch.device) -> dict[str, Any]:
    source = torch.randint(256, (COPIED,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source)}


def _matmul(device: torch.device) -> dict[str, Any]:
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return {"matmul": lambda: torch.mm(a, b, out=out)}


def _host(device: torch.device) -> dict[str, Any]:
    there = torch.randint(256, (HOST_COPIED,), dtype=torch.uint8, device=device)
    here = torch.empty(HOST_COPIED, dtype=torch.uint8, pin_memory=True)
    return {
        "device to host": lambda: here.copy_(there, non_blocking=True),
        "host to device": lambda: there.copy_(here, non_blocking=True),
    }


CEILINGS = {
    "copy": (_copy, 2.0 * COPIED, "bytes/s"),
    "matmul": (_matmul, 2.0 * SIDE**3, "FLOP/s"),
    "host": (_host, float(HOST_COPIED), "bytes/s"),
}
"Name -> how, bytes or operations of one call, unit of the rate."
