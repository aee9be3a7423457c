"""What a dream of Pinfall keeps of physics: balls, energy, momentum, contacts, what is hidden.

Everything is read off frames (pinfall.py) and compared with exact states.

Dimensions: n clips, t frames, h of them ahead, k balls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from training.data.config_worlds import Variant
from training.envs.pinfall import SCREEN, frame_of
from training.evaluation.pinfall import ALIVE, Parsed, first_turn

LATE = 1.5  # frames by which a turn may be off
NEAR = 3.0  # pixels by which a ball that comes back may be off
AROUND = 3  # frames before and after a collision in which nothing else is met


class Exam(NamedTuple):
    """What a model is asked: clips whose first `context` frames it sees."""

    clips: Any  # Clips, or the fields `actions`, `rewards` and `ends` alone
    frames: Float[Tensor, "n t 3 s s"]
    context: int
    variant: Variant | None  # of Pinfall
    states: Float[Tensor, "n t k"] | None = None  # what is known of frames of another game

    @property
    def ahead(self) -> int:
        return self.frames.shape[1] - self.context


def half_life(error: Float[Tensor, "n h"], radius: Float[Tensor, "n t k"]) -> float:
    """Frames until half of the dreams have a ball more than a radius off; h if they never do."""
    off = (error / radius.mean((1, 2))[:, None]).median(0).values > 1
    return float(off.int().argmax() if off.any() else len(off))


def alive(read: Parsed, begun: Parsed, horizons: Sequence[int]) -> dict[str, float]:
    """How many balls still have their size."""
    ratio = read.area / begun.area[:, -1:]
    share = whole(ratio).float().mean((0, 2))
    return {f"alive/{h}": share[h - 1].item() for h in horizons if h <= len(share)}


def whole(ratio: Tensor) -> Tensor:
    """Whether areas, over what they were, are those of one ball."""
    return (ratio >= ALIVE[0]) & (ratio <= ALIVE[1])


def physics(read: Parsed, true: Parsed, exam: Exam, met: Tensor) -> dict[str, float]:
    """Whether energy is kept, and contacts happen when they should; of the first ball."""
    assert exam.variant is not None
    frame, context = frame_of(exam.variant), exam.context
    x, v = (
        torch.from_numpy(part[:, context - 1 :, 0]).to(read.ball)
        for part in (exam.clips.x, exam.clips.v)
    )

    def energy(place: Tensor, speed: Tensor) -> Tensor:
        return speed.square().sum(-1) / 2 + frame.gravity * (frame.bottom - place[:, 1])

    found, before = {}, energy(x[:, 0], v[:, 0])
    x, h = x[:, 1:], min(20, exam.ahead - 1)
    if h > 1:
        free = ~met[:, h - 1 : h + 1].any(1)  # nothing is met around that frame
        both = (("energy_drift", read), ("parser_energy_drift", true)) if free.any() else ()
        for name, parsed in both:
            path = parsed.ball[:, :, 0]
            now = energy(path[:, h - 1], (path[:, h] - path[:, h - 2]) / 2)
            found[name] = (now / before - 1).abs()[free].median().item()
    wanted, told = first_turn(x), first_turn(read.ball[:, :, 0])
    turns = wanted.isfinite()
    if turns.any():
        off = (told - wanted).abs()[turns]
        found["turns_in_time"] = (off <= LATE).float().mean().item()
        found["turns_missed"] = (~told[turns].isfinite()).float().mean().item()
    return found


def permanence(read: Parsed, exam: Exam) -> dict[str, float]:
    """Of the balls that went behind the screen and came out again, how many do in the dream: whole,
    where they should be and when."""
    device, context = read.ball.device, exam.context
    x, radius = (torch.from_numpy(part[:, context:, 0]).to(device)
                 for part in (exam.clips.x, exam.clips.radius))  # fmt: skip
    left, top, right, bottom = SCREEN
    edge = radius[..., None]
    low, high = (torch.tensor(side, device=device) for side in ((left, top), (right, bottom)))
    hidden = ((x - edge >= low) & (x + edge <= high)).all(-1)  # [n, h]
    clear = ((x + edge <= low) | (x - edge >= high)).any(-1)
    back = clear & (hidden.cumsum(1) > 0)
    first = back & (back.cumsum(1) == 1)
    found = {"hidden": first.any(1).float().mean().item()}
    if first.any():
        off = (read.ball[:, :, 0] - x).norm(dim=-1)[first]
        ratio = (read.area[:, :, 0] / (torch.pi * radius.square()))[first]
        found["comes_back"] = ((off <= NEAR) & whole(ratio)).float().mean().item()
    return found


def momentum(read: Parsed, true: Parsed, exam: Exam) -> dict[str, float]:
    """By how much the sum of momenta changes in a collision of balls, over the sum of their
    lengths: the median over collisions that nothing else happens around. Mass is area."""
    device, context = read.ball.device, exam.context
    v, radius = (torch.from_numpy(part[:, context:]).to(device)
                 for part in (exam.clips.v, exam.clips.radius))  # fmt: skip
    mass = radius.square()[..., None]
    turns = (v.diff(dim=1).abs() > 1e-6).any(-1)  # [n, h-1, k]
    kept = (mass * v).sum(2).diff(dim=1).norm(dim=-1) < 1e-3
    alone = turns.any(-1) & kept & (turns.sum(-1) == 2)
    found = {}
    for name, parsed in (("momentum", read), ("parser_momentum", true)):
        speed = parsed.ball.diff(dim=1)
        lost = []
        for row, at in alone.nonzero().tolist():
            first, last = at - AROUND, at + AROUND + 1
            around = turns[row, max(first, 0) : last + 1].any(-1).sum()
            if first < 0 or last >= speed.shape[1] or around > 1:
                continue
            before, after = ((mass[row, 0] * speed[row, t]).sum(0) for t in (first, last))
            size = (mass[row, 0] * speed[row, first]).norm(dim=-1).sum().clamp(min=1e-6)
            lost.append((after - before).norm() / size)
        if lost:
            found[name] = torch.stack(lost).median().item()
    return found
