"""What a step of a world is worth, and whether it was the last, told from three frames.

The reward and termination model of DIAMOND (2024, arXiv:2405.12399): residual blocks over
frames, told the action, each level of half the size of the one before; logits for the sign of the
reward and for the end. What differs: the published one sees two frames and has an LSTM on top. Ours
sees one more before, so that it knows how fast things were: a ball that was hit between two frames
may look like one that was slow. And steps that are worth something, one in a hundred, count more.

Dimensions: b steps, c channels, h and w height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.video.actions import ActionTable
from models.worlds.video.config import DiamondConfig, FilmWorldConfig
from models.worlds.video.graphs import directly
from models.worlds.video.unet import Residual, groups_of

SIGNS = 3  # of a reward: -1, 0, 1
LEVELS = 4
BEFORE = 2  # frames that are seen before the action
RARE = 10.0  # how much more a step counts that is worth something, or the last


class Outcome(nn.Module):
    """From a frame, an action and the frame after it to logits.

    Args:
        size: height and width of a frame, a multiple of 8.
    """

    def __init__(self, channels: int, parts: Sequence[int], size: int, width: int) -> None:
        super().__init__()
        self.action = ActionTable(parts, width)
        self.enter = nn.Conv2d((BEFORE + 1) * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, width, width) for _ in range(LEVELS))
        self.norm = nn.GroupNorm(groups_of(width), width)
        self.leave = nn.Linear(width * (size // 2 ** (LEVELS - 1)) ** 2, SIGNS + 2)

    def forward(
        self,
        before: Float[Tensor, "b 2 c h w"],
        action: Int64[Tensor, " b"],
        after: Float[Tensor, "b c h w"],
    ) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 2"]]:
        """Logits of the reward's sign (-1, 0, 1), and of going on or ending; frames in [-1, 1]."""
        x, told = self.enter(torch.cat([before.flatten(1, 2), after], dim=1)), self.action(action)
        for level, block in enumerate(self.blocks):
            x = block(x if not level else F.avg_pool2d(x, 2), told)
        logits = self.leave(F.silu(self.norm(x)).flatten(1))
        return logits[:, :SIGNS], logits[:, SIGNS:]


class DrawnWorld(nn.Module):
    """What every model that draws a world has: shapes that are known, and what a step is worth.

    Attributes:
        run: calls what a step is between its noise and its frame (graphs.py has another).
    """

    run: Callable[..., Any] = staticmethod(directly)

    def __init__(self, config: DiamondConfig | FilmWorldConfig) -> None:
        super().__init__()
        if config.channels is None or config.actions is None or config.image_size is None:
            raise ValueError("model.channels, model.image_size and model.actions must be known")
        self.config, self.context = config, config.context
        self.channels, self.size, self.actions = config.channels, config.image_size, config.actions
        self.parts = config.action_parts or [config.actions]
        if math.prod(self.parts) != self.actions:
            raise ValueError(
                f"model.actions={self.actions} must be the product of "
                f"model.action_parts={self.parts}"
            )
        self.outcomes = Outcome(self.channels, self.parts, self.size, config.outcome_width)

    def outcome(
        self,
        before: Float[Tensor, "b 2 c h w"],
        action: Int64[Tensor, " b"],
        after: Float[Tensor, "b c h w"],
    ) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 2"]]:
        """Logits of the sign of the reward (-1, 0, 1), and of going on or ending; of two frames in
        [0, 1], what was done then, and the frame that followed."""
        return self.outcomes(before * 2 - 1, action, after * 2 - 1)


def steps_of(
    frames: Float[Tensor, "b t c h w"], actions: Int64[Tensor, "b t-1"]
) -> tuple[Float[Tensor, "s 2 c h w"], Int64[Tensor, " s"], Float[Tensor, "s c h w"]]:
    """Every step of clips that `BEFORE` frames were seen before, in the order of clips."""
    before = frames.unfold(1, BEFORE, 1)[:, :-1]  # [b, t - 2, c, h, w, 2]
    before = before.movedim(-1, 2).flatten(0, 1)
    return before, actions[:, BEFORE - 1 :].flatten(), frames[:, BEFORE:].flatten(0, 1)


def outcome_loss(
    signs: Float[Tensor, "s 3"],
    ends: Float[Tensor, "s 2"],
    reward: Float[Tensor, " s"],
    end: Tensor,
) -> Float[Tensor, ""]:
    """Cross-entropies of the sign of a reward and of the end, added; what is rare counts more."""
    wanted, last = reward.sign().long() + 1, end.long()
    of_signs = F.cross_entropy(signs.float(), wanted, reduction="none")
    of_ends = F.cross_entropy(ends.float(), last, reduction="none")
    rare = torch.where(wanted != 1, RARE, 1.0), torch.where(last == 1, RARE, 1.0)
    return (rare[0] * of_signs).mean() + (rare[1] * of_ends).mean()
