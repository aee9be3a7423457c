"""The kernels of KV compaction, interpreted, against the definition."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from einops import rearrange

from kernels.dispatch import interpreting
from kernels.kv_cache.attention.op import decode_paged
from kernels.kv_cache.compaction import launch, scores
from kernels.kv_cache.compaction import triton as kernels
from kernels.kv_cache.compaction.op import compact_kv
from kernels.parity import compaction as parity
from kernels.tiles import Tile, override

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

CPU = torch.device("cpu")


def test_kernels_are_interpreted():
    for name in ("window_lse", "window_scores", "expected_logits", "gather_kept"):
        assert type(getattr(kernels, name)).__name__ == "InterpretedFunction"


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 36), (torch.float16, 24), (torch.bfloat16, 15)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_kernels_agree_with_the_definition(dtype, count):
    for case in parity.cases("small", count, dtype):
        for comparison in case.run("interpret", CPU):
            assert comparison.holds, (case.name, comparison)


def scoring_inputs():
    rng = torch.Generator().manual_seed(0)
    q, mean = torch.randn(2, 5, 4, 20, generator=rng), torch.randn(2, 4, 20, generator=rng)
    k, root = torch.randn(2, 40, 2, 20, generator=rng), torch.randn(2, 4, 20, 20, generator=rng)
    return q, k, mean, root @ root.mT / 20, torch.tensor([40, 33], dtype=torch.int32)


def moving(kind: str = "none", rotated: bool = False):
    """A cache and what `launch.gather_kept` takes besides it."""
    kept = [[[0, 3, 18, 30], [7]], [list(range(20)), []]]
    options = {"kind": kind, "kv": 2, "page": 16, "d": 20, "rotated": rotated, "seed": 0}
    cache, table, pool, memory = parity.filled([33, 20], kept, options, torch.float32, CPU)
    for x in memory:  # opcheck compares what is written, and NaN differs from itself
        x.nan_to_num_(5.0) if x.is_floating_point() else None
    packed = parity.packed(kept, CPU)
    first = pool.alloc(2)[0] * 2
    head_pages = torch.tensor([[first, -1], [first + 1, -1], [first + 2, first + 3], [-1, -1]])
    rope = parity.turns(33, 20) if rotated else (None, None)
    index = (table.pages, packed.tokens, packed.counts, head_pages.int())
    return cache, index, rope


def test_custom_ops_keep_their_contract():
    q, k, mean, covariance, lengths = scoring_inputs()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(launch.window_attention, (q, k, lengths, 0.2), test_utils=checks)
    torch.library.opcheck(launch.window_attention, (q, k, None, 0.2), test_utils=checks)
    arguments = (mean, covariance, k, lengths, 0.2)
    torch.library.opcheck(launch.expected_logits, arguments, test_utils=checks)
    for kind, rotated in (("none", True), ("int8", False)):
        cache, index, rope = moving(kind, rotated)
        arguments = (cache.data, cache.scales, *index, *rope)
        torch.library.opcheck(launch.gather_kept, arguments, test_utils=checks)


def test_scores_and_gather_trace_into_one_graph():
    q, k, mean, covariance, lengths = scoring_inputs()

    def score(q, k, mean, covariance):
        return scores.score_window_attention(
            q, k, lengths=lengths, impl="interpret"
        ) + scores.score_expected_attention(
            mean, covariance, k, k, lengths=lengths, impl="interpret"
        )

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    inputs = (q, k, mean, covariance)
    torch.testing.assert_close(compiled(*inputs), score(*inputs))

    def move(data, *arguments):
        launch.gather_kept(data, None, *arguments)
        return data.sum()

    cache, index, rope = moving(rotated=True)
    copy = cache.data.clone()
    total = torch.compile(move, fullgraph=True, backend="aot_eager")(cache.data, *index, *rope)
    assert torch.equal(total, move(copy, *index, *rope)) and torch.equal(cache.data, copy)


def test_results_do_not_depend_on_tiles_or_on_the_rest_of_the_batch():
    q, k, mean, covariance, lengths = scoring_inputs()
    options = {"lengths": lengths, "impl": "interpret", "keep_window": False}
    whole = scores.score_window_attention(q, k, **options)
    assert torch.equal(whole, scores.score_window_attention(q, k, **options))
    alone = scores.score_window_attention(q[1:], k[1:], **options | {"lengths": lengths[1:]})
    assert torch.equal(whole[1:], alone)
    other = Tile(MappingProxyType({"BLOCK_M": 32, "BLOCK_N": 16}))
    with override("kv_window", other):
        torch.testing.assert_close(scores.score_window_attention(q, k, **options), whole)
    expected = scores.score_expected_attention(mean, covariance, k, impl="interpret")
    with override("kv_expected", Tile(MappingProxyType({"BLOCK_N": 64, "BLOCK_C": 16}))):
        torch.testing.assert_close(
            scores.score_expected_attention(mean, covariance, k, impl="interpret"), expected
        )


def test_decoding_over_all_tokens_kept_is_bitwise_decoding_over_the_source():
    lengths = [37, 16]
    kept = [[list(range(n))] * 2 for n in lengths]
    options = {"kind": "none", "kv": 2, "page": 16, "d": 16, "rotated": False, "seed": 3}
    cache, table, pool, _ = parity.filled(lengths, kept, options, torch.float32, CPU)
    compacted = compact_kv(cache, table, parity.packed(kept, CPU), pool, impl="interpret")
    q = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    flat = rearrange(q, "r (kv g) d -> (r kv) g d", kv=2)
    decode = {"splits": 1, "impl": "interpret"}
    out = decode_paged(flat, compacted.cache, compacted.table, **decode)
    expected = decode_paged(q, cache, table, **decode)
    assert torch.equal(rearrange(out, "(r kv) g d -> r (kv g) d", kv=2), expected)
