"""The worlds that models with actions learn: coloured rooms, Push-T, recorded trajectories.

Each says what is seen of its states. Those that can be acted in also say what an episode is, when
its goal is reached, what probes are asked, and what would be a surprise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.push_t import PushTData
from training.data.trajectories import TrajectoriesData
from training.data.two_rooms_rgb import TwoRoomsRGBData
from training.data.walks import Walks
from training.envs import push_t, two_rooms_rgb
from training.envs.two_rooms_rgb import CANVAS, SPEED
from training.evaluation.film_figures import goal_films
from training.evaluation.goals import Act, Episodes
from training.evaluation.room_figures import rgb_paths_chart
from training.evaluation.surprise import Film
from training.recipes.jepa_video_clips import (
    PIXEL_MEAN,
    PIXEL_STD,
    on_device,
    see_recorded,
    see_rooms,
)
from training.torch_step import Batch


class ActedWorld:
    """A world of walks that episodes can be played in.

    Subclasses also give `begin`, `reached`, `distance` and `oracle`, as training/evaluation/
    goals.py asks, and `paths_chart`, a picture of episodes.
    """

    def __init__(self, data: TwoRoomsRGBData | PushTData, device: torch.device) -> None:
        self.data, self.device = data, device
        self.mean, self.std = (
            torch.from_numpy(x).to(device) for x in (data.action_mean, data.action_std)
        )

    def film(self, batch: Batch) -> Tensor:
        """[b, t, 3, s, s] frames of a batch, normalised."""
        return self.see(batch["states"])

    def heldout(self, count: int, states: int) -> Batch:
        """Held-out windows of so many states, from the beginning of walks."""
        walks, reach = self.data.heldout(count), self.data.config.skip * (states - 1)
        seen = walks.states[:, : reach + 1 : self.data.config.skip]
        blocks = self.data.blocks(walks.actions[:, :reach])
        return on_device(Walks(seen, blocks)._asdict(), self.device)

    def raw(self, blocks: Tensor) -> Tensor:
        """[..., skip a] normalised blocks -> [..., skip, a] actions."""
        return blocks.unflatten(-1, (self.data.config.skip, -1)) * self.std + self.mean

    def see(self, states: Tensor) -> Tensor:
        """[b, t, 3, s, s] frames, normalised."""
        raise NotImplementedError

    def asked(self, states: Tensor) -> dict[str, Tensor]:
        """What probes read off latents, by a prefix of the metric's name."""
        raise NotImplementedError

    def violations(
        self, states: Tensor, actions: Tensor, generator: torch.Generator
    ) -> dict[str, tuple[Film, Film]]:
        """Event -> (possible, impossible) films of the same windows."""
        raise NotImplementedError


class RoomsActed(ActedWorld):
    """The coloured rooms: a state is where the dot is."""

    data: TwoRoomsRGBData

    class Playing:
        def __init__(self, states: Tensor) -> None:
            self.states = states

        def step(self, actions: Tensor) -> None:
            self.states = two_rooms_rgb.move(self.states, actions)

    def see(self, states: Tensor) -> Tensor:
        return see_rooms(states, self.data.config.image_size)

    def begin(self, states: Tensor) -> Playing:
        return self.Playing(states)

    def move(self, states: Tensor, actions: Tensor) -> Tensor:
        return two_rooms_rgb.move(states, actions)

    def distance(self, states: Tensor, goal: Tensor) -> Tensor:
        return (states - goal).norm(dim=-1)

    def reached(self, states: Tensor, goal: Tensor) -> Tensor:
        return self.distance(states, goal) < two_rooms_rgb.NEAR

    def oracle(self, episodes: Episodes) -> Act:
        return lambda states, left: two_rooms_rgb.towards(states, episodes.goal)[:, None]

    def asked(self, states: Tensor) -> dict[str, Tensor]:
        return {"": states}

    def actor(self, states: Tensor) -> Tensor:
        """[..., 2] places in [-1, 1]."""
        return states / CANVAS * 2 - 1

    def guessed(self, start: Tensor, actions: Tensor) -> Tensor:
        """Where the dot would be with nothing in the way: [..., 2] places in [-1, 1] and
        [..., t, a] blocks after them -> [..., t, 2] places before each."""
        moved = SPEED * self.raw(actions).clamp(-1, 1).sum(dim=-2) * (2 / CANVAS)  # [..., t, 2]
        return start[..., None, :] + moved.cumsum(dim=-2) - moved

    def violations(
        self, states: Tensor, actions: Tensor, generator: torch.Generator
    ) -> dict[str, tuple[Film, Film]]:
        """teleport: the dot is elsewhere from the middle on; colour: it is blue from there on;
        reversed: the walk is told backwards with the actions turned round, where nothing was in
        its way: a dot that runs against a wall does not do so backwards."""
        frames, late = self.see(states), from_the_middle(states)
        possible, found = Film(frames, actions), {}
        shift = swapped(states, generator)
        away = shift.norm(dim=-1) > CANVAS / 4
        moved = torch.where(late[:, None], states + shift[:, None], states)
        some = Film(frames[away], actions[away])
        found["teleport"] = some, Film(self.see(moved[away].clamp(22, 202)), actions[away])
        blue = torch.where(late[:, None, None, None], frames.flip(2), frames)
        found["colour"] = possible, Film(blue, actions)
        raw = self.raw(actions)
        free = SPEED * raw.clamp(-1, 1).sum(dim=-2)  # [n, t-1, 2]
        met = (states.diff(dim=1) - free).abs().amax(dim=(1, 2)) > 0.01
        backwards = ((-raw - self.mean) / self.std).flip(1, 2).flatten(-2)
        some = Film(frames[~met], actions[~met])
        found["reversed"] = some, Film(self.see(states[~met].flip(1)), backwards[~met])
        return found

    paths_chart = staticmethod(rgb_paths_chart)


