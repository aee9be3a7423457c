"""How much each cached key matters: the scores that `select_top` ranks by.

    score_key_norm             -||k||: no queries needed
    score_window_attention     what the last queries attended to (SnapKV; TOVA with one query,
                               H2O with all of them)
    score_expected_attention   what queries to come are expected to attend to

    impl        window and expected attention, on keys that no gradient is asked for
    triton      our kernels (`triton.py`), on a GPU: nothing as large as [b, h, w, s] or, for the
                expectation, as the keys of all query heads is stored
    interpret   the same, interpreted on the CPU, for tests
    torch       matmuls, the softmax in float32 (float64 for float64); has gradients
    auto        triton on a GPU, else torch

The key norm is one reduction, which torch runs at the speed of memory: it has no kernel.

Scores are higher for keys that matter more, +inf for those that the method always keeps and -inf
where there is no key (past the length of a shorter request). Keys are as the cache holds them,
after the rotation. `reference.py` has the papers and the definitions.

Dimensions: b batch, w queries of the window, s keys, h query heads, kv key/value heads, d head
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.op import kernel_refusal
from kernels.dispatch import resolve

POOLINGS = ("avg", "max")


def score_key_norm(
    k: Float[Tensor, "b s kv d"], *, lengths: Int[Tensor, " b"] | None = None
) -> Float[Tensor, "b kv s"]:
    """Minus the norm of each key (Devoto et al., 2024, arXiv:2406.11430): a key of low norm draws
    much attention. Of little use where a norm on keys (qk-norm) makes them all alike.

    Args:
        k: keys; any float dtype.
        lengths: keys of each request, if they differ; 0..s. None: s.
    Returns:
        float32 (float64 for float64); -inf past a request's length.
    Raises:
        ValueError: shapes or dtypes that contradict each other.
    """
    lengths = _check("score_key_norm", k, lengths)
    norm = torch.linalg.vector_norm(k, dim=-1, dtype=_wide(k))
    return _absent(-norm.transpose(1, 2), lengths)


def score_window_attention(
    q_window: Float[Tensor, "b w h d"],
    k: Float[Tensor, "b s kv d"],
    *,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    pooling: str = "avg",
    kernel_size: int = 5,
    keep_window: bool = True,
    impl: str = "auto",
) -> Float[Tensor, "b kv s"]:
    """The attention that keys get from the last queries (SnapKV: Li et al., 2024,
    arXiv:2404.14469), on average over the window and the query heads of a group, then pooled over
    neighbouring keys. Heads are averaged before pooling, as in Ada-KV's grouped-query form.

    Args:
        q_window: the last w queries of each request, after the rotation; query i is at position
            length - w + i. SnapKV takes w = 32 or 64. kv divides h.
        k: all keys, the window's included; of the dtype of q_window.
        lengths: keys of each request, if they differ; 0..s. None: s. One that is shorter than the
            window has only its last `length` queries.
        scale: factor > 0 on the scores; None: 1 / sqrt(d).
        pooling: "avg" or "max" over `kernel_size` keys around each, none of the window and zeros
            at both ends.
        kernel_size: odd; SnapKV takes 5 or 7, and 1 does not pool.
        keep_window: the window's keys score +inf. False: they are scored and pooled as the others
            are; with w = 1 that is TOVA (Oren et al., 2024, arXiv:2401.06104), with w = s it is
            H2O (Zhang et al., 2023, arXiv:2306.14048) up to its greedy eviction.
        impl: one of those above.
    Returns:
        float32 (float64 for float64); -inf past a request's length.
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, or an `impl` that cannot
            run; the message says why.
    """
    lengths = _check("score_window_attention", k, lengths)
    _check_window(q_window, k, scale, pooling, kernel_size)
    (w, h, d), kv = q_window.shape[1:], k.shape[2]
    scale = d**-0.5 if scale is None else float(scale)
    chosen = resolve(
        "score_window_attention",
        impl,
        device=k.device,
        table="kv_window",
        refusal=_refusal(q_window, k),
    )
    if chosen == "torch":
        total = _window_attention(q_window, k, lengths, scale)
    else:
        from kernels.kv_cache.compaction.launch import window_attention

        total = window_attention(q_window, k, lengths, scale)
    last = _length(k, lengths)  # [b, 1, 1]
    mean = total / (last.clamp(1, w) * (h // kv))
    position = torch.arange(k.shape[1], device=k.device)
    scored = position < (last - w if keep_window else last)
    mean = torch.where(scored, mean, 0.0)
    if kernel_size > 1:
        pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        mean = pool(mean, kernel_size, stride=1, padding=kernel_size // 2)
    return _absent(torch.where(scored, mean, float("inf")), lengths)


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
    impl: str = "auto",
) -> Float[Tensor, "b kv s"]:
    """The attention that a Gaussian query is expected to pay (Devoto et al., 2025,
    arXiv:2510.00636), times the norm of the value.

        z = E exp(scale q^T k) = exp(scale mu^T k + scale^2 k^T Sigma k / 2)
        score = (mean over the group's heads of z / sum z + epsilon) ||v||

    Args:
        mean_q, cov_q: mu and Sigma of the queries to come, rotated: `average_rotation` does that.
            Any float dtype; the kernel reads Sigma in the dtype of k and adds up in float32. None
            for Sigma: the mean alone counts. kv divides h.
        k, v: of one shape and dtype. None for v: the norm of the value is left out, as is epsilon.
            The paper means the norm of W_o v: pass that product if it is worth it to you.
        lengths: keys of each request, if they differ; 0..s. None: s.
        scale: factor > 0 on q^T k; None: 1 / sqrt(d).
        sink: first tokens that the softmax leaves out and that score +inf, as they draw attention
            whatever they hold.
        epsilon: >= 0; lets the value's norm count where hardly any attention is expected.
        impl: one of those above.
    Returns:
        float32 (float64 for float64); -inf past a request's length.
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, or an `impl` that cannot
            run; the message says why.
    """
    lengths = _check("score_expected_attention", k, lengths)
    _check_expected(mean_q, cov_q, k, v, scale, sink, epsilon)
    d = k.shape[3]
    scale = d**-0.5 if scale is None else float(scale)
    refusal = _refusal(k[:, :1], k) or _wants_gradients(mean_q, cov_q)
    chosen = resolve(
        "score_expected_attention", impl, device=k.device, table="kv_expected", refusal=refusal
    )
    if chosen == "torch":
        logits = _expected_logits(mean_q, cov_q, k, scale)
    else:
        from kernels.kv_cache.compaction.launch import expected_logits

        logits = expected_logits(mean_q, cov_q, k, lengths, scale)
    position, last = torch.arange(k.shape[1], device=k.device), _length(k, lengths)
    counted = (position >= sink) & (position < last)  # [#b, 1, s]
    # Finite, so that a request with nothing but sinks gives numbers; they are replaced below.
    logits = torch.where(counted, logits, torch.finfo(logits.dtype).min)
    scores = reduce(logits.softmax(-1), "b (kv g) s -> b kv s", "mean", kv=k.shape[2])
    if v is not None:
        norm = torch.linalg.vector_norm(v, dim=-1, dtype=_wide(v)).transpose(1, 2)
        scores = (scores + epsilon) * norm
    return _absent(torch.where(position < sink, float("inf"), scores), lengths)


def average_rotation(
    mean_q: Float[Tensor, "b h d"],
    cov_q: Float[Tensor, "b h d d"] | None,
    cos: Float[Tensor, "positions d"],
    sin: Float[Tensor, "positions d"],
) -> tuple[Float[Tensor, "b h d"], Float[Tensor, "b h d d"] | None]:
    """Statistics of queries before the rotation -> of queries at the positions to come.

    R mu and R Sigma R^T, where R is the mean of the rotations of all given positions
    (arXiv:2510.00636, section 3; it takes the next 512).

    Args:
        mean_q, cov_q: mean and covariance over the queries seen so far, of one dtype; the paper
            leaves out the first 4, whose activations are outliers.
        cos, sin: of the rotation at those positions, as `rope` of `append_kv`.
    """
    d = mean_q.shape[-1]
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != d or d % 2 or len(cos) == 0:
        raise ValueError(
            f"average_rotation: cos and sin must be [positions, d] = [positions, {d}], with at "
            f"least one position, got {list(cos.shape)} and {list(sin.shape)}"
        )
    c = cos[:, : d // 2].mean(0).to(mean_q.dtype)
    s = sin[:, d // 2 :].mean(0).to(mean_q.dtype)  # the first half is negated

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    return rotate(mean_q), None if cov_q is None else rotate(rotate(cov_q).mT).mT


def _window_attention(q: Tensor, k: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    """Sums over queries and heads of each key's attention, [b, kv, s]."""
    w, kv, s = q.shape[1], k.shape[2], k.shape[1]
    queries = rearrange(q, "b w (kv g) d -> b kv (g w) d", kv=kv)
    logits = (queries @ rearrange(k, "b s kv d -> b kv d s")).to(_wide(k)) * scale
    logits = rearrange(logits, "b kv (g w) s -> b kv g w s", w=w)
    query = torch.arange(w, device=k.device)[:, None]
    position = _length(k, lengths) - w + query  # [b, w, 1]
    seen = (torch.arange(s, device=k.device) <= position)[:, None, None]
    logits = torch.where(seen, logits, torch.finfo(logits.dtype).min)
    return torch.where(seen, logits.softmax(-1), 0.0).sum((2, 3))


def _expected_logits(mean: Tensor, covariance: Tensor | None, k: Tensor, scale: float) -> Tensor:
    kv, dtype = k.shape[2], _wide(k)
    keys = rearrange(k.to(dtype), "b s kv d -> b kv 1 s d")
    mean = rearrange(mean.to(dtype), "b (kv g) d -> b kv g d 1", kv=kv)
    logits = (keys @ mean)[..., 0] * scale  # [b, kv, g, s]
    if covariance is not None:
        sigma = rearrange(covariance.to(dtype), "b (kv g) d e -> b kv g d e", kv=kv)
        logits = logits + (scale**2 / 2) * ((keys @ sigma) * keys).sum(-1)
    return rearrange(logits, "b kv g s -> b (kv g) s")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _length(k: Tensor, lengths: Tensor | None) -> Tensor:
    """Keys of each request, [b, 1, 1]."""
    lengths = k.new_full((len(k),), k.shape[1], dtype=torch.int32) if lengths is None else lengths
    return lengths[:, None, None]


def _absent(scores: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return scores
    position = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(position < lengths[:, None, None], scores, float("-inf"))


def _refusal(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot score these keys, or None."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return "there are no keys"
    if k.dtype == torch.float64 or k.shape[3] > 256:
        return kernel_refusal(q, k, k)
    return _wants_gradients(q, k)


def _wants_gradients(*tensors: Tensor | None) -> str | None:
    wanted = any(x is not None and x.requires_grad for x in tensors)
    return "the kernels have no derivative" if wanted and torch.is_grad_enabled() else None


def _check(op: str, k: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Of the keys and their lengths, which come back as int32 on the keys' device."""
    if k.ndim != 4 or 0 in k.shape[2:] or not k.is_floating_point() or k.itemsize < 2:
        raise ValueError(
            f"{op}: k must be [b, s, kv, d] in a float dtype of 16 bits or more, "
            f"got {list(k.shape)} {k.dtype}"
        )
    if lengths is None:
        return None
    if lengths.shape != k.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"{op}: lengths must be integers [b] = [{len(k)}], "
            f"got {list(lengths.shape)} {lengths.dtype}"
        )
    readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and len(lengths) and not 0 <= min(lengths.tolist()) <= max(lengths) <= k.shape[1]:
        raise ValueError(f"{op}: lengths must be in 0..{k.shape[1]}, got {lengths.tolist()}")
    return lengths.to(k.device, torch.int32)


def _check_window(q: Tensor, k: Tensor, scale, pooling: str, kernel_size: int) -> None:
    (b, s, kv, d), op = k.shape, "score_window_attention"
    if q.ndim != 4 or (q.shape[0], q.shape[3]) != (b, d) or q.shape[2] % kv or q.shape[2] == 0:
        raise ValueError(
            f"{op}: q_window must be [b, w, h, d] = [{b}, w, a multiple of {kv}, {d}], "
            f"got {list(q.shape)}"
        )
    if not 1 <= q.shape[1] <= max(s, 1):
        raise ValueError(f"{op}: a window has 1 to {s} queries, got {q.shape[1]}")
    if q.dtype != k.dtype:
        raise ValueError(f"{op}: q_window is {q.dtype} but k is {k.dtype}: cast one")
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale={scale} must be > 0, or None for 1 / sqrt(d)")
    if pooling not in POOLINGS:
        raise ValueError(f"{op}: pooling={pooling!r} is unknown: use {', '.join(POOLINGS)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size={kernel_size} must be odd, 1 for no pooling")


def _check_expected(mean, cov, k, v, scale, sink: int, epsilon: float) -> None:
    (b, _, kv, d), op = k.shape, "score_expected_attention"
    if mean.ndim != 3 or (mean.shape[0], mean.shape[2]) != (b, d) or mean.shape[1] % kv:
        raise ValueError(
            f"{op}: mean_q must be [b, h, d] = [{b}, a multiple of {kv}, {d}], "
            f"got {list(mean.shape)}"
        )
    if cov is not None and cov.shape != (*mean.shape, d):
        raise ValueError(
            f"{op}: cov_q must be [b, h, d, d] = {[*mean.shape, d]}, got {list(cov.shape)}"
        )
    if v is not None and (v.shape != k.shape or v.dtype != k.dtype):
        raise ValueError(
            f"{op}: v must be as k, {list(k.shape)} {k.dtype}, got {list(v.shape)} {v.dtype}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale={scale} must be > 0, or None for 1 / sqrt(d)")
    if sink < 0 or not epsilon >= 0:
        raise ValueError(f"{op}: sink={sink} and epsilon={epsilon} must be >= 0")
