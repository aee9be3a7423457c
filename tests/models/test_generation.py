"""Generation: greedy equals full recomputation, each sampling option does what it says."""

from __future__ import annotations

import pytest
import torch

from models.language.config import TransformerConfig
from models.language.inference.generation import generate, sample
from models.language.transformer import Transformer


@pytest.fixture(params=[None, 4], ids=["full", "window"])
def model(request) -> Transformer:
    config = TransformerConfig(
        vocab_size=31, d_model=32, num_layers=2, window=request.param, ngram_orders=[2]
    )
    return Transformer(config, generator=torch.Generator().manual_seed(0))


PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_greedy_equals_full_recomputation(model):
    tokens = PROMPT
    for _ in range(10):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, PROMPT, 10, temperature=0), tokens)


def test_the_generator_decides(model):
    runs = [
        generate(model, PROMPT, 8, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0][:, :5], PROMPT) and runs[0].shape == (2, 13)


def test_a_stop_token_ends_its_row_and_all_rows_the_call(model):
    greedy = generate(model, PROMPT, 10, temperature=0)
    stop = greedy[0, 5].item()
    out = generate(model, PROMPT, 10, temperature=0, stop_token=stop)
    assert (out[0, 5:] == stop).all()
    ends = (greedy[1, 5:] == stop).nonzero().flatten()
    new = 10 if len(ends) == 0 else ends[0].item() + 1
    assert out.shape[1] == 5 + new and torch.equal(out[1], greedy[1, : 5 + new])


def test_autocast_keeps_its_dtype_in_the_cache(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, PROMPT, 3, temperature=0).shape == (2, 8)


def test_no_new_tokens_returns_the_prompt(model):
    assert torch.equal(generate(model, PROMPT, 0), PROMPT)


LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def frequencies(**options) -> torch.Tensor:
    logits = LOGITS.expand(20000, 4)
    tokens = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    return tokens.bincount(minlength=4) / 20000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_samples_have_the_right_frequencies(options, expected):
    # Five standard errors of a frequency among 20000: 5 * 0.5 / sqrt(20000).
    torch.testing.assert_close(
        frequencies(**options), torch.tensor(expected).float(), rtol=0, atol=0.018
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ],
)
def test_bad_input_says_what_was_expected(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **{"max_new_tokens": 1} | options)
