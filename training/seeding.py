"""Random streams: every random number of a run is a function of (seed, stream name, counters).

Nothing random is stored in a checkpoint. A run that resumes at step k draws what the uninterrupted
run would have drawn, and changing one stream (say `eval`) moves no other.
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax
    import torch


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed, uniform over the streams and counters (blake2b of their text)."""
    text = "/".join([str(int(seed)), stream, *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """A numpy generator of its own for one stream."""
    return np.random.Generator(np.random.Philox(stream_seed(seed, stream, *counters)))


def torch_generator(
    seed: int, stream: str, *counters: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator of its own for one stream, on `device`."""
    import torch

    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream, *counters))


def jax_key(seed: int, stream: str, *counters: int) -> jax.Array:
    """A jax PRNG key of its own for one stream."""
    import jax

    return jax.random.key(stream_seed(seed, stream, *counters) & 0x7FFFFFFF)


def seed_global_generators(seed: int) -> None:
    """Seed the process-wide generators, for library code that draws from them unasked."""
    random.seed(stream_seed(seed, "python"))
    np.random.seed(stream_seed(seed, "numpy") & 0xFFFFFFFF)


def deterministic_torch() -> None:
    """Make torch refuse operations whose result depends on scheduling."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
