"""Actions as vectors: of one number, or of several parts.

An action is one integer, so that a world of three actions and one of twenty keys and a mouse look
the same from outside. That of several parts is the number that they are in mixed radix,

    action = part_0 + n_0 (part_1 + n_1 (part_2 + ...)),

and its vector is the sum of the vectors of its parts, as in VPT's own models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


def strides(counts: Sequence[int]) -> list[int]:
    """What one more of each part adds to the number."""
    return [math.prod(counts[:i]) for i in range(len(counts))]


class ActionTable(nn.Embedding):
    """A vector for every action: the sum of its parts'.

    Args:
        counts: values of each part.
        d: width of a vector.
        none: one more number, after the last action, that says that no action is known.
    """

    def __init__(self, counts: Sequence[int], d: int, none: bool = False) -> None:
        super().__init__(sum(counts) + none, d)
        self.counts, self.actions = tuple(counts), math.prod(counts)

    def forward(self, input: Int64[Tensor, " ..."]) -> Float[Tensor, "... d"]:
        """Of actions."""
        if len(self.counts) == 1:
            return super().forward(input)
        first = accumulate(self.counts, initial=0)
        each = zip(self.counts, strides(self.counts), first, strict=False)
        rows = torch.stack([input // stride % n + start for n, stride, start in each], dim=-1)
        vectors = super().forward(rows).sum(-2)
        unknown = (input == self.actions)[..., None]
        return torch.where(unknown, self.weight[-1], vectors)


def packed(parts: Int64[np.ndarray, "... k"], counts: Sequence[int]) -> Int64[np.ndarray, " ..."]:
    """Actions of their parts."""
    return (parts * np.array(strides(counts), np.int64)).sum(-1)
