"""The definition of the losses of a linear head, against which the fast paths are tested.

Written to be checked by eye: it materialises the whole [n, vocab] matrix of logits and shares no
code with the fast paths. float64 stays float64; anything narrower than float32 is computed in
float32. Arguments as in `op.py`, on hidden [n, d]; a target or token is in range or marked.

Dimensions: n tokens (rows), d width of the hidden states, k tokens that the teacher named.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_probabilities(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "vocab d"],
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, "n vocab"]:
    """log softmax(softcap(hidden weight^T) / temperature)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    return logits - logits.logsumexp(dim=-1, keepdim=True)


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "vocab d"],
    targets: Int[Tensor, " n"],
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "*n"]:
    """-log p(target) of each row; 0 where the target is `ignore_index`."""
    logprobs = log_probabilities(hidden, weight, softcap=softcap)
    losses, counted = [], []
    for row, target in enumerate(targets.tolist()):
        counted.append(target != ignore_index)
        losses.append(-logprobs[row, target] if counted[-1] else logprobs[row].sum() * 0)
    return _reduce(losses, counted, reduction, logprobs)


def linear_logprobs(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "vocab d"],
    tokens: Int[Tensor, " n"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log p(token) of each row, 0 where the token is -1, and the entropy of p."""
    logprobs = log_probabilities(hidden, weight, temperature, softcap)
    selected = logprobs.gather(1, tokens.clamp(min=0).long()[:, None])[:, 0]
    return selected.masked_fill(tokens == -1, 0.0), -(logprobs.exp() * logprobs).sum(dim=1)


def linear_distillation(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "vocab d"],
    teacher_tokens: Int[Tensor, "n k"],
    teacher_logprobs: Float[Tensor, "n k"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    tail: str = "ignore",
    reduction: str = "mean",
) -> Float[Tensor, "*n"]:
    """sum_j p_j (log p_j - log q_j) over the teacher's tokens of each row, q the student's.

    tail: "ignore" stops there, "renormalise" divides p by its sum first, "lump" adds the same term
    for all other tokens taken as one. A row without a teacher's token is 0.
    """
    logprobs = log_probabilities(hidden, weight, temperature, softcap)
    losses, counted = [], []
    for row in range(len(hidden)):
        named = teacher_tokens[row] != -1
        log_p = teacher_logprobs[row][named].to(logprobs.dtype)
        log_q = logprobs[row, teacher_tokens[row][named].long()]
        if tail == "renormalise" and len(log_p):
            log_p = log_p - log_p.logsumexp(dim=0)
        terms = [p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -torch.inf]
        p_rest = 1 - log_p.exp().sum()
        if tail == "lump" and len(log_p) and p_rest > 0:
            others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            others[teacher_tokens[row][named].long()] = False
            terms.append(p_rest * (p_rest.log() - logprobs[row][others].logsumexp(dim=0)))
        counted.append(len(log_p) > 0)
        losses.append(sum(terms, start=logprobs[row].sum() * 0))
    return _reduce(losses, counted, reduction, logprobs)


def _reduce(losses: list[Tensor], counted: list[bool], reduction: str, like: Tensor) -> Tensor:
    """The losses, their sum, or their mean over the rows that count (0 if there are none)."""
    losses = torch.stack(losses) if losses else like.sum(dim=1)
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, sum(counted)) if reduction == "mean" else 1)
