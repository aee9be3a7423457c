"""Complete token ids with a decoder in this process, one sequence at a time, behind any prefix.

Dimensions: t prompt tokens, n new tokens, k reported tokens, vocab token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from models.language.inference.cache import KVCache
from models.language.inference.generation import sample
from models.language.prefix import Prefix
from models.language.transformer import Transformer


@torch.no_grad()
def complete(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    top_logprobs: int = 0,
    stop: Collection[int] = (),
    prefix: Prefix | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """New tokens, up to and with the first of `stop`, and the likeliest tokens of each step.

    Args:
        prompt: at least one token id.
        temperature: >= 0; 0 takes the likeliest. Log-probabilities are those at 1.
        top_logprobs: how many tokens to report for each step.
        prefix: what stands before the prompt, e.g. a cartridge.
    Returns:
        n ids, and n lists of (id, natural log-probability), the likeliest first.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    weight = model.embed.weight
    cache = KVCache(
        model.config, 1, len(prompt) + max_tokens, prefix=prefix, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    new = torch.tensor([list(prompt)], device=weight.device)
    tokens: list[int] = []
    top: list[list[tuple[int, float]]] = []
    for _ in range(max_tokens):
        hidden = model.hidden(new, cache=cache)[:, -1:]
        logits = model.logits(hidden)[:, 0].float()  # [1, vocab]
        new = sample(logits, temperature, generator=generator)[:, None]
        tokens.append(int(new))
        if top_logprobs:
            best = logits[0].log_softmax(-1).topk(min(top_logprobs, logits.shape[-1]))
            top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        if tokens[-1] in stop:
            break
    return tokens, top
