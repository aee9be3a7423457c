"""What every video world model offers: one is played, judged and learned in like another.

    cache = model.init_cache(frames, actions, episodes)      some frames that were seen
    frame, cache = model.step(cache, action)                 the one that follows, and again

Frames are in [0, 1], [b, 3, h, w]; actions are numbers [b], what was done after the last frame. A
cache is a value: to try two actions, step twice from the same one.
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Float, Int64
from torch import Tensor


class WorldModel(Protocol):
    """A model that draws what follows.

    Attributes:
        context: how many frames it must have seen.
    """

    context: int

    def init_cache(
        self,
        frames: Float[Tensor, "b t c h w"],
        actions: Int64[Tensor, "b t-1"],
        episodes: Int64[Tensor, " b"],
        seed: int = 0,
    ) -> Any:
        """What `step` goes on from. `seed` and `episodes` decide all noise there will be.

        Raises:
            ValueError: fewer frames than `context`, frames of another size, unknown actions.
        """
        ...

    def step(self, cache: Any, action: Int64[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Any]:
        """The next frame, and the cache with it."""
        ...

    def outcome(
        self,
        before: Float[Tensor, "b 2 c h w"],
        action: Int64[Tensor, " b"],
        after: Float[Tensor, "b c h w"],
    ) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 2"]]:
        """Logits of the sign of the reward (-1, 0, 1) of a step, and of going on or ending; of the
        two frames before it and the one after."""
        ...


def check_seen(
    frames: Float[Tensor, "b t c h w"],
    actions: Int64[Tensor, "b t-1"],
    context: int,
    channels: int,
    size: int,
) -> None:
    """Raise ValueError unless these are frames, enough of them, and the actions between them."""
    if frames.ndim != 5 or frames.shape[2:] != (channels, size, size):
        raise ValueError(
            f"frames must be [b, t, {channels}, {size}, {size}], they are {list(frames.shape)}"
        )
    if not frames.is_floating_point():
        raise ValueError(f"frames must be numbers in [0, 1], they are {frames.dtype}")
    if not (frames.amin() >= 0 and frames.amax() <= 1):
        raise ValueError(
            f"frames must be numbers in [0, 1], the largest is {frames.amax().item():g}, the least "
            f"{frames.amin().item():g}"
        )
    count = frames.shape[1]
    if count < context:
        raise ValueError(f"{count} frames were seen: the model needs {context} or more")
    if actions.shape[1] != count - 1:
        raise ValueError(
            f"{count} frames have {count - 1} actions between them, not {actions.shape[1]}"
        )


def check_actions(actions: Int64[Tensor, " ..."], count: int) -> None:
    """Raise ValueError unless all are in 0 .. count - 1."""
    if actions.is_floating_point() or actions.dtype.is_complex:
        raise ValueError(f"actions must be integers, they are {actions.dtype}")
    wrong = (actions < 0) | (actions >= count)
    if wrong.any():  # the device is waited for once
        bad = actions[wrong][0].item()
        raise ValueError(f"action {bad}: the world has 0 to {count - 1}")
