"""The Triton kernels of TTT-Linear as custom operators of torch.

    afferent::ttt_linear             out, last W and b, and what the backward pass needs
    afferent::ttt_linear_backward    of q, k, v, rate, position, weight, bias, norm weight and bias
        tiles: tuned/ttt_{states,outputs,dreads,dstates,dwrites}

    kept for the backward pass                             values         dtype
    W, b before every mini-batch                           b h t / C d d  of q; b in float32
    G, the gradient at every token                         b h t d        of q

The backward pass needs as much again for dW', db' and dZ, and four times b h t d besides. The
operators trace under `torch.compile(fullgraph=True)` and export, and run under activation
checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import arch
from kernels.launch import cdiv, dense_rows, launch, padded, precision, strides
from kernels.tiles import Tile, pick


def tile_of(table: str, q: Tensor) -> Tile:
    """The tile of a kernel for the width and dtype of q."""
    return pick(table, arch(q.device), bytes=q.itemsize, width=padded(q.shape[-1]))


def sizes(q: Tensor, c: int) -> dict[str, Any]:
    """What every kernel is told of the sizes."""
    _, t, h, d = q.shape
    constants = {"C": c, "D": d, "BLOCK_C": padded(c), "BLOCK_D": padded(d)}
    return {"t": t, "h": h, "n": cdiv(t, c), **constants, "PRECISION": precision(q.dtype)}


def plain(x: Tensor) -> Tensor:
    """float32 and contiguous."""
    return x.float().contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [b, t, h, d], last_w, last_b, states, biases, gradients."""
    from kernels.fast_weights.ttt import triton as kernels

    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    b, t, h, d = q.shape
    shared = sizes(q, len(position))
    n = shared["n"]
    states, gradients = q.new_empty(b, h, n, d, d), q.new_empty(b, h, t, d)
    biases = q.new_empty(b, h, n, d, dtype=torch.float32)
    last_w = q.new_empty(b, h, d, d, dtype=torch.float32)
    last_b, out = q.new_empty(b, h, d, dtype=torch.float32), v.new_empty(b, t, h, d)
    shared |= {"k": k, "rate": rate, **strides(k=k, rate=rate), "position": plain(position)}
    shared |= {"gamma": plain(norm_weight), "beta": plain(norm_bias)}
    shared |= {"states": states, "biases": biases, "gradients": gradients}
    launch(
        kernels.ttt_states, (b * h,), tile_of("ttt_states", q),
        v=v, weight=plain(weight), bias=plain(bias), last_w=last_w, last_b=last_b,
        **strides(v=v), **shared,
    )  # fmt: skip
    launch(
        kernels.ttt_outputs, (n, b * h), tile_of("ttt_outputs", q),
        q=q, out=out, **strides(q=q, out=out), **shared,
    )  # fmt: skip
    return out, last_w, last_b, states, biases, gradients


