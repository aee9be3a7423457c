"""The definition of KV compaction: scores, selection and what a compacted cache holds, as loops.

    key norm             A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
                         Devoto et al., 2024, arXiv:2406.11430
    window attention     SnapKV, Li et al., 2024, arXiv:2404.14469
    expected attention   Expected Attention, Devoto et al., 2025, arXiv:2510.00636
    adaptive budgets     Ada-KV, Feng et al., 2024, arXiv:2407.11550

Written to be checked by eye: one token after the other, sharing no code with the fast paths.
float64 stays float64. Arguments are those of the public functions.

Dimensions: b batch (r requests), w queries of the window, s keys, h query heads, kv key/value
heads, d head width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.kv_cache.layout import BlockTable, PagedKV

NEVER, ALWAYS = float("-inf"), float("inf")


def score_key_norm(
    k: Float[Tensor, "b s kv d"], lengths: Int[Tensor, " b"] | None = None
) -> Float[Tensor, "b kv s"]:
    """-||k||: keys of low norm draw much attention."""
    b, s, kv, _ = k.shape
    scores = torch.full((b, kv, s), NEVER, dtype=torch.promote_types(k.dtype, torch.float32))
    for n in range(b):
        for head in range(kv):
            for j in range(_length(lengths, n, s)):
                scores[n, head, j] = -k[n, j, head].to(scores.dtype).square().sum().sqrt()
    return scores


def score_window_attention(
    q_window: Float[Tensor, "b w h d"],
    k: Float[Tensor, "b s kv d"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    pooling: str = "avg",
    kernel_size: int = 5,
    keep_window: bool = True,
) -> Float[Tensor, "b kv s"]:
    """The attention a key gets from the last w queries, on average over them and the group's heads,
    then pooled over its neighbours; the window itself scores +inf."""
    (b, w, h, d), (s, kv) = q_window.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    dtype = torch.promote_types(k.dtype, torch.float32)
    q, k = q_window.to(dtype), k.to(dtype)
    scores = torch.full((b, kv, s), NEVER, dtype=dtype)
    for n in range(b):
        length = _length(lengths, n, s)
        scored = max(length - w, 0) if keep_window else length
        for head in range(kv):
            received, rows = torch.zeros(length, dtype=dtype), 0
            for query_head in range(head * (h // kv), (head + 1) * (h // kv)):
                for i in range(w):
                    position = length - w + i
                    if position >= 0:  # a request shorter than the window has fewer queries
                        logits = scale * (k[n, : position + 1, head] @ q[n, i, query_head])
                        received[: position + 1] += logits.softmax(0)
                        rows += 1
            mean = received[:scored] / max(rows, 1)
            scores[n, head, :scored] = _pool(mean, pooling, kernel_size)
            scores[n, head, scored:length] = ALWAYS
    return scores


def _pool(x: Float[Tensor, " n"], pooling: str, kernel_size: int) -> Float[Tensor, " n"]:
    """The mean or maximum of kernel_size neighbours, what lies outside of x counting as zero."""
    pooled, reach = torch.zeros_like(x), kernel_size // 2
    for j in range(len(x)):
        near = x[max(j - reach, 0) : j + reach + 1]
        pooled[j] = near.sum() / kernel_size if pooling == "avg" else near.max()
    return pooled


def score_expected_attention(
    mean_q: Float[Tensor, "b h d"],
    cov_q: Float[Tensor, "b h d d"] | None,
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv d"] | None = None,
    *,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    sink: int = 4,
    epsilon: float = 0.0,
) -> Float[Tensor, "b kv s"]:
    """The attention a key is expected to get from a Gaussian query, on average over the group's
    heads, times the norm of its value; the first `sink` tokens score +inf.

        z = exp(scale mu^T k + scale^2 k^T Sigma k / 2) = E exp(scale q^T k),   a = z / sum z
    """
    (b, h, d), (s, kv) = mean_q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    dtype = torch.promote_types(k.dtype, torch.float32)
    scores = torch.full((b, kv, s), NEVER, dtype=dtype)
    for n in range(b):
        length = _length(lengths, n, s)
        for head in range(kv):
            keys = k[n, sink:length, head].to(dtype)
            expected = torch.zeros(len(keys), dtype=dtype)
            for query_head in range(head * (h // kv), (head + 1) * (h // kv)):
                logits = torch.zeros(len(keys), dtype=dtype)
                for j, key in enumerate(keys):
                    logits[j] = scale * (mean_q[n, query_head].to(dtype) @ key)
                    if cov_q is not None:
                        logits[j] += scale**2 / 2 * (key @ cov_q[n, query_head].to(dtype) @ key)
                expected += logits.softmax(0) / (h // kv)
            if v is not None:
                expected = (expected + epsilon) * v[n, sink:length, head].to(dtype).norm(dim=-1)
            scores[n, head, sink:length] = expected
            scores[n, head, : min(sink, length)] = ALWAYS
    return scores


def average_rotation(
    mean_q: Float[Tensor, "b h d"],
    cov_q: Float[Tensor, "b h d d"],
    cos: Float[Tensor, "positions d"],
    sin: Float[Tensor, "positions d"],
) -> tuple[Float[Tensor, "b h d"], Float[Tensor, "b h d d"]]:
    """R mu and R Sigma R^T with R the mean over positions of the matrices that rotate a query."""
    half = cos.shape[1] // 2
    rotation = torch.zeros(2 * half, 2 * half, dtype=mean_q.dtype)
    for c, s in zip(cos, sin, strict=True):
        for i in range(half):
            rotation[i, i] += c[i] / len(cos)
            rotation[i, i + half] -= s[i + half] / len(cos)
            rotation[i + half, i] += s[i + half] / len(cos)
            rotation[i + half, i + half] += c[i] / len(cos)
    return mean_q @ rotation.T, rotation @ cov_q @ rotation.T


def select_top(
    scores: Float[Tensor, "b kv s"],
    budget: int | Int[Tensor, "b kv"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    sink: int = 0,
    recent: int = 0,
) -> list[list[list[int]]]:
    """The tokens that each head of each request keeps, ascending."""
    b, kv, s = scores.shape
    kept = []
    for n in range(b):
        ranked = [
            _ranked(scores[n, head], _length(lengths, n, s), sink, recent) for head in range(kv)
        ]
        budgets = [budget] * kv if isinstance(budget, int) else budget[n].tolist()
        kept.append(
            [sorted(j for _, j in row[:most]) for row, most in zip(ranked, budgets, strict=True)]
        )
    return kept


def adaptive_budgets(
    scores: Float[Tensor, "b kv s"],
    total: int,
    floor: int = 0,
    *,
    lengths: Int[Tensor, " b"] | None = None,
    sink: int = 0,
    recent: int = 0,
) -> list[list[int]]:
    """How many tokens each head keeps if `total` are kept over all of them: first the `floor` best
    (or its sinks and recents) of each, then the best of what is left of all."""
    b, kv, s = scores.shape
    budgets = []
    for n in range(b):
        ranked = [
            _ranked(scores[n, head], _length(lengths, n, s), sink, recent) for head in range(kv)
        ]
        least = max(floor, sink + recent)
        counts = [min(least, len(row)) for row in ranked]
        rest = [(minus, head, j) for head, row in enumerate(ranked) for minus, j in row[least:]]
        for _, head, _ in sorted(rest)[: total - sum(counts)]:
            counts[head] += 1
        budgets.append(counts)
    return budgets


def _ranked(
    scores: Float[Tensor, " s"], length: int, sink: int, recent: int
) -> list[tuple[float, int]]:
    """(minus score, token) of what may be kept, best first, the earlier of two equal ones first."""
    found = []
    for j in range(length):
        forced = j < sink or j >= length - recent
        score = ALWAYS if forced else scores[j].item()
        if score > NEVER:
            found.append((-score, j))
    return sorted(found)


def compact(
    cache: PagedKV,
    table: BlockTable,
    kept: list[list[list[int]]],
    rope: tuple[Tensor, Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """What each (request, head) row of the compacted cache holds: keys and values [n, d] as they
    are stored (with `rope`: keys in float64), and scales [n, 2] of a quantised cache.

    With `rope` the key of token j, which was rotated to position j, is moved to its rank n among
    the kept ones: turned back by the angles of j - n positions.
    """
    rows = []
    for request, heads in enumerate(kept):
        for head, tokens in enumerate(heads):
            keys, values, scales = [], [], []
            for rank, j in enumerate(tokens):
                page, slot = int(table.pages[request, j // cache.page]), j % cache.page
                key, value = cache.data[page, :, slot, head]
                keys.append(key if rope is None else _turned_back(key, j - rank, *rope))
                values.append(value)
                if cache.scales is not None:
                    scales.append(cache.scales[page, :, slot, head])
            rows.append((_stack(keys, cache), _stack(values, cache), _stack(scales, cache, 2)))
    return [(k, v, None if cache.scales is None else x) for k, v, x in rows]


def _turned_back(key: Tensor, positions: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + d/2) turned by minus the angles of a position."""
    first, second = key.double().chunk(2)
    c, s = cos[positions, : len(first)].double(), sin[positions, len(first) :].double()
    return torch.cat([first * c + second * s, second * c - first * s])


def _stack(rows: list[Tensor], cache: PagedKV, width: int | None = None) -> Tensor:
    return torch.stack(rows) if rows else torch.empty(0, width or cache.d, dtype=cache.data.dtype)


def _length(lengths: Tensor | None, n: int, s: int) -> int:
    return s if lengths is None else int(lengths[n])
