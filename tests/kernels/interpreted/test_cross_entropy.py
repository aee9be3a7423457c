"""The linear head's kernels, interpreted: values and gradients, and as operators of torch."""

from __future__ import annotations

from types import MappingProxyType
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from kernels import linear_cross_entropy, linear_distillation, linear_logprobs, record
from kernels.cross_entropy import launch, op, reference
from kernels.cross_entropy import triton as kernels
from kernels.parity.cross_entropy import LargestTensor, cases
from kernels.tiles import Tile, override

CPU = torch.device("cpu")


def head(seed: int, n: int = 9, vocab: int = 70, d: int = 20, dtype=torch.float32) -> list[Tensor]:
    """hidden and weight, differentiable, and a token for each row."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(m, d, generator=generator).to(dtype) for m in (n, vocab))
    tokens = torch.randint(0, vocab, (n,), generator=generator)
    return [hidden.requires_grad_(), weight.requires_grad_(), tokens]


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_these_kernels_are_interpreted() -> None:
    for kernel in (kernels.linear_logsumexp, kernels.linear_selected, kernels.linear_dlogits):
        assert type(kernel).__name__ == "InterpretedFunction"
    with record() as ran:
        linear_cross_entropy(*head(0), impl="interpret")
    assert [choice.impl for choice in ran] == ["interpret"]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 24), (torch.float16, 15), (torch.bfloat16, 9)],
    ids=["float32", "float16", "bfloat16"],
)
def test_values_and_gradients_agree_with_the_definition(dtype: torch.dtype, count: int) -> None:
    for case in cases("small", count, dtype):
        wrong = [c for c in case.run("interpret", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_the_same_cases_notice_what_is_missing() -> None:
    """Negative controls: a kernel that does not run, and gradients that lose a term."""
    backward, run = launch.backward, launch.launch

    def idle(kernel, *arguments, **named):
        if kernel is not kernels.linear_selected:
            run(kernel, *arguments, **named)

    def without_entropy(dlogprobs, dlse, dentropy, *others):
        return backward(dlogprobs, dlse, dentropy * 0, *others)

    def without_selected(dlogprobs, *others):
        return backward(dlogprobs * 0.99, *others)

    for name, substitute in (
        ("launch", idle),
        ("backward", without_entropy),
        ("backward", without_selected),
    ):
        with mock.patch.object(launch, name, substitute):
            found = [case.run("interpret", CPU) for case in cases("small", 3, torch.float32)]
        assert any(not comparison.holds for comparison in found[1]), substitute


def test_tiles_splits_and_chunks_do_not_change_the_result() -> None:
    """Blocks of other sizes, and reads through descriptors, with the ends of every tile ragged."""
    hidden, weight, tokens = head(1, n=37, vocab=150)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference.linear_logprobs(*exact, tokens)
    gradients = torch.autograd.grad(sum(x.sin().sum() for x in expected), exact)
    for n, v, d in ((16, 32, 16), (32, 16, 32)):
        for descriptors, group, workspace in ((False, 1, 0), (True, 2, 128 * 37 * 4)):
            blocks = MappingProxyType({"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d})
            tile = Tile(blocks, descriptors=descriptors)
            with (
                override("linear_logsumexp", tile),
                override("linear_dlogits", tile),
                mock.patch.object(launch, "GROUP", group),
                mock.patch.object(launch, "PROGRAMS", 8),
                mock.patch.object(op, "WORKSPACE", workspace),
            ):
                got = linear_logprobs(hidden, weight, tokens, return_entropy=True, impl="interpret")
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-5)
                loss = sum(x.sin().sum() for x in got)
                for a, b in zip(
                    torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True
                ):
                    assert relative(a, b) < 1e-5


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_eighty_neither_overflow_nor_lose_the_gradient(softcap) -> None:
    hidden, weight, targets = head(2, n=12)
    with torch.no_grad():
        hidden *= 80 / (hidden @ weight.T).abs().max()
        targets[:6] = (hidden @ weight.T).argmin(1)[:6]  # as unlikely as can be
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    options = {"softcap": softcap, "reduction": "none"}
    expected = reference.linear_cross_entropy(*exact, targets, **options)
    got = linear_cross_entropy(hidden, weight, targets, **options, impl="interpret")
    assert softcap or expected.max() > 60
    assert relative(got, expected) < 1e-6
    gradients = torch.autograd.grad(expected.sum(), exact)
    for a, b in zip(torch.autograd.grad(got.sum(), (hidden, weight)), gradients, strict=True):
        assert relative(a, b) < 1e-5


def test_float16_keeps_the_gradient_of_a_mean_over_many_tokens() -> None:
    """Each token of a large batch has a small gradient, times the probability of every word. The
    control: dlogits in their own unit are rounded to a few bits."""
    hidden, weight, tokens = head(3, n=16, vocab=200, d=16, dtype=torch.float16)
    with torch.no_grad():
        weight *= 0.6
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = reference.linear_logprobs(*exact, tokens)[1].sum() * 2.0**-13
    expected = torch.autograd.grad(loss, exact)[0]

    def error() -> float:
        _, entropy = linear_logprobs(hidden, weight, tokens, return_entropy=True, impl="interpret")
        return relative(torch.autograd.grad(entropy.sum() * 2.0**-13, hidden)[0], expected)

    with mock.patch.object(launch, "_unit", lambda *gradients: torch.ones(())):
        rounded = error()
    assert error() < 1e-3 < rounded / 3


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_grows_with_tokens_times_vocabulary(frozen: bool) -> None:
    """The control: with a workspace for all of it the same check sees the logits. Besides, a
    gradient that nobody asked for is not computed. (The interpreter copies the weight.)"""
    n, vocab, d = 64, 400, 8
    hidden, weight, tokens = head(4, n, vocab, d)
    tokens, total = tokens[:, None].int(), torch.zeros(0)
    ones, row = torch.ones(n, 1), torch.zeros(n)
    for workspace, most in ((128 * n * 4, 128 * n), (op.WORKSPACE, vocab * n)):
        with mock.patch.object(op, "WORKSPACE", workspace), torch.no_grad():
            with LargestTensor() as largest:
                logprobs, lse, _ = launch.forward(hidden, weight, tokens, 1.0, 0.0, False)
            assert largest.numel <= vocab * d < most / 2
            saved = (hidden, weight, tokens, logprobs, lse, total)
            with LargestTensor() as largest:
                _, dweight = launch.backward(ones, row, total, *saved, 1.0, 0.0, True, not frozen)
        assert largest.numel == most
        assert dweight.shape == ((0,) if frozen else weight.shape)


def test_no_rows_are_no_loss() -> None:
    hidden, weight, tokens = head(5, n=0)
    loss = linear_cross_entropy(hidden, weight, tokens, impl="interpret")
    assert loss.item() == 0.0
    for x, gradient in zip(
        (hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True
    ):
        assert gradient.shape == x.shape and not gradient.any()


def arguments(entropy: bool) -> tuple:
    hidden, weight, tokens = head(6)
    more = torch.randint(0, 70, (9, 2), generator=torch.Generator().manual_seed(0))
    return hidden, weight, torch.cat([tokens[:, None], more], 1).int(), 0.5, 3.0, entropy


@pytest.mark.parametrize("entropy", [False, True])
def test_the_operators_pass_opcheck(entropy: bool) -> None:
    inputs = arguments(entropy)
    opcheck(launch.linear_softmax, inputs, atol=1e-5, rtol=1e-5)
    tensors, numbers = [x.detach() for x in inputs[:3]], inputs[3:5]
    with torch.no_grad():
        results = launch.linear_softmax(*inputs)
    gradients = [torch.ones_like(x) for x in results]
    for wanted in ((True, True), (True, False), (False, True)):
        opcheck(
            launch.linear_softmax_backward,
            (*gradients, *tensors, *results, *numbers, *wanted),
            test_utils=("test_schema", "test_faketensor"),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


def loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logprobs, entropy = linear_logprobs(
        hidden, weight, tokens, return_entropy=True, impl="interpret"
    )
    distance = linear_distillation(
        hidden, weight, tokens[:, None], logprobs.detach()[:, None], tail="lump", impl="interpret"
    )
    return (logprobs * entropy).sum() + distance


def test_compiles_into_one_graph_with_gradients() -> None:
    hidden, weight, tokens = head(7)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight, tokens), (hidden, weight))
    expected = torch.autograd.grad(loss(hidden, weight, tokens), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_exports() -> None:
    class Head(torch.nn.Module):
        def forward(self, hidden, weight, tokens):
            return linear_logprobs(hidden, weight, tokens, impl="interpret")

    inputs = tuple(x.detach() for x in head(8))
    program = torch.export.export(Head(), inputs)
    assert "afferent.linear_softmax.default" in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), Head()(*inputs))


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, tokens = head(9)
    with torch.autocast("cpu", dtype=torch.float16):
        got = linear_cross_entropy(hidden, weight, tokens, impl="interpret")
    low = linear_cross_entropy(hidden.half(), weight.half(), tokens, impl="interpret")
    assert torch.equal(got, low)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = head(10)
    again = checkpoint(loss, *inputs, use_reentrant=False)
    got = torch.autograd.grad(again, inputs[:2])
    for a, b in zip(got, torch.autograd.grad(loss(*inputs), inputs[:2]), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused_with_the_way_out() -> None:
    hidden, weight, tokens = head(11)
    value = linear_cross_entropy(hidden, weight, tokens, impl="interpret")
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="pass impl='torch' for second"):
        torch.autograd.grad(gradient.sum(), weight)


def test_float64_is_refused_with_the_reason() -> None:
    hidden, weight, tokens = head(12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"take float32, float16 and bfloat16, not torch\.float64"):
        linear_cross_entropy(hidden, weight, tokens, impl="interpret")