def backward(
    dout: Tensor,
    dlast_w: Tensor,
    dlast_b: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    states: Tensor,
    biases: Tensor,
    gradients: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [b, t, h, d], drate [b, t, h], dposition [c], dweight, dbias [b, h, ...] and of
    the norm [h, d]; all but the first three in float32."""
    from kernels.fast_weights.ttt import triton as kernels

    q, k, v, dout = (dense_rows(x) for x in (q, k, v, dout))
    b, t, h, d = q.shape
    c, shared = len(position), sizes(q, len(position))
    n = shared["n"]
    wide = {"dtype": torch.float32, "device": q.device}
    dq, dk, dv = (x.new_empty(b, h, t, d) for x in (q, k, v))
    dreads, dsteps = q.new_empty(2, b, h, t, d)
    dkeys, dgradients = torch.empty(2, b, h, t, d, **wide)
    drate, dlast = torch.empty(2, b, h, t, **wide)
    dposition = torch.empty(b, h, n, c, **wide)
    dnorm = torch.empty(2, 2, b, h, n, d, **wide)  # read and written; scale and shift
    dstates, dbiases = torch.empty_like(states), torch.empty_like(biases)
    dweight, dbias = torch.empty(b, h, d, d, **wide), torch.empty(b, h, d, **wide)
    shared |= {"k": k, "rate": rate, **strides(k=k, rate=rate), "position": plain(position)}
    shared |= {"gamma": plain(norm_weight), "states": states, "biases": biases}
    reading, writing = {"q": q, **strides(q=q)}, {"v": v, **strides(v=v), "beta": plain(norm_bias)}
    changes = {"dgradients": dgradients, "dkeys": dkeys}
    launch(
        kernels.ttt_dreads, (n, b * h), tile_of("ttt_dreads", q),
        gradients=gradients, dout=dout, dreads=dreads, dq=dq, drate=drate, dposition=dposition,
        dgamma=dnorm[0, 0], dbeta=dnorm[0, 1], **strides(dout=dout), **reading, **changes, **shared,
    )  # fmt: skip
    launch(
        kernels.ttt_dstates, (b * h,), tile_of("ttt_dstates", q),
        dreads=dreads, dgradients=dgradients, dlast_w=plain(dlast_w), dlast_b=plain(dlast_b),
        dstates=dstates, dbiases=dbiases, dsteps=dsteps, dweight=dweight, dbias=dbias,
        **reading, **writing, **shared,
    )  # fmt: skip
    launch(
        kernels.ttt_dwrites, (n, b * h), tile_of("ttt_dwrites", q),
        dstates=dstates, dbiases=dbiases, dsteps=dsteps, dk=dk, dv=dv, dlast=dlast,
        dgamma=dnorm[1, 0], dbeta=dnorm[1, 1], **writing, **changes, **shared,
    )  # fmt: skip
    # dlast is of position_C rate_s, C the last token of the mini-batch; the last one may be short.
    whole, ends = (n - 1) * c, [c - 1, t - (n - 1) * c - 1]
    lengths = zip(ends, (whole, t - whole), strict=True)
    drate += dlast * torch.cat([position.float()[end].expand(size) for end, size in lengths])
    taken = (dlast * rate.float().transpose(1, 2)).sum(dim=(0, 1))  # [t]
    dposition = dposition.sum(dim=(0, 1, 2))
    dposition[ends[0]] += taken[:whole].sum()
    dposition[ends[1]] += taken[whole:].sum()
    of_norm = (x.clone() for x in dnorm.sum(dim=(0, 2, 4)))
    dq, dk, dv, drate = (x.transpose(1, 2) for x in (dq, dk, dv, drate))
    return dq, dk, dv, drate, dposition, dweight, dbias, *of_norm


@torch.library.custom_op("afferent::ttt_linear", mutates_args=())
def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(q, k, v, rate, position, weight, bias, norm_weight, norm_bias)


@ttt_linear.register_fake
def _(q, k, v, rate, position, weight, bias, norm_weight, norm_bias):
    b, t, h, d = q.shape
    n = cdiv(t, len(position))
    return (
        v.new_empty(b, t, h, d),
        q.new_empty(b, h, d, d, dtype=torch.float32),
        q.new_empty(b, h, d, dtype=torch.float32),
        q.new_empty(b, h, n, d, d),
        q.new_empty(b, h, n, d, dtype=torch.float32),
        q.new_empty(b, h, t, d),
    )


@torch.library.custom_op("afferent::ttt_linear_backward", mutates_args=())
def ttt_linear_backward(
    dout: Tensor,
    dlast_w: Tensor,
    dlast_b: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    states: Tensor,
    biases: Tensor,
    gradients: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (q, k, v, rate, position, norm_weight, norm_bias, states, biases, gradients)
    found = backward(dout, dlast_w, dlast_b, *given)
    return tuple(x.contiguous() for x in found)  # type: ignore[return-value]


@ttt_linear_backward.register_fake
def _(dout, dlast_w, dlast_b, q, k, v, rate, position, norm_weight, norm_bias, *kept):
    def wide(x: Tensor) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.float32)

    like = (x.new_empty(x.shape) for x in (q, k, v))
    return *like, *map(wide, (rate, position, dlast_w, dlast_b, norm_weight, norm_bias))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.dtypes = [x.dtype for x in inputs[3:]]
    ctx.save_for_backward(*inputs[:5], *inputs[7:], *output[3:])  # not the first W and b
    ctx.mark_non_differentiable(*output[3:])


def _differentiate(ctx: Any, dout: Tensor, dlast_w: Tensor, dlast_b: Tensor, *_: Any) -> tuple:
    found = ttt_linear_backward(dout.contiguous(), dlast_w, dlast_b, *ctx.saved_tensors)
    narrow = (x.to(dtype) for x, dtype in zip(found[3:], ctx.dtypes, strict=True))
    return *found[:3], *narrow


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "the kernels of ttt_linear have first derivatives only: pass impl='torch' for second"
    )


ttt_linear.register_autograd(_differentiate, setup_context=_save)
ttt_linear_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
