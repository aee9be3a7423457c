"""The Triton kernels of the gated delta rule as custom operators of torch.

    afferent::gated_delta             out, last, and what the backward pass needs
    afferent::gated_delta_backward    dq, dk, dv, dbeta, dg, dfirst
        tiles: tuned/delta_{solve,states,outputs,dstates,dqueries,dkeys,dvalues}

    kept for the backward pass                          values
    X, the solved system of every chunk                 b h t C
    S, the state before every chunk                     b h t / C dk dv
    U, the corrections                                  b h t dv

in the dtype of q; the backward pass needs as much again for dS' and dR. The operators trace under
`torch.compile(fullgraph=True)` and export, and run under activation checkpointing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import arch
from kernels.launch import cdiv, dense_rows, launch, padded, precision, strides
from kernels.tiles import Tile, pick


def chunk(q: Tensor) -> int:
    """Tokens of a chunk: as many for all kernels, by the table of the first."""
    return tile_of("delta_solve", q).blocks["BLOCK_C"]


def summed(g: Tensor, c: int) -> Tensor:
    """Log decays [b, t, h] -> their sums within chunks of c, in units of log 2: [b, h, n, c]."""
    b, t, h = g.shape
    fill = -t % c
    rows = F.pad(g.float(), (0, 0, 0, fill)).transpose(1, 2).reshape(b, h, -1, c)
    return rows.cumsum(-1) / math.log(2)


def tile_of(table: str, q: Tensor) -> Tile:
    """The tile of a kernel for the width and dtype of q."""
    return pick(table, arch(q.device), bytes=q.itemsize, width=padded(q.shape[-1]))


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [b, t, h, dv], last [b, h, dk, dv], X, states, corrections."""
    from kernels.fast_weights.gated_delta import triton as kernels

    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    (b, t, h, dk), dv = q.shape, v.shape[-1]
    c = chunk(q)
    since = summed(g, c)
    n = since.shape[2]
    solved = q.new_empty(b, h, n, c, c)
    states, corrections = q.new_empty(b, h, n, dk, dv), q.new_empty(b, h, t, dv)
    last, out = q.new_empty(b, h, dk, dv, dtype=torch.float32), v.new_empty(b, t, h, dv)
    shared = {"since": since, "t": t, "h": h, "n": n, "DK": dk, "BLOCK_K": padded(dk)}
    shared["PRECISION"] = precision(q.dtype)
    launch(
        kernels.delta_solve, (n, b * h), tile_of("delta_solve", q),
        k=k, beta=beta, solved=solved, **strides(k=k, beta=beta), **shared,
    )  # fmt: skip
    shared["BLOCK_C"] = c
    tile = tile_of("delta_states", q)
    launch(
        kernels.delta_states, (cdiv(dv, tile.blocks["BLOCK_V"]), b * h), tile,
        k=k, v=v, beta=beta, solved=solved, first=None if first is None else first.contiguous(),
        states=states, corrections=corrections, last=last, DV=dv,
        **strides(k=k, v=v, beta=beta), **shared,
    )  # fmt: skip
    tile = tile_of("delta_outputs", q)
    launch(
        kernels.delta_outputs, (n, cdiv(dv, tile.blocks["BLOCK_V"]), b * h), tile,
        q=q, k=k, states=states, corrections=corrections, out=out, scale=scale, DV=dv,
        **strides(q=q, k=k, out=out), **shared,
    )  # fmt: skip
    return out, last, solved, states, corrections