class PushTActed(ActedWorld):
    """Push-T: where disc and block are, how the block is turned, how fast the disc is."""

    data: PushTData

    class Playing:
        def __init__(self, states: Tensor) -> None:
            self.tables, self.device = push_t.PushT(states.cpu().numpy()), states.device

        @property
        def states(self) -> Tensor:
            return torch.from_numpy(self.tables.states).to(self.device)

        def step(self, actions: Tensor) -> None:
            self.tables.step(actions.cpu().numpy())

    def see(self, states: Tensor) -> Tensor:
        return (push_t.render(states, self.data.config.image_size) - PIXEL_MEAN) / PIXEL_STD

    def begin(self, states: Tensor) -> Playing:
        return self.Playing(states)

    def distance(self, states: Tensor, goal: Tensor) -> Tensor:
        return push_t.distance(states, goal)

    def reached(self, states: Tensor, goal: Tensor) -> Tensor:
        return push_t.reached(states, goal)

    def oracle(self, episodes: Episodes) -> Act:
        """Does what was done in the walk, then nothing."""
        parts = list(episodes.done.split(self.data.config.skip, dim=1))
        still = torch.zeros_like(parts[0])
        return lambda states, left: parts.pop(0) if parts else still

    def asked(self, states: Tensor) -> dict[str, Tensor]:
        angle = states[..., 4]
        turned = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return {"agent/": states[..., :2], "block/": states[..., 2:4], "angle/": turned}

    def violations(
        self, states: Tensor, actions: Tensor, generator: torch.Generator
    ) -> dict[str, tuple[Film, Film]]:
        """teleport: the block is elsewhere from the middle on; teleport_agent: the disc is;
        colour: red and blue are exchanged from there on."""
        frames, late = self.see(states), from_the_middle(states)
        shift, found = swapped(states, generator), {}
        for name, part in (("teleport", slice(2, 4)), ("teleport_agent", slice(0, 2))):
            away = shift[:, part].norm(dim=-1) > push_t.CANVAS / 8
            moved = states.clone()
            moved[..., part] += torch.where(late[:, None], shift[:, None, part], 0.0)
            some = Film(frames[away], actions[away])
            found[name] = some, Film(self.see(moved[away]), actions[away])
        blue = torch.where(late[:, None, None, None], frames.flip(2), frames)
        found["colour"] = Film(frames, actions), Film(blue, actions)
        return found

    paths_chart = staticmethod(goal_films)


def from_the_middle(states: Tensor) -> Tensor:
    """[t], true from the middle of a film on."""
    return torch.arange(states.shape[1], device=states.device) >= states.shape[1] // 2


def swapped(states: Tensor, generator: torch.Generator) -> Tensor:
    """[n, s], from the state in the middle of each film to that of another."""
    middle = states[:, states.shape[1] // 2]
    return middle[torch.randperm(len(middle), generator=generator, device=middle.device)] - middle


class RecordedActed:
    """Recorded trajectories: an action is what it adds to the state."""

    def __init__(self, data: TrajectoriesData, device: torch.device) -> None:
        self.data, self.device = data, device

    def film(self, batch: Batch) -> Tensor:
        return see_recorded(batch["frames"])

    def actor(self, states: Tensor) -> Tensor:
        return states

    def guessed(self, start: Tensor, actions: Tensor) -> Tensor:
        return start[..., None, :] + actions.cumsum(dim=-2) - actions

    def heldout(self, count: int, states: int) -> Batch:
        return on_device(self.data.heldout(count), self.device)
