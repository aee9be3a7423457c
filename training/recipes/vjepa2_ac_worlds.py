"""What a predictor on a frozen encoder acts in: the coloured rooms, or recorded trajectories.

Each says what is seen, where the actor is (its state), and where actions would bring it with
nothing in the way, which is what is known of states that lie ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.trajectories import TrajectoriesData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.envs.two_rooms_rgb import CANVAS, SPEED
from training.recipes.jepa_video_clips import on_device, see_recorded, see_rooms
from training.torch_step import Batch


class RoomsActed:
    """The coloured rooms: a state is where the dot is, and plans can be tried."""

    def __init__(self, data: TwoRoomsRGBData, device: torch.device) -> None:
        self.data, self.device = data, device
        self.mean, self.std = (
            torch.from_numpy(x).to(device) for x in (data.action_mean, data.action_std)
        )

    def see(self, batch: Batch) -> Tensor:
        """[b, t, 3, s, s] frames, normalised."""
        return see_rooms(batch["positions"], self.data.config.image_size)

    def states(self, batch: Batch) -> Tensor:
        """[b, t, 2] places in [-1, 1]."""
        return batch["positions"] / CANVAS * 2 - 1

    def guessed(self, start: Tensor, actions: Tensor) -> Tensor:
        """[..., 2] states and [..., t, a] blocks after them -> [..., t, 2] states before each."""
        raw = actions.unflatten(-1, (-1, 2)) * self.std + self.mean
        moved = SPEED * raw.clamp(-1, 1).sum(dim=-2) * (2 / CANVAS)  # [..., t, 2]
        return start[..., None, :] + moved.cumsum(dim=-2) - moved

    def heldout(self, count: int) -> Batch:
        skip, states = self.data.config.skip, self.data.config.seq_len
        walks, reach = self.data.heldout(count), skip * (states - 1)
        found = {
            "positions": walks.positions[:, : reach + 1 : skip],
            "actions": self.data.blocks(walks.actions[:, :reach]),
        }
        return on_device(found, self.device)


class RecordedActed:
    """Recorded trajectories: an action is what it adds to the state."""

    def __init__(self, data: TrajectoriesData, device: torch.device) -> None:
        self.data, self.device = data, device

    def see(self, batch: Batch) -> Tensor:
        return see_recorded(batch["frames"])

    def states(self, batch: Batch) -> Tensor:
        return batch["states"]

    def guessed(self, start: Tensor, actions: Tensor) -> Tensor:
        return start[..., None, :] + actions.cumsum(dim=-2) - actions

    def heldout(self, count: int) -> Batch:
        return on_device(self.data.heldout(count), self.device)
