"""One case: every entry is prepared, checked with the oracle, seen to run, then timed in turn."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from kernels.bench.cases import Case, Entry, Inputs, Parts, fresh_compilations
from kernels.bench.results import judged
from kernels.bench.timing import Sampler, gpu_sampler, interleave, sets_of_inputs, summary
from kernels.parity.case import poisoned

SECONDS = 2.0
"Spent on the samples of a case, unless LEAST_SAMPLES take longer."


PATIENCE = {"peer": 180.0, "ours": 75.0, "variant": 45.0}
"Seconds until an entry must be hanging: it compiles, runs and is profiled. flex compiles longest."

STAGES = ("inputs and oracle", "samples")
"What a case does besides its entries."


class DeviceLost(Exception):
    """The GPU context is unusable: only a new process can go on."""


def relative_errors(got: Parts, expected: Parts) -> dict[str, float]:
    """||got - expected|| / ||expected|| of each part; infinite where got is not finite."""
    errors = {}
    for name, exact in expected.items():
        x, exact = got[name].detach().double(), exact.detach().double().to(got[name].device)
        if x.shape != exact.shape:
            raise ValueError(f"{name} is {list(x.shape)}, the oracle's {list(exact.shape)}")
        norm, difference = exact.norm().item(), (x - exact).norm().item()
        error = difference / norm if norm else difference
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def check(case: Case, entry: Entry, output: Any, inputs: Inputs, oracle: Parts) -> dict[str, Any]:
    """error, cap and status ("" if right) of what an entry returned."""
    expected = oracle if entry.expected is None else entry.expected(inputs)
    cap = case.cap if entry.cap is None else entry.cap
    errors = relative_errors(case.parts(output), expected)
    worst = max(errors, key=lambda name: errors[name])
    # JSON has no infinity.
    said = {n: float(f"{e:.3g}") if math.isfinite(e) else None for n, e in errors.items()}
    row = {"error": said, "cap": cap}
    if errors[worst] <= cap:
        return {**row, "status": "", "reason": ""}
    reason = f"{worst} is {errors[worst]:.2e} from the oracle, at most {cap:g} is allowed"
    return {**row, "status": "wrong", "reason": reason}


def heading(case: Case) -> dict[str, Any]:
    """What a row says of its problem."""
    return {
        "case": case.id,
        "fingerprint": case.fingerprint(),
        "shapes": dict(case.shapes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "flops": case.work.flops,
        "bytes": case.work.bytes,
        "through_host": case.through_host,
    }


def failed(case: Case, reason: str) -> dict[str, Any]:
    """The row of a case that could not be set up; a later call tries again."""
    return {**heading(case), "complete": False, "entries": [], "targets": [], "reason": reason}


def description(entry: Entry) -> dict[str, Any]:
    """What a row says of an entry before it has run."""
    row: dict[str, Any] = {"name": entry.name, "ours": entry.ours, "variant": entry.variant}
    row["note"] = entry.note
    if entry.work is not None:
        row |= {"flops": entry.work.flops, "bytes": entry.work.bytes}
    return row


def dry_run(case: Case) -> dict[str, Any]:
    """Compose the case on the CPU and check every entry that runs there. Nothing is timed."""
    device = torch.device("cpu")
    inputs = case.inputs(device, 0)
    oracle = case.expected(inputs)
    entries = []
    for entry in case.entries:
        row = description(entry)
        if entry.on_cpu:
            row |= check(case, entry, entry.prepare(inputs)(), inputs, oracle)
            row["status"] = row["status"] or "right"
        else:
            row |= {"status": "left out", "reason": "needs a GPU"}
        entries.append(row)
    return {**heading(case), "entries": entries}


def on_gpu(
    case: Case,
    device: torch.device,
    ceilings: Mapping[str, Any],
    *,
    crashed: Mapping[str, str],
    deadline: float = math.inf,
    report: Callable[[str, float], None] = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 1,
) -> dict[str, Any]:
    """The row of a case.

    Args:
        crashed: entries that an earlier process died in, and how: left out.
        report: told what runs next, and after how many seconds it must be hanging.
    Raises:
        OutOfTime: the deadline came first. DeviceLost: an entry took the GPU's context with it.
    """
    stream = torch.cuda.Stream(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = sets_of_inputs(case.footprint or case.work.bytes, cache)
    entries, samplers = [], {}
    with fresh_compilations():
        report(STAGES[0], PATIENCE["peer"])
        with torch.cuda.stream(stream):
            inputs = [case.inputs(device, seed + index) for index in range(count)]
            oracle = case.expected(inputs[0])
        for entry in case.entries:
            row = description(entry)
            entries.append(row)
            if entry.name in crashed:
                row |= {"status": "crashed", "reason": crashed[entry.name]}
                continue
            kind = "variant" if entry.variant else "ours" if entry.ours else "peer"
            report(entry.name, PATIENCE[kind])
            found, sampler = admit(case, entry, inputs, oracle, stream, clock)
            row |= found
            if sampler is not None:
                samplers[entry.name] = sampler
        report(STAGES[1], PATIENCE["peer"])
        taken = interleave(samplers, seconds=SECONDS, deadline=deadline, clock=clock)
        _still_there()
    for row in entries:
        if row["name"] in taken:
            row["ms"] = summary(taken[row["name"]])
    row = {**heading(case), "complete": True, "input_sets": count, "entries": entries}
    return {**row, "targets": [judged(row, target, ceilings) for target in case.targets]}


def admit(
    case: Case,
    entry: Entry,
    inputs: list[Inputs],
    oracle: Parts,
    stream: torch.cuda.Stream,
    clock: Callable[[], float],
) -> tuple[dict[str, Any], Sampler | None]:
    """What is known of an entry before it is timed, and its sampler if it may be."""
    began = clock()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.cuda.stream(stream):
                calls = [entry.prepare(one) for one in inputs]
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                with poisoned() if entry.ours else nullcontext():
                    output = calls[0]()
                torch.cuda.synchronize()
                first = {"first_call_s": round(clock() - began, 2)}
                first["memory_bytes"] = torch.cuda.max_memory_allocated() - held
                row = first | check(case, entry, output, inputs[0], oracle)
                del output
            if row["status"]:
                return row, None
            row["kernels"] = gpu_kernels(calls[0], stream)
            # None at all: then it is the profiler that does not work on this machine.
            if row["kernels"] and entry.kernels and not seen(entry.kernels, row["kernels"]):
                reason = f"no GPU kernel named like {' or '.join(entry.kernels)} ran"
                return row | {"status": "unseen", "reason": reason}, None
            sampler, how = gpu_sampler(calls, stream, capturable=entry.capturable)
            return row | {"status": "timed", "timed_by": how}, sampler
        except Exception as error:
            _still_there()
            return {"status": "refused", "reason": _reason(error, said)}, None


def seen(wanted: tuple[str, ...], ran: list[str]) -> bool:
    """Whether a kernel that ran has one of the wanted names, or one that contains it."""
    return any(part in name for part in wanted for name in ran)


def gpu_kernels(call: Callable[[], Any], stream: torch.cuda.Stream) -> list[str]:
    """Names of the GPU kernels of one call, in order, each once."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both) as profiler, torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
    names = [
        event.name[:160] for event in profiler.events() if event.device_type == DeviceType.CUDA
    ]
    return list(dict.fromkeys(names))


def _still_there() -> None:
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(str(error).strip().splitlines()[0]) from error


def _reason(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """The error, and what torch warned about before it: there it says why a backend refused."""
    lines = [f"{type(error).__name__}: {error}", *(str(w.message) for w in said)]
    return " | ".join(" ".join(line.split())[:300] for line in lines)[:900]
