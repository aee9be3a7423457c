"""Presses: a context's keys and values, cut down to those that matter.

    reading = read(model, context)
    scores = snapkv(reading)                            one [b, kv, s] for each layer
    prefix = press(reading, scores, keep=64)            each head keeps its 64 best rows

Every press is a score; what is kept and gathered is the same for all. Kept keys stay at the
position that they were rotated to, and the next token stands where it would after the whole
context. None of them sees the question, unless the reading holds it: pass `context` tokens only,
and the press is query-agnostic; read the question too and score with it (`snapkv(..., question=n)`)
and it is query-aware, which speeds up one answer and compresses nothing.

    random             a number drawn for each token, or for each token and head
    streaming_llm      the first tokens and the last ones    Xiao et al., 2023, arXiv:2309.17453
    key_norm           keys of low norm                      Devoto et al., 2024, arXiv:2406.11430
    snapkv             attention of the last queries         Li et al., 2024, arXiv:2404.14469
    tova               attention of the last query           Oren et al., 2024, arXiv:2401.06104
    h2o                attention of all queries              Zhang et al., 2023, arXiv:2306.14048
    expected_attention what queries to come should attend to Devoto et al., 2025, arXiv:2510.00636
    keydiff            keys unlike the mean key              Park et al., 2025, arXiv:2504.15364
    kvzip              most attention while the context is   Kim et al., 2025, arXiv:2505.23416
                       repeated

H2O evicts while it reads; here, as in NVIDIA's kvpress, it ranks once at the end.
KVzip scores chunks of a long context one after the other; here the context is repeated whole.

Dimensions: b sequences, s rows of the context, kv key/value heads, g query heads of each, hd width.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from kernels.kv_cache.compaction.scores import (
    average_rotation,
    score_expected_attention,
    score_key_norm,
    score_window_attention,
)
from kernels.kv_cache.compaction.selection import Kept, adaptive_budgets, select_top
from models.language.layers import rotary, rotate
from models.language.prefix import Prefix, Reading, read

Scores = list[Float[Tensor, "b kv s"]]
SINK = 4


def press(
    reading: Reading,
    scores: Scores,
    keep: int,
    *,
    rows: int | None = None,
    adaptive: bool = False,
    floor: int = 0,
) -> Prefix:
    """The prefix of what each head keeps.

    Args:
        scores: of each layer; rows of -inf are never kept, rows of +inf before all others.
        keep: rows that a head keeps, on average over the heads of a layer.
        rows: how many of the reading's tokens are context, from the first; None: all.
        adaptive: let the heads of a layer compete for its rows (Ada-KV, arXiv:2407.11550); what a
            head does not keep takes no memory.
        floor: rows that each head keeps at least, if they compete.
    Raises:
        ValueError: keep is not in 1..rows.
    """
    whole = reading.keys[0].shape[1] if rows is None else rows
    if not 1 <= keep <= whole:
        raise ValueError(f"keep={keep} must be between 1 and the {whole} rows of the context")
    layers, counts = [], []
    for k, v, score in zip(reading.keys, reading.values, scores, strict=True):
        score = score[..., :whole]
        budget: int | Tensor = keep
        if adaptive:
            budget = adaptive_budgets(score, keep * score.shape[1], floor)
        kept = select_top(score, budget)
        layers.append((gather_rows(k, kept), gather_rows(v, kept)))
        counts.append(kept.counts)
    position = reading.start + whole
    return Prefix(tuple(layers), position, tuple(counts) if adaptive else None)


def gather_rows(x: Float[Tensor, "b s kv hd"], kept: Kept) -> Float[Tensor, "b most kv hd"]:
    """The rows that each head keeps, in order, up to the last place; zeros before them."""
    most = kept.tokens.shape[2]
    shift = (most - kept.counts)[..., None]  # right-aligned: absent rows come first
    place = torch.arange(most, device=x.device) - shift  # [b, kv, most]
    token = kept.tokens.long().gather(2, place.clamp(min=0)).clamp(min=0)
    rows = rearrange(x, "b s kv hd -> b kv s hd").gather(
        2, token[..., None].expand(-1, -1, -1, x.shape[-1])
    )
    rows = torch.where((place >= 0)[..., None], rows, 0.0)
    return rearrange(rows, "b kv most hd -> b most kv hd")


def random(
    reading: Reading, *, generator: torch.Generator | None = None, per_head: bool = False
) -> Scores:
    """A number for each token, the same in all layers and heads, or one for each of these."""
    b, s, kv, _ = reading.keys[0].shape

    def draw(heads: int) -> Tensor:
        return torch.rand(b, heads, s, generator=generator).to(reading.keys[0].device)

    if per_head:
        return [draw(kv) for _ in reading.keys]
    return [draw(1).expand(b, kv, s)] * len(reading.keys)


def streaming_llm(reading: Reading, *, sink: int = SINK) -> Scores:
    """The first `sink` tokens, then the last ones."""
    b, s, kv, _ = reading.keys[0].shape
    position = torch.arange(s, device=reading.keys[0].device, dtype=torch.float32)
    score = torch.where(position < sink, float("inf"), position)
    return [score.expand(b, kv, s)] * len(reading.keys)


def key_norm(reading: Reading) -> Scores:
    """Minus the norm of each key."""
    return [score_key_norm(k) for k in reading.keys]


def snapkv(
    reading: Reading, *, window: int = 16, kernel_size: int = 5, question: int = 0
) -> Scores:
    """Attention of the last `window` queries, which are kept themselves.

    Args:
        question: so many tokens at the end of the reading are no context, and their queries are
            the window: query-aware.
    """
    if question:
        return [
            score_window_attention(q[:, -question:], k, kernel_size=kernel_size, keep_window=True)
            for q, k in zip(reading.queries, reading.keys, strict=True)
        ]
    window = min(window, reading.keys[0].shape[1])
    return [
        score_window_attention(q[:, -window:], k, kernel_size=kernel_size)
        for q, k in zip(reading.queries, reading.keys, strict=True)
    ]


def tova(reading: Reading) -> Scores:
    """Attention of the last query, the mean over all heads, so that all keep the same tokens."""
    scores = [
        score_window_attention(q[:, -1:], k, kernel_size=1, keep_window=False)
        for q, k in zip(reading.queries, reading.keys, strict=True)
    ]
    return [reduce(score, "b kv s -> b 1 s", "mean").expand_as(score) for score in scores]


def h2o(reading: Reading) -> Scores:
    """Attention that each key has received from all queries, its own included."""
    return [
        score_window_attention(q, k, kernel_size=1, keep_window=False)
        for q, k in zip(reading.queries, reading.keys, strict=True)
    ]


def expected_attention(reading: Reading, *, future: int = 512, sink: int = SINK) -> Scores:
    """Attention that a Gaussian query at one of the next `future` positions is expected to pay."""
    device, config = reading.keys[0].device, reading.config
    seen = torch.arange(reading.start, reading.position, device=device)
    cos, sin = rotary(config, seen)
    coming = torch.arange(reading.position, reading.position + future, device=device)
    next_cos, next_sin = (x[:, 0] for x in rotary(config, coming))
    found = []
    for q, k, v in zip(reading.queries, reading.keys, reading.values, strict=True):
        back = rotate(q.to(cos.dtype), cos, -sin)[:, min(sink, q.shape[1] - 1) :]  # unrotated
        mean = back.mean(1)  # [b, h, hd]
        centred = back - mean[:, None]
        covariance = torch.einsum("b t h i, b t h j -> b h i j", centred, centred) / back.shape[1]
        mean, covariance = average_rotation(mean, covariance, next_cos, next_sin)
        assert covariance is not None
        mean, covariance = mean.to(k.dtype), covariance.to(k.dtype)
        found.append(score_expected_attention(mean, covariance, k, v, sink=sink))
    return found


def keydiff(reading: Reading) -> Scores:
    """Minus the cosine between each key and the mean direction of the keys of its head."""
    found = []
    for k in reading.keys:
        unit = torch.nn.functional.normalize(k.float(), dim=-1)
        mean = torch.nn.functional.normalize(unit.mean(1, keepdim=True), dim=-1)
        found.append(-rearrange((unit * mean).sum(-1), "b s kv -> b kv s"))
    return found


def kvzip(reading: Reading, model: Any, repeat: Int[Tensor, "b t"]) -> Scores:
    """The most attention that each key gets while the context is repeated after itself.

    Args:
        repeat: a prompt that asks for the context, and the context; costs reading it once more.
    """
    again = read(model, repeat, reading.prefix())
    found = []
    for q, k, own in zip(again.queries, reading.keys, again.keys, strict=True):
        s, t = k.shape[1], q.shape[1]
        queries = rearrange(q.float(), "b t (kv g) hd -> b kv (g t) hd", kv=k.shape[2])
        keys = rearrange(torch.cat([k, own], dim=1).float(), "b s kv hd -> b kv hd s")
        logits = rearrange(queries @ keys, "b kv (g t) s -> b kv g t s", t=t) * k.shape[3] ** -0.5
        later = torch.arange(s + t, device=k.device) > s + torch.arange(t, device=k.device)[:, None]
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
        found.append(reduce(weights[..., :s], "b kv g t s -> b kv s", "max"))
    return found


PRESSES = {
    "random": random,
    "streaming_llm": streaming_llm,
    "key_norm": key_norm,
    "snapkv": snapkv,
    "tova": tova,
    "h2o": h2o,
    "expected_attention": expected_attention,
    "keydiff": keydiff,
    "kvzip": kvzip,
}
"Those that do not see the question, by name."
