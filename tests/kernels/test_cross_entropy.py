"""Losses of a linear head: the torch path against the definition, the definition against torch."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy, linear_distillation, linear_logprobs, record
from kernels.cross_entropy import op, reference
from kernels.parity.cross_entropy import FUNCTIONS, LargestTensor, draw, with_gradients


def head(seed: int, n: int = 7, vocab: int = 11, d: int = 5, dtype=torch.float64) -> list[Tensor]:
    """hidden and weight, differentiable, and a token for each row."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(m, d, generator=generator).to(dtype) for m in (n, vocab))
    tokens = torch.randint(0, vocab, (n,), generator=generator)
    return [hidden.requires_grad_(), weight.requires_grad_(), tokens]


def teacher(seed: int, n: int = 7, vocab: int = 11, k: int = 4) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of a random teacher, and their log-probabilities."""
    generator = torch.Generator().manual_seed(100 + seed)
    logits = torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    values, indices = logits.log_softmax(1).topk(k)
    return indices, values


def small_chunks(rows: int = 2, vocab: int = 11):
    """Let the torch path take so many rows of float64 logits at a time."""
    return mock.patch.object(op, "WORKSPACE", rows * vocab * 8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    for seed in range(30):
        inputs, options, limits = draw(name, "small", seed, torch.float64)
        more = {"return_entropy": True} if name == "linear_logprobs" else {}
        exact = with_gradients(getattr(reference, name), inputs, options, limits)
        got = with_gradients(getattr(op, name), inputs, options, limits, impl="torch", **more)
        assert exact.keys() == got.keys()
        for what, expected in exact.items():
            torch.testing.assert_close(
                got[what], expected, rtol=1e-9, atol=1e-11, msg=f"{what}: {seed} {options}"
            )


def test_the_definition_is_torchs_cross_entropy_of_the_logits() -> None:
    hidden, weight, targets = head(0)
    targets[2] = 3
    for reduction in op.REDUCTIONS:
        expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=3, reduction=reduction)
        for function in (reference.linear_cross_entropy, linear_cross_entropy):
            got = function(hidden, weight, targets, ignore_index=3, reduction=reduction)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [2, 100])
def test_first_and_second_derivatives_in_one_chunk_and_in_several(softcap, rows: int) -> None:
    hidden, weight, tokens = head(1, n=5, vocab=6, d=3)
    tokens[1] = op.PADDING
    indices, values = teacher(1, n=5, vocab=6, k=3)

    def functions(hidden, weight):
        options = {"softcap": softcap, "impl": "torch"}
        logprobs, entropy = linear_logprobs(
            hidden, weight, tokens, temperature=0.7, return_entropy=True, **options
        )
        losses = [
            linear_distillation(hidden, weight, indices, values, tail=tail, **options)
            for tail in op.TAILS
        ]
        loss = linear_cross_entropy(hidden, weight, tokens, ignore_index=-1, **options)
        return logprobs, entropy, loss, *losses

    with small_chunks(rows, vocab=6):
        assert torch.autograd.gradcheck(functions, (hidden, weight))
        assert torch.autograd.gradgradcheck(functions, (hidden, weight))


def test_the_three_losses_meet_where_they_must() -> None:
    """One certain teacher's token: cross-entropy. All of them: the Kullback-Leibler divergence."""
    hidden, weight, tokens = head(2)
    losses = linear_cross_entropy(hidden, weight, tokens, reduction="none")
    assert torch.equal(losses, -linear_logprobs(hidden, weight, tokens))
    certain = linear_distillation(
        hidden, weight, tokens[:, None], torch.zeros(len(tokens), 1), reduction="none"
    )
    assert torch.equal(certain, losses)
    indices, values = teacher(2, k=11)
    dense = torch.empty_like(values).scatter(1, indices, values)
    student = (hidden @ weight.T / 2.0).log_softmax(1)
    expected = F.kl_div(student, dense, log_target=True, reduction="batchmean")
    for tail in op.TAILS:
        got = linear_distillation(hidden, weight, indices, values, temperature=2.0, tail=tail)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_what_becomes_of_the_teachers_tail() -> None:
    """At q = p on a few tokens only "lump" is a divergence at its minimum: 0, and flat."""
    hidden, weight, _ = head(3)
    values, indices = (hidden @ weight.T).log_softmax(1).detach().topk(3)
    found = {}
    for tail in op.TAILS:
        loss = linear_distillation(hidden, weight, indices, values, tail=tail)
        (gradient,) = torch.autograd.grad(loss, hidden)
        found[tail] = loss.item(), gradient.abs().max().item()
    assert abs(found["lump"][0]) < 1e-14 and found["lump"][1] < 1e-14
    assert abs(found["ignore"][0]) < 1e-14 and found["ignore"][1] > 1e-3
    assert found["renormalise"][0] > 0.01 and found["renormalise"][1] > 1e-3


