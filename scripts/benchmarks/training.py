"""Training speed: the step against a plain nanoGPT-style model, the loop against the bare step,
start-up and composition against their limits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import TransformerConfig
from models.language.transformer import Transformer, num_parameters
from scripts.bench import Measurement, interleaved
from training.distributed import Processes
from training.logging import Logger
from training.loop import fit
from training.schema import LoggerConfig, LoopConfig
from training.seeding import torch_generator

LAYERS, WIDTH, HEADS, TIME, BATCH, VOCAB = 4, 128, 4, 256, 16, 257


class SameLayersBlock(nn.Module):
    """Our block's layers, written the usual way with torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        hidden = 336
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        q, k = (h * cos + rotate_half(h) * sin for h in heads[:2])
        mixed = F.scaled_dot_product_attention(q, k, heads[2], is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class SameLayers(nn.Module):
    """The decoder's layers from torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(SameLayersBlock() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, 1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        frequency = 10000.0 ** -(torch.arange(half) / half)
        angle = torch.outer(torch.arange(tokens.shape[1]).float(), frequency).repeat(1, 2)
        x, cos, sin = self.embed(tokens), angle.cos(), angle.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embed.weight)


class PlainBlock(nn.Module):
    """A GPT-2 block of torch's own modules: LayerNorm, fused qkv, SDPA, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(2)  # [b, h, t, hd]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """nanoGPT's model from torch's own modules: learned positions, tied head, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TIME, WIDTH)
        self.blocks = nn.Sequential(*[PlainBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


def training_step(model: nn.Module) -> Any:
    """A function that takes one AdamW step on random tokens."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, TIME + 1), generator=torch_generator(0, "bench"))

    def step() -> None:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def step_against(peer: nn.Module, name: str, limit: float, repeats: int) -> Measurement:
    """Our decoder at the quickstart's width against `peer` at the same width and depth."""
    config = TransformerConfig(vocab_size=VOCAB, d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS)
    ours = Transformer(config, torch_generator(0, "init"))
    sizes = f"{num_parameters(ours):,} and {num_parameters(peer):,} parameters"
    seconds, peer_seconds = interleaved(training_step(ours), training_step(peer), repeats)
    return Measurement("torch training step", f"{name} ({sizes})", seconds, peer_seconds, limit)


class Sleeper:
    """A recipe whose step takes 50 ms and computes nothing."""

    framework, unit, units_per_step, flops_per_step = "torch", "tokens", 1, 0.0
    step_s = 0.05

    def step(self, batch: Any) -> dict[str, float]:
        time.sleep(self.step_s)
        return {"train/loss": 1.0, "opt/lr": 1.0, "opt/grad_norm": 1.0}

    def evaluate(self, final: bool = False) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"nothing": torch.zeros(1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class SameBatch:
    def batch(self, step: int) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros((BATCH, TIME + 1), np.int32)}

    def ids(self, step: int) -> list[str]:
        return []


class NoDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path

    def heartbeat(self, step: int) -> None:
        pass


def loop_against_bare_steps(repeats: int) -> Measurement:
    """`fit` with a row every step against the same steps in a bare for loop."""
    steps = 20

    def looped() -> None:
        with tempfile.TemporaryDirectory() as name:
            logger = Logger(LoggerConfig(), Path(name), "bench", "bench")
            logger.progress.every_s = float("inf")
            config = LoopConfig(steps=steps, log_every=1, checkpoint_every=0)
            recipe, directory = Sleeper(), NoDirectory(Path(name))
            fit(recipe, SameBatch(), config, directory, logger, Processes())  # type: ignore[arg-type]
            logger.close()

    def bare() -> None:
        recipe = Sleeper()
        for _ in range(steps):
            recipe.step(None)

    seconds, peer = interleaved(looped, bare, max(2, repeats // 3), warmup=1)
    what = "20 steps of 50 ms in the loop, a row each, one checkpoint"
    return Measurement(what, "the same steps alone", seconds, peer, 1.02)


def command_time(command: list[str], repeats: int) -> float:
    """Fastest wall time of a command, in seconds, after one warm-up."""
    times = []
    for _ in range(1 + min(repeats, 5)):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def run(repeats: int) -> list[Measurement]:
    """Every measurement of the suite."""
    from training.config import compose

    help_s = command_time([sys.executable, "-m", "scripts.cli", "--help"], repeats)
    began = time.perf_counter()
    compose(["experiment=quickstart/stdlib"])
    first = time.perf_counter() - began
    return [
        step_against(SameLayers(), "the same layers from torch's own modules", 1.0, repeats),
        step_against(PlainGPT(), "GPT-2's layers from torch's own modules", 1.15, repeats),
        loop_against_bare_steps(repeats),
        Measurement("afferent --help", "2 seconds", help_s, 2.0, 1.0),
        Measurement("composing a configuration", "half a second", first, 0.5, 1.0),
    ]
