"""Which tokens each key/value head keeps: the best scores within a budget.

Sorting is what torch already does well, so there are no kernels here. Equal scores are ranked by
position, the earlier first: the same tokens every time and on every device.

Dimensions: b batch, s keys, kv key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """Tokens that each head of each request keeps; heads may keep different numbers of them."""

    tokens: Int32[Tensor, "b kv most"]
    "Positions in the request, ascending; -1 past a head's count."
    counts: Int32[Tensor, "b kv"]
    "How many tokens a head keeps."


def select_top(
    scores: Float[Tensor, "b kv s"],
    budget: int | Int[Tensor, "b kv"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    sink: int = 0,
    recent: int = 0,
) -> Kept:
    """The tokens with the highest scores, for each head.

    Args:
        scores: as the score functions return them; -inf: never kept, +inf: before all others.
        budget: tokens that each head keeps, or one number for each head; a head with fewer tokens
            keeps them all.
        lengths: tokens of each request, if they differ; 0..s. None: s.
        sink, recent: first and last tokens of each request that are kept whatever their score; they
            count towards the budget.
    Raises:
        ValueError: shapes, dtypes or sizes that contradict each other, a budget that does not hold
            sink and recent, or a score that is not a number. Reads scores and budgets: waits for
            the GPU.
    """
    _check("select_top", scores, lengths, sink, recent)
    scores = _forced(scores, lengths, sink, recent)
    budgets = _budgets(scores, budget, sink + recent)
    order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (rank < budgets[..., None]) & (order.values > float("-inf"))  # [b, kv, s], by rank
    counts = chosen.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    beyond = scores.shape[-1]
    tokens = torch.where(chosen, order.indices, beyond).sort(dim=-1).values[..., :most]
    return Kept(torch.where(tokens < beyond, tokens, -1).int(), counts.int())


def adaptive_budgets(
    scores: Float[Tensor, "b kv s"],
    total: int,
    floor: int = 0,
    *,
    lengths: Int[Tensor, " b"] | None = None,
    sink: int = 0,
    recent: int = 0,
) -> Int32[Tensor, "b kv"]:
    """Budgets for `select_top` that let heads compete (Ada-KV: Feng et al., 2024, arXiv:2407.11550,
    algorithm 1): the best `total` scores of a request over all its heads.

    The paper guards heads with little by mixing its budgets with the uniform total / kv; here, and
    in NVIDIA's kvpress, each head is sure of its `floor` best tokens and the total is exact.

    Args:
        scores: comparable between heads, as attention is.
        total: tokens that all heads of a request keep together; a request with fewer keeps all.
        floor: tokens that each head keeps at least.
        lengths, sink, recent: as for `select_top`: pass it the same.
    Raises:
        ValueError: as for `select_top`, or `total` below kv * max(floor, sink + recent).
    """
    _check("adaptive_budgets", scores, lengths, sink, recent)
    kv, s = scores.shape[1:]
    least = max(floor, sink + recent)
    if floor < 0 or total < kv * least:
        raise ValueError(
            f"adaptive_budgets: total={total} must be at least kv * max(floor, sink + recent) = "
            f"{kv} * {least}, and floor={floor} at least 0"
        )
    scores = _forced(scores, lengths, sink, recent)
    order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(s, device=scores.device)
    present = order.values > float("-inf")
    # Scores of +inf compete too, but never against what a head is sure of.
    most = torch.finfo(scores.dtype).max
    sure = torch.where((rank < least) & present, float("inf"), order.values.clamp(max=most))
    pooled = sure.flatten(1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(kv * s, device=scores.device)
    chosen = (rank < total) & (pooled.values > float("-inf"))
    counts = torch.zeros(len(scores), kv, dtype=torch.int64, device=scores.device)
    counts.scatter_add_(1, pooled.indices // max(s, 1), chosen.long())
    return counts.int()


def _forced(scores: Tensor, lengths: Tensor | None, sink: int, recent: int) -> Tensor:
    """Scores with +inf for sinks and recents, -inf where there is no token."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    last: Tensor | int = scores.shape[-1]
    if lengths is not None:
        last = lengths.to(scores.device)[:, None, None]
    forced: Bool[Tensor, "#b 1 s"] = (position < sink) | (position >= last - recent)
    scores = torch.where(forced, float("inf"), scores)
    return torch.where(position < last, scores, float("-inf"))


def _budgets(scores: Tensor, budget: int | Tensor, least: int) -> Int[Tensor, "#b #kv"]:
    b, kv, _ = scores.shape
    if isinstance(budget, Tensor):
        if budget.shape != (b, kv) or budget.is_floating_point():
            raise ValueError(
                f"select_top: budget must be an int or integers [b, kv] = {[b, kv]}, "
                f"got {list(budget.shape)} {budget.dtype}"
            )
    else:
        budget = torch.tensor([[budget]])
    lowest = int(budget.min()) if budget.numel() else least
    if lowest < least:
        raise ValueError(
            f"select_top: a budget of {lowest} does not hold sink + recent = {least} tokens"
        )
    return budget.to(scores.device)


def _check(op: str, scores: Tensor, lengths: Tensor | None, sink: int, recent: int) -> None:
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ValueError(
            f"{op}: scores must be floats [b, kv, s], got {list(scores.shape)} {scores.dtype}"
        )
    if lengths is not None and (lengths.shape != scores.shape[:1] or lengths.is_floating_point()):
        raise ValueError(
            f"{op}: lengths must be integers [b] = [{len(scores)}], "
            f"got {list(lengths.shape)} {lengths.dtype}"
        )
    if min(sink, recent) < 0:
        raise ValueError(f"{op}: sink={sink} and recent={recent} must be >= 0")
    if bool(scores.isnan().any()):
        raise ValueError(f"{op}: a score is not a number: mend what was scored, or mask it to -inf")
