"""How a time is measured: many samples, taken in turn, of calls that do not wait for the CPU.

A sample is one replay of a CUDA graph that holds one call for each set of inputs, between two
events, divided by the number of calls. The sets together are larger than three times the L2 cache,
so that none of them is still cached when its turn comes. Entries are sampled in turn, forwards and
backwards (A B C, C B A, ...), so that a clock that drifts drifts for all of them. A graph that
cannot be captured is replaced by the calls themselves, and the result says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Sampler = Callable[[], float]
"Milliseconds of one call."

SPIN_CYCLES = 200_000
"The GPU is kept busy for about 0.1 ms before a sample, until the CPU has queued all of it."

CACHE_SIZES = 3
MOST_SETS = 64
LEAST_SAMPLES, MOST_SAMPLES = 20, 100


class OutOfTime(Exception):
    """The budget ended before a case had enough samples."""


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and spread in milliseconds, and the samples they come from (4 digits)."""
    kept = [float(f"{sample:.4g}") for sample in samples]
    return {
        **{f"p{round(100 * q)}": quantile(kept, q) for q in (0.2, 0.5, 0.8)},
        "samples": kept,
    }


def sets_of_inputs(size: float, cache: float, *, least: int = 2, most: int = MOST_SETS) -> int:
    """How many sets of `size` bytes pass CACHE_SIZES times the cache."""
    return max(least, min(most, math.ceil(CACHE_SIZES * cache / max(size, 1.0))))


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: forwards, then backwards."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def interleave(
    samplers: Mapping[str, Sampler],
    *,
    seconds: float,
    deadline: float = math.inf,
    least: int = LEAST_SAMPLES,
    most: int = MOST_SAMPLES,
    warmup: int = 2,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Samples of every entry, taken in turn.

    Args:
        seconds: rounds are added until this has passed and there are `least`, or there are `most`.
        deadline: of `clock`.
    Raises:
        OutOfTime: the deadline came before `least` rounds.
    """
    names = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    began = clock()
    for turn in range(-warmup, most):
        enough = turn >= least and clock() - began >= seconds
        if not names or enough:
            break
        if clock() > deadline:
            if turn >= least:
                break
            raise OutOfTime(f"{max(turn, 0)} of {least} rounds")
        for name in in_turn(names, turn):
            sample = samplers[name]()
            if turn >= 0:
                taken[name].append(sample)
    return taken


def gpu_sampler(
    calls: Sequence[Callable[[], Any]],
    stream: torch.cuda.Stream,
    *,
    capturable: bool = True,
    warmup: int = 3,
) -> tuple[Sampler, str]:
    """A sampler of `calls`, one for each set of inputs, and how it runs them."""

    def every() -> None:
        for call in calls:
            call()

    with torch.cuda.stream(stream):
        for _ in range(warmup):
            every()
    stream.synchronize()
    if not capturable:
        return _between_events(every, len(calls), stream), "events"
    before = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        # Autograd calls backward passes from a thread of its own.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            every()
    except Exception as error:
        torch.cuda.set_stream(before)  # a capture that fails leaves its stream behind
        torch.cuda.synchronize()
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        how = f"events, as no graph could be captured: {reason[:160]}"
        return _between_events(every, len(calls), stream), how
    return _between_events(graph.replay, len(calls), stream), "graph"


def _between_events(run: Callable[[], object], calls: int, stream: torch.cuda.Stream) -> Sampler:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record(stream)
            run()
            end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / calls

    return sample
