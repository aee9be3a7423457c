"""What a model of pushing is worth over ten steps, where it is told the true poses at first.

Of windows of episodes that are held out, and of things in them that go further than a threshold:

    error       metres between where a thing is told to be at the end and where it is, mean
    angle       and degrees
    floors      if it had stayed (position), if it had gone on as it went (velocity)
    shuffled    if the model is told what was done in other windows
    ranks       correlation (Spearman's) of how far members are apart with how wrong their mean is
    rest        error of things that do not move, mean
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from models.worlds.splats.mro_gwm import MroGwm, PushHistory
from training.data.push_world import Episodes
from training.envs.push_world import moved
from training.seeding import numpy_rng

STARTS = 3  # windows of an episode


def cut(episodes: Episodes, history: int, ahead: int) -> Episodes:
    """A few windows of each episode, evenly."""
    count, states = episodes.poses.shape[:2]
    length = history + ahead
    starts = np.unique(np.linspace(0, states - length, STARTS).round().astype(int))
    rows = np.repeat(np.arange(count), len(starts))
    return episodes.windows(rows, np.tile(starts, count), length)


@torch.no_grad()
def open_loop(
    model: MroGwm, episodes: Episodes, ahead: int, least: float, seed: int, device: torch.device
) -> dict[str, float]:
    """Metrics, of things that go further than `least` metres."""
    h = model.config.history
    windows = cut(episodes, h, ahead)
    poses, pusher, actions = (
        torch.from_numpy(x).to(device) for x in (windows.poses, windows.pusher, windows.actions)
    )
    seen, true, now = PushHistory(poses[:, :h], pusher[:, :h]), poses[:, -1], poses[:, h - 1]
    told, apart = model.imagine(seen, actions[:, h - 1 :], pusher[:, h:])
    others = actions[torch.from_numpy(deranged(len(actions), seed)).to(device), h - 1 :]
    elsewhere = model.imagine(seen, others, led(pusher[:, h - 1], others))[0]
    went = (true[..., :2] - now[..., :2]).norm(dim=-1)
    counted = went > least
    if not counted.any():
        return {"windows": 0.0}
    last = told[:, -1]
    error = off(last, true)
    going_on = now[..., :3] + ahead * (now - poses[:, h - 2])[..., :3]
    found = {
        "error": error[counted].mean(),
        "angle": turned(last, true)[counted].mean(),
        "angle_staying": turned(now, true)[counted].mean(),
        "floors/position": off(now, true)[counted].mean(),
        "floors/velocity": (going_on - true[..., :3]).norm(dim=-1)[counted].mean(),
        "shuffled": off(elsewhere[:, -1], true)[counted].mean(),
        "rest": error[went < 0.01].mean() if (went < 0.01).any() else error.new_zeros(()),
    }
    values = {name: float(x) for name, x in found.items()}
    values["share_of_position"] = values["error"] / values["floors/position"]
    values["share_of_velocity"] = values["error"] / values["floors/velocity"]
    values["shuffled_times"] = values["shuffled"] / max(values["error"], 1e-9)
    values["windows"] = float(counted.any(-1).sum())
    if len(model.members) > 1:
        pairs = apart[:, -1][counted].cpu().numpy(), error[counted].cpu().numpy()
        values["ranks"] = float(spearmanr(*pairs).statistic)
    return values


def led(pusher: Float[Tensor, "b 2"], actions: Float[Tensor, "b t 2"]) -> Float[Tensor, "b t 2"]:
    """Where the pusher is after each action."""
    at, ways = pusher.cpu().numpy(), []
    for t in range(actions.shape[1]):
        at = moved(at, actions[:, t].cpu().numpy())
        ways.append(torch.from_numpy(at).to(actions))
    return torch.stack(ways, dim=1)


def deranged(count: int, seed: int) -> np.ndarray:
    """Whose actions each window is told in place of its own: never these, if there are two."""
    order = numpy_rng(seed, "eval/shuffled").permutation(count)
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, 1)
    return other


def off(a: Float[Tensor, "*b 7"], b: Float[Tensor, "*b 7"]) -> Float[Tensor, "*b"]:
    """Metres between places."""
    return (a[..., :3] - b[..., :3]).norm(dim=-1)


def turned(a: Float[Tensor, "*b 7"], b: Float[Tensor, "*b 7"]) -> Float[Tensor, "*b"]:
    """Degrees between rotations."""
    alike = (a[..., 3:] * b[..., 3:]).sum(-1).abs().clamp(max=1)
    return 2 * torch.rad2deg(alike.acos())
