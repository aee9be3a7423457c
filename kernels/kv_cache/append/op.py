"""Writing the keys and values of new tokens into a paged cache, in the form that is read later.

    impl       what runs                                                          without
    triton     our kernels (`triton.py`), on a GPU: one pass, one or two launches  float64
    interpret  the same, interpreted on the CPU, for tests                         float64
    torch      gathers and scatters of torch, any device                           -
    auto       triton on a GPU, else torch; `kernels.record` says which, and why

An implementation asked for by name never falls back to another one: it runs, or it raises.

Dimensions: n new tokens of r requests, h query heads, kv key/value heads, d head width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from kernels.dispatch import arch, resolve
from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.quantise import encode_keys, encode_rows, encode_values

Rope = tuple[Float[Tensor, "positions d"], Float[Tensor, "positions d"]]


def append_kv(
    cache: PagedKV,
    table: BlockTable,
    k: Float[Tensor, "n kv d"],
    v: Float[Tensor, "n kv d"],
    *,
    cu_seqlens: Int32[Tensor, " r1"],
    q: Float[Tensor, "n h d"] | None = None,
    rope: Rope | None = None,
    k_norm: Float[Tensor, " d"] | None = None,
    q_norm: Float[Tensor, " d"] | None = None,
    norm_eps: float = 1e-6,
    positions: Int[Tensor, " n"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "n h d"] | None:
    """Normalise, rotate and quantise new keys and values, and write them to their pages, in place.

    `table` is that of the step: its lengths count the new tokens already, so that one table,
    checked once, serves append and attention in every layer. The new tokens of request i are its
    last cu_seqlens[i + 1] - cu_seqlens[i]. Pages that are written, and tails, must belong to one
    request only.

    Args:
        k, v: of the new tokens of all requests, one request after the other; in the cache's dtype.
        cu_seqlens: where each request begins in them, and where the last ends: ascending from 0 to
            n. A request may have none.
        q: queries of the same tokens, to be normalised and rotated in the same pass.
        rope: cosines and sines of the rotation by position, float32, as `rotary` of
            `models/language/transformer.py` makes them: channels i and i + d/2 turn together, and
            the two halves of a row repeat each other (the sines: negated, then as they are).
        k_norm, q_norm: weights of an RMSNorm over the head width, before the rotation.
        norm_eps: its epsilon.
        positions: rows of `rope` for each token; None: its index in its request.
        impl: one of those above.
    Returns:
        q, normalised and rotated in float32 and rounded once (q itself if there is nothing to do);
        None without q.
    Raises:
        ValueError: shapes, dtypes or options that contradict each other, an fp8 cache on a chip
            without fp8, an unknown `impl`, or one that cannot run; the message says why. Values of
            `cu_seqlens` and `positions` are checked on the CPU only: reading them would wait for a
            GPU. There a token that does not fit is not written, and a position without a row in
            `rope` gives NaN.
    """
    _check(cache, table, k, v, cu_seqlens, q, positions)
    _check_options(k, q, rope, k_norm, q_norm, norm_eps)
    if k.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(table, len(k), cu_seqlens, rope, positions)
    if impl != "torch" and (refusal := _no_fp8(cache)) is not None:
        raise ValueError(f"append_kv: {refusal}")
    chosen = resolve(
        "append_kv", impl, device=k.device, table="kv_append", refusal=_kernel_refusal(cache)
    )
    turns = q is not None and (rope is not None or q_norm is not None)
    given = q if turns else None

    if chosen in ("triton", "interpret"):
        from kernels.kv_cache.append.launch import append_kv as kernel

        cos, sin = (None, None) if rope is None else rope
        turned = kernel(
            given, k, v, cos, sin, q_norm, k_norm, positions, cu_seqlens,
            table.pages, table.lengths, table.tails, cache.data, cache.scales,
            cache.key_scales, cache.key_zeros, cache.value_scales, cache.value_zeros, cache.tail,
            norm_eps, cache.quant.kind,
        )  # fmt: skip
        return turned if turns else q

    owner, index = _places(table, len(k), cu_seqlens)
    at = index if positions is None else positions.long()
    keys = _turn(k, k_norm, norm_eps, rope, at)
    _scatter(cache, table, owner, index, keys, v)
    if cache.quant.kind == "int4":
        _scatter_int4_keys(cache, table, cu_seqlens.long(), keys)
    return _turn(q, q_norm, norm_eps, rope, at) if turns else q


def _places(table: BlockTable, n: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The request of each new token, and its index there."""
    token = torch.arange(n, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return owner, (table.lengths - cu_seqlens[1:])[owner] + token


def _turn(x: Tensor, norm: Tensor | None, eps: float, rope: Rope | None, at: Tensor) -> Tensor:
    """x [n, heads, d], normalised and rotated to positions `at` in float32 or wider."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.to(y.dtype)
    if rope is not None:
        half = x.shape[-1] // 2
        cos, sin = rope[0][at, None, :half], rope[1][at, None, half:]  # [n, 1, d/2]
        a, b = y.chunk(2, dim=-1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return y.to(x.dtype)


def _scatter(cache: PagedKV, table: BlockTable, owner, index, k: Tensor, v: Tensor) -> None:
    """Everything but the keys of int4: each token on its own."""
    page, slot = table.pages[owner, index // cache.page].long(), index % cache.page
    if cache.quant.kind == "int4":
        code, scale, zero = encode_values(v, cache.quant.group)
        cache.data[page, 1, slot] = code
        cache.value_scales[page, slot], cache.value_zeros[page, slot] = scale, zero
        return
    for which, x in enumerate((k, v)):
        if cache.quant.kind == "none":
            cache.data[page, which, slot] = x
        else:
            code, scale = encode_rows(x, cache.quant.kind)
            # As bytes: not every torch operator moves float8.
            cache.data.view(torch.uint8)[page, which, slot] = code.view(torch.uint8)
            cache.scales[page, which, slot] = scale


def _scatter_int4_keys(cache: PagedKV, table: BlockTable, ends: Tensor, k: Tensor) -> None:
    """Encode the pages that are full now, and keep the keys of those that are not in the tails."""
    page, lengths = cache.page, table.lengths.long()
    held = lengths - ends.diff()
    first = held // page
    touched = torch.where(held < lengths, (lengths - 1) // page - first + 1, 0)
    owner = torch.arange(len(lengths), device=k.device).repeat_interleave(touched)
    before = touched.cumsum(0) - touched
    number = first[owner] + torch.arange(len(owner), device=k.device) - before[owner]

    slot = torch.arange(page, device=k.device)
    index = number[:, None] * page + slot  # [touched pages, page]
    new = (index >= held[owner, None]) & (index < lengths[owner, None])
    token = (ends[owner] - held[owner])[:, None] + index
    tails = table.tails.long()[owner]
    rows = torch.where(
        new[..., None, None],
        k[torch.where(new, token, 0)],
        cache.tail[tails],
    )  # [touched pages, page, kv, d]
    full = (number + 1) * page <= lengths[owner]
    place = table.pages[owner[full], number[full]].long()
    code, scale, zero = encode_keys(rows[full])
    cache.data[place, 0] = code
    cache.key_scales[place], cache.key_zeros[place] = scale, zero

    kept, slot = (new & ~full[:, None]).nonzero(as_tuple=True)
    cache.tail[tails[kept], slot] = rows[kept, slot]


def _kernel_refusal(cache: PagedKV) -> str | None:
    """Why the Triton kernels cannot write this cache, or None."""
    if cache.dtype == torch.float64:
        return "the kernels take float32, float16 and bfloat16, not torch.float64"
    if cache.d > 256:
        return f"the kernels take heads of up to 256, not {cache.d}"
    if cache.quant.kind == "int4" and cache.page > 256:
        return f"the kernels hold a page of int4 keys, of up to 256 tokens, not {cache.page}"
    for name in ("data", "key_scales", "value_scales", "tail"):
        x = getattr(cache, name)
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dimension of the cache's {name} must be contiguous"
    for scales, zeros in (
        (cache.key_scales, cache.key_zeros),
        (cache.value_scales, cache.value_zeros),
    ):
        if scales is not None and scales.stride() != zeros.stride():
            return "scales and zero points of the cache must have the same strides"
    return None


def _no_fp8(cache: PagedKV) -> str | None:
    chip = arch(cache.device)
    if cache.quant.kind != "fp8" or (isinstance(chip, int) and (chip >= 89 or chip == 0)):
        return None
    name = chip if isinstance(chip, str) else f"sm_{chip}"
    return (
        f"an fp8 cache needs a chip with float8_e4m3fn (sm_89 and later), this is {name}: "
        "use QuantSpec('int8')"
    )


def _check(cache: PagedKV, table: BlockTable, k, v, cu_seqlens, q, positions) -> None:
    kv, d, r = cache.kv, cache.d, len(table.lengths)
    if k.ndim != 3 or k.shape != v.shape or tuple(k.shape[1:]) != (kv, d):
        raise ValueError(
            f"append_kv expects k and v of one shape [n, kv, d] = [n, {kv}, {d}], as the cache, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if q is not None and (q.ndim != 3 or (len(q), q.shape[2]) != (len(k), d)):
        raise ValueError(f"q must be [n, h, d] = [{len(k)}, h, {d}], got {list(q.shape)}")
    for name, x in {"k": k, "v": v, "q": k if q is None else q}.items():
        if x.dtype != cache.dtype:
            raise ValueError(f"{name} is {x.dtype}, the cache serves {cache.dtype}: cast it")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} wants a gradient, append_kv has none: use torch.no_grad()")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.shape != (r + 1,):
        raise ValueError(
            f"cu_seqlens must be int32 [r + 1] = [{r + 1}] for a table of {r} requests, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if positions is not None and (
        positions.shape != (len(k),) or positions.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"positions must be int32 or int64 [n] = [{len(k)}], "
            f"got {positions.dtype} {list(positions.shape)}"
        )
    if (table.tails is None) != (cache.tail is None):
        raise ValueError("the table has tails exactly for an int4 cache: make it for this cache")


def _check_options(k, q, rope, k_norm, q_norm, norm_eps: float) -> None:
    d = k.shape[2]
    if rope is not None:
        cos, sin = rope
        if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != d or d % 2:
            raise ValueError(
                f"rope must be cosines and sines [positions, d], d = {d} even, "
                f"got {list(cos.shape)} and {list(sin.shape)}"
            )
        if not cos.dtype == sin.dtype == torch.float32:
            raise ValueError(f"rope must be float32, got {cos.dtype} and {sin.dtype}")
        if not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError(
                "rope must be contiguous: call .contiguous() once, outside of the step"
            )
    for name, weight in {"k_norm": k_norm, "q_norm": q_norm}.items():
        if weight is not None and weight.shape != (d,):
            raise ValueError(f"{name} must be [d] = [{d}], got {list(weight.shape)}")
    if q_norm is not None and q is None:
        raise ValueError("q_norm normalises q: give q too")
    if not norm_eps > 0:
        raise ValueError(f"norm_eps={norm_eps} must be > 0")


def _check_values(table: BlockTable, n: int, cu_seqlens, rope, positions) -> None:
    ends = cu_seqlens.tolist()
    new = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != n or any(count < 0 for count in new):
        raise ValueError(f"cu_seqlens must ascend from 0 to n = {n}, got {ends}")
    for i, (length, count) in enumerate(zip(table.lengths.tolist(), new, strict=True)):
        if count > length:
            raise ValueError(
                f"request {i} has length {length} but {count} new tokens: "
                "the table's lengths count the new tokens"
            )
    if rope is not None and n:
        if positions is None:
            lengths = table.lengths.tolist()
            low, high = 0, max(x for x, count in zip(lengths, new, strict=True) if count) - 1
        else:
            low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= len(rope[0]):
            raise ValueError(
                f"position {low if low < 0 else high} has no row in rope: it has {len(rope[0])}"
            )
