"""The kernels of the characteristic function, interpreted: values, gradients, operators."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from kernels import record
from kernels.parity.sigreg import cases
from kernels.sigreg import op, triton
from kernels.sigreg.op import characteristic_function

CPU = torch.device("cpu")


def test_these_kernels_are_interpreted() -> None:
    for kernel in (triton.ecf_forward, triton.ecf_backward):
        assert type(kernel).__name__ == "InterpretedFunction"
    with record() as ran:
        characteristic_function(torch.randn(5, 3), 0.1, 4, impl="interpret")
    assert [choice.impl for choice in ran] == ["interpret"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_agree_with_the_definition(dtype: torch.dtype) -> None:
    for case in cases("small", 20, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_the_operators_pass_opcheck() -> None:
    h = torch.randn(2, 5, 3, requires_grad=True)
    opcheck(op.ecf, (h, 0.2, 5))
    averages = torch.ones(2, 5, 3)
    opcheck(op.ecf_backward, (averages, averages, h.detach(), 0.2, 5))


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()

    def loss(h, impl):
        cosines, sines = characteristic_function(h, 3 / 16, 17, impl=impl)
        return cosines.square().sum() + sines.square().sum()

    h = torch.randn(2, 9, 4, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(h, "interpret"), h)
    torch.testing.assert_close(got, torch.autograd.grad(loss(h, "torch"), h))


def test_second_derivatives_are_refused() -> None:
    h = torch.randn(4, 3, requires_grad=True)
    cosines, _ = characteristic_function(h, 0.2, 5, impl="interpret")
    (first,) = torch.autograd.grad(cosines.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="pass impl='torch' for second ones"):
        first.sum().backward()


def test_sine_and_cosine_are_those_of_float64() -> None:
    """At one knot and for one sample the averages are the functions themselves."""
    x = torch.cat([torch.linspace(-8000, 8000, 4001), torch.randn(500), torch.zeros(1)])
    cosines, sines = characteristic_function(x[None], 1.0, 2, impl="interpret")
    torch.testing.assert_close(cosines[1], x.double().cos().float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sines[1], x.double().sin().float(), rtol=0, atol=2e-6)
