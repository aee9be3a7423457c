"""Memories: what each keeps, both ledgers to the byte, and the limits in which all are one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from models.language import presses
from models.language.config import MixingConfig, TransformerConfig
from models.language.memory_budget import (
    FastWeightMemory,
    FullContext,
    NoContext,
    Pressed,
    Quantised,
    QueryAware,
    forward_flops,
    row_bytes,
)
from models.language.retrieval import Compaction, Lookup, Window, bm25, sentences
from models.language.transformer import Transformer

END = 40


def build(**options) -> Transformer:
    config = TransformerConfig(
        **{"vocab_size": 41, "d_model": 32, "num_layers": 2, "num_kv_heads": 2} | options
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def texts(b: int = 3, t: int = 33, seed: int = 0) -> torch.Tensor:
    """A first token, then sentences of four tokens."""
    tokens = torch.randint(1, 40, (b, t), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    tokens[:, 4::4] = END
    return tokens


@pytest.fixture
def model() -> Transformer:
    return build()


OWNER = torch.tensor([0, 2, 1, 2, 0])
ASKED = torch.randint(1, 40, (5, 3), generator=torch.Generator().manual_seed(9))

MEMORIES = {
    "full": FullContext,
    "none": NoContext,
    "key_norm": lambda m: Pressed(m, 8, presses.key_norm),
    "snapkv": lambda m: Pressed(m, 8, partial(presses.snapkv, window=4)),
    "adaptive": lambda m: Pressed(m, 8, partial(presses.snapkv, window=4), adaptive=True),
    "aware": lambda m: QueryAware(m, 8),
    "int4": lambda m: Quantised(m, 4, group=8),
    "window": lambda m: Window(m, 9),
    "bm25": lambda m: Lookup(m, 9, {END}),
    "embedding": lambda m: Lookup(m, 9, {END}, embed=True),
    "compaction": lambda m: Compaction(m, 9, {END}),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_fresh_memory_answers_from_the_file_alone(name, model, tmp_path):
    memory = MEMORIES[name](model)
    state = memory.absorb(texts())
    logits = memory.score(state, ASKED, OWNER)
    assert logits.shape == (5, 3, 41)
    for document in range(3):
        path = tmp_path / f"{document}.safetensors"
        stored = memory.export(state, document, path)
        assert stored == path.stat().st_size
        own = document == OWNER
        fresh = MEMORIES[name](model)
        again = fresh.score(fresh.load(path), ASKED[own], torch.zeros(int(own.sum()), dtype=int))
        torch.testing.assert_close(again, logits[own], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MEMORIES)
def test_no_document_knows_of_another(name, model):
    memory, other = MEMORIES[name](model), MEMORIES[name](model)
    tokens = texts()
    logits = memory.score(memory.absorb(tokens), ASKED, OWNER)
    changed = tokens.clone()
    changed[1] = texts(seed=5)[1]
    found = other.score(other.absorb(changed), ASKED, OWNER)
    same = OWNER != 1
    torch.testing.assert_close(found[same], logits[same], atol=1e-5, rtol=1e-5)


def test_resident_bytes_are_what_the_answers_attend_to(model):
    row, tokens = row_bytes(model), texts()
    assert row == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    for name, rows in {
        "full": 33, "none": 1, "key_norm": 8, "snapkv": 8, "adaptive": 8, "aware": 8, "window": 9,
        "compaction": 9,
    }.items():  # fmt: skip
        memory = MEMORIES[name](model)
        state = memory.absorb(tokens)
        memory.score(state, ASKED, OWNER)
        assert memory.resident_bytes(state) == rows * row, name
    state = Quantised(model, 4, group=8).absorb(tokens)
    coded = 2 * (32 * 2 * 8 // 2) + 4 * 2 * 8 * 2 * 2 + 32 * 2 * 2 * 2  # codes, key, value scales
    assert Quantised(model, 4, group=8).resident_bytes(state) == 2 * coded + row


def test_heads_that_keep_less_are_stored_in_less(model, tmp_path):
    tokens, sizes = texts(), {}
    for name in ("snapkv", "adaptive"):
        memory = MEMORIES[name](model)
        sizes[name] = memory.export(memory.absorb(tokens), 0, tmp_path / name)
    assert abs(sizes["snapkv"] - sizes["adaptive"]) < 300  # the counts and their names


def test_with_room_for_everything_all_are_the_full_context(model):
    tokens = texts()
    expected = FullContext(model).score(FullContext(model).absorb(tokens), ASKED, OWNER)
    for memory in (
        Pressed(model, 33, presses.key_norm),
        Window(model, 33),
        Compaction(model, 33, {END}),
        Lookup(model, 33, {END}, embed=True),
    ):
        found = memory.score(memory.absorb(tokens), ASKED, OWNER)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_lookup_finds_the_sentence_that_has_the_word(model):
    tokens = texts(1, 33)
    every = sentences(tokens[0].tolist(), {END})
    assert [len(sentence) for sentence in every] == [4] * 8
    every[5][1] = word = 77
    fits = bm25([3, word], every)
    assert max(range(8), key=lambda i: fits[i]) == 5
    rare, common = bm25([word], every)[5], bm25([END], every)[5]
    assert rare > 5 * common

    memory = Lookup(model, 5, {END})
    tokens[0, 1:][tokens[0, 1:] == 7] = 8
    tokens[0, 14] = 7
    text = memory.text(memory.absorb(tokens), [7], 0)
    assert text == [0, *tokens[0, 13:17].tolist()]
    assert memory.text(memory.absorb(tokens), [39 + 5], 0) == [0], "nothing fits: nothing is read"


def test_compaction_keeps_what_surprised(model):
    tokens = texts(1)
    logits = model(tokens[:, :-1]).log_softmax(-1)
    nats = -logits.gather(-1, tokens[:, 1:, None])[0, :, 0]
    best = nats.view(8, 4).mean(1).argmax().item()
    memory = Compaction(model, 5, {END})
    expected = [0, *tokens[0, 1 + 4 * best : 5 + 4 * best].tolist()]
    assert memory.text(memory.absorb(tokens), [], 0) == expected


@pytest.mark.parametrize("mixer", ["gated_delta", "ttt_linear", "titans"])
def test_fast_weights_are_a_memory_of_one_size(mixer, tmp_path):
    model = build(num_kv_heads=None, mixing=MixingConfig(pattern=[mixer], chunk=4))
    memory, tokens = FastWeightMemory(model), texts()
    state = memory.absorb(tokens)
    logits = memory.score(state, ASKED, OWNER)
    for document in range(3):
        path, own = tmp_path / f"{document}.safetensors", document == OWNER
        memory.export(state, document, path)
        fresh = FastWeightMemory(model)  # knows nothing but the file
        again = fresh.score(fresh.load(path), ASKED[own], torch.zeros(int(own.sum()), dtype=int))
        torch.testing.assert_close(again, logits[own], atol=1e-5, rtol=1e-5)
    whole = model(torch.cat([tokens[OWNER], ASKED], dim=1))[:, 33:]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    longer = memory.absorb(texts(t=65))
    assert memory.resident_bytes(longer) <= model.state_bytes(65)
    assert memory.resident_bytes(state) == memory.resident_bytes(longer)


def test_flops_are_those_of_the_passes_that_are_made(model):
    from torch.utils.flop_counter import FlopCounterMode

    tokens = texts(1)
    for attention in model.blocks:
        attention.attention.impl = "torch"
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens)
    full = forward_flops(model.config, 33)
    # The counted attention is square, ours is causal: half of it, and the diagonal.
    square = 4 * 32 * 2 * 33 * 33
    causal = 4 * 32 * 2 * 33 * 34 / 2
    assert counter.get_total_flops() == pytest.approx(full - causal + square, rel=1e-3)
    kvzip = Pressed(model, 8, presses.key_norm, readings=2)
    assert kvzip.flops("absorb", 33) == full + forward_flops(model.config, 33, 33)
    assert kvzip.flops("score", 3) == forward_flops(model.config, 3, 8)