def test_the_entropy_of_an_undecided_head_is_log_vocab() -> None:
    hidden, weight, tokens = head(4)
    weight = weight[:1].expand(11, -1)  # every token is as likely
    logprobs, entropy = linear_logprobs(hidden, weight, tokens, return_entropy=True)
    expected = torch.full((7,), 11.0, dtype=torch.float64).log()
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(-logprobs, expected)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    hidden, weight, tokens = head(5)
    shifted = weight + torch.randn(5, generator=torch.Generator().manual_seed(0))
    for function in (linear_cross_entropy, linear_logprobs):
        torch.testing.assert_close(
            function(hidden, weight, tokens), function(hidden, shifted, tokens)
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_that_counts_is_a_loss_of_zero(reduction: str) -> None:
    for n in (0, 3):
        hidden, weight, tokens = head(6, n=n)
        indices, values = teacher(6, n=n)
        losses = (
            linear_cross_entropy(
                hidden, weight, torch.full_like(tokens, -100), reduction=reduction
            ),
            linear_distillation(
                hidden, weight, torch.full_like(indices, -1), values * torch.nan,
                reduction=reduction,
            ),
        )  # fmt: skip
        for loss in losses:
            assert loss.item() == 0.0
            for gradient in torch.autograd.grad(loss, (hidden, weight)):
                assert not gradient.any()


def test_any_number_of_leading_dimensions() -> None:
    hidden, weight, tokens = head(7, n=6)
    indices, values = teacher(7, n=6)
    flat = linear_logprobs(hidden, weight, tokens, return_entropy=True)
    shaped = linear_logprobs(hidden.view(2, 3, 5), weight, tokens.view(2, 3), return_entropy=True)
    for a, b in zip(flat, shaped, strict=True):
        assert torch.equal(a.view(2, 3), b)
    one = linear_cross_entropy(hidden[0], weight, tokens[0], reduction="none")
    assert one.shape == () and one == -flat[0][0]
    loss = linear_distillation(
        hidden.view(2, 3, 5), weight, indices.view(2, 3, 4), values.view(2, 3, 4)
    )
    torch.testing.assert_close(loss, linear_distillation(hidden, weight, indices, values))


def losses(function, hidden: Tensor, weight: Tensor, tokens: Tensor, impl: str) -> None:
    function(hidden, weight, tokens, impl=impl).backward()


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor, impl: str) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, tokens)


def test_no_tensor_grows_with_tokens_times_vocabulary() -> None:
    """And the same check sees the logits of the usual way."""
    hidden, weight, tokens = head(8, n=64, vocab=96, d=4, dtype=torch.float32)
    with mock.patch.object(op, "WORKSPACE", 8 * 96 * 4):
        for function, most in ((linear_cross_entropy, 8 * 96), (naive, None)):
            with LargestTensor() as largest:
                losses(function, hidden, weight, tokens, "torch")
            if most is None:
                assert largest.numel == 64 * 96
            else:
                assert 64 * 4 <= largest.numel <= most


def test_chunks_sum_the_gradient_of_a_bfloat16_head_in_float32() -> None:
    hidden, weight, tokens = head(9, n=512, vocab=16, d=8, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*exact, tokens, reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact[1])

    def error(rows: int) -> float:
        with mock.patch.object(op, "WORKSPACE", rows * 16 * 4):
            loss = linear_cross_entropy(hidden, weight, tokens, reduction="sum", impl="torch")
        (got,) = torch.autograd.grad(loss, weight)
        return ((got.double() - expected).norm() / expected.norm()).item()

    assert error(1) < 1.2 * error(512) < 1e-2


def test_results_are_float32_for_narrower_types_and_autocast_casts() -> None:
    hidden, weight, tokens = head(10, dtype=torch.float32)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), tokens)
    assert low.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, tokens)
    assert torch.equal(loss, low)
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.dtype == torch.float32


def test_a_frozen_head_and_tied_weights() -> None:
    hidden, weight, tokens = head(11)
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, tokens)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, tokens), hidden)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected[0])

    tied = weight.detach().requires_grad_()
    linear_cross_entropy(tied[tokens].tanh(), tied, tokens).backward()
    table, other = (weight.detach().requires_grad_() for _ in range(2))
    F.cross_entropy(table[tokens].tanh() @ other.T, tokens).backward()
    torch.testing.assert_close(tied.grad, table.grad + other.grad)


