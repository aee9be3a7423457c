"""Attention: one public function, several implementations that agree with `reference.py`.

    impl       what runs                                       gradients      without
    triton     our kernels (`triton.py`), on a GPU             first order    float64
    interpret  the same, interpreted on the CPU, for tests     first order    float64
    torch      two batched matmuls and a softmax in float32    of any order   -
    sdpa       torch's scaled_dot_product_attention            first order    softcap, sinks, LSE
    flex       torch's flex_attention, compiled on a GPU       first order    heads below 16
    auto       triton on a GPU, else sdpa, else torch; `kernels.record` says which, and why

An implementation asked for by name never falls back to another one: it runs, or it raises.

Dimensions: b batch, t queries, s keys (the queries are the last t of the s positions), p prefix
rows, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from kernels.attention import intervals as masks
from kernels.dispatch import arch, resolve
from kernels.launch import GRID_ROWS, misaligned

Prefix = tuple[Float[Tensor, "p kv d"], Float[Tensor, "p kv d"]]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s kv d"],
    v: Float[Tensor, "b s kv d"],
    *,
    causal: bool = True,
    window: int | None = None,
    block: int | None = None,
    segments: Int[Tensor, "b s"] | None = None,
    cu_seqlens_q: Int[Tensor, " n1"] | None = None,
    cu_seqlens_k: Int[Tensor, " n1"] | None = None,
    prefix_kv: Prefix | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "b t h d"] | tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h t"]]:
    """Grouped-query attention of the last t positions of a sequence of s.

    Args:
        q: queries; query i sits at position s - t + i. Any float dtype, shared by q, k and v; under
            autocast all three are cast to its dtype.
        k, v: keys and values; kv divides h, and query head i reads head i // (h / kv).
        causal: a query sees no position after its own.
        window: tokens a query sees, itself included, counting back; needs `causal`. None: all.
        block: causal by blocks of so many of the s positions, as by frames of a film: a query sees
            all of its own block, and of those before. Excludes window, segments and packing.
        segments: an id for each of the s positions; a document is a run of equal ids, and a query
            sees only its own.
        cu_seqlens_q, cu_seqlens_k: packed sequences of different lengths, b = 1: where each begins
            in the queries and in the keys, and where the last ends, int32 or int64, ascending from
            0. The queries of a sequence are the last positions of its keys.
        prefix_kv: keys and values of p rows that every query of the batch sees besides, as a
            cartridge's; not copied per sequence. Excludes `window`: a prefix would fall out of it.
        sinks: a logit per query head that takes part in the softmax and whose value is zero.
        softcap: c > 0 replaces each score x by c tanh(x / c).
        scale: factor > 0 on the scores; None: 1 / sqrt(d).
        return_lse: return the log-sum-exp of the scores too, natural logarithm; differentiable.
        impl: one of those above.
    Returns:
        The attended values, in the dtype of q; 0 for a query that sees nothing. With `return_lse`
        also LSE [b, h, t] in float32 (float64 for float64), -inf for a query that sees nothing.
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, an unknown `impl`, or one
            that cannot run; the message says why.
    """
    q, k, v, prefix_kv = _autocast(q, k, v, prefix_kv)
    _check(q, k, v, causal, window, segments, cu_seqlens_q, cu_seqlens_k)
    _check_extras(q, k, window, prefix_kv, sinks, softcap, scale)
    _check_block(block, causal, window, segments, cu_seqlens_q)
    plain = softcap is None and sinks is None and not return_lse
    chosen = resolve(
        "attention",
        impl,
        device=q.device,
        table="attention_forward",
        torch_impls=("sdpa", "torch", "flex") if plain else ("torch", "sdpa", "flex"),
        refusal=kernel_refusal(q, k, v, prefix_kv),
    )
    if chosen == "sdpa" and not plain:
        raise ValueError(
            "attention: impl='sdpa' has no softcap, sinks or LSE: use impl='auto' or 'torch'"
        )
    t, s, d = q.shape[1], k.shape[1], q.shape[3]
    scale = d**-0.5 if scale is None else float(scale)
    before, after = masks.reach(causal, None if window is None or window >= s else window)
    table = None
    if block is not None:
        table = masks.from_blocks(t, s, block, q.device)
    elif segments is not None:
        table = masks.from_segments(segments, t, before, after)
    elif cu_seqlens_q is not None and cu_seqlens_k is not None:
        table = masks.from_lengths(cu_seqlens_q, cu_seqlens_k, t, before, after)

    if chosen in ("triton", "interpret"):
        rest = prefix_kv, sinks, before, after, scale, softcap or 0.0
        out, lse = _kernels(q, k, v, table, *rest)
        return (out, lse) if return_lse else out

    whole = table is None and before >= s and prefix_kv is None
    square = chosen == "sdpa" and causal and t == s and whole
    mask = None
    if not square:
        k, v, mask = _mask(q, k, v, before, after, table)
    if prefix_kv is not None:
        k, v, mask = _with_prefix(k, v, mask, prefix_kv)
    if chosen == "sdpa":
        return _sdpa(q, k, v, mask, square, scale)
    compute = masked_attention if chosen == "torch" else _flex
    out, lse = compute(q, k, v, mask, sinks, softcap, scale)
    return (out, lse) if return_lse else out


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, table: Int32[Tensor, "#b 2 t"] | None,
    prefix_kv: Prefix | None, sinks: Tensor | None,
    before: int, after: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse of the kernels, of as many sequences at a time as a grid has rows."""
    from kernels.attention.launch import attention as kernel

    pk, pv = (None, None) if prefix_kv is None else prefix_kv
    if len(q) <= GRID_ROWS:
        return kernel(q, k, v, pk, pv, sinks, table, before, after, scale, softcap)
    found = []
    for first in range(0, len(q), GRID_ROWS):
        part = slice(first, first + GRID_ROWS)
        seen = table if table is None or len(table) == 1 else table[part]
        given = q[part], k[part], v[part], pk, pv, sinks, seen
        found.append(kernel(*given, before, after, scale, softcap))
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, prefix_kv: Prefix | None
) -> tuple[Tensor, Tensor, Tensor, Prefix | None]:
    """Everything in autocast's dtype where that is on; like torch's, it leaves float64 alone."""
    kind = q.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return q, k, v, prefix_kv
    if q.dtype == torch.float64:
        return q, k, v, prefix_kv
    dtype = torch.get_autocast_dtype(kind)
    if prefix_kv is not None:
        prefix_kv = prefix_kv[0].to(dtype), prefix_kv[1].to(dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), prefix_kv


