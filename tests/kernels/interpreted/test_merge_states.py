"""The kernels of merge_states, interpreted: values and gradients, and as operators of torch."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from kernels import merge_states, record
from kernels.attention import merge, triton_merge
from kernels.parity.merge import cases, draw

CPU = torch.device("cpu")


def test_these_kernels_are_interpreted() -> None:
    for kernel in (triton_merge.merge_forward, triton_merge.merge_backward):
        assert type(kernel).__name__ == "InterpretedFunction"
    outs, lses = draw("small", 0, torch.float32)
    with record() as ran:
        merge_states(zip(outs, lses, strict=True), impl="interpret")
    assert [choice.impl for choice in ran] == ["interpret"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_agree_with_the_definition(dtype: torch.dtype) -> None:
    for case in cases("small", 30, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_a_sink_is_a_state_without_a_value() -> None:
    outs, lses = (torch.stack(x) for x in draw("small", 3, torch.float32))
    sinks = torch.linspace(-1, 1, outs.shape[3])
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge.forward(outs, lses, out, lse, sinks)
    sink = torch.zeros_like(outs[0]), sinks[:, None].expand_as(lses[0])
    expected = merge_states([*zip(outs, lses, strict=True), sink], impl="torch")
    torch.testing.assert_close((out, lse), expected)


def states(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    outs = torch.randn(n, 2, 3, 2, 20, generator=generator, requires_grad=True)
    return outs, torch.randn(n, 2, 2, 3, generator=generator, requires_grad=True)


def test_the_operators_pass_opcheck() -> None:
    outs, lses = states(3)
    opcheck(merge.merge, (outs, lses))
    dout, dlse = torch.ones_like(outs[0]), torch.ones_like(lses[0])
    opcheck(merge.merge_backward, (dout, dlse, outs.detach(), lses.detach()))


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()

    def loss(outs, lses, impl):
        out, lse = merge_states(list(zip(outs, lses, strict=True)), impl=impl)
        return out.square().sum() + lse.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = states(2)
    got = torch.autograd.grad(compiled(*given, "interpret"), given)
    expected = torch.autograd.grad(loss(*given, "torch"), given)
    torch.testing.assert_close(got, expected)


def test_second_derivatives_are_refused() -> None:
    outs, lses = states(2)
    out, _ = merge_states(list(zip(outs, lses, strict=True)), impl="interpret")
    (first,) = torch.autograd.grad(out.square().sum(), outs, create_graph=True)
    with pytest.raises(RuntimeError, match="pass impl='torch' for second ones"):
        first.sum().backward()
