"""Where things are in frames of a game, read off by a small network that is taught on true ones.

Some games say where things are (training/data/atari.py), dreams of them do not. What is read off a
dream is compared with the truth, beside what is read off true frames, which is the least error that
could be measured, and beside the last frame seen, over again.

Dimensions: n frames or clips, h frames ahead, o things, k numbers (ball_x, ball_y, ..), s pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.worlds.initialise import init_uniform

WIDTH, REACH = 16, 5  # channels and kernels of the network
STEPS, BATCH, RATE = 600, 64, 3e-3


class Reader(nn.Module):
    """Of each thing a map of where it might be, and the mean place of that.

    Args:
        names: thing_axis, with x to the right and y down.
        width, height: what the frame is of; places are told in its units.
    """

    def __init__(self, names: Sequence[str], width: float, height: float) -> None:
        super().__init__()
        things = list(dict.fromkeys(name.rsplit("_", 1)[0] for name in names))
        parts = [name.rsplit("_", 1) for name in names]
        self.picks = [(things.index(thing), "xy".index(axis)) for thing, axis in parts]
        self.sizes = width, height
        pad = REACH // 2
        self.maps = nn.Sequential(
            nn.Conv2d(5, WIDTH, REACH, padding=pad), nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, REACH, padding=pad), nn.SiLU(),
            nn.Conv2d(WIDTH, len(things), REACH, padding=pad),
        )  # fmt: skip

    def forward(self, frames: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n k"]:
        n, s = len(frames), frames.shape[-1]
        at = (torch.arange(s, device=frames.device) + 0.5) / s
        across, down = at.expand(n, 1, s, s), at[:, None].expand(n, 1, s, s)
        with torch.autocast(frames.device.type, enabled=False):  # whatever the model is asked in
            told = self.maps(torch.cat([frames.float(), across, down], dim=1))
            share = told.flatten(2).softmax(-1).unflatten(2, (s, s))  # [n, o, s, s]
            means = (share.sum(2) @ at) * self.sizes[0], (share.sum(3) @ at) * self.sizes[1]
        return torch.stack([means[axis][:, thing] for thing, axis in self.picks], dim=1)


def taught(
    frames: Float[Tensor, "n 3 s s"],
    places: Float[Tensor, "n k"],
    names: Sequence[str],
    width: float,
    height: float,
) -> Reader:
    """A reader of frames in [0, 1] whose places are known, or NaN."""
    generator = torch.Generator(frames.device).manual_seed(0)
    reader = Reader(names, width, height).to(frames.device)
    init_uniform(reader, generator)
    adam = torch.optim.Adam(reader.parameters(), RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(len(frames), (BATCH,), generator=generator, device=frames.device)
            told, true = reader(frames[rows]), places[rows]
            seen = true.isfinite()
            error = F.smooth_l1_loss(told[seen], true[seen])
            adam.zero_grad()
            error.backward()
            adam.step()
            rate.step()
    return reader.eval()


@torch.no_grad()
def read(reader: Reader, frames: Float[Tensor, "n t 3 s s"]) -> Float[Tensor, "n t k"]:
    """Places in the frames of clips, some at a time."""
    parts = [reader(part) for part in frames.flatten(0, 1).split(4 * BATCH)]
    return torch.cat(parts).unflatten(0, frames.shape[:2])


def misplaced(
    told: Float[Tensor, "n h k"],
    seen: Float[Tensor, "n h k"],
    true: Float[Tensor, "n h1 k"],
    names: Sequence[str],
    horizons: Sequence[int],
    far: Sequence[int],
) -> dict[str, float]:
    """How far things are from where they should be, where the truth has them in the picture.

    Args:
        told, seen: read off dreams, and off the true frames that they should be.
        true: of these and of the last frame before them.

    Returns:
        of the ball `error/h`, `parser/h` (read off true frames), `copy/h` (it stays where it is),
        `over_copy/h`, and the worst of these; of each other thing `<thing>/h`.
    """
    found: dict[str, float] = {}
    for thing in dict.fromkeys(name.rsplit("_", 1)[0] for name in names):
        own = [i for i, name in enumerate(names) if name.startswith(f"{thing}_")]
        begun, after = true[:, :1, own], true[:, 1:, own]
        for h in (h for h in horizons if h <= told.shape[1]):
            at = h - 1
            off = {
                "error": told[:, at, own] - after[:, at],
                "parser": seen[:, at, own] - after[:, at],
                "copy": begun[:, 0] - after[:, at],
            }
            length = {name: x.norm(dim=-1) for name, x in off.items()}
            rows = length["copy"].isfinite()
            if not rows.any():
                continue
            mean = {name: x[rows].mean().item() for name, x in length.items()}
            if thing != "ball":
                found[f"{thing}/{h}"] = mean["error"]
                continue
            found |= {f"{name}/{h}": value for name, value in mean.items()}
            found[f"over_copy/{h}"] = mean["error"] / max(mean["copy"], 1e-6)
            if h in far:
                worst = found.get("over_copy/worst", 0.0)
                found["over_copy/worst"] = max(found[f"over_copy/{h}"], worst)
    return found
