"""The serving suite's arms, without a GPU: what fits, what is shared, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.language.transformer import Transformer
from scripts import bench
from scripts.benchmarks import serving
from training.errors import UserError


def test_the_arms_fill_the_memory_and_no_more():
    sizes = dataclasses.replace(serving.SIZES["dry"], most=10**6)
    model = Transformer(sizes.model, torch.Generator().manual_seed(0))
    found = serving.arms(sizes, torch.float32)
    for name, (requests, rows, shared) in found.items():
        cache = serving.cache_of(model, sizes, requests, rows, shared)
        one_more = serving.cache_of(model, sizes, requests + 1, rows, shared)
        assert cache.num_bytes <= sizes.memory < one_more.num_bytes, name
    assert found["full context"][0] < found["shared"][0] <= found["cartridge"][0]


def test_a_step_decodes_the_same_token_every_time():
    sizes = serving.SIZES["dry"]
    model = Transformer(sizes.model, torch.Generator().manual_seed(0))
    cache = serving.cache_of(model, sizes, 3, 64, True)
    first = serving.step(model, cache)
    torch.testing.assert_close(serving.step(model, cache), first)
    assert cache.length == 0 and first.shape == (3, 1, 64)


def test_the_dry_run_says_what_each_arm_holds_and_without_a_gpu_nothing_is_timed(capsys):
    assert bench.bench_own(bench.parse(["suite=serving", "dry_run=true"])) == 0
    said = capsys.readouterr().out
    assert "cartridge: 8 requests behind 64 rows" in said
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="times a GPU"):
            bench.bench_own(bench.parse(["suite=serving"]))
    for words, message in (
        (["suite=serving", "scale=large"], "scale=large is unknown"),
        (["suite=serving", "budget=60"], "no key `budget`"),
        (["suite=serving,decode"], "serving has keys of its own"),
    ):
        with pytest.raises(UserError, match=message):
            bench.parse(words)
