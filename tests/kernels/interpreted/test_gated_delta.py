"""The kernels of the gated delta rule: random cases, and what random cases seldom draw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import gated_delta_rule, record
from kernels.fast_weights.gated_delta import reference
from kernels.fast_weights.gated_delta.launch import chunk
from kernels.parity.gated_delta import cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_random_cases(dtype: torch.dtype) -> None:
    for case in cases("small", 6, dtype):
        for comparison in case.run("interpret", torch.device("cpu")):
            assert comparison.holds, (case.name, comparison)


def inputs(t: int, dtype: torch.dtype = torch.float32, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(1, t, 2, d), F.normalize(normal(1, t, 2, d), dim=-1), normal(1, t, 2, d)
    return [*(x.to(dtype) for x in (q, k, v, normal(1, t, 2).sigmoid())), -normal(1, t, 2).abs()]


def test_lengths_around_the_chunk_and_strided_inputs() -> None:
    size = chunk(inputs(1)[0])
    for t in (size - 1, size, size + 1, 2 * size + 3):
        given = inputs(t)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]  # heads outside
        expected, state = reference.gated_delta_rule(*given)
        for x in (given, turned):
            out, last = gated_delta_rule(*x, impl="interpret")
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-5)


def test_a_sequence_continues_from_its_state() -> None:
    given = inputs(37)
    whole, last = gated_delta_rule(*given, impl="interpret")
    first, middle = gated_delta_rule(*(x[:, :20] for x in given), impl="interpret")
    rest, end = gated_delta_rule(*(x[:, 20:] for x in given), state=middle, impl="interpret")
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


def test_a_fast_decay_neither_overflows_nor_poisons_gradients() -> None:
    *given, g = inputs(40)
    leaves = [x.requires_grad_() for x in (*given, 60 * g)]
    out, last = gated_delta_rule(*leaves, impl="interpret")
    (out.sum() + last.sum()).backward()
    assert all(x.isfinite().all() for x in (out, last, *(leaf.grad for leaf in leaves)))


def test_it_compiles_into_one_graph_and_says_what_ran() -> None:
    given = inputs(20)
    with record() as choices:
        eager = gated_delta_rule(*given, impl="interpret")
    assert [choice.impl for choice in choices] == ["interpret"]
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given, impl="interpret"), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        gated_delta_rule(*(x.double() for x in inputs(4)), impl="interpret")
    with pytest.raises(ValueError, match="keys of width 80 are over 64"):
        gated_delta_rule(*inputs(4, d=80), impl="interpret")
    leaves = [x.requires_grad_() for x in inputs(5)]
    out, _ = gated_delta_rule(*leaves, impl="interpret")
    (slope,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()
