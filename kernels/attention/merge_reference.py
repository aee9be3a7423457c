"""The definition of `merge_states`: attention over several sets of keys from that over each.

softmax(S) V over the union of disjoint sets i of keys, where attention over set i alone is out_i
and the log of its softmax's denominator is lse_i (Hydragen: Juravsky et al., 2024,
arXiv:2402.05099; FlashInfer: Ye et al., 2025, arXiv:2501.01005):

    exp(lse) = sum_i exp(lse_i)          out = sum_i exp(lse_i - lse) out_i
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def merge_states(
    states: Sequence[tuple[Float[Tensor, "*b t h d"], Float[Tensor, "*b h t"]]],
) -> tuple[Float[Tensor, "*b t h d"], Float[Tensor, "*b h t"]]:
    """As `kernels.attention.merge.merge_states`; float64 stays float64."""
    dtype = torch.promote_types(states[0][0].dtype, torch.float32)
    empty = torch.stack([lse == float("-inf") for _, lse in states]).all(dim=0)
    # A finite -1e300 rather than -inf keeps the gradients of empty rows finite; zeroed below.
    nothing = torch.finfo(dtype).min / 4
    total = torch.stack([lse.to(dtype).clamp(min=nothing) for _, lse in states]).logsumexp(dim=0)
    merged = torch.zeros_like(states[0][0], dtype=dtype)
    for out, lse in states:
        saw_nothing = lse == float("-inf")
        weight = torch.exp(lse.to(dtype).clamp(min=nothing) - total).masked_fill(saw_nothing, 0.0)
        out = out.to(dtype).masked_fill(saw_nothing.mT[..., None], 0.0)
        merged = merged + weight.mT[..., None] * out
    return merged.to(states[0][0].dtype), total.masked_fill(empty, float("-inf"))
