"""The Triton kernels of attention as custom operators of torch.

    afferent::attention            out, lse = ...            tiles: tuned/attention_forward.json
    afferent::attention_backward   dq, dk, dv, ... = ...     tuned/attention_{dk_dv,dq}.json

They trace under `torch.compile(fullgraph=True)` and export, and run under activation checkpointing.
Arguments are as in `op.attention`, checked there. A prefix that is not given, and the gradients of
what is not given, are empty tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.attention.intervals import UNBOUNDED, transposed
from kernels.attention.triton import attention_forward
from kernels.attention.triton_backward import (
    attention_delta,
    attention_dk_dv,
    attention_dq,
    attention_prefix_dk_dv,
)
from kernels.dispatch import arch
from kernels.language import LOG2E
from kernels.launch import cdiv, dense_rows, launch, padded, precision, readable
from kernels.tiles import pick

PREFIX_PROGRAMS = 264
"Two programs for each of the 132 multiprocessors of an H100 or H200."


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of [b, rows, heads, d] tensors, named by letter: q_b, q_t, q_h."""
    return {
        f"{name}_{letter}": stride
        for name, x in tensors.items()
        for letter, stride in zip("bsh" if name[-1] in "kv" else "bth", x.stride()[:3], strict=True)
    }


def _common(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor] | None, softcap: float
) -> dict[str, Any]:
    """Arguments that forward and dq share."""
    pk, pv = (None, None) if prefix is None else prefix
    names = ("pk_p", "pk_h", "pv_p", "pv_h")
    both = (0, 0, 0, 0) if prefix is None else (*prefix[0].stride()[:2], *prefix[1].stride()[:2])
    return {
        "q": q, "k": k, "v": v, "prefix_k": pk, "prefix_v": pv,
        **strides(q=q, k=k, v=v), **dict(zip(names, both, strict=True)),
        "t": q.shape[1], "s": k.shape[1], "p": 0 if prefix is None else prefix[0].shape[0],
        "softcap": softcap, "GROUP": q.shape[2] // k.shape[2], "D": q.shape[3],
        "BLOCK_D": padded(q.shape[3]), "PREFIX": prefix is not None, "SOFTCAP": softcap > 0,
        "PRECISION": precision(q.dtype),
    }  # fmt: skip


