"""Presses: what each keeps, that nothing moves, that what is dropped is gone."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from kernels import adaptive_budgets, compact_kv, decode_paged, pages_of, select_top
from kernels.kv_cache.append.op import append_kv
from kernels.kv_cache.layout import BlockTable, PagedKV
from kernels.kv_cache.pool import PagePool
from models.language import presses
from models.language.config import TransformerConfig
from models.language.prefix import Reading, read
from models.language.presses import PRESSES, press
from models.language.transformer import Transformer


@pytest.fixture(params=[4, 2, 1], ids=["mha", "gqa", "mqa"])
def model(request) -> Transformer:
    config = TransformerConfig(
        vocab_size=41, d_model=32, num_layers=2, num_heads=4, num_kv_heads=request.param
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def random_tokens(b: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(41, (b, t), generator=torch.Generator().manual_seed(seed))


def scores_of(name: str, model: Transformer, reading: Reading, context: torch.Tensor):
    if name == "kvzip":
        return presses.kvzip(reading, model, context)
    if name == "random":
        return presses.random(reading, generator=torch.Generator().manual_seed(0))
    return PRESSES[name](reading)


def best_of_all(scores: torch.Tensor, total: int, floor: int) -> set[tuple[int, int]]:
    """(head, row): the best `floor` of each head, then the best of what is left."""
    ranks = [row.argsort(descending=True, stable=True).tolist() for row in scores]
    sure = {(h, j) for h, rank in enumerate(ranks) for j in rank[:floor]}
    rest = sorted((-scores[h, j].item(), h, j) for h, rank in enumerate(ranks) for j in rank)
    left = [(h, j) for _, h, j in rest if (h, j) not in sure]
    return sure | set(left[: total - len(sure)])


@pytest.mark.parametrize("name", PRESSES)
@torch.no_grad()
def test_a_press_that_drops_nothing_changes_nothing(name, model):
    context, question = random_tokens(2, 24), random_tokens(2, 5, seed=1)
    reading = read(model, context)
    scores = scores_of(name, model, reading, context)
    assert [s.shape for s in scores] == [(2, model.config.resolved_kv_heads, 24)] * 2
    expected = model(question, cache=reading.prefix())
    for adaptive in (False, True):
        prefix = press(reading, scores, 24, adaptive=adaptive)
        assert prefix.num_bytes == reading.prefix().num_bytes
        torch.testing.assert_close(model(question, cache=prefix), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@torch.no_grad()
def test_the_model_sees_the_best_rows_of_each_head_and_no_others(name, adaptive, model):
    """Against attention over the whole context with a mask that says, per head, what is kept."""
    context = random_tokens(2, 24)
    reading = read(model, context)
    scores = scores_of(name, model, reading, context)
    keep, kv = 9, model.config.resolved_kv_heads
    prefix = press(reading, scores, keep, adaptive=adaptive, floor=2)
    assert prefix.position == 24
    assert prefix.num_bytes * 24 == reading.prefix().num_bytes * keep

    layer, g = 1, 4 // kv
    q = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(2))
    k, v = torch.randn(2, 2, 5, kv, 8, generator=torch.Generator().manual_seed(3))
    out = prefix.attend_turned(layer, q, k, v)
    for b in range(2):
        chosen = best_of_all(scores[layer][b], keep * kv, floor=2)
        for h in range(kv):
            best = scores[layer][b, h].argsort(descending=True, stable=True).tolist()
            kept = sorted(j for head, j in chosen if head == h) if adaptive else sorted(best[:keep])
            keys = torch.cat([reading.keys[layer][b, kept, h], k[b, :, h]])
            values = torch.cat([reading.values[layer][b, kept, h], v[b, :, h]])
            for head in range(h * g, (h + 1) * g):
                logits = q[b, :, head] @ keys.T * 8**-0.5
                i = torch.arange(5)
                unseen = torch.arange(len(keys)) > len(kept) + i[:, None]
                expected = logits.masked_fill(unseen, float("-inf")).softmax(-1) @ values
                torch.testing.assert_close(out[b, :, head], expected, atol=1e-5, rtol=1e-5)


def kept_by(scores: torch.Tensor, keep: int) -> set[int]:
    return set(scores.topk(keep).indices.tolist())


@torch.no_grad()
def test_each_press_keeps_what_its_paper_says(model):
    context = random_tokens(1, 24)
    reading = read(model, context)
    assert kept_by(presses.streaming_llm(reading)[0][0, 0], 8) == {0, 1, 2, 3, 20, 21, 22, 23}
    norms = reading.keys[1][0, :, 0].norm(dim=-1)
    assert kept_by(presses.key_norm(reading)[1][0, 0], 5) == set(norms.argsort()[:5].tolist())
    assert kept_by(presses.snapkv(reading, window=6)[1][0, 0], 10) >= set(range(18, 24))
    assert (presses.tova(reading)[1] == presses.tova(reading)[1][:, :1]).all()
    unit = torch.nn.functional.normalize(reading.keys[1][0, :, 0], dim=-1)
    likeness = unit @ torch.nn.functional.normalize(unit.mean(0), dim=0)
    assert kept_by(presses.keydiff(reading)[1][0, 0], 5) == set(likeness.argsort()[:5].tolist())

    received = torch.zeros(24)
    q, k, kv = reading.queries[1][0], reading.keys[1][0], model.config.resolved_kv_heads
    for head in range(4 // kv):
        logits = q[:, head] @ k[:, 0].T * 8**-0.5
        causal = torch.ones(24, 24).tril().bool()
        received += logits.masked_fill(~causal, float("-inf")).softmax(-1).sum(0)
    assert kept_by(presses.h2o(reading)[1][0, 0], 5) == kept_by(received, 5)


@torch.no_grad()
def test_kvzip_is_the_most_attention_of_a_second_reading(model):
    context = random_tokens(1, 12)
    reading, both = read(model, context), read(model, context.repeat(1, 2))
    scores = presses.kvzip(reading, model, context)
    kv = model.config.resolved_kv_heads
    for layer in range(2):
        most = torch.zeros(12)
        for head in range(4 // kv):  # of the first key/value head
            logits = both.queries[layer][0, :, head] @ both.keys[layer][0, :, 0].T * 8**-0.5
            causal = torch.ones(24, 24).tril().bool()
            weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
            most = torch.maximum(most, weights[12:, :12].amax(0))
        torch.testing.assert_close(scores[layer][0, 0], most, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_query_aware_press_sees_the_question_and_keeps_none_of_it(model):
    context, question = random_tokens(2, 20), random_tokens(2, 4, seed=1)
    reading = read(model, torch.cat([context, question], dim=1))
    prefix = press(reading, presses.snapkv(reading, question=4), 6, rows=20)
    assert prefix.position == 20 and prefix.rows == 6
    agnostic = press(read(model, context), presses.snapkv(read(model, context)), 6)
    assert not torch.equal(prefix.layers[1][0], agnostic.layers[1][0])


@torch.no_grad()
def test_a_random_press_keeps_every_token_as_often(model):
    reading = read(model, random_tokens(1, 16))
    kept = torch.zeros(16)
    for seed in range(400):
        scores = presses.random(reading, generator=torch.Generator().manual_seed(seed))
        kept[scores[0][0, 0].topk(4).indices] += 1
    assert (kept / 400 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    per_head = presses.random(reading, per_head=True)
    assert not torch.equal(per_head[0], per_head[1])


@torch.no_grad()
def test_a_budget_that_cannot_be_is_refused(model):
    reading = read(model, random_tokens(1, 16))
    for keep in (0, 17):
        with pytest.raises(ValueError, match=f"keep={keep} must be between 1 and the 16 rows"):
            press(reading, presses.key_norm(reading), keep)


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@torch.no_grad()
def test_pages_of_a_pressed_cache_are_fewer_and_answer_the_same(adaptive, model):
    """What is dropped is memory that other requests can have: the kept rows of each head go to
    pages of their own, the others are freed, and a new token sees what the prefix shows it."""
    context, kv = random_tokens(2, 96), model.config.resolved_kv_heads
    reading = read(model, context)
    scores = presses.h2o(reading)
    prefix = press(reading, scores, 16, adaptive=adaptive, floor=1)
    layer, (q, k, v) = 1, torch.randn(3, 2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :, :kv], v[:, :, :kv]
    expected = prefix.attend_turned(layer, q, k, v)[:, 0]

    pool = PagePool(2 * 6 + 6 * kv)
    cache = PagedKV.create(pool.pages, 16, kv, 8, dtype=torch.float32)
    pages = torch.tensor([pool.alloc(6) for _ in range(2)])
    table = BlockTable.create(pages, torch.full((2,), 96), cache)
    rows = (reading.keys[layer].flatten(0, 1), reading.values[layer].flatten(0, 1))
    append_kv(cache, table, *rows, cu_seqlens=torch.tensor([0, 96, 192], dtype=torch.int32))
    budget = adaptive_budgets(scores[layer], 16 * kv, 1) if adaptive else 16
    kept = select_top(scores[layer], budget)
    compacted = compact_kv(cache, table, kept, pool, room=1)
    for own in pages_of(table, cache):
        pool.free(own)
    used = sum(len(own) for own in compacted.pages)
    assert pool.used_pages == used <= 2 * 3, "of 12 pages"
    cache.data[[p for p in range(pool.pages) if not pool.holders(p)]] = float("nan")

    heads = 2 * kv
    lengths = compacted.table.lengths + 1
    grown = BlockTable.create(compacted.table.pages, lengths, compacted.cache)
    each = torch.arange(heads + 1, dtype=torch.int32)
    one = [rearrange(x[:, 0], "b kv hd -> (b kv) 1 hd").contiguous() for x in (k, v)]
    append_kv(compacted.cache, grown, *one, cu_seqlens=each)
    asked = rearrange(q[:, 0], "b (kv g) hd -> (b kv) g hd", kv=kv).contiguous()
    out = decode_paged(asked, compacted.cache, grown)
    found = rearrange(out, "(b kv) g hd -> b (kv g) hd", kv=kv)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
