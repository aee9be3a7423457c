"""Serving one document to many requests: decode throughput within a memory of so many bytes.

    full context   every request has the document's keys and values for itself
    shared         all requests share the pages of the document's keys and values
    cartridge      all requests share the pages of a cartridge, 32 times fewer

Each arm decodes one token for as many requests as its cache has room for. Throughput is requests
over seconds of a step, so it counts both what a step costs and how many requests fit. Weights and
rows are random: what is in them does not change the time. Published: 26.4 times the throughput of
full context on average (Cartridges, 2025, arXiv:2506.06266), there at 38.6 times less memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.config import TransformerConfig
from models.language.inference.cache import KVCache
from models.language.prefix import Prefix
from models.language.transformer import Transformer
from scripts.bench import Measurement, interleaved
from training.errors import UserError

PAGE = 64
EXPECTED = 1 / 5  # of full context's seconds per token, at most: far below what is published


@dataclass(frozen=True)
class Sizes:
    """Of the model, the document, the cartridge and the memory."""

    model: TransformerConfig
    document: int
    cartridge: int
    new: int
    "Tokens that each request may still take."
    memory: int
    "Bytes of the cache of an arm."
    most: int
    "Requests that a step takes at most."


SIZES = {
    "h200": Sizes(
        TransformerConfig(
            vocab_size=128256, d_model=2048, num_layers=16, num_heads=32, num_kv_heads=8,
            head_dim=64, d_ff=8192, rope_theta=500000.0,
        ),
        8192, 256, 128, 40 * 10**9, 2048,
    ),
    "small": Sizes(
        TransformerConfig(
            vocab_size=32000, d_model=1024, num_layers=8, num_heads=16, num_kv_heads=4,
            head_dim=64, d_ff=2816,
        ),
        4096, 128, 128, 8 * 10**9, 1024,
    ),
    "dry": Sizes(
        TransformerConfig(
            vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48
        ),
        256, 64, 64, 400_000, 8,
    ),
}  # fmt: skip


def arms(sizes: Sizes, dtype: torch.dtype) -> dict[str, tuple[int, int, bool]]:
    """Name -> requests that fit, rows before each, whether they share them."""
    config = sizes.model
    width = config.resolved_kv_heads * config.resolved_head_dim
    page = 2 * config.num_layers * width * PAGE * dtype.itemsize
    own = -(-sizes.new // PAGE) * page

    def room(shared: int, each: int) -> int:
        return max(1, min(sizes.most, (sizes.memory - shared) // each))

    document, cartridge = sizes.document // PAGE * page, sizes.cartridge // PAGE * page
    return {
        "full context": (room(0, document + own), sizes.document, False),
        "shared": (room(document, own), sizes.document, True),
        "cartridge": (room(cartridge, own), sizes.cartridge, True),
    }


def cache_of(model: Transformer, sizes: Sizes, requests: int, rows: int, shared: bool) -> KVCache:
    """The cache of an arm: random rows, before every request."""
    weight, config = model.embed.weight, sizes.model
    shape = (rows, config.resolved_kv_heads, config.resolved_head_dim)
    generator = torch.Generator(device=weight.device).manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

    layers = tuple((drawn(), drawn()) for _ in range(config.num_layers))
    prefix = Prefix(layers, rows)
    if not shared:
        prefix = prefix.map(lambda x: x[None].expand(requests, -1, -1, -1))
    return KVCache(
        config, requests, sizes.new, page=PAGE, prefix=prefix, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip


@torch.no_grad()
def step(model: Transformer, cache: KVCache) -> Tensor:
    """Logits of one more token of every request; the cache forgets it again."""
    tokens = torch.zeros(len(cache.tokens), 1, dtype=torch.long, device=cache.tokens.device)
    logits = model.logits(model.hidden(tokens, cache=cache))
    cache.length -= 1  # every repetition decodes the same token
    if logits.is_cuda:
        torch.cuda.synchronize()
    return logits


def run(scale: str, repeats: int) -> list[Measurement]:
    """Seconds per token of the arms that share, against full context. Raises UserError."""
    if not torch.cuda.is_available():
        raise UserError(
            "suite=serving times a GPU and this machine has none: dry_run=true checks the arms"
        )
    sizes = SIZES[scale]
    with torch.device("cuda"):
        model = Transformer(sizes.model).to(torch.bfloat16)
    every = arms(sizes, torch.bfloat16)
    requests, rows, share = every["full context"]
    measurements = []
    for name in ("shared", "cartridge"):
        own, before, shared = every[name]
        full = cache_of(model, sizes, requests, rows, share)
        ours = cache_of(model, sizes, own, before, shared)
        seconds, peer = interleaved(
            lambda ours=ours: step(model, ours), lambda full=full: step(model, full), repeats
        )  # fmt: skip
        measurements.append(
            Measurement(
                f"a token of {own} requests behind {before} {name} rows",
                f"of {requests} behind {rows} rows each",
                seconds / own,
                peer / requests,
                EXPECTED if name == "cartridge" else 1.0,
            )
        )
        del full, ours
        torch.cuda.empty_cache()
    return measurements


def check() -> list[str]:
    """The arms at tiny size on the CPU: what they hold, and that sharing changes no logit."""
    sizes = SIZES["dry"]
    model = Transformer(sizes.model, torch.Generator().manual_seed(0))
    every, lines, logits = arms(sizes, torch.float32), [], {}
    for name, (requests, rows, shared) in every.items():
        cache = cache_of(model, sizes, requests, rows, shared)
        if cache.num_bytes > sizes.memory:
            raise UserError(f"{name} takes {cache.num_bytes} bytes of {sizes.memory}")
        logits[name] = step(model, cache)
        lines.append(f"{name}: {requests} requests behind {rows} rows, {cache.num_bytes:,} bytes")
    if not torch.allclose(logits["full context"][0], logits["shared"][0], atol=1e-4):
        raise UserError("sharing the document's pages changed the logits")
    return lines
