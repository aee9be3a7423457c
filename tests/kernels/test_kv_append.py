"""Appending to a paged cache: the torch path against the definition, the definition against its
meaning, what the codes stand for, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import kernels
from kernels.dispatch import assume_arch, record
from kernels.kv_cache import quantise
from kernels.kv_cache.append import reference
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.layout import BlockTable, PagedKV, QuantSpec
from kernels.parity import append as parity
from models.language.config import TransformerConfig
from models.language.layers import RMSNorm, rotary, rotate

CPU = torch.device("cpu")
KINDS = ("none", "fp8", "int8", "int4")


class Setup:
    """A poisoned cache, empty; requests of the given lengths in permuted pages; their tokens."""

    def __init__(
        self,
        kind: str,
        lengths: list[int],
        *,
        kv: int = 2,
        d: int = 8,
        page: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        none = [0] * len(lengths)
        rng, generator = random.Random(seed), torch.Generator().manual_seed(7)
        quant = QuantSpec(kind, group=4)
        self.cache, self.table = parity.poisoned_cache(
            rng, page, kv, d, dtype, quant, none, lengths
        )
        self.ends, self.n = parity.ends(lengths), sum(lengths)
        self.k, self.v = torch.randn(2, self.n, kv, d, generator=generator, dtype=dtype)

    def append(self, **options) -> torch.Tensor | None:
        return append_kv(
            self.cache, self.table, self.k, self.v, **{"cu_seqlens": self.ends, **options}
        )


def same(a: PagedKV, b: PagedKV) -> bool:
    """Bitwise, guard bands included."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in parity.STORED]
    return all(
        torch.equal(parity.bits(parity.whole(x)), parity.bits(parity.whole(y)))
        for x, y in pairs
        if x is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_torch_path_writes_what_the_definition_writes(dtype: torch.dtype) -> None:
    for case in parity.cases("small", 40, dtype):
        wrong = [c for c in case.run("torch", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


def test_a_wrong_code_and_a_write_beside_the_page_are_noticed() -> None:
    """The comparison above can fail."""
    for name, index in (("codes", (0, 0, 0, 0, 0)), ("changed besides", (-1, 1, -1, -1, -1))):
        setup = Setup("int8", [16])
        before, got = (parity.mapped(setup.cache, lambda x: parity.copied(x, CPU)) for _ in "ab")
        setup.append(impl="torch")
        append_kv(got, setup.table, setup.k, setup.v, cu_seqlens=setup.ends, impl="torch")
        results = parity.compare_caches(before, setup.cache, got, turned=False)
        assert all(c.holds for c in results)
        page = int(setup.table.pages[0, 0])
        where = (page, *index[1:]) if name == "codes" else index
        if name != "codes" and page == setup.cache.pages - 1:
            where = (0, *index[1:])
        got.data[where] += 1
        results = parity.compare_caches(before, setup.cache, got, turned=False)
        assert [c.what for c in results if not c.holds] == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_any_chunking_writes_the_same_cache(kind: str) -> None:
    lengths = [50, 1, 33, 16]
    for seed in range(4):
        rng = random.Random(seed)
        whole, pieces = Setup(kind, lengths), Setup(kind, lengths)
        rope = tuple(parity.tables(8).values())
        whole.append(rope=rope, impl="torch")
        done = [0] * 4
        while done != lengths:
            new = [
                min(rng.choice([0, 1, 3, 16, 17]), end - at)
                for at, end in zip(done, lengths, strict=True)
            ]
            rows = torch.cat([
                torch.arange(at, at + count) + int(begin)
                for at, count, begin in zip(done, new, whole.ends[:-1], strict=True)
            ])  # fmt: skip
            done = [at + count for at, count in zip(done, new, strict=True)]
            table = BlockTable(pieces.table.pages, torch.tensor(done).int(), pieces.table.tails)
            k, v = whole.k[rows], whole.v[rows]
            append_kv(
                pieces.cache, table, k, v, cu_seqlens=parity.ends(new), rope=rope, impl="torch"
            )
        for name in parity.STORED:
            a, b = getattr(whole.cache, name), getattr(pieces.cache, name)
            if a is not None and name != "tail":
                assert torch.equal(parity.bits(a), parity.bits(b)), (name, seed)
        held = [quantise.dequantise(s.cache, s.table) for s in (whole, pieces)]
        for a, b in zip(*held, strict=True):  # with what the tails hold
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_matter_which_pages_a_request_has(kind: str) -> None:
    read = []
    for seed in range(3):
        setup = Setup(kind, [40, 7, 32], seed=seed)
        setup.append(impl="torch")
        read.append((setup.table.pages, quantise.dequantise(setup.cache, setup.table)))
    assert not torch.equal(read[0][0], read[1][0])
    for _, requests in read[1:]:
        for got, first in zip(requests, read[0][1], strict=True):
            assert torch.equal(got[0], first[0]) and torch.equal(got[1], first[1])


def test_an_unquantised_cache_gives_back_what_was_written() -> None:
    setup = Setup("none", [40, 7, 32], dtype=torch.bfloat16)
    setup.append(impl="torch")
    for i, (keys, values) in enumerate(quantise.dequantise(setup.cache, setup.table)):
        rows = slice(int(setup.ends[i]), int(setup.ends[i + 1]))
        assert torch.equal(keys, setup.k[rows].double())
        assert torch.equal(values, setup.v[rows].double())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", [append_kv, reference.append_kv], ids=["torch", "reference"])
def test_keys_and_queries_are_rotated_as_in_the_model(function, dtype, norm: bool) -> None:
    setup = Setup("none", [20, 5], dtype=dtype)
    q = torch.randn(25, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    config = TransformerConfig(d_model=32, num_heads=4, head_dim=8, qk_norm=norm)
    cos, sin = rotary(config, torch.arange(20))
    norms, expected = {}, []
    for name, x in (("k_norm", setup.k), ("q_norm", q)):
        if norm:
            layer = RMSNorm(8, 1e-3).to(dtype)
            layer.weight.data = torch.rand(8, dtype=dtype)
            norms[name], x = layer.weight.data, layer(x).detach()
        parts = [rotate(y[None], cos[: len(y)].to(dtype), sin[: len(y)].to(dtype))[0]
                 for y in x.split([20, 5])]  # fmt: skip
        expected.append(torch.cat(parts))
    turned = function(
        setup.cache, setup.table, setup.k, setup.v, cu_seqlens=setup.ends, q=q,
        rope=(cos[:, 0], sin[:, 0]), norm_eps=1e-3, **norms,
    )  # fmt: skip
    stored = torch.cat([keys for keys, _ in quantise.dequantise(setup.cache, setup.table)])
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(turned, expected[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(stored.to(dtype), expected[0], rtol=0, atol=tolerance)


def test_positions_replace_the_index_in_the_request() -> None:
    by_index, shifted, reversed_ = (Setup("none", [20, 5]) for _ in range(3))
    cos, sin = parity.tables(8).values()
    index = torch.cat([torch.arange(20), torch.arange(5)])
    q = torch.randn(25, 1, 8, generator=torch.Generator().manual_seed(1))
    plain = by_index.append(q=q, rope=(cos, sin), impl="torch")
    given = shifted.append(q=q, rope=(cos[3:].clone(), sin[3:].clone()), impl="torch")
    assert not torch.equal(given, plain)
    given = shifted.append(q=q, rope=(cos, sin), positions=index, impl="torch")
    assert torch.equal(given, plain) and same(by_index.cache, shifted.cache)
    reversed_.append(q=q, rope=(cos, sin), positions=index.flip(0).int(), impl="torch")
    assert not same(by_index.cache, reversed_.cache)


def test_queries_with_nothing_to_do_are_returned_as_they_are() -> None:
    setup = Setup("none", [3, 0])
    q = torch.randn(3, 4, 8)
    assert setup.append(q=q, impl="torch") is q
    assert setup.append(impl="torch") is None
    nothing = Setup("int4", [0, 0])
    before = parity.mapped(nothing.cache, lambda x: parity.copied(x, CPU))
    assert nothing.append(q=q[:0], rope=tuple(parity.tables(8).values())).shape == (0, 4, 8)
    assert same(before, nothing.cache)


def test_the_function_is_public_and_says_what_ran() -> None:
    setup = Setup("int8", [3])
    with record() as ran:
        kernels.append_kv(setup.cache, setup.table, setup.k, setup.v, cu_seqlens=setup.ends)
    assert [(choice.op, choice.impl) for choice in ran] == [("append_kv", "torch")]


# What the codes stand for


def wide(*shape: int) -> torch.Tensor:
    """Values of many magnitudes, with rows and columns of zeros and of constants."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator)
    x = x * 10.0 ** torch.randint(-5, 5, (*shape[:-1], 1), generator=generator)
    x = x + 10.0 ** torch.randint(-5, 5, (*shape[:-3], 1, *shape[-2:]), generator=generator)
    x[0], x[1], x[2, ..., 0, :], x[3] = 0.0, -3.7, 0.0, x[3].abs()
    return x


def test_int8_and_fp8_are_off_by_at_most_half_a_step() -> None:
    x = wide(6, 16, 2, 64)
    code, scale = quantise.encode_rows(x, "int8")
    assert scale.isfinite().all() and int(code.int().abs().max()) == 127
    off = (quantise.decode_rows(code, scale, torch.float64) - x).abs()
    assert bool((off <= 0.5001 * scale.double()[..., None]).all())
    code, scale = quantise.encode_rows(x, "fp8")
    assert scale.isfinite().all() and code.float().isfinite().all()
    units = (x / scale[..., None]).abs()
    step = 2.0 ** (units.clamp(min=2.0**-6).log2().floor() - 3)  # between neighbours in e4m3
    off = (quantise.decode_rows(code, scale, torch.float64) - x).abs()
    assert bool((off <= 0.5001 * (step * scale[..., None]).double()).all())


def test_int4_is_off_by_at_most_half_a_step() -> None:
    x = wide(6, 16, 2, 64)
    byte, scale, zero = quantise.encode_keys(x)
    assert scale.isfinite().all() and zero.isfinite().all()
    off = (quantise.decode_keys(byte, scale, zero, torch.float64) - x).abs()
    assert bool((off <= 0.51 * scale.double()[..., None, :, :]).all())
    byte, scale, zero = quantise.encode_values(x, 32)
    assert scale.isfinite().all() and zero.isfinite().all()
    off = (quantise.decode_values(byte, scale, zero, torch.float64) - x).abs()
    assert bool((off <= 0.51 * scale.double().repeat_interleave(32, -1)).all())
    low, high = x.unflatten(-1, (2, 32)).aminmax(dim=-1)
    smallest = torch.maximum(torch.maximum(-low, high) / 1024, torch.tensor(2.0**-14))
    expected = torch.maximum((high - low) / 15, smallest)
    torch.testing.assert_close(scale.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_zeros_are_stored_as_zeros(kind: str) -> None:
    setup = Setup(kind, [32])
    setup.k.zero_()
    setup.v.zero_()
    setup.v[:, 0, :3] = torch.tensor([1.0, -2.0, 5.0])
    setup.append(impl="torch")
    ((keys, values),) = quantise.dequantise(setup.cache, setup.table)
    assert not keys.any() and not values[:, 0, 3:].any() and not values[:, 1].any()
    assert bool((values[:, 0, :3].abs() > 0.5).all())


def test_values_beyond_the_range_of_int4_saturate_and_stay_finite() -> None:
    x = torch.tensor([3e38, -3e38, 1.0, 0.0]).repeat(16, 1, 2)  # [page, kv, d]
    byte, scale, zero = quantise.encode_keys(x)
    assert scale.isfinite().all() and zero.isfinite().all()
    assert quantise.decode_keys(byte, scale, zero)[..., 2].allclose(torch.tensor(1.0), atol=1e-3)


def test_packing_codes_of_int4_loses_nothing() -> None:
    code = torch.arange(256).reshape(-1, 16).remainder(16).to(torch.uint8)
    code = code[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    byte = quantise.pack(code)
    assert byte.shape == (16, 8) and torch.equal(quantise.unpack(byte), code)
    assert int(byte[0, 0]) == int(code[0, 0]) + 16 * int(code[0, 8])  # c low, c + d/2 high


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": torch.zeros(5, 2, 4)}, r"k and v of one shape \[n, kv, d\] = \[n, 2, 8\]"),
        ({"v": torch.zeros(4, 2, 8)}, r"k and v of one shape"),
        ({"k": torch.zeros(5, 16)}, r"k and v of one shape"),
        ({"k": torch.zeros(5, 2, 8).half()}, r"k is torch.float16, the cache serves torch.float32"),
        ({"q": torch.zeros(5, 2, 4)}, r"q must be \[n, h, d\] = \[5, h, 8\], got \[5, 2, 4\]"),
        ({"q": torch.zeros(4, 2, 8)}, r"q must be"),
        ({"q": torch.zeros(5, 2, 8).double()}, r"q is torch.float64, the cache serves"),
        ({"k": torch.zeros(5, 2, 8, requires_grad=True)}, r"append_kv has none: use torch.no_grad"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, r"cu_seqlens must be int32 \[r \+ 1\] = \[3\]"),
        ({"cu_seqlens": torch.tensor([0, 5]).int()}, r"\[3\] for a table of 2 requests"),
        ({"cu_seqlens": torch.tensor([0, 2, 4]).int()}, r"ascend from 0 to n = 5, got \[0, 2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 6, 5]).int()}, r"ascend from 0 to n = 5"),
        ({"cu_seqlens": torch.tensor([0, 1, 5]).int()}, r"request 1 has length 3 but 4 new tokens"),
        ({"positions": torch.zeros(4).long()}, r"positions must be int32 or int64 \[n\] = \[5\]"),
        ({"positions": torch.zeros(5)}, r"positions must be int32 or int64"),
        ({"rope": (torch.zeros(9, 4), torch.zeros(9, 4))}, r"\[positions, d\], d = 8 even, got"),
        ({"rope": (torch.zeros(9, 8), torch.zeros(8, 8))}, r"got \[9, 8\] and \[8, 8\]"),
        ({"rope": (torch.zeros(9, 1, 8),) * 2}, r"got \[9, 1, 8\]"),
        ({"rope": (torch.zeros(9, 8).half(),) * 2}, r"rope must be float32"),
        ({"rope": (torch.zeros(8, 9).T,) * 2}, r"rope must be contiguous"),
        ({"rope": (torch.zeros(9, 8),) * 2}, r"position 9 has no row in rope: it has 9"),
        (
            {"rope": (torch.zeros(9, 8),) * 2, "positions": torch.tensor([0, 1, -2, 0, 0])},
            r"position -2 has no row in rope",
        ),
        ({"k_norm": torch.zeros(4)}, r"k_norm must be \[d\] = \[8\], got \[4\]"),
        ({"q_norm": torch.zeros(8)}, r"q_norm normalises q: give q too"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0 must be > 0"),
        ({"impl": "sdpa"}, r"impl='sdpa' is unknown: use auto, triton, interpret, torch"),
        ({"impl": "triton"}, r"impl='triton' cannot run here: the tensors are on cpu"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes: dict, said: str) -> None:
    setup = Setup("int8", [10, 3])
    before = parity.mapped(setup.cache, lambda x: parity.copied(x, CPU))
    given = {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    given |= {"cu_seqlens": torch.tensor([0, 2, 5]).int()} | changes
    with pytest.raises(ValueError, match=said):
        append_kv(setup.cache, setup.table, given.pop("k"), given.pop("v"), **given)
    assert same(before, setup.cache)


def test_a_table_without_tails_is_refused_for_int4() -> None:
    setup = Setup("int4", [10])
    table = BlockTable(setup.table.pages, setup.table.lengths)
    with pytest.raises(ValueError, match="tails exactly for an int4 cache"):
        append_kv(setup.cache, table, setup.k, setup.v, cu_seqlens=setup.ends)


def test_fp8_is_refused_on_a_chip_without_it() -> None:
    setup = Setup("fp8", [5])
    for chip, name in ((80, "sm_80"), ("gfx942", "gfx942")):
        with assume_arch(chip):
            for impl in ("auto", "triton"):
                with pytest.raises(ValueError, match=rf"sm_89 and later\), this is {name}"):
                    setup.append(impl=impl)
            setup.append(impl="torch")  # asked for by name: torch computes it in software


def test_what_the_kernels_cannot_do_is_refused_with_the_reason() -> None:
    for kind, changes, said in (
        ("none", {"dtype": torch.float64}, "not torch.float64"),
        ("none", {"d": 260}, "heads of up to 256, not 260"),
        ("int4", {"page": 512}, "up to 256 tokens, not 512"),
    ):
        setup = Setup(kind, [5], **changes)
        with assume_arch(90), pytest.raises(ValueError, match=said):
            setup.append(impl="triton")
        setup.append(impl="auto")
    setup = Setup("int4", [5])
    scattered = setup.cache.tail.mT.contiguous().mT
    setup.cache = replace(setup.cache, tail=scattered)
    with assume_arch(90), pytest.raises(ValueError, match="of the cache's tail must be contiguous"):
        setup.append(impl="triton")
    setup.append(impl="auto")
