"""Learning rates as a function of the step, shared by the torch and the jax step helpers."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from training.schema import OptimConfig, Schedule


def lr_scale(config: OptimConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate at `step` of `steps`, in (0, 1].

    Linear warm-up over `warmup_steps`, then constant, linear, cosine (SGDR, 2016, arXiv:1608.03983,
    eq. 5, one period), or wsd: constant until the last `decay_fraction`, then linear
    (MiniCPM, 2024, arXiv:2404.06395), or exponential. All but constant end at `final_lr_ratio`.
    With `restart` the whole of it, warm-up too, comes twice: until that share of the steps, and
    from there on.
    """
    first = math.ceil(config.restart * steps)
    step, steps = (step, first) if step < first else (step - first, steps - first)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    if config.schedule == Schedule.cosine:
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.schedule == Schedule.linear:
        left = 1.0 - done
    elif config.schedule == Schedule.wsd:
        left = min(1.0, (1.0 - done) / max(config.decay_fraction, 1e-9))
    elif config.schedule == Schedule.exponential:
        return config.final_lr_ratio**done
    else:
        return 1.0
    return config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left


def lr_table(config: OptimConfig, steps: int) -> Float[np.ndarray, " steps"]:
    """`lr_scale` of every step, float32."""
    return np.array([lr_scale(config, step, steps) for step in range(steps)], np.float32)
