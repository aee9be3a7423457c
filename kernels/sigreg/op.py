"""`characteristic_function`: averages of exp(i t h) over samples, at equally spaced t.

    cos, sin = characteristic_function(z @ directions, step=3 / 16, knots=17)

The definition is in `reference.py`, the kernels in `triton.py`; as operators of torch:

    afferent::characteristic_function             cos, sin = ...    tiles: tuned/ecf_forward.json
    afferent::characteristic_function_backward    dh = ...          tiles: tuned/ecf_backward.json

What it saves: the n k j numbers exp(i t_j h_nk) are 17 times as many as the projections, and plain
torch keeps several copies of them for the backward pass.

Dimensions: g groups (views, time steps), n samples, k directions, j knots.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import arch, resolve
from kernels.launch import cdiv, launch
from kernels.tiles import pick

MAX_KNOTS = 64


def characteristic_function(
    h: Float[Tensor, "*g n k"], step: float, knots: int, *, impl: str = "auto"
) -> tuple[Float[Tensor, "*g j k"], Float[Tensor, "*g j k"]]:
    """Means over n of cos(t_j h) and of sin(t_j h), for t_j = j step and j = 0 .. knots - 1.

    Args:
        h: projections, in a float dtype of 16 bits or more.
        impl: triton, interpret (first derivatives), torch (of any order), or auto.
    Returns:
        Both in float32 (float64 for float64), differentiable in h.
    Raises:
        ValueError: no samples, an argument out of range, an unknown `impl` or one that cannot run.
    """
    if h.ndim < 2 or h.shape[-2] < 1:
        raise ValueError(f"h must be [..., n, k] with at least one sample, got {list(h.shape)}")
    if not h.is_floating_point() or h.itemsize < 2:
        raise ValueError(f"h needs a float dtype of 16 bits or more, got {h.dtype}")
    if not 1 <= knots <= MAX_KNOTS:
        raise ValueError(f"knots={knots} must be between 1 and {MAX_KNOTS}")
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step={step} must be finite and above 0")
    chosen = resolve(
        "characteristic_function", impl, device=h.device, table="ecf_forward", refusal=_refusal(h)
    )
    if chosen == "torch":
        return _plain(h, step, knots)
    groups, (n, k) = h.shape[:-2], h.shape[-2:]
    cosines, sines = ecf(h.reshape(-1, n, k), step, knots)
    return cosines.view(*groups, knots, k), sines.view(*groups, knots, k)


def _plain(h: Tensor, step: float, knots: int) -> tuple[Tensor, Tensor]:
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    t = step * torch.arange(knots, device=h.device, dtype=h.dtype)
    angle = h[..., None, :, :] * t[:, None, None]  # [*g, j, n, k]
    return angle.cos().mean(dim=-2), angle.sin().mean(dim=-2)


def _refusal(h: Tensor) -> str | None:
    """Why the Triton kernels cannot compute this call, or None."""
    if h.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {h.dtype}"
    if h.numel() == 0:
        return f"a dimension is zero: h is {list(h.shape)}"
    if math.prod(h.shape[:-2]) > 65535:
        return f"the kernels take up to 65,535 groups, not {math.prod(h.shape[:-2])}"
    return None


def forward(h: Tensor, step: float, knots: int) -> tuple[Tensor, Tensor]:
    """cos and sin [g, knots, k] of h [g, n, k], contiguous."""
    from kernels.sigreg.triton import ecf_forward

    g, n, k = h.shape
    cosines, sines = (h.new_empty(g, knots, k, dtype=torch.float32) for _ in range(2))
    tile = pick("ecf_forward", arch(h.device))
    launch(
        ecf_forward,
        (cdiv(k, tile.blocks["BLOCK_K"]), g),
        tile,
        h=h, cosines=cosines, sines=sines, step=float(step), n=n, k=k,
        KNOTS=knots, PADDED=1 << (knots - 1).bit_length(),
    )  # fmt: skip
    return cosines, sines


def backward(dcosines: Tensor, dsines: Tensor, h: Tensor, step: float, knots: int) -> Tensor:
    """The gradient of h."""
    from kernels.sigreg.triton import ecf_backward

    (g, n, k), dh = h.shape, torch.empty_like(h)
    tile = pick("ecf_backward", arch(h.device))
    launch(
        ecf_backward,
        (cdiv(n, tile.blocks["BLOCK_N"]), cdiv(k, tile.blocks["BLOCK_K"]), g),
        tile,
        dcosines=dcosines.contiguous(), dsines=dsines.contiguous(), h=h, dh=dh,
        step=float(step), n=n, k=k, KNOTS=knots,
    )  # fmt: skip
    return dh


@torch.library.custom_op("afferent::characteristic_function", mutates_args=())
def ecf(h: Tensor, step: float, knots: int) -> tuple[Tensor, Tensor]:
    return forward(h.contiguous(), step, knots)


@ecf.register_fake
def _(h, step, knots):
    shape = h.shape[0], knots, h.shape[2]
    return tuple(h.new_empty(shape, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("afferent::characteristic_function_backward", mutates_args=())
def ecf_backward(dcosines: Tensor, dsines: Tensor, h: Tensor, step: float, knots: int) -> Tensor:
    return backward(dcosines, dsines, h.contiguous(), step, knots)


@ecf_backward.register_fake
def _(dcosines, dsines, h, step, knots):
    return h.new_empty(h.shape)


def _save(ctx: Any, inputs: tuple[Tensor, float, int], output: tuple[Tensor, Tensor]) -> None:
    h, ctx.step, ctx.knots = inputs
    ctx.save_for_backward(h)


def _differentiate(ctx: Any, dcosines: Tensor, dsines: Tensor) -> tuple[Tensor, None, None]:
    (h,) = ctx.saved_tensors
    return ecf_backward(dcosines, dsines, h, ctx.step, ctx.knots), None, None


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "characteristic_function's kernels have first derivatives only: pass impl='torch' for "
        "second ones"
    )


ecf.register_autograd(_differentiate, setup_context=_save)
ecf_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