def _mask(intervals: Tensor | None, before: int, after: int) -> dict[str, Any]:
    """Arguments that say which keys a query sees."""
    wide = intervals is None or intervals.shape[0] == 1
    return {
        "intervals": intervals, "INTERVALS": intervals is not None,
        "intervals_b": 0 if wide else intervals.stride(0), "before": before, "after": after,
    }  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    before: int,
    after: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [b, t, h, d] in the dtype of q, and lse float32 [b, h, t]."""
    b, t, h, d = q.shape
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        prefix = dense_rows(prefix_k), dense_rows(prefix_v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(b, h, t, dtype=torch.float32)
    keys = {"bytes": q.itemsize, "head_dim": d, "softcap": int(softcap > 0)}
    tile = pick("attention_forward", arch(q.device), **keys)
    launch(
        attention_forward,
        (cdiv(t, tile.blocks["BLOCK_M"]), h, b),
        tile,
        out=out, lse=lse, sinks=sinks, SINKS=sinks is not None, WINDOW=before < UNBOUNDED,
        **_common(q, k, v, prefix, softcap), **_mask(intervals, before, after),
        **strides(out=out),
        scale=scale if softcap else scale * LOG2E.value,
        DESCRIPTORS=tile.descriptors, WARP_SPECIALIZE=tile.warp_specialize and prefix is None,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    sinks: Tensor | None,
    intervals: Tensor | None,
    out: Tensor,
    lse: Tensor,
    before: int,
    after: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the prefix's keys and values, and the sinks."""
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    q, k, v, dout = dense_rows(q), dense_rows(k), dense_rows(v), readable(dout)
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        prefix = dense_rows(prefix_k), dense_rows(prefix_v)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    chip, keys = arch(q.device), {"bytes": q.itemsize, "head_dim": d, "softcap": int(softcap > 0)}
    shared = _common(q, k, v, prefix, softcap) | {"scale": scale, "dout": dout}
    shared |= {"lse": lse, "delta": delta} | strides(dout=dout)

    tile = pick("attention_delta", chip)
    launch(
        attention_delta,
        (cdiv(t, tile.blocks["BLOCK_M"]), h, b),
        tile,
        out=out, dout=dout, dlse=dlse.contiguous(), delta=delta, t=t, D=d, BLOCK_D=padded(d),
        **strides(out=out, dout=dout),
    )  # fmt: skip

    tile = pick("attention_dq", chip, **keys)
    launch(
        attention_dq,
        (cdiv(t, tile.blocks["BLOCK_M"]), h, b),
        tile,
        **shared, **_mask(intervals, before, after), dq=dq, **strides(dq=dq),
        WINDOW=before < UNBOUNDED, DESCRIPTORS=tile.descriptors,
    )  # fmt: skip

    tile = pick("attention_dk_dv", chip, **keys)
    seen_by = None if intervals is None else transposed(intervals, s)
    launch(
        attention_dk_dv,
        (cdiv(s, tile.blocks["BLOCK_N"]), kv, b),
        tile,
        **{name: shared[name] for name in attention_dk_dv.arg_names if name in shared},
        **_mask(seen_by, after, before), dk=dk, dv=dv,
        **strides(dk=dk, dv=dv),
        DESCRIPTORS=tile.descriptors,
    )  # fmt: skip

    dpk, dpv = q.new_empty(0), q.new_empty(0)
    if prefix is not None:
        tile = pick("attention_prefix_dk_dv", chip, **keys)
        dpk, dpv = _prefix_gradients(shared, prefix, tile)
    dsinks = q.new_empty(0)
    if sinks is not None:  # dL / dsink = -sum_i P_sink delta_i
        sink = sinks.float()[:, None]
        dsinks = -(torch.exp(sink - lse) * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk, dv, dpk, dpv, dsinks


def _prefix_gradients(
    shared: dict[str, Any], prefix: tuple[Tensor, Tensor], tile: Any
) -> tuple[Tensor, Tensor]:
    """Sums over the batch; each slice of it is a program of its own, up to what fills the chip."""
    (p, kv, d), b = prefix[0].shape, shared["q"].shape[0]
    blocks = cdiv(p, tile.blocks["BLOCK_N"])
    slices = min(b, cdiv(PREFIX_PROGRAMS, max(1, blocks * kv)))
    dk, dv = (prefix[0].new_empty(slices, p, kv, d, dtype=torch.float32) for _ in range(2))
    launch(
        attention_prefix_dk_dv,
        (blocks, kv, slices),
        tile,
        **{name: shared[name] for name in attention_prefix_dk_dv.arg_names if name in shared},
        b=b, dk=dk, dv=dv, DESCRIPTORS=tile.descriptors,
    )  # fmt: skip
    return dk.sum(0).to(prefix[0].dtype), dv.sum(0).to(prefix[1].dtype)


attention = torch.library.custom_op("afferent::attention", forward, mutates_args=())
attention_backward = torch.library.custom_op(
    "afferent::attention_backward", backward, mutates_args=()
)


@attention.register_fake
def _(q, k, v, prefix_k, prefix_v, sinks, intervals, before, after, scale, softcap):
    b, t, h, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(b, h, t, dtype=torch.float32)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, prefix_k, prefix_v, sinks, intervals, out, lse, *numbers):
    given = (q, k, v, prefix_k, prefix_v, sinks)
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in given
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, before, after, scale, softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = before, after, scale, softcap


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them when asked
    gradients = attention_backward(dout, dlse, *saved, *ctx.numbers)
    wanted = [None if x is None else dx for x, dx in zip(saved[:6], gradients, strict=True)]
    return (*wanted, None, None, None, None, None)


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "attention's kernels have first derivatives only: pass impl='torch' for second ones"
    )


attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
