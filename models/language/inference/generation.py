"""Sample continuations from a decoder transformer, one token per forward pass, with a KV cache.

Temperature divides the logits; top-k keeps the k likeliest tokens; top-p (nucleus sampling, "The
Curious Case of Neural Text Degeneration", 2019, arXiv:1904.09751) keeps the fewest likeliest tokens
whose probabilities reach p. They apply in this order.

Dimensions: b batch, t prompt tokens, n prompt and new tokens, vocab token ids.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.kv_cache.layout import QuantSpec
from models.language.inference.cache import KVCache
from models.language.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_tokens: Int[Tensor, "b t"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    quant: QuantSpec | None = None,
) -> Int[Tensor, "b n"]:
    """The prompt followed by up to `max_new_tokens` sampled tokens.

    Args:
        prompt_tokens: at least one token per row, all rows of one length, on the model's device.
        temperature: >= 0; 0 takes the likeliest token (the first of equals) and ignores the rest.
        top_k: >= 1, or None for no limit.
        top_p: in (0, 1], or None for no limit.
        generator: source of the samples, on the model's device; None: torch's own.
        quant: how the cache stores keys and values; None: as they are.
        stop_token: ends a row, which is then filled up with it; all rows ended end the call.
    Raises:
        ValueError: an argument out of its range.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    b, t = prompt_tokens.shape
    weight = model.embed.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(
        model.config, b, t + max_new_tokens, quant=quant, device=weight.device, dtype=dtype
    )
    tokens, new = [prompt_tokens], prompt_tokens
    ended = torch.zeros(b, dtype=torch.bool, device=weight.device)
    for _ in range(max_new_tokens):
        hidden = model.hidden(new, cache=cache)[:, -1:]  # [b, 1, d]
        logits = model.logits(hidden)[:, 0].float()  # [b, vocab]
        new = sample(logits, temperature, top_k, top_p, generator)[:, None]  # [b, 1]
        if stop_token is not None:
            new = new.masked_fill(ended[:, None], stop_token)
            ended = ended | (new[:, 0] == stop_token)
        tokens.append(new.to(prompt_tokens.dtype))
        if stop_token is not None and bool(ended.all()):
            break
    return torch.cat(tokens, dim=1)


def sample(
    logits: Float[Tensor, "b vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """One token per row; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The largest logit first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, token = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, token, values)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, token = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # mass of the likelier tokens
        ranked = ranked.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, token, ranked)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1], or None")
