"""Attention: every torch path against the definition, the definition against its meaning."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kernels import attention, record
from kernels.attention import intervals as masks
from kernels.attention import op, reference
from kernels.dispatch import assume_arch, resolve
from kernels.parity.attention import call, draw, with_gradients

CPU = torch.device("cpu")
TABLE = "attention_forward"
# Sums of at most a hundred terms reordered, in units of the last place of values of order one;
# large logits (up to 80) multiply them.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.bfloat16: 0.25}


def runs_as(impl: str, inputs, options) -> bool:
    """Whether `impl` has what the case needs."""
    return impl != "sdpa" or not ({"sinks"} & set(inputs) or "softcap" in options)


@pytest.mark.parametrize("impl", ["torch", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_agree_with_the_definition(impl, dtype):
    for seed in range(60):
        inputs, options = draw("small", seed, dtype)
        if runs_as(impl, inputs, options):
            exact = {name: x.double() for name, x in inputs.items()}
            expected, _ = call(reference.attention, exact, options)
            out = call(attention, inputs, options, impl=impl)
            assert out.dtype == dtype and out.shape == inputs["q"].shape
            error = (out.double() - expected).abs().max().item()
            assert error < TOLERANCE[dtype], (seed, error, options)


def test_flex_agrees_with_the_definition():
    for seed in range(12):
        inputs, options = draw("small", seed, torch.float32)
        expected, lse = call(reference.attention, inputs, options)
        out, got = call(attention, inputs, options, impl="flex", return_lse=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4, msg=str(seed))
        torch.testing.assert_close(got, lse, rtol=0, atol=1e-4, msg=str(seed))


def test_gradients_and_lse_agree_with_the_definition():
    for seed in range(40):
        inputs, options = draw("small", seed, torch.float64)
        expected = with_gradients(reference.attention, inputs, options)
        got = with_gradients(attention, inputs, options, impl="torch", return_lse=True)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-9)


def test_sdpa_has_the_gradients_of_the_definition():
    drawn = (draw("small", seed, torch.float64) for seed in itertools.count())
    inputs, options = next(case for case in drawn if "window" in case[1] and runs_as("sdpa", *case))
    inputs = {name: inputs[name].requires_grad_() for name in ("q", "k", "v")}
    losses = [
        call(reference.attention, inputs, options)[0].square().sum(),
        call(attention, inputs, options, impl="sdpa").square().sum(),
    ]
    expected, got = (torch.autograd.grad(loss, list(inputs.values())) for loss in losses)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_torch_path_and_definition_have_correct_first_and_second_derivatives():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, h, 2, dtype=torch.float64, generator=g) for n, h in
               ((3, 2), (4, 1), (4, 1)))  # fmt: skip
    pk, pv = torch.randn(2, 2, 1, 2, dtype=torch.float64, generator=g)
    sinks = torch.randn(2, dtype=torch.float64, generator=g)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, pk, pv, sinks)]

    def run(function, **more):
        def compute(q, k, v, pk, pv, sinks):
            return function(q, k, v, prefix_kv=(pk, pv), sinks=sinks, softcap=2.0, **more)

        return compute

    assert torch.autograd.gradcheck(run(reference.attention), inputs)
    ours = run(attention, impl="torch", return_lse=True)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


def test_the_definition_equals_a_loop_over_queries():
    """Causality from the bottom right, a window, documents, groups: pair by pair."""
    g = torch.Generator().manual_seed(3)
    b, t, s, h, kv, d, window = 2, 9, 13, 4, 2, 8, 4
    q = torch.randn(b, t, h, d, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, b, s, kv, d, generator=g, dtype=torch.float64)
    segments = torch.tensor([7, 7, 7, 1, 1, 1, 1, 7, 7, 7, 7, 7, 7]).expand(b, s)  # 7 twice: two
    runs = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    out, lse = reference.attention(q, k, v, window=window, segments=segments)
    for n, i, head in itertools.product(range(b), range(t), range(h)):
        position, group = s - t + i, head // (h // kv)
        keys = [
            j for j in range(s) if position - window < j <= position and runs[j] == runs[position]
        ]
        scores = k[n, keys, group] @ q[n, i, head] / d**0.5
        torch.testing.assert_close(out[n, i, head], scores.softmax(0) @ v[n, keys, group])
        torch.testing.assert_close(lse[n, head, i], scores.logsumexp(0))


@pytest.mark.parametrize("impl", ["torch", "sdpa", "flex"])
def test_blocks_see_themselves_and_what_is_before_them(impl):
    g = torch.Generator().manual_seed(5)
    t, s, block = 10, 13, 4
    q = torch.randn(2, t, 4, 16, generator=g)
    k, v = torch.randn(2, 2, s, 2, 16, generator=g)
    out = attention(q, k, v, block=block, impl=impl)
    for i in range(t):
        end = min(s, ((s - t + i) // block + 1) * block)
        row = attention(q[:, i : i + 1], k[:, :end], v[:, :end], causal=False, impl="torch")
        torch.testing.assert_close(out[:, i : i + 1], row)
    torch.testing.assert_close(out, reference.attention(q, k, v, block=block)[0])
    ones = attention(q, k, v, block=1, impl=impl)
    torch.testing.assert_close(ones, attention(q, k, v, impl=impl))


def test_packed_sequences_are_those_sequences_alone():
    g = torch.Generator().manual_seed(4)
    lengths = [(3, 5), (0, 4), (4, 4), (6, 2), (2, 0)]  # queries, keys; some see nothing
    t, s = (sum(n) for n in zip(*lengths, strict=True))
    q = torch.randn(1, t, 2, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, s, 1, 8, generator=g, dtype=torch.float64)
    begins = [torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*lengths, strict=True)]
    for options in ({}, {"window": 2}, {"causal": False}):
        out = attention(
            q, k, v, cu_seqlens_q=begins[0], cu_seqlens_k=begins[1], impl="torch", **options
        )
        for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in begins), strict=True):
            alone, _ = reference.attention(q[:, a:b], k[:, c:d], v[:, c:d], **options)
            torch.testing.assert_close(out[:, a:b], alone)


def test_changing_a_later_key_leaves_earlier_rows_as_they_were():
    q, k, v = (
        torch.randn(1, 12, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    out = attention(q, k, v, impl="torch")
    k2, v2 = k.clone(), v.clone()
    k2[:, 7], v2[:, 7] = 3.0, -9.0
    changed = attention(q, k2, v2, impl="torch")
    assert torch.equal(changed[:, :7], out[:, :7])
    assert not torch.equal(changed[:, 7:], out[:, 7:])


def test_the_gradient_of_a_prefix_is_the_sum_over_the_batch_of_copies():
    g = torch.Generator().manual_seed(6)
    q = torch.randn(3, 5, 2, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 3, 5, 1, 8, generator=g, dtype=torch.float64)
    pk, pv = torch.randn(2, 4, 1, 8, generator=g, dtype=torch.float64).requires_grad_()
    shared = attention(q, k, v, prefix_kv=(pk, pv), impl="torch").square().sum()
    rows = []
    for n in range(3):
        keys, values = (
            torch.cat([pk[None], k[n : n + 1]], 1),
            torch.cat([pv[None], v[n : n + 1]], 1),
        )
        rows.append(reference.attention(q[n : n + 1], keys, values)[0].square().sum())
    for a, b in zip(
        torch.autograd.grad(shared, (pk, pv)), torch.autograd.grad(sum(rows), (pk, pv)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", range(8))
def test_intervals_are_monotone_and_their_transpose_is_who_sees_whom(seed):
    rng = random.Random(seed)
    t, s = rng.randint(1, 30), rng.randint(30, 40)
    before, after = masks.reach(rng.random() < 0.5, None)
    if seed == 0:
        table = masks.from_blocks(t, s, rng.randint(1, 9), torch.device("cpu"))
    elif rng.random() < 0.5:
        segments = torch.randint(0, 3, (2, s), generator=torch.Generator().manual_seed(seed))
        table = masks.from_segments(segments, t, before, after)
    else:
        cuts = [[0, *sorted(rng.randint(0, n) for _ in range(3)), n] for n in (t, s)]
        table = masks.from_lengths(*map(torch.tensor, cuts), t, before, after)
    assert (table[:, :, 1:] >= table[:, :, :-1]).all()  # what the kernels rely on
    seen = masks.visible(table, s)
    assert torch.equal(masks.visible(masks.transposed(table, s), t), seen.transpose(1, 2))


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_non_contiguous_inputs(impl):
    q, k, v = torch.randn(3, 2, 2, 9, 4).transpose(2, 3)  # [b, t, h, d] strided
    expected, _ = reference.attention(q, k, v, window=3)
    torch.testing.assert_close(op.attention(q, k, v, window=3, impl=impl), expected)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
def test_traces_into_one_graph(impl, window):
    def loss(q, k, v, segments):
        return attention(q, k, v, window=window, segments=segments, impl=impl).square().sum()

    q = torch.randn(2, 6, 4, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 9, 2, 8)
    segments = torch.arange(9).div(4, rounding_mode="floor").expand(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for documents in (None, segments):
        (got,) = torch.autograd.grad(compiled(q, k, v, documents), q)
        (expected,) = torch.autograd.grad(loss(q, k, v, documents), q)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_runs_on_meta(impl):
    q, k = torch.empty(2, 3, 4, 8, device="meta"), torch.empty(2, 5, 2, 8, device="meta")
    out = attention(q, k, k, window=2, impl=impl)
    assert out.is_meta and out.shape == q.shape


q4, k2 = torch.zeros(1, 3, 4, 16), torch.zeros(1, 5, 2, 16)
p3 = torch.zeros(3, 2, 16)


def test_auto_says_what_it_ran_and_why():
    with record() as ran:
        attention(q4, k2, k2)
        attention(q4, k2, k2, softcap=3.0)
        attention(q4, k2, k2, impl="flex")
    assert [(choice.op, choice.impl) for choice in ran] == [
        ("attention", "sdpa"),
        ("attention", "torch"),
        ("attention", "flex"),
    ]
    assert ran[0].reason == "the tensors are on cpu, not on a GPU" and ran[2].reason == "asked for"


def test_auto_takes_the_kernels_where_a_gpu_is():
    with assume_arch(90):
        assert resolve("attention", "auto", device=CPU, table=TABLE) == "triton"
        assert resolve("attention", "auto", device=CPU, table=TABLE, refusal="because") == "torch"
    for chip in (75, "gfx942"):  # no row of the table is for them
        with assume_arch(chip), record() as ran:
            assert resolve("attention", "auto", device=CPU, table=TABLE) == "torch"
        assert "has no tiles for" in ran[0].reason


def test_a_kernel_asked_for_by_name_never_becomes_something_else():
    with pytest.raises(ValueError, match="impl='triton' cannot run here: the tensors are on cpu"):
        attention(q4, k2, k2, impl="triton")
    with pytest.raises(ValueError, match="start Python with TRITON_INTERPRET=1"):
        attention(q4, k2, k2, impl="interpret")
    with pytest.raises(ValueError, match="impl='sdpa' has no softcap, sinks or LSE"):
        attention(q4, k2, k2, softcap=1.0, impl="sdpa")


def test_strides_that_tma_cannot_read_are_refused_on_chips_that_use_it():
    wide = torch.zeros(1, 5, 2, 24, dtype=torch.bfloat16)
    narrow = wide[..., :20].contiguous()[..., :17]  # rows 20 values, 40 bytes, apart
    q = wide[..., :17]
    with assume_arch(90):
        assert op.kernel_refusal(wide, wide, wide) is None
        assert "40 bytes" in str(op.kernel_refusal(q, narrow, narrow))
        assert "up to 256" in str(op.kernel_refusal(*[torch.zeros(1, 2, 1, 264).half()] * 3))
        assert "float64" in str(op.kernel_refusal(*[torch.zeros(1, 2, 1, 8).double()] * 3))
        shifted = torch.zeros(1, 5, 2, 32, dtype=torch.bfloat16)[..., 1:17]  # begins at byte 2
        assert "2 bytes" in str(op.kernel_refusal(wide, shifted, shifted))
        assert op.kernel_refusal(*[narrow.float()] * 3) is None  # float32 is not read through TMA
    with assume_arch(80):
        assert op.kernel_refusal(q, narrow, narrow) is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((q4, k2, k2), {"impl": "flash"}, "impl='flash' is unknown: use auto, triton"),
        ((q4[0], k2, k2), {}, r"expects q \[b, t, h, d\]"),
        ((q4, k2, k2[:, :4]), {}, "of one shape"),
        ((q4, k2[..., :4], k2[..., :4]), {}, "batch and head width"),
        ((q4[:, :, :3], k2, k2), {}, "2 key/value heads do not divide 3 query heads"),
        ((q4.double(), k2, k2), {}, "one float dtype"),
        ((q4.to(torch.float8_e4m3fn),) + (k2.to(torch.float8_e4m3fn),) * 2, {}, "16 bits or more"),
        ((q4, k2, k2), {"window": 0}, "a window is >= 1"),
        ((q4, k2, k2), {"window": -3}, "window=-3"),
        ((q4, k2, k2), {"window": 2, "causal": False}, "needs causal=True"),
        ((q4, k2, k2), {"block": 0}, "a block is >= 1"),
        ((q4, k2, k2), {"block": 2, "causal": False}, "needs causal=True"),
        ((q4, k2, k2), {"block": 2, "window": 2}, "give one of them"),
        ((q4, k2, k2), {"segments": torch.zeros(1, 3)}, r"\[b, s\] = \[1, 5\], got \[1, 3\]"),
        ((k2.expand(1, 5, 2, 16), q4[:, :, :2], q4[:, :, :2]),
         {"segments": torch.zeros(1, 3)}, "segments need t <= s"),
        ((q4, k2, k2), {"cu_seqlens_q": torch.tensor([0, 3])}, "give both or none"),
        ((q4, k2, k2), {"cu_seqlens_q": torch.tensor([0, 3]),
                        "cu_seqlens_k": torch.tensor([0, 2, 5])}, "two vectors of one length"),
        ((q4.expand(2, -1, -1, -1), *[k2.expand(2, -1, -1, -1)] * 2),
         {"cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_k": torch.tensor([0, 5])}, "b=2"),
        ((q4, k2, k2), {"prefix_kv": (p3[:, :1], p3[:, :1])}, "prefix of another model"),
        ((q4, k2, k2), {"prefix_kv": (p3.double(), p3.double())}, "cast it"),
        ((q4, k2, k2), {"prefix_kv": (p3, p3), "window": 2}, "fall out of the window"),
        ((q4, k2, k2), {"sinks": torch.zeros(3)}, r"\[h\] = \[4\]"),
        ((q4, k2, k2), {"softcap": 0.0}, "softcap=0.0 must be > 0"),
        ((q4, k2, k2), {"scale": -1.0}, "scale=-1.0 must be > 0"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options)


def test_the_package_offers_the_function_not_the_folder():
    import kernels

    assert kernels.attention is op.attention
    with pytest.raises(AttributeError, match="kernels has no atention"):
        _ = kernels.atention
