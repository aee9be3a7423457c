"""How the cost of reading grows with the context: seconds of a prefill, bytes of what is kept.

Times are medians of repeated calls after a first one that compiles. On a CPU only the exponent is
evidence of anything: ratios between architectures there say nothing about a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

ENOUGH_S = 10.0  # of timing one length


def prefill_cost(
    prepare: Callable[[int], Callable[[], object]],
    state_bytes: Callable[[int], int],
    lengths: Sequence[int],
    repeats: int = 3,
) -> dict[str, Any]:
    """Time the reading of contexts of several lengths.

    Args:
        prepare: length -> a call that reads so many tokens and waits for the result.
        state_bytes: length -> bytes that a sequence keeps after so many tokens.
    Returns:
        Per length `seconds` and `bytes`; `log2_seconds` by length, whose differences are ratios of
        times; `exponent` of the time over all lengths, and `exponent_end` over the last two;
        `growth`, the bytes' ratio from the first length to the last.
    """
    seconds = []
    for length in lengths:
        call = prepare(length)
        call()
        taken = []
        while len(taken) < repeats and sum(taken) < ENOUGH_S:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        seconds.append(median(taken))
    kept = [state_bytes(length) for length in lengths]
    return {
        "lengths": list(lengths),
        "seconds": seconds,
        "bytes": kept,
        "log2_seconds": {str(n): math.log2(s) for n, s in zip(lengths, seconds, strict=True)},
        "exponent": exponent(lengths, seconds),
        "exponent_end": exponent(lengths[-2:], seconds[-2:]),
        "growth": kept[-1] / kept[0],
    }


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of log time over log length, by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
