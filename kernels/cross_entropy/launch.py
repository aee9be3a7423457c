"""The Triton kernels of a linear head's softmax as custom operators of torch.

    afferent::linear_softmax             logprobs, lse, entropy = ...
                                         tiles: tuned/linear_{logsumexp,selected}.json
    afferent::linear_softmax_backward    dhidden, dweight = ...       tuned/linear_dlogits.json

All losses of `op.py` are a few operations on these [n, k] log-probabilities. The backward pass
takes the vocabulary in chunks of columns: a kernel writes the chunk's gradient of the logits into a
workspace in the dtype of `hidden`, and two products of cuBLAS turn it into the chunk of dweight,
complete at once, and into a share of dhidden. Chunks of rows would do the opposite: dweight, the
larger one as long as there are fewer tokens than words, would be read and written for every chunk.

    memory besides the results                          bytes
    workspace, n x columns of a chunk                   op.WORKSPACE, or those of hidden if more
    dhidden and a chunk's share of it, float32          8 n d
    a chunk of dweight, float32                         4 d columns

None of it grows with n times vocab. The k selected logits are summed apart from the sweep over the
vocabulary, so that a log-probability is rounded as float32 logits are, and may exceed 0 by as much.

The operators trace under `torch.compile(fullgraph=True)` and export,
and run under activation checkpointing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import op
from kernels.dispatch import arch
from kernels.launch import cdiv, launch, precision
from kernels.tiles import pick

GROUP = 16
"""Blocks of rows that share what they read of the weight, and least number of splits of the
vocabulary, which share what they read of `hidden`: a square of programs reads the least."""

PROGRAMS = 528
"Four for each of the 132 multiprocessors of an H100 or H200: below, the vocabulary is split more."


def whole_rows(x: Tensor) -> Tensor:
    """x with dense rows that begin at multiples of 16 bytes, as TMA reads them; copied if not."""
    step = 16 // x.itemsize
    rows, d = x.shape
    aligned = x.stride(0) % step == 0 and x.storage_offset() % step == 0
    if aligned and x.stride(1) == 1 and x.stride(0) >= d:
        return x
    return x.new_empty(rows, -(-d // step) * step)[:, :d].copy_(x)


def chunk_columns(n: int, d: int, vocab: int, itemsize: int) -> int:
    """Columns of a chunk of the backward pass: what fits the workspace, but at least d."""
    fitting = op.WORKSPACE // (max(n, 1) * itemsize) // 128 * 128
    return min(vocab, max(fitting, d))


def _common(hidden: Tensor, weight: Tensor, scale: float, softcap: float) -> dict[str, Any]:
    """Arguments that all kernels share."""
    return {
        "hidden": hidden, "weight": weight, "hidden_n": hidden.stride(0),
        "weight_v": weight.stride(0), "n": hidden.shape[0], "D": hidden.shape[1],
        "scale": scale, "softcap": softcap, "SOFTCAP": softcap > 0,
    }  # fmt: skip


def forward(
    hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [n, k], lse [n] and the entropy [n] (none: [0]), float32.

    tokens: int32 [n, k], all within the vocabulary. scale: 1 / temperature. softcap: 0 for none.
    """
    from kernels.cross_entropy import triton as kernels

    (n, k), vocab = tokens.shape, weight.shape[0]
    hidden, weight, tokens = whole_rows(hidden), whole_rows(weight), tokens.contiguous()
    shared, chip = _common(hidden, weight, scale, softcap), arch(hidden.device)

    tile = pick("linear_logsumexp", chip, bytes=hidden.itemsize)
    rows, tiles = cdiv(n, tile.blocks["BLOCK_N"]), cdiv(vocab, tile.blocks["BLOCK_V"])
    share = cdiv(tiles, max(GROUP, cdiv(PROGRAMS, max(rows, 1)))) * tile.blocks["BLOCK_V"]
    splits = cdiv(vocab, share)
    parts = hidden.new_empty(splits, n, dtype=torch.float32)
    entropies = torch.empty_like(parts) if entropy else None
    launch(
        kernels.linear_logsumexp,
        (rows * splits,),
        tile,
        **shared, lse=parts, entropy=entropies, vocab=vocab, splits=splits, share=share,
        GROUP=GROUP, ENTROPY=entropy, PRECISION=precision(hidden.dtype),
        DESCRIPTORS=tile.descriptors,
    )  # fmt: skip

    logits = hidden.new_empty(n, k, dtype=torch.float32)
    tile = pick("linear_selected", chip)
    grid = (cdiv(n, tile.blocks["BLOCK_N"]), k)
    launch(kernels.linear_selected, grid, tile, **shared, tokens=tokens, logits=logits, k=k)

    lse = parts.logsumexp(0)
    total = hidden.new_empty(0, dtype=torch.float32)
    if entropies is not None:  # of the splits' shares, and within each
        total = ((parts - lse).exp() * (entropies + lse - parts)).sum(0)
    return logits - lse[:, None], lse, total