@pytest.mark.parametrize("rows", [2, 100])
def test_traces_into_one_graph_where_a_token_outside_is_nan(rows: int) -> None:
    """Compiled, as on a GPU, nobody looks at the tokens: the row is NaN, and has no gradient."""
    hidden, weight, targets = head(12)
    expected = linear_cross_entropy(hidden, weight, targets, reduction="none")
    targets[1], targets[4], targets[5] = 11, -1, -(2**40)
    function = partial(linear_cross_entropy, reduction="none", impl="torch")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with small_chunks(rows):
        got = compiled(hidden, weight, targets)
    outside = torch.zeros(7, dtype=torch.bool)
    outside[[1, 4, 5]] = True
    assert torch.equal(got.isnan(), outside)
    torch.testing.assert_close(got[~outside], expected[~outside])
    (gradient,) = torch.autograd.grad(got.sum(), hidden)
    assert torch.equal(gradient.any(dim=1), ~outside)


def test_runs_on_meta() -> None:
    hidden, weight = (torch.empty(n, 4, device="meta") for n in (6, 9))
    tokens = torch.empty(6, dtype=torch.long, device="meta")
    logprobs, entropy = linear_logprobs(hidden, weight, tokens, return_entropy=True)
    assert logprobs.is_meta and logprobs.shape == entropy.shape == (6,)


def test_says_what_ran_and_why() -> None:
    hidden, weight, tokens = head(13, dtype=torch.float32)
    with record() as ran:
        linear_cross_entropy(hidden, weight, tokens)
        linear_logprobs(hidden, weight, tokens, impl="torch")
    assert [(choice.op, choice.impl) for choice in ran] == [
        ("linear_cross_entropy", "torch"),
        ("linear_logprobs", "torch"),
    ]
    assert "not on a GPU" in ran[0].reason
    for impl, reason in (("triton", "not on a GPU"), ("interpret", "TRITON_INTERPRET=1")):
        with pytest.raises(ValueError, match=reason):
            linear_cross_entropy(hidden, weight, tokens, impl=impl)


h, w, t = torch.zeros(3, 4), torch.zeros(9, 4), torch.tensor([0, 8, 2])
tt, tl = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)
wrong = torch.tensor([0, 9, 2])


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (linear_cross_entropy, (h, w[:, :3], t), {}, r"weight \[vocab, d\], got \[3, 4\] and \[9"),
        (linear_cross_entropy, (h, w[:0], t), {}, r"weight \[0, 4\] is empty"),
        (linear_cross_entropy, (h, w.double(), t), {}, "one float dtype .* cast one of them"),
        (linear_cross_entropy, (h.int(), w.int(), t), {}, "one float dtype"),
        (linear_cross_entropy, (h, w, t[:2]), {}, r"targets must be int32 or int64 \[3\]"),
        (linear_cross_entropy, (h, w, t.float()), {}, "targets must be int32 or int64"),
        (linear_cross_entropy, (h, w, wrong), {}, "targets holds 9, expected 0 to 8 .*9 rows"),
        (linear_cross_entropy, (h, w, t - 1), {}, "targets holds -1, .* ignore_index=-100"),
        (linear_cross_entropy, (h, w, t), {"reduction": "avg"}, "use mean, sum, none"),
        (linear_cross_entropy, (h, w, t), {"softcap": 0.0}, "softcap=0.0 must be > 0"),
        (linear_cross_entropy, (h, w, t), {"impl": "cuda"}, "impl='cuda' is unknown"),
        (linear_cross_entropy, (h, w, t.to("meta")), {}, "one device, got cpu, cpu and meta"),
        (linear_logprobs, (h, w, wrong), {}, "tokens holds 9, .* padding -1"),
        (linear_logprobs, (h, w, t), {"temperature": 0}, "temperature=0 must be > 0"),
        (linear_distillation, (h, w, tt[:2], tl[:2]), {}, r"teacher_tokens must be .* \[3, 2\]"),
        (linear_distillation, (h, w, tt[:, :0], tl[:, :0]), {}, "at least one token"),
        (linear_distillation, (h, w, tt, tl[:, :1]), {}, r"shape of teacher_tokens \[3, 2\]"),
        (linear_distillation, (h, w, tt, tl + 0.5), {}, "teacher_logprobs holds 0.5"),
        (linear_distillation, (h, w, tt + 9, tl), {}, "teacher_tokens holds 9"),
        (linear_distillation, (h, w, tt, tl), {"tail": "drop"}, "use ignore, renormalise, lump"),
    ],
)
def test_bad_input_says_what_was_expected(function, arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
