"""A transformer over films: frames see all of themselves, and by places what was there before.

The causal diffusion transformer of Oasis (2024), Diffusion Forcing (2024, arXiv:2407.01392) and
Dreamer 4 (2025, arXiv:2509.24527): in turn, attention over the tokens of each frame, and, in every
`time_every`th block, over the frames at each token's place, causal, in a window.

    x = x + gate attention(norm(x));   x = x + gate mlp(norm(x))
    norm(x) = rmsnorm(x) (1 + scale) + shift        scale, shift and gate of the frame's condition

or, without conditions, with a scale that is learned and no shift and no gate.

Keys of frames that are past are kept as they were before rotation, and rotated anew at each step by
where they lie among those that are kept: a film of any length stays within the positions that were
trained on. What falls out of the window is dropped, but for the first `sinks` frames.

Dimensions: b films, t frames, s tokens of a frame, d width, h heads, hd head width, n kept frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kernels.attention.op import attention
from models.worlds.initialise import init_zero
from models.worlds.video.config import FilmTransformerConfig

THETA = 1000.0  # of the rotations: windows are short


class FilmCache(NamedTuple):
    """Keys, not rotated, and values of the frames that are kept, for each block over time.

    A value: nothing in it ever changes.
    """

    keys: tuple[Float[Tensor, "bs n h hd"], ...]
    values: tuple[Float[Tensor, "bs n h hd"], ...]

    @property
    def frames(self) -> int:
        """How many are kept."""
        return self.keys[0].shape[1] if self.keys else 0


def check_beside(x: Float[Tensor, "b t ..."], cache: FilmCache | None) -> None:
    """Raise ValueError if there is more than one frame beside a cache."""
    if cache is not None and x.shape[1] != 1:
        raise ValueError(f"{x.shape[1]} frames beside a cache: they are told one by one")


def rotate(x: Float[Tensor, "b n h hd"], first: int = 0) -> Float[Tensor, "b n h hd"]:
    """Rotary positions first, first + 1, ..: pairs of components turned by position / theta^i."""
    half = x.shape[-1] // 2
    speed = THETA ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(first, first + x.shape[1], device=x.device)[:, None] * speed
    cos, sin = (f(angle)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))  # [n, 1, hd / 2]
    even, odd = x.chunk(2, dim=-1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], dim=-1)


class SpaceAttention(nn.Module):
    """All tokens of a frame to all."""

    def __init__(self, config: FilmTransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b t s d"]) -> Float[Tensor, "b t s d"]:
        q, k, v = rearrange(
            self.qkv(x), "b t s (three h hd) -> three (b t) s h hd", three=3, h=self.heads
        )
        mixed = attention(unit(q), unit(k), v, causal=False)
        return self.out(rearrange(mixed, "(b t) s h hd -> b t s (h hd)", b=len(x)))


class TimeAttention(nn.Module):
    """At each token's place, every frame to those before it."""

    def __init__(self, config: FilmTransformerConfig) -> None:
        super().__init__()
        self.heads, self.window, self.sinks = config.heads, config.window, config.sinks
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "b t s d"], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "b t s d"], tuple[Tensor, Tensor]]:
        """What the frames see, and the keys and values to keep.

        Args:
            past: those kept before; then t must be 1.
        """
        b, t = x.shape[:2]
        q, k, v = rearrange(
            self.qkv(x), "b t s (three h hd) -> three (b s) t h hd", three=3, h=self.heads
        )
        q, k = unit(q), unit(k)
        if past is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
        n = k.shape[1]
        banded = None if past is not None or self.sinks else self.window
        mixed = attention(rotate(q, n - t), rotate(k), v, causal=True, window=banded)
        out = self.out(rearrange(mixed, "(b s) t h hd -> b t s (h hd)", b=b))
        return out, (self.kept(k), self.kept(v))

    def kept(self, x: Float[Tensor, "bs n h hd"]) -> Float[Tensor, "bs m h hd"]:
        """Of frames in order, those that the next one sees: the window's, and the sinks."""
        room = self.window - 1
        if x.shape[1] <= room + self.sinks:
            return x
        return torch.cat([x[:, : self.sinks], x[:, x.shape[1] - room :]], dim=1)