def backward(
    dlogprobs: Tensor,
    dlse: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    scale: float,
    softcap: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; one that is not asked for is not computed, and [0]."""
    from kernels.cross_entropy.triton import linear_dlogits

    (n, d), vocab, has_entropy = hidden.shape, weight.shape[0], entropy.numel() > 0
    hidden, weight, tokens = whole_rows(hidden), whole_rows(weight), tokens.contiguous()
    dlse = dlse - dlogprobs.sum(1)  # log p = Z - LSE
    unit = _unit(dlogprobs, dlse, dentropy)
    dselected, dlse, dentropy = dlogprobs / unit, dlse / unit, dentropy / unit
    unit = unit * scale  # the temperature's share of dX / dZ
    if softcap:
        dselected = dselected * (1 - ((logprobs + lse[:, None]) / (scale * softcap)) ** 2)

    tile = pick("linear_dlogits", arch(hidden.device), bytes=hidden.itemsize)
    columns = chunk_columns(n, d, vocab, hidden.itemsize)
    dlogits = hidden.new_empty(n, columns)
    dhidden = hidden.new_zeros(n, d, dtype=torch.float32) if of_hidden else hidden.new_empty(0)
    dweight = weight.new_empty(vocab, d) if of_weight else weight.new_empty(0)
    for first in range(0, vocab, columns):
        width = min(columns, vocab - first)
        tiles = cdiv(width, tile.blocks["BLOCK_V"])
        launch(
            linear_dlogits,
            (cdiv(n, tile.blocks["BLOCK_N"]) * tiles,),
            tile,
            **_common(hidden, weight, scale, softcap), tokens=tokens, k=tokens.shape[1],
            lse=lse, entropy=entropy if has_entropy else None, dselected=dselected, dlse=dlse,
            dentropy=dentropy if has_entropy else None, dlogits=dlogits, dlogits_n=columns,
            vocab=vocab, first=first, width=width, GROUP=GROUP, ENTROPY=has_entropy,
            PRECISION=precision(hidden.dtype), DESCRIPTORS=tile.descriptors,
        )  # fmt: skip
        chunk = dlogits[:, :width]
        if of_hidden:
            dhidden += _product(chunk, weight[first : first + width])
        if of_weight:
            dweight[first : first + width] = _product(chunk.T, hidden).mul_(unit)
    return dhidden.mul_(unit).to(hidden.dtype) if of_hidden else dhidden, dweight


def _unit(*gradients: Tensor) -> Tensor:
    """A power of two in which dlogits are written, so that float16 holds them: with the mean over
    many tokens, those of unlikely words would be rounded to zero."""
    least = gradients[0].new_full((1,), 1e-30)
    largest = torch.cat([least, *(x.flatten().abs() for x in gradients)]).amax()
    return torch.exp2(largest.log2().floor() - 8)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@torch.library.custom_op("afferent::linear_softmax", mutates_args=())
def linear_softmax(
    hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(hidden, weight, tokens, scale, softcap, entropy)


@linear_softmax.register_fake
def _(hidden, weight, tokens, scale, softcap, entropy):
    n, k = tokens.shape
    shapes = ((n, k), (n,), (n if entropy else 0,))
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("afferent::linear_softmax_backward", mutates_args=())
def linear_softmax_backward(
    dlogprobs: Tensor,
    dlse: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    lse: Tensor,
    entropy: Tensor,
    scale: float,
    softcap: float,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    return backward(
        dlogprobs, dlse, dentropy, hidden, weight, tokens, logprobs, lse, entropy, scale, softcap,
        of_hidden, of_weight,
    )  # fmt: skip


@linear_softmax_backward.register_fake
def _(dlogprobs, dlse, dentropy, hidden, weight, *options):
    *_, of_hidden, of_weight = options
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, tokens, *ctx.numbers = inputs
    ctx.save_for_backward(hidden, weight, tokens, *output)


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple:
    scale, softcap, _ = ctx.numbers
    wanted = ctx.needs_input_grad[:2]
    both = linear_softmax_backward(
        *(x.contiguous() for x in gradients), *ctx.saved_tensors, scale, softcap, *wanted
    )
    return *(dx if want else None for dx, want in zip(both, wanted, strict=True)), *[None] * 4


def _refuse_second(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "the kernels of a linear head have first derivatives only: pass impl='torch' for second"
    )


linear_softmax.register_autograd(_differentiate, setup_context=_save)
linear_softmax_backward.register_autograd(_refuse_second, setup_context=lambda *_, **__: None)
