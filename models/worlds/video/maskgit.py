"""Tokens of a frame, drawn many at a time, the surest first.

MaskGIT: Masked Generative Image Transformer, 2022, arXiv:2202.04200. All tokens are masked at
first. At each of S steps every masked token is drawn from what the model says of it, and those are
kept that it is surest of, until after step s

    n_s = ceil(N (1 - cos(pi (s + 1) / (2 S))))       at least one more than before; n_{S-1} = N

are known. What it is surest of is randomised, less and less: log p + choice (1 - n_s / N) gumbel.

Dimensions: b frames, n tokens of a frame, v codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

DRAWN, CHOSEN = 0, 1  # what numbers are for


def counts(tokens: int, steps: int) -> list[int]:
    """How many tokens are known after each step.

    Raises:
        ValueError: more steps than tokens.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"{steps} steps for {tokens} tokens: give 1 to {tokens}")
    found, known = [], 0
    for step in range(steps):
        share = 1 - math.cos(math.pi * (step + 1) / (2 * steps))
        left = steps - 1 - step  # each step has one of its own
        known = min(max(known + 1, math.ceil(tokens * share - 1e-9)), tokens - left)
        found.append(known)
    return found


def fill(
    tell: Callable[[Int64[Tensor, "b n"]], Float[Tensor, "b n v"]],
    even: Float[Tensor, "b steps 2 n"],
    mask: int,
    temperature: float,
    choice: float,
) -> Int64[Tensor, "b n"]:
    """Frames drawn from nothing.

    Args:
        tell: tokens, some of them `mask` -> logits of the codes.
        even: numbers in (0, 1) that decide all.
        temperature: of drawing a token; 0 takes the likeliest.
        choice: how much chance there is in which tokens are kept.
    """
    b, steps, _, n = even.shape
    even = even.clamp(1e-6, 1 - 1e-6)
    tokens = torch.full((b, n), mask, device=even.device)
    for step, known in enumerate(counts(n, steps)):
        logits = tell(tokens).float()
        drawn = logits.argmax(-1)
        if temperature:
            p = (logits / temperature).softmax(-1)
            below = p.cumsum(-1) < even[:, step, DRAWN, :, None]  # as many codes lie below
            drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
        sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        gumbel = -(-even[:, step, CHOSEN].log()).log()
        sure = sure + choice * (1 - known / n) * gumbel
        sure = sure.masked_fill(tokens != mask, torch.inf)
        keep = sure.argsort(dim=-1, descending=True, stable=True)[:, :known]
        now = torch.where(tokens != mask, tokens, drawn)
        tokens = tokens.scatter(1, keep, now.gather(1, keep))
    return tokens
