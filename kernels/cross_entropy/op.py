"""Losses of a linear head, without its [n, vocab] logits: training, RL and distillation.

    linear_cross_entropy   -log p(target)                        of hidden states, a head's weight
    linear_logprobs        log p(token), and the entropy         and token ids
    linear_distillation    sum_j p_j (log p_j - log q_j) over the teacher's most likely tokens

with p (of the student: q) = softmax(softcap(hidden weight^T) / temperature). All three are a few
operations on the log-probabilities of the k tokens that they ask for.

    impl       what runs                                              gradients      without
    triton     our kernels (`triton.py`), cuBLAS in the backward      first order    float64
    interpret  the same, interpreted on the CPU, for tests            first order    float64
    torch      logits of a chunk of rows at a time, recomputed for    of any order   -
               the backward pass if there is more than one
    auto       triton on a GPU, else torch; `kernels.record` says which, and why

Memory: no implementation makes a tensor of logits, or of their gradients, of more than `WORKSPACE`
bytes (the kernels: or as many as hidden takes, if that is more; torch: or one row). What else they
need is linear in n and in vocab; `launch.py` lists it. Under autocast hidden and weight are cast to
its dtype, as by `torch.nn.Linear`.

Dimensions: n tokens (rows; written as one, of any number of leading dimensions), d width of the
hidden states, k tokens that the teacher named.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import resolve

WORKSPACE = 256 * 2**20
"Bytes of a tensor of logits, or of their gradients."

PADDING = -1
"A token id that asks for nothing."

REDUCTIONS = ("mean", "sum", "none")
TAILS = ("ignore", "renormalise", "lump")


def linear_cross_entropy(
    hidden: Float[Tensor, "*n d"],
    weight: Float[Tensor, "vocab d"],
    targets: Int[Tensor, "*n"],
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Float[Tensor, "*n"]:
    """Cross-entropy of softmax(hidden weight^T), as of `F.cross_entropy` on the logits.

    Args:
        hidden: any float dtype of 16 bits or more, that of `weight`; differentiable.
        weight: of the head; differentiable. A frozen head costs no gradient work.
        targets: a token id for each row.
        ignore_index: the target of rows that do not count.
        softcap: c > 0 replaces each logit x by c tanh(x / c) (Gemma 2, 2024, arXiv:2408.00118).
        reduction: "mean" over the rows that count (0, with gradients of 0, if there are none),
            "sum", or "none": a loss for each row, 0 where it does not count.
        impl: one of those above.
    Returns:
        The loss in nats, float32 (float64 for float64); a scalar unless reduction="none".
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, an `impl` that cannot run,
            or, on the CPU, a target outside the vocabulary. On a GPU nobody looks, which would mean
            to wait for it: the loss of that row is NaN, and it has no gradient.
    """
    name = "linear_cross_entropy"
    hidden, weight = _prepared(name, hidden, weight, targets, hidden.shape[:-1], "targets")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r} is unknown: use {', '.join(REDUCTIONS)}")
    counts = targets != ignore_index
    _check_range(name, "targets", targets, counts, len(weight), f"ignore_index={ignore_index}")
    logprobs, _ = _selected(
        name, hidden, weight, targets[..., None], counts[..., None], 1.0, softcap, False, impl
    )
    return _reduced(-logprobs[..., 0], counts, reduction)


def linear_logprobs(
    hidden: Float[Tensor, "*n d"],
    weight: Float[Tensor, "vocab d"],
    tokens: Int[Tensor, "*n"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "*n"] | tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Log-probability of one token of each row, as reinforcement learning needs it.

    Args:
        tokens: a token id for each row; -1 for none: log-probability 0, no gradient.
        temperature: > 0, that the token was sampled with; divides the logits after the softcap.
        return_entropy: return the entropy of each row's distribution too; differentiable.
        hidden, weight, softcap, impl: as of `linear_cross_entropy`.
    Returns:
        Log-probabilities in nats, float32 (float64 for float64), and with `return_entropy` the
        entropies. A token outside the vocabulary: as of `linear_cross_entropy`.
    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    name = "linear_logprobs"
    hidden, weight = _prepared(name, hidden, weight, tokens, hidden.shape[:-1], "tokens")
    named = tokens != PADDING
    _check_range(name, "tokens", tokens, named, len(weight), f"padding {PADDING}")
    logprobs, entropy = _selected(
        name, hidden, weight, tokens[..., None], named[..., None],
        temperature, softcap, return_entropy, impl,
    )  # fmt: skip
    return (logprobs[..., 0], entropy) if return_entropy else logprobs[..., 0]


def linear_distillation(
    hidden: Float[Tensor, "*n d"],
    weight: Float[Tensor, "vocab d"],
    teacher_tokens: Int[Tensor, "*n k"],
    teacher_logprobs: Float[Tensor, "*n k"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    tail: str = "ignore",
    reduction: str = "mean",
    impl: str = "auto",
) -> Float[Tensor, "*n"]:
    """Distillation from the k most likely tokens of a teacher, p, into the head's q.

    With tail="ignore" this is the loss of Cartridges (Eyuboglu et al., 2025, arXiv:2506.06266, k =
    20) less the teacher's entropy, which does not depend on the student: p is not renormalised, and
    what is left of it counts nowhere. So the minimum is not 0, and not at q = p.

    Args:
        teacher_tokens: distinct token ids of each row; -1 for padding.
        teacher_logprobs: the teacher's, at the same temperature, natural logarithm; a constant.
            What stands at padding is not read; -inf is p = 0.
        temperature: > 0, divides the student's logits. The loss is not multiplied by its square.
        tail: what becomes of the teacher's probability outside of its k tokens. "ignore": nothing;
            "renormalise": p is divided by its sum; "lump": all other tokens are one more outcome,
            which makes the loss a divergence: never negative, 0 where the teacher and the student
            agree on k tokens and the rest.
        reduction: "mean" over the rows that have a teacher's token (0, with gradients of 0, if
            there are none), "sum", or "none": a loss for each row, 0 where there is none.
        hidden, weight, softcap, impl: as of `linear_cross_entropy`.
    Returns:
        The loss in nats, float32 (float64 for float64); a scalar unless reduction="none".
    Raises:
        ValueError: as `linear_cross_entropy`; on the CPU also a log-probability above 0.
    """
    name = "linear_distillation"
    if 0 in (teacher_tokens.ndim, *teacher_tokens.shape[-1:]):
        raise ValueError(
            f"{name}: teacher_tokens {list(teacher_tokens.shape)} needs at least one token a row"
        )
    expected = (*hidden.shape[:-1], *teacher_tokens.shape[-1:])
    hidden, weight = _prepared(name, hidden, weight, teacher_tokens, expected, "teacher_tokens")
    if teacher_logprobs.shape != teacher_tokens.shape or not teacher_logprobs.is_floating_point():
        raise ValueError(
            f"{name}: teacher_logprobs must be floats of the shape of teacher_tokens "
            f"{list(teacher_tokens.shape)}, got {teacher_logprobs.dtype} "
            f"{list(teacher_logprobs.shape)}"
        )
    for option, value, known in (("tail", tail, TAILS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{name}: {option}={value!r} is unknown: use {', '.join(known)}")
    named = teacher_tokens != PADDING
    _check_range(name, "teacher_tokens", teacher_tokens, named, len(weight), f"padding {PADDING}")
    log_p = teacher_logprobs.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    log_p = torch.where(named, log_p, float("-inf"))
    if _can_be_read(log_p) and bool((log_p > 0).any()):
        raise ValueError(
            f"{name}: teacher_logprobs holds {log_p.max().item():.6g}: a log-probability is <= 0; "
            "pass logarithms of probabilities"
        )
    log_q, _ = _selected(
        name, hidden, weight, teacher_tokens, named, temperature, softcap, False, impl
    )
    return _reduced(_divergence(log_p, log_q, named, tail), named.any(-1), reduction)


def _divergence(log_p: Tensor, log_q: Tensor, named: Tensor, tail: str) -> Tensor:
    """Over the last dimension. log_p is -inf where nothing is named, and log_q 0."""
    if tail == "renormalise":
        log_p = torch.where(named, log_p - log_p.logsumexp(-1, keepdim=True), float("-inf"))
    p = log_p.exp()
    loss = (p * (torch.where(p > 0, log_p, 0.0) - log_q)).sum(-1)
    if tail == "lump":
        least = torch.finfo(log_q.dtype).eps  # of a rest: both sums are rounded
        q_rest = 1 - torch.where(named, log_q.exp(), 0.0).sum(-1)
        p_rest = torch.where(named.any(-1), 1 - p.sum(-1), 0.0).clamp(min=0.0)
        rest = p_rest * (p_rest.clamp(min=least).log() - q_rest.clamp(min=least).log())
        loss = loss + rest
    return loss


def _reduced(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """losses: 0 in rows that do not count."""
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _selected(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    wanted: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    impl: str,
) -> tuple[Float[Tensor, "*n k"], Float[Tensor, "*n"] | None]:
    """Log-probabilities of k tokens of each row, and entropies.

    A token that is not wanted: 0. One outside of the vocabulary: NaN. Neither has a gradient.
    """
    for option, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {option}={value} must be > 0")
    chosen = resolve(
        name, impl, device=hidden.device, table="linear_logsumexp", refusal=_kernel_refusal(hidden)
    )
    inside = wanted & (tokens >= 0) & (tokens < len(weight))
    known = torch.where(inside, tokens, 0).reshape(-1, tokens.shape[-1])  # nothing else is read
    rows, scale = hidden.reshape(-1, hidden.shape[-1]), 1.0 / temperature
    if chosen in ("triton", "interpret"):
        from kernels.cross_entropy.launch import linear_softmax

        logprobs, _, total = linear_softmax(
            rows, weight, known.int(), scale, softcap or 0.0, entropy
        )
    else:
        logprobs, total = _chunked(rows, weight, known.long(), scale, softcap, entropy)
    logprobs = torch.where(inside, logprobs.reshape(tokens.shape), float("nan"))
    return torch.where(wanted, logprobs, 0.0), total.reshape(tokens.shape[:-1]) if entropy else None


def _kernel_refusal(hidden: Tensor) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    if hidden.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"the kernels take float32, float16 and bfloat16, not {hidden.dtype}"


def _chunked(
    hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, softcap, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, k] and entropies [n]; more logits than fit are recomputed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = max(1, WORKSPACE // (len(weight) * wide.itemsize))
    if len(hidden) <= rows:
        return _softmax(hidden, weight, tokens, scale, softcap, entropy)
    if weight.requires_grad and torch.is_grad_enabled():
        weight = weight.to(wide)  # so that its gradient is summed over the chunks in float32
    chunks = [
        checkpoint(
            _softmax, *chunk, tokens_of_chunk, scale, softcap, entropy,
            use_reentrant=False, preserve_rng_state=False,
        )
        for *chunk, tokens_of_chunk in (
            (hidden[i : i + rows], weight, tokens[i : i + rows])
            for i in range(0, len(hidden), rows)
        )
    ]  # fmt: skip
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _softmax(
    hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, softcap, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = F.log_softmax(logits * scale, dim=-1)
    selected = logprobs.gather(-1, tokens)
    if not entropy:
        return selected, selected.new_zeros(len(hidden))
    return selected, -(logprobs.exp() * logprobs).sum(-1)


def _prepared(
    name: str, hidden: Tensor, weight: Tensor, tokens: Tensor, shape: tuple, what: str
) -> tuple[Tensor, Tensor]:
    """hidden and weight in the dtype of autocast, checked together with the token ids."""
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} expects hidden [..., d] and weight [vocab, d], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight {list(weight.shape)} is empty, expected [vocab, d]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point() or hidden.itemsize < 2:
        raise ValueError(
            f"{name}: hidden and weight need one float dtype of 16 bits or more, got "
            f"{hidden.dtype} and {weight.dtype}: cast one of them, or use autocast"
        )
    if not hidden.device == weight.device == tokens.device:
        raise ValueError(
            f"{name}: hidden, weight and {what} must be on one device, got {hidden.device}, "
            f"{weight.device} and {tokens.device}"
        )
    if tokens.shape != torch.Size(shape) or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: {what} must be int32 or int64 {list(shape)} "
            f"for hidden {list(hidden.shape)}, got {tokens.dtype} {list(tokens.shape)}"
        )
    return hidden, weight


def _can_be_read(x: Tensor) -> bool:
    """Whether a look at the values costs no wait for a GPU, and is no part of a traced graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(
    name: str, what: str, tokens: Tensor, counts: Tensor, vocab: int, exception: str
) -> None:
    if not _can_be_read(tokens):
        return
    outside = tokens[counts & ((tokens < 0) | (tokens >= vocab))]
    if len(outside):
        raise ValueError(
            f"{name}: {what} holds {outside[0].item()}, expected 0 to {vocab - 1} "
            f"(weight has {vocab} rows), or {exception}"
        )