def backward(
    dout: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    solved: Tensor,
    states: Tensor,
    corrections: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [b, t, h, ...], dbeta, dg [b, t, h], dfirst [b, h, dk, dv]."""
    from kernels.fast_weights.gated_delta import triton as kernels

    q, k, v, dout = (dense_rows(x) for x in (q, k, v, dout))
    (b, t, h, dk), dv = q.shape, v.shape[-1]
    c = chunk(q)
    since = summed(g, c)
    n = since.shape[2]
    dstates, derrors = torch.empty_like(states), torch.empty_like(corrections)
    dfirst = q.new_empty(b, h, dk, dv, dtype=torch.float32)
    shared = {"since": since, "t": t, "h": h, "n": n, "DK": dk, "BLOCK_K": padded(dk)}
    shared |= {"BLOCK_C": c, "DV": dv, "PRECISION": precision(q.dtype), "k": k, **strides(k=k)}
    reading = {"q": q, "dout": dout, "scale": scale, **strides(q=q, dout=dout)}
    writing = {"beta": beta, "derrors": derrors, **strides(beta=beta)}
    kept = {"states": states, "corrections": corrections}
    tile = tile_of("delta_dstates", q)
    launch(
        kernels.delta_dstates, (cdiv(dv, tile.blocks["BLOCK_V"]), b * h), tile,
        solved=solved, dlast=dlast.float().contiguous(), dfirst=dfirst, dstates=dstates,
        **shared, **reading, **writing,
    )  # fmt: skip
    dq, dkey = q.new_empty(b, h, t, dk), k.new_empty(b, h, t, dk)
    dvalue = v.new_empty(b, h, t, dv)
    dbeta = beta.new_empty(b, h, t, dtype=torch.float32)
    dkeys = q.new_empty(b, h, t, dk, dtype=torch.float32)
    parts = since.new_empty(4, *since.shape)  # of dsince, and dwritten
    dend = since.new_empty(b, h, n, dk)
    launch(
        kernels.delta_dqueries, (n, b * h), tile_of("delta_dqueries", q),
        dq=dq, dsince=parts[0], **shared, **reading, **kept,
    )  # fmt: skip
    launch(
        kernels.delta_dkeys, (n, b * h), tile_of("delta_dkeys", q),
        dstates=dstates, dkeys=dkeys, dsince=parts[1], dwritten=parts[3], dend=dend,
        **shared, **reading, **kept,
    )  # fmt: skip
    launch(
        kernels.delta_dvalues, (n, b * h), tile_of("delta_dvalues", q),
        v=v, dkeys=dkeys, dk=dkey, dv=dvalue, dbeta=dbeta, dsince=parts[2],
        **strides(v=v), **shared, **writing, **kept,
    )  # fmt: skip
    # c is a running sum, so that the decay of a token takes part in every later one's.
    dsince = parts[:3].sum(0)
    dsince[..., -1] += parts[3].sum(-1) + dend.sum(-1)
    dg = dsince.flip(-1).cumsum(-1).flip(-1).reshape(b, h, -1)[..., :t]
    dq, dkey, dvalue, dbeta, dg = (x.transpose(1, 2) for x in (dq, dkey, dvalue, dbeta, dg))
    return dq, dkey, dvalue, dbeta.to(beta.dtype), dg.to(g.dtype), dfirst


@torch.library.custom_op("afferent::gated_delta", mutates_args=())
def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(q, k, v, beta, g, first, scale)


@gated_delta.register_fake
def _(q, k, v, beta, g, first, scale):
    (b, t, h, dk), dv = q.shape, v.shape[-1]
    c = chunk(q)
    n = cdiv(t, c)
    return (
        v.new_empty(b, t, h, dv),
        q.new_empty(b, h, dk, dv, dtype=torch.float32),
        q.new_empty(b, h, n, c, c),
        q.new_empty(b, h, n, dk, dv),
        q.new_empty(b, h, t, dv),
    )


@torch.library.custom_op("afferent::gated_delta_backward", mutates_args=())
def gated_delta_backward(
    dout: Tensor,
    dlast: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    solved: Tensor,
    states: Tensor,
    corrections: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = backward(dout, dlast, q, k, v, beta, g, solved, states, corrections, scale)
    return tuple(x.contiguous() for x in found)  # type: ignore[return-value]


@gated_delta_backward.register_fake
def _(dout, dlast, q, k, v, beta, g, solved, states, corrections, scale):
    b, h, _, dk, dv = states.shape
    like = tuple(x.new_empty(x.shape) for x in (q, k, v, beta, g))
    return *like, q.new_empty(b, h, dk, dv, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, first, ctx.scale = inputs
    ctx.has_first = first is not None
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx: Any, dout: Tensor, dlast: Tensor, *_: Any) -> tuple:
    found = gated_delta_backward(dout.contiguous(), dlast, *ctx.saved_tensors, ctx.scale)
    return *found[:5], found[5] if ctx.has_first else None, None


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "the kernels of gated_delta_rule have first derivatives only: pass impl='torch' for second"
    )


gated_delta.register_autograd(_differentiate, setup_context=_save)
gated_delta_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
