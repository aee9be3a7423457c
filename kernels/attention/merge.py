"""`merge_states`: attention over disjoint sets of keys, put together exactly.

    prefix = attention(q, *prefix_kv, causal=False, return_lse=True)
    own = attention(q, k, v, return_lse=True)
    out, lse = merge_states([prefix, own])        # = attention over the prefix and the own keys

The definition is in `merge_reference.py`, the kernels in `triton_merge.py`; as operators of torch:

    afferent::merge_states             out, lse = ...           tiles: tuned/merge_states.json
    afferent::merge_states_backward    douts, dlses = ...

Dimensions: n states, t queries, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import arch, resolve
from kernels.launch import launch
from kernels.tiles import pick

State = tuple[Float[Tensor, "*b t h d"], Float[Tensor, "*b h t"]]
"Attention over one set of keys, as `attention(..., return_lse=True)` returns it."


def merge_states(states: Sequence[State], *, impl: str = "auto") -> State:
    """Attention over the union of disjoint sets of keys, from attention over each of them.

    Args:
        states: for each set the attended values, in one float dtype of 16 bits or more, and the
            log-sum-exp of the scores (natural logarithm), in float32 (float64 for float64). -inf
            says that the query saw none of the set; what the values are there does not matter.
        impl: triton, interpret (first derivatives), torch (of any order), or auto.
    Returns:
        out in the dtype of the states', and lse; 0 and -inf where a query saw nothing at all.
        Both are differentiable in everything given; gradients are finite, also at -inf.
    Raises:
        ValueError: no state, states of different shapes or dtypes, an unknown `impl` or one that
            cannot run; the message says why.
    """
    states = list(states)
    _check(states)
    outs, lses = (torch.stack(parts) for parts in zip(*states, strict=True))
    chosen = resolve(
        "merge_states", impl, device=outs.device, table="merge_states", refusal=_refusal(outs)
    )
    if chosen == "torch":
        return _merge(outs, lses)
    shape = states[0][0].shape
    out, lse = merge(outs.reshape(len(states), -1, *shape[-3:]), lses.flatten(1, -3))
    return out.view(shape), lse.view(states[0][1].shape)


def _merge(outs: Float[Tensor, "n *b t h d"], lses: Float[Tensor, "n *b h t"]) -> State:
    dtype = lses.dtype
    largest = lses.detach().amax(dim=0)
    shift = torch.where(largest == float("-inf"), 0.0, largest)
    weights = torch.exp(lses - shift)  # [n, *b, h, t]
    total = weights.sum(dim=0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    read = torch.where((lses == float("-inf")).mT[..., None], 0.0, outs.to(dtype))
    out = ((weights / total).mT[..., None] * read).sum(dim=0)
    return out.to(outs.dtype), torch.where(empty, float("-inf"), shift + torch.log(total))


def _check(states: list[State]) -> None:
    if not states:
        raise ValueError("merge_states needs at least one (out, lse) pair, got none")
    out, lse = states[0]
    if out.ndim < 3 or lse.shape != (*out.shape[:-3], out.shape[-2], out.shape[-3]):
        raise ValueError(
            "merge_states expects out [..., t, h, d] and lse [..., h, t], "
            f"got {list(out.shape)} and {list(lse.shape)}"
        )
    if not out.is_floating_point() or out.itemsize < 2:
        raise ValueError(f"out needs a float dtype of 16 bits or more, got {out.dtype}")
    if lse.dtype != torch.promote_types(out.dtype, torch.float32):
        raise ValueError(
            f"the lse of {out.dtype} states must be "
            f"{torch.promote_types(out.dtype, torch.float32)}, got {lse.dtype}"
        )
    for i, (other, other_lse) in enumerate(states):
        if (other.shape, other_lse.shape) != (out.shape, lse.shape):
            raise ValueError(
                f"states must have one shape: state 0 is {list(out.shape)} and {list(lse.shape)}, "
                f"state {i} is {list(other.shape)} and {list(other_lse.shape)}"
            )
        if (other.dtype, other_lse.dtype) != (out.dtype, lse.dtype):
            raise ValueError(
                f"states must have one dtype: state 0 is {out.dtype} and {lse.dtype}, "
                f"state {i} is {other.dtype} and {other_lse.dtype}"
            )


def _refusal(outs: Tensor) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    if outs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {outs.dtype}"
    if outs.numel() == 0:
        return f"a dimension is zero: the states are {list(outs.shape[1:])}"
    if outs.shape[-1] > 256:
        return f"the kernels take heads of up to 256, not {outs.shape[-1]}"
    return None


def forward(
    outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None = None
) -> None:
    """Merge outs [n, b, t, h, d] and lses [n, b, h, t] into out and lse; all of them contiguous.

    Args:
        sinks: a logit per head [h] that takes part in the softmax and whose value is zero.
    """
    from kernels.attention.triton_merge import merge_forward

    tile = pick("merge_states", arch(outs.device), head_dim=outs.shape[-1])
    launch(
        merge_forward,
        _grid(lse, tile),
        tile,
        outs=outs, lses=lses, sinks=sinks, out=out, lse=lse, SINKS=sinks is not None,
        **_sizes(outs),
    )  # fmt: skip


def backward(dout: Tensor, dlse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of outs and lses."""
    from kernels.attention.triton_merge import merge_backward

    douts, dlses = torch.empty_like(outs), torch.empty_like(lses)
    tile = pick("merge_states", arch(outs.device), head_dim=outs.shape[-1])
    launch(
        merge_backward,
        _grid(dlse, tile),
        tile,
        dout=dout.contiguous(), dlse=dlse.contiguous(), outs=outs, lses=lses,
        douts=douts, dlses=dlses, STATES=power_of_two(len(outs)), **_sizes(outs),
    )  # fmt: skip
    return douts, dlses


def _grid(lse: Tensor, tile: Any) -> tuple[int]:
    return (-(-lse.numel() // tile.blocks["BLOCK_M"]),)


def _sizes(outs: Tensor) -> dict[str, int]:
    n, b, t, h, d = outs.shape
    return {"states": n, "t": t, "h": h, "rows": b * t * h, "D": d, "BLOCK_D": power_of_two(d)}


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


@torch.library.custom_op("afferent::merge_states", mutates_args=())
def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    outs, lses = outs.contiguous(), lses.contiguous()
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    forward(outs, lses, out, lse)
    return out, lse


@merge.register_fake
def _(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


@torch.library.custom_op("afferent::merge_states_backward", mutates_args=())
def merge_backward(dout: Tensor, dlse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return backward(dout, dlse, outs.contiguous(), lses.contiguous())


@merge_backward.register_fake
def _(dout, dlse, outs, lses):
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    return merge_backward(dout, dlse, *ctx.saved_tensors)


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "merge_states' kernels have first derivatives only: pass impl='torch' for second ones"
    )


merge.register_autograd(_differentiate, setup_context=_save)
merge_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
