"""Attention's kernels, interpreted: values and gradients, and as operators of torch."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.library import opcheck

from kernels.attention import launch, reference, triton_backward
from kernels.attention import triton as forward_kernels
from kernels.attention.op import attention
from kernels.dispatch import record
from kernels.parity.attention import cases
from kernels.tiles import Tile, override

CPU = torch.device("cpu")


def test_these_kernels_are_interpreted() -> None:
    for kernel in (forward_kernels.attention_forward, triton_backward.attention_dk_dv):
        assert type(kernel).__name__ == "InterpretedFunction"
    q = torch.randn(1, 4, 1, 16)
    with record() as ran:
        attention(q, q, q, impl="interpret")
    assert [choice.impl for choice in ran] == ["interpret"]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 30), (torch.float16, 20), (torch.bfloat16, 8)],
    ids=["float32", "float16", "bfloat16"],
)
def test_values_and_gradients_agree_with_the_definition(dtype: torch.dtype, count: int) -> None:
    for case in cases("small", count, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_tiles_do_not_change_the_result() -> None:
    """Blocks of other sizes, and reads through descriptors, with the ends of every tile ragged."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 37, 4, 32, generator=generator)
    k, v = torch.randn(2, 2, 53, 2, 32, generator=generator)
    prefix = tuple(torch.randn(2, 21, 2, 32, generator=generator))
    expected, lse = reference.attention(q.double(), k.double(), v.double(), prefix_kv=prefix)
    for m, n in ((16, 32), (64, 16)):
        for descriptors in (False, True):
            tile = Tile({"BLOCK_M": m, "BLOCK_N": n}, descriptors=descriptors)
            with override("attention_forward", tile):
                out, got = attention(q, k, v, prefix_kv=prefix, impl="interpret", return_lse=True)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
            torch.testing.assert_close(got.double(), lse, rtol=0, atol=2e-6)


def test_the_single_masked_sweep_of_warp_specialisation_is_right() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 45, 2, 16, generator=generator)
    tile = Tile({"BLOCK_M": 16, "BLOCK_N": 16}, descriptors=True, warp_specialize=True)
    for window in (None, 20):
        expected, _ = reference.attention(q.double(), k.double(), v.double(), window=window)
        with override("attention_forward", tile):
            out = attention(q, k, v, window=window, impl="interpret")
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_more_sequences_than_a_grid_has_rows_are_computed_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v, pk, pv, sinks = arguments(True)[:6]
    q, k, v = (torch.cat([x, 2 * x, x.flip(0)[:1]]) for x in (q, k, v))  # five
    own = torch.arange(7).expand(5, 7) > torch.arange(5)[:, None]

    def run():
        given = {"prefix_kv": (pk, pv), "sinks": sinks, "return_lse": True, "impl": "interpret"}
        out, lse = attention(q, k, v, segments=own.int(), **given)
        loss = (out * torch.linspace(-1, 1, 16)).sum() + lse.square().sum()
        return out, lse, *torch.autograd.grad(loss, (q, k, v, pk, pv, sinks))

    expected = run()
    for module in ("kernels.attention.op", "kernels.launch"):
        monkeypatch.setattr(import_module(module), "GRID_ROWS", 2)
    for a, b in zip(run(), expected, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(import_module("kernels.attention.op"), "GRID_ROWS", 9)
    with pytest.raises(
        ValueError, match=r"attention_forward: a grid of \(1, 2, 5\) has more than 2"
    ):
        run()


def arguments(prefix: bool):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 5, 2, 16, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 7, 1, 16, generator=generator, requires_grad=True) for _ in range(2))
    extra = [None, None, None]
    if prefix:
        pk, pv = (torch.randn(3, 1, 16, generator=generator, requires_grad=True) for _ in range(2))
        extra = [pk, pv, torch.randn(2, generator=generator, requires_grad=True)]
    return (q, k, v, *extra, None, 2**30, 0, 0.25, 0.0)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_operator_passes_opcheck(prefix: bool) -> None:
    opcheck(launch.attention, arguments(prefix), atol=1e-5, rtol=1e-5)


def test_compiles_into_one_graph_with_gradients() -> None:
    def loss(q, k, v):
        out, lse = attention(q, k, v, window=4, return_lse=True, impl="interpret")
        return out.square().sum() + lse.sum()

    q, k, v = arguments(False)[:3]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, impl="interpret")

    q, k, v = (x.detach() for x in arguments(False)[:3])
    program = torch.export.export(Layer(), (q, k, v))
    assert "afferent.attention.default" in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), Layer()(q, k, v))


def test_autocast_computes_in_its_dtype() -> None:
    q, k, v = (x.detach() for x in arguments(False)[:3])
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention(q, k, v, impl="interpret")
    assert out.dtype == torch.float16
    expected = attention(q.half(), k.half(), v.half(), impl="interpret")
    assert torch.equal(out, expected)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    q, k, v = arguments(False)[:3]

    def loss(q, k, v):
        return attention(q, k, v, impl="interpret").square().sum()

    got = torch.autograd.grad(checkpoint(loss, q, k, v, use_reentrant=False), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_with_the_way_out() -> None:
    q, k, v = arguments(False)[:3]
    out = attention(q, k, v, impl="interpret")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="pass impl='torch' for second ones"):
        torch.autograd.grad(dq.sum(), k)


def test_without_the_gradient_of_lse_a_merge_would_be_wrong() -> None:
    """Negative control: halves merged by their LSE have the gradients of the whole only because
    the backward pass takes the LSE's gradient into account."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 6, 1, 16, generator=generator)
    k, v = torch.randn(2, 1, 40, 1, 16, generator=generator)

    def merged_gradient(drop: bool):
        key = k.clone().requires_grad_()
        parts = [
            attention(q, x, y, causal=False, return_lse=True, impl="interpret")
            for x, y in zip(key.split(20, dim=1), v.split(20, dim=1), strict=True)
        ]
        lses = torch.stack([lse.detach() if drop else lse for _, lse in parts])
        weights = lses.softmax(0).transpose(2, 3)[..., None]  # [2, b, t, h, 1]
        out = sum(w * o for w, (o, _) in zip(weights, parts, strict=True))
        return torch.autograd.grad(out.square().sum(), key)[0]

    whole = k.double().requires_grad_()
    out, _ = reference.attention(q.double(), whole, v.double(), causal=False)
    (expected,) = torch.autograd.grad(out.square().sum(), whole)
    torch.testing.assert_close(merged_gradient(False).double(), expected, rtol=0, atol=1e-5)
    assert (merged_gradient(True).double() - expected).abs().max() > 1e-3
