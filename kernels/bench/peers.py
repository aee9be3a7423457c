"""Who else computes attention: torch's backends by name, compiled flex_attention, the tutorial's.

Each is a function on the layout of `kernels.attention` ([b, t, h, d], keys [b, s, kv, d]); views
cost nothing. What a user would do once per model or step, such as compiling or building a block
mask, is prepared outside of the timed call unless the name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.cases import Call, Entry, Inputs, tile_label
from kernels.tiles import Tile

Attend = Callable[..., Tensor]
"(q, k, v, then the prefix's k and v where there is one) -> out."

SDPA_KERNELS = {
    "flash": (("flash_fwd",), ("flash_bwd",)),
    "cudnn": (("cudnn",), ("cudnn",)),
    "efficient": (("fmha_cutlassF",), ("fmha_cutlassB",)),
}
"Backend -> parts of the names of its forward and of its backward kernels."

FLEX_KERNELS = (("flex_attention", "triton_tem"), ("flex_attention_backward", "triton_tem"))


@dataclass(frozen=True)
class Attention:
    """A way to compute attention."""

    name: str
    prepare: Callable[[Inputs], Attend]
    "What is not timed; it may look at the inputs."
    kernels: tuple[tuple[str, ...], tuple[str, ...]]
    "Parts of the names of its GPU kernels, forward and backward."
    ours: bool = False
    on_cpu: tuple[str, ...] = ("forward", "backward", "both")
    "Modes that a dry run can call."
    note: str = ""

    def entry(self, mode: str, names: tuple[str, ...]) -> Entry:
        """mode: forward, backward, or both (a forward pass and its gradients); names: of the
        inputs that it is a function of, and whose gradients are asked for."""
        return Entry(
            self.name,
            partial(MODES[mode], self.prepare, names),
            ours=self.ours,
            kernels=self.kernels[mode == "backward"],
            on_cpu=mode in self.on_cpu,
            note=self.note,
        )


def _forward(prepare: Callable[[Inputs], Attend], names: tuple[str, ...], inputs: Inputs) -> Call:
    attend, arguments = prepare(inputs), [inputs[name] for name in names]

    def call() -> Tensor:
        with torch.no_grad():
            return attend(*arguments)

    return call


def _backward(prepare: Callable[[Inputs], Attend], names: tuple[str, ...], inputs: Inputs) -> Call:
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    out, dout = prepare(inputs)(*leaves), inputs["dout"]
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _both(prepare: Callable[[Inputs], Attend], names: tuple[str, ...], inputs: Inputs) -> Call:
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    attend, dout = prepare(inputs), inputs["dout"]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


MODES = {"forward": _forward, "backward": _backward, "both": _both}


def with_prefix(k: Tensor, v: Tensor, prefix: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values after those of a prefix [p, kv, d], which is copied for every sequence."""
    if not prefix:
        return k, v
    together = [
        torch.cat([x[None].expand(len(y), -1, -1, -1), y], dim=1)
        for x, y in zip(prefix, (k, v), strict=True)
    ]
    return together[0], together[1]


def sdpa_backend(backend: str, x: Tensor) -> Any:
    """A context in which scaled_dot_product_attention runs as this backend or raises; anything on a
    CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return sdpa_kernel([named[backend]]) if x.is_cuda else nullcontext()


def sdpa(
    backend: str, *, causal: bool, mask: Callable[[Inputs], Tensor] | None = None
) -> Attention:
    """torch's scaled_dot_product_attention, held to one of its backends.

    mask: inputs -> which key each query sees, bool [t, s], in the place of `causal`.
    """

    def prepare(inputs: Inputs) -> Attend:
        dense = None if mask is None else mask(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
            k, v = with_prefix(k, v, prefix)
            with sdpa_backend(backend, q):
                out = F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)),
                    attn_mask=dense,
                    is_causal=causal and dense is None,
                    enable_gqa=q.shape[2] != k.shape[2],
                )
            return out.transpose(1, 2)

        return attend

    note = "dense bool mask" if mask is not None else ""
    return Attention(f"sdpa {backend}", prepare, SDPA_KERNELS[backend], note=note)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def compiled(function: Callable, x: Tensor) -> Callable:
    """The function, compiled for static shapes on a GPU."""
    return _compiled(function) if x.is_cuda else function


def flex(
    mask_mod: Callable[[Inputs], Any] | None,
    score_mod: Any = None,
    *,
    build: bool = False,
) -> Attention:
    """torch's flex_attention, compiled.

    Args:
        mask_mod: inputs -> flex's function (b, h, i, j) -> bool, counting the prefix's keys first;
            or None: everything.
        build: build the block mask inside of the timed call too.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kept: list[Any] = []  # one mask for all sets of inputs: a second one would be compiled again

    def prepare(inputs: Inputs) -> Attend:
        q = inputs["q"]
        t, s = q.shape[1], inputs["k"].shape[1] + len(inputs.get("prefix_k", ()))
        seen = None if mask_mod is None else mask_mod(inputs)

        def block_mask() -> Any:
            if seen is None:
                return None
            create = compiled(create_block_mask, q) if build else create_block_mask
            return create(seen, None, None, t, s, device=q.device)

        if not kept:
            kept.append(block_mask())

        def attend(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
            k, v = with_prefix(k, v, prefix)
            out = compiled(flex_attention, q)(
                *(x.transpose(1, 2) for x in (q, k, v)),
                score_mod=score_mod,
                block_mask=block_mask() if build else kept[0],
                enable_gqa=q.shape[2] != k.shape[2],
            )
            return out.transpose(1, 2)

        return attend

    name = "mask and flex" if build else "flex"
    note = "its block mask is built in the timed call" if build else ""
    return Attention(name, prepare, FLEX_KERNELS, on_cpu=("forward",), note=note)


def tutorials(d: int, *, causal: bool, mode: str) -> list[Entry]:
    """The tutorial's kernel, with each of its forward tiles; on contiguous copies in its layout."""
    tiles = TUTORIAL_FORWARD.get(d, ()) if mode == "forward" else TUTORIAL_FORWARD.get(d, ())[:1]

    def prepare(tile: Tile, inputs: Inputs) -> Call:
        from kernels.bench.tutorial import TutorialAttention

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale = 1 / math.sqrt(d)
            return TutorialAttention.apply(q, k, v, causal, scale, tile, TUTORIAL_BACKWARD[d])

        own = {n: inputs[n].transpose(1, 2).contiguous() for n in ("q", "k", "v", "dout")}
        call = MODES[mode](lambda _: attend, ("q", "k", "v"), own)

        def run() -> Any:
            out = call()
            if isinstance(out, Tensor):
                return out.transpose(1, 2)
            return tuple(x.transpose(1, 2) for x in out)

        return run

    kernel = "tutorial_backward" if mode == "backward" else "tutorial_forward"
    return [
        Entry(f"tutorial {tile_label(tile)}", partial(prepare, tile), kernels=(kernel,))
        for tile in tiles
    ]


def _tile(num_warps: int, num_stages: int, **blocks: int) -> Tile:
    return Tile(MappingProxyType(blocks), num_warps, num_stages)


TUTORIAL_FORWARD = {
    64: (_tile(4, 3, BLOCK_M=128, BLOCK_N=64),),
    128: (_tile(8, 3, BLOCK_M=128, BLOCK_N=64), _tile(8, 2, BLOCK_M=128, BLOCK_N=128)),
}
TUTORIAL_BACKWARD = {
    64: _tile(8, 3, BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=32),
    128: _tile(8, 3, BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=32),
}
"By head width, within the tutorial's configurations; none of them spills on sm_90."