def unit(x: Float[Tensor, "b n h hd"]) -> Float[Tensor, "b n h hd"]:
    """Queries and keys of one length."""
    return F.rms_norm(x, x.shape[-1:])


class Modulation(NamedTuple):
    """What a condition does to one half of a block: without one, nothing."""

    scale: Tensor | float = 0.0
    shift: Tensor | float = 0.0
    gate: Tensor | float = 1.0


class Block(nn.Module):
    """Attention over space or time, then an MLP.

    Args:
        conditioned: both are told the condition of the frame.
    """

    def __init__(self, config: FilmTransformerConfig, over_time: bool, conditioned: bool) -> None:
        super().__init__()
        d = config.dim
        self.attention = (TimeAttention if over_time else SpaceAttention)(config)
        self.enter = nn.Linear(d, config.mlp_ratio * d)
        self.leave = nn.Linear(config.mlp_ratio * d, d)
        self.modulation = nn.Linear(d, 6 * d) if conditioned else None
        self.norms = None if conditioned else nn.ModuleList(nn.RMSNorm(d) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "b t s d"],
        c: Float[Tensor, "b t d"] | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b t s d"], tuple[Tensor, Tensor] | None]:
        first = second = Modulation()
        if self.modulation is not None:
            assert c is not None
            parts = self.modulation(F.silu(c))[:, :, None].chunk(6, dim=-1)  # each [b, t, 1, d]
            first, second = Modulation(*parts[:3]), Modulation(*parts[3:])
        kept, shown = None, self.normed(x, 0, first)
        if isinstance(self.attention, TimeAttention):
            mixed, kept = self.attention(shown, past)
        else:
            mixed = self.attention(shown)
        x = x + first.gate * mixed
        hidden = F.gelu(self.enter(self.normed(x, 1, second)))
        return x + second.gate * self.leave(hidden), kept

    def normed(self, x: Tensor, which: int, by: Modulation) -> Tensor:
        """What attention (0) or the MLP (1) sees."""
        if self.norms is not None:
            return self.norms[which](x)
        return F.rms_norm(x, x.shape[-1:]) * (1 + by.scale) + by.shift


class FilmTransformer(nn.Module):
    """Blocks over space, every `time_every`th over time.

    Args:
        conditioned: each frame has a condition.
        over_time: false, and every block is over space: frames see nothing of each other.
    """

    def __init__(
        self, config: FilmTransformerConfig, conditioned: bool = True, over_time: bool = True
    ) -> None:
        super().__init__()
        every = config.time_every
        self.blocks = nn.ModuleList(
            Block(config, over_time and i % every == every - 1, conditioned)
            for i in range(config.depth)
        )

    def silence(self) -> None:
        """Every block does nothing at first."""
        for block in self.blocks:
            assert isinstance(block, Block) and block.modulation is not None
            init_zero(block.modulation)

    def forward(
        self,
        x: Float[Tensor, "b t s d"],
        c: Float[Tensor, "b t d"] | None,
        cache: FilmCache | None = None,
    ) -> tuple[Float[Tensor, "b t s d"], FilmCache]:
        """Tokens of frames that follow those in the cache, and the cache with them.

        Raises:
            ValueError: more than one frame beside a cache.
        """
        check_beside(x, cache)
        keys, values, count = [], [], 0
        for block in self.blocks:
            past = None
            if cache is not None and isinstance(block.attention, TimeAttention):
                past = cache.keys[count], cache.values[count]
                count += 1
            x, kept = block(x, c, past)
            if kept is not None:
                keys.append(kept[0])
                values.append(kept[1])
        return x, FilmCache(tuple(keys), tuple(values))