def _mask(
    q: Tensor, k: Tensor, v: Tensor, before: int, after: int, table: Int32[Tensor, "#b 2 t"] | None
) -> tuple[Tensor, Tensor, Bool[Tensor, "#b t s"] | None]:
    """Keys and values without those that no query sees, and who sees which; None: all see all."""
    t, s = q.shape[1], k.shape[1]
    if table is None and t > 0:
        oldest = max(0, s - t - before)  # key that the first query still sees
        k, v, s = k[:, oldest:], v[:, oldest:], s - oldest
        if (after >= t or t == 1) and before >= s - 1:
            return k, v, None
    if table is None:
        table = masks.from_positions(t, s, before, after, q.device)
    return k, v, masks.visible(table, s)


def _with_prefix(
    k: Tensor, v: Tensor, mask: Tensor | None, prefix: Prefix
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The prefix, copied for each sequence, before its keys; every query sees it."""
    both = zip(prefix, (k, v), strict=True)
    k, v = (torch.cat([x.expand(len(y), -1, -1, -1), y], dim=1) for x, y in both)
    return k, v, None if mask is None else F.pad(mask, (prefix[0].shape[0], 0), value=True)


def kernel_refusal(
    q: Tensor, k: Tensor, v: Tensor, prefix_kv: tuple[Tensor, Tensor] | None = None
) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    d, chip = q.shape[-1], arch(q.device)
    if not 1 <= d <= 256:
        return f"the kernels take heads of up to 256, not {d}"
    prefix = () if prefix_kv is None else prefix_kv[0].shape
    if 0 in (*q.shape, *k.shape, *prefix):
        return f"a dimension is zero: q {list(q.shape)}, k {list(k.shape)}, prefix {list(prefix)}"
    if isinstance(chip, int) and chip >= 90 and q.itemsize == 2:  # these tiles read through TMA
        read = {"q": q, "k": k, "v": v}
        if prefix_kv is not None:
            read |= dict(zip(("the prefix's k", "the prefix's v"), prefix_kv, strict=True))
        for name, x in read.items():
            if (bytes_apart := misaligned(x)) is not None:
                return (
                    f"{name} has rows {bytes_apart} bytes apart, or begins there, and sm_{chip} "
                    "reads it in whole 16 bytes: make it contiguous, or pad its rows"
                )
    return None


def _sdpa(q, k, v, mask: Bool[Tensor, "#b t s"] | None, square: bool, scale: float):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # [b, h, t, d]
        k.transpose(1, 2),  # [b, kv, s, d]
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def masked_attention(q, k, v, mask: Bool[Tensor, "#b t s"] | None, sinks, softcap, scale: float):
    """The torch path: out and lse for a mask that says which keys each query sees (None: all)."""
    t, kv = q.shape[1], k.shape[2]
    # The query heads of one group become more queries of their key head: nothing is repeated.
    queries = rearrange(q * scale, "b t (kv g) d -> b kv (g t) d", kv=kv)
    scores = queries @ rearrange(k, "b s kv d -> b kv d s")
    scores = rearrange(scores, "b kv (g t) s -> b (kv g) t s", t=t)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    empty = None
    if mask is not None:
        if sinks is None:
            empty = ~mask.any(dim=-1)[:, None]  # [#b, 1, t]
            mask = mask | empty[:, 0, :, None]  # softmax of something finite, zeroed below
        scores = torch.where(mask[:, None], scores, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)
    weights = weights if sinks is None else weights[..., :-1]
    lse = scores.logsumexp(-1)
    if empty is not None:
        weights = torch.where(empty[..., None], 0.0, weights)
        lse = torch.where(empty, float("-inf"), lse)
    weights = rearrange(weights.to(q.dtype), "b (kv g) t s -> b kv (g t) s", kv=kv)
    out = weights @ rearrange(v, "b s kv d -> b kv s d")
    return rearrange(out, "b kv (g t) d -> b t (kv g) d", t=t), lse


def _flex(q, k, v, mask: Bool[Tensor, "#b t s"] | None, sinks, softcap, scale: float):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, t, s = len(q), q.shape[1], k.shape[1]
    block_mask = score_mod = None
    if mask is not None:
        mask = mask.expand(b, t, s)
        block_mask = create_block_mask(
            lambda batch, head, i, j: mask[batch, i, j], b, None, t, s, device=q.device
        )
    if softcap is not None:
        score_mod = lambda score, *_: softcap * torch.tanh(score / softcap)  # noqa: E731
    call = torch.compile(flex_attention, fullgraph=True) if q.is_cuda else flex_attention
    out, lse = call(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        score_mod=score_mod, block_mask=block_mask, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2], return_lse=True,
    )  # fmt: skip
    if sinks is not None:  # the sink takes its share of the softmax
        total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        out, lse = out * torch.exp(lse - total)[..., None].to(out.dtype), total
    return out.transpose(1, 2), lse


def _check(q, k, v, causal, window, segments, cu_seqlens_q, cu_seqlens_k) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "attention expects q [b, t, h, d] and k, v of one shape [b, s, kv, d], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(
            "q and k must agree in batch and head width, "
            f"got q {list(q.shape)} and k {list(k.shape)} ([b, t, h, d] and [b, s, kv, d])"
        )
    if kv == 0 or h % kv:
        raise ValueError(f"{kv} key/value heads do not divide {h} query heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point() or q.itemsize < 2:
        raise ValueError(
            f"q, k, v need one float dtype of 16 bits or more, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"window={window}, causal={causal}: a window is >= 1 and needs causal=True"
        )
    if segments is not None:
        if segments.shape != (b, s):
            raise ValueError(f"segments must be [b, s] = {[b, s]}, got {list(segments.shape)}")
        if t > s:
            raise ValueError(f"{t} queries cannot be the last of {s} keys: segments need t <= s")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k come together: give both or none")
    if cu_seqlens_q is not None:
        if b != 1 or segments is not None:
            raise ValueError(
                f"cu_seqlens_* pack sequences into one row: b={b} must be 1, and segments None"
            )
        if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must be two vectors of one length, got "
                f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
            )
        if len(cu_seqlens_q) < 2:
            raise ValueError("cu_seqlens_* need at least two values: a begin and an end")


def _check_block(block, causal, window, segments, cu_seqlens_q) -> None:
    if block is None:
        return
    if block < 1 or not causal:
        raise ValueError(f"block={block}, causal={causal}: a block is >= 1 and needs causal=True")
    if window is not None or segments is not None or cu_seqlens_q is not None:
        raise ValueError(f"block={block} with window, segments or cu_seqlens_*: give one of them")


def _check_extras(q, k, window, prefix_kv, sinks, softcap, scale) -> None:
    h, d = q.shape[2:]
    if prefix_kv is not None:
        pk, pv = prefix_kv
        if pk.ndim != 3 or pk.shape != pv.shape or tuple(pk.shape[1:]) != (k.shape[2], d):
            raise ValueError(
                f"prefix_kv must be two tensors [p, kv, d] = [p, {k.shape[2]}, {d}], got "
                f"{list(pk.shape)} and {list(pv.shape)}: is it a prefix of another model?"
            )
        if pk.dtype != q.dtype or pv.dtype != q.dtype:
            raise ValueError(f"prefix_kv is {pk.dtype}, {pv.dtype}, but q is {q.dtype}: cast it")
        if window is not None:
            raise ValueError(
                f"window={window} with prefix_kv: the prefix would fall out of the window"
            )
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"sinks must be [h] = [{h}], got {list(sinks.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be > 0, or None")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be > 0, or None for 1 / sqrt(d)")
