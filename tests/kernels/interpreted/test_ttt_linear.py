"""The kernels of TTT-Linear: random cases, and what random cases seldom draw."""

from __future__ import annotations

import pytest
import torch

from kernels import record, ttt_linear
from kernels.fast_weights.ttt import reference
from kernels.parity.ttt_linear import cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_random_cases(dtype: torch.dtype) -> None:
    for case in cases("small", 4, dtype):
        for comparison in case.run("interpret", torch.device("cpu")):
            assert comparison.holds, (case.name, comparison)


def inputs(t: int, c: int = 4, d: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = [normal(1, t, 2, d) for _ in range(3)]
    rate, position = 0.1 * normal(1, t, 2).sigmoid(), 1 / torch.arange(1.0, c + 1)
    start = [0.2 * normal(1, 2, d, d), 0.1 * normal(1, 2, d)]
    return [*tokens, rate, position, *start, 1 + 0.1 * normal(2, d), 0.1 * normal(2, d)]


def test_lengths_around_the_mini_batch_and_strided_inputs() -> None:
    for t in (3, 4, 5, 9):
        q, k, v, rate, position, weight, bias, *norm = inputs(t)
        expected, state = reference.ttt(q, k, v, rate, position, [weight, bias], *norm)
        for turn in (False, True):
            given = [q, k, v, rate]
            if turn:  # heads outside
                given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
            found = ttt_linear(*given, position, weight, bias, *norm, impl="interpret")
            for a, b in zip(found, [expected, *state], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sequence_continues_after_whole_mini_batches() -> None:
    *tokens, position, weight, bias, scale, shift = inputs(11)
    whole, *last = ttt_linear(*tokens, position, weight, bias, scale, shift, impl="interpret")
    start = [weight, bias]
    parts = []
    for part in (slice(0, 8), slice(8, 11)):
        given = [x[:, part] for x in tokens]
        out, *start = ttt_linear(*given, position, *start, scale, shift, impl="interpret")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start, last, rtol=1e-4, atol=1e-5)


def test_keys_that_the_model_maps_to_a_constant_poison_nothing() -> None:
    *given, weight, bias, scale, shift = inputs(6)
    leaves = [x.requires_grad_() for x in (*given, 0 * weight, 0 * bias, scale, shift)]
    found = ttt_linear(*leaves, impl="interpret")  # no variance to divide by
    sum(x.sum() for x in found).backward()
    assert all(x.isfinite().all() for x in (*found, *(leaf.grad for leaf in leaves)))


def test_it_compiles_into_one_graph_and_says_what_ran() -> None:
    given = inputs(6)
    with record() as choices:
        eager = ttt_linear(*given, impl="interpret")
    assert [choice.impl for choice in choices] == ["interpret"]
    compiled = torch.compile(ttt_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*given, impl="interpret"), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        ttt_linear(*(x.double() for x in inputs(4)), impl="interpret")
    with pytest.raises(ValueError, match="heads of width 40 are over 32"):
        ttt_linear(*inputs(4, d=40), impl="interpret")
    with pytest.raises(ValueError, match="mini-batches of 20 tokens are over 16"):
        ttt_linear(*inputs(4, c=20), impl="interpret")
    leaves = [x.requires_grad_() for x in inputs(5)]
    out, *_ = ttt_linear(*leaves, impl="interpret")
    (slope,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        slope.sum().backward()
