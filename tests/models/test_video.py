"""Video world models: EDM's identities, noise by number, what a frame depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.worlds.video.config import DiamondConfig
from models.worlds.video.diamond import Diamond, quantise
from models.worlds.video.edm import karras_grid, precondition
from models.worlds.video.noise import normal

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def diamond(live: bool = True, **changes: object) -> Diamond:
    """A small one; if `live`, with random weights where they are zero at first."""
    sizes = {"widths": [8, 16], "condition": 16, "channels": 3, "actions": 3, "image_size": 8}
    model = Diamond(DiamondConfig(**(sizes | changes)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(FRESH)
    model.initialise(generator)
    for parameter in model.parameters() if live else ():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip(frames: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH)
    seen = torch.randint(256, (count, frames, 3, 8, 8), generator=generator) / 255
    return seen, torch.randint(3, (count, frames - 1), generator=generator)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_preconditioning_keeps_the_identities_of_edm(offset: float) -> None:
    sigma, data = torch.logspace(-3, 2, 50, dtype=torch.float64), 0.5
    into, skip, out, noise = precondition(sigma, data, offset)
    s = (sigma.square() + offset**2).sqrt()
    torch.testing.assert_close(skip, 1 - (s * into).square())
    torch.testing.assert_close(out, s * data * into)
    # Input and target have variance 1 for data of variance d^2 and noise of variance s^2.
    torch.testing.assert_close(into.square() * (s.square() + data**2), torch.ones_like(s))
    target = ((1 - skip).square() * data**2 + skip.square() * s.square()) / out.square()
    torch.testing.assert_close(target, torch.ones_like(s))
    if offset:
        assert noise.min() >= math.log(offset) / 4, "bounded, however little noise there is"


def test_noise_levels_fall_from_the_largest_to_the_least_and_then_to_none() -> None:
    grid = karras_grid(18, 0.002, 80.0)
    assert len(grid) == 19 and grid[-1] == 0 and (grid.diff() < 0).all()
    torch.testing.assert_close(grid[[0, 17]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    root = grid[:-1] ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(17))
    assert karras_grid(1, 0.002, 5.0).tolist() == [pytest.approx(5.0), 0.0]


def test_noise_is_normal_and_a_function_of_its_number() -> None:
    episodes = torch.arange(64) + FRESH
    x = normal(FRESH, episodes, (3, 1), (40, 25))
    again = normal(FRESH, episodes[5:9], (3, 1), (40, 25))
    assert torch.equal(x[5:9], again), "whatever else is in the batch"
    assert torch.equal(normal(FRESH, episodes, (3, 1), (999,)), x.flatten(1)[:, :999])
    for other in (normal(FRESH + 1, episodes, (3, 1), (40, 25)),
                  normal(FRESH, episodes, (1, 3), (40, 25)),
                  normal(FRESH, episodes, (3,), (40, 25)),
                  normal(FRESH, episodes + 64, (3, 1), (40, 25))):  # fmt: skip
        assert abs(torch.corrcoef(torch.stack([x.flatten(), other.flatten()]))[0, 1]) < 0.02
    flat = x.flatten()
    assert abs(flat.mean()) < 0.02 and abs(flat.var() - 1) < 0.03
    assert abs((flat**4).mean() - 3) < 0.2 and x.isfinite().all()
    rows = torch.corrcoef(x.flatten(1)) - torch.eye(64)
    assert rows.abs().max() < 0.2


def test_at_first_the_clean_frame_is_the_noisy_one_scaled() -> None:
    model = diamond(live=False)
    frames, actions = clip(5)
    noisy, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    skip = precondition(sigma, 0.5, model.config.sigma_offset).skip
    found = model.denoise(noisy, sigma, frames[:, :4], actions)
    torch.testing.assert_close(found, quantise(skip[:, None, None, None] * noisy))


def test_the_loss_is_that_of_a_network_that_tells_the_clean_frame() -> None:
    """A network that knows x has none, whatever the noise; one that says 0 has about 1."""
    model, (frames, actions) = diamond(), clip(5, 64)
    x, seen = frames[:, 4] * 2 - 1, frames[:, :4] * 2 - 1
    data = x.std()
    model.config.sigma_data = data.item()  # type: ignore[misc]

    def knows(noisy: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        scales = precondition(sigma, model.config.sigma_data, model.config.sigma_offset)
        return (x - scales.skip[:, None, None, None] * noisy) / scales.out[:, None, None, None]

    model.forward = knows  # type: ignore[method-assign]

    def draw(use: int, *shape: int) -> torch.Tensor:
        return normal(FRESH, torch.arange(64), (use,), shape)

    loss, told = model.loss(x, seen, actions, draw)
    assert loss < 1e-8
    torch.testing.assert_close(told, x, atol=1e-5, rtol=0)
    model.forward = lambda noisy, *_: torch.zeros_like(noisy)  # type: ignore[method-assign]
    loss, _ = model.loss(x, seen, actions, draw)
    assert 0.8 < loss < 1.2


def test_a_frame_depends_on_the_context_alone_and_on_the_action_before_it() -> None:
    model, (frames, actions) = diamond(), clip(7)
    episodes = torch.arange(2)

    def drawn(frames: torch.Tensor, actions: torch.Tensor, last: int) -> torch.Tensor:
        cache = model.init_cache(frames, actions, episodes)
        return model.step(cache, torch.full((2,), last))[0]

    base = drawn(frames, actions, 0)
    assert torch.equal(base, drawn(frames[:, 3:], actions[:, 3:], 0)), "four frames are seen"
    earlier = frames.clone()
    earlier[:, 2] = 0.5
    assert torch.equal(base, drawn(earlier, actions, 0))
    for changed in (drawn(torch.cat([frames[:, :-1], 1 - frames[:, -1:]], 1), actions, 0),
                    drawn(frames, torch.cat([actions[:, :-1], 2 - actions[:, -1:]], 1), 0),
                    drawn(frames, actions, 1)):  # fmt: skip
        assert changed.shape == base.shape
    assert not torch.equal(base, drawn(frames, actions, 1))


def test_a_cache_is_a_value_and_noise_is_of_the_episode_and_the_frame() -> None:
    model, (frames, actions) = diamond(), clip(4, 3)
    cache = model.init_cache(frames, actions, torch.tensor([5, 6, 7]), seed=1)
    action = torch.tensor([0, 1, 2])
    first, after = model.step(cache, action)
    assert torch.equal(model.step(cache, action)[0], first), "the same again from the same cache"
    alone = model.init_cache(frames[1:2], actions[1:2], torch.tensor([6]), seed=1)
    torch.testing.assert_close(model.step(alone, action[1:2])[0], first[1:2], atol=1e-5, rtol=0)
    second, _ = model.step(after, action)
    for other in (
        second,
        model.step(model.init_cache(frames, actions, torch.arange(3), 1), action)[0],
    ):
        assert not torch.equal(first, other)
    assert torch.equal(after.frames[:, -1], first * 2 - 1)
    levels = first * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


def test_any_widths_make_a_network_that_gives_frames_of_its_size() -> None:
    for widths in ([8], [48, 64], [20, 33, 7]):
        model = diamond(widths=widths, attention=False)
        frames, actions = clip(4)
        found = model(frames[:, 0], torch.ones(2), frames, torch.cat([actions, actions[:, :1]], 1))
        assert found.shape == frames[:, 0].shape


def test_more_steps_and_less_noise_are_what_the_configuration_says() -> None:
    calls: list[float] = []
    model, (frames, actions) = diamond(steps=5), clip(4)
    denoise = model.denoise

    def counted(x: torch.Tensor, sigma: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(sigma[0].item())
        return denoise(x, sigma, *rest)

    model.denoise = counted  # type: ignore[method-assign]
    model.step(model.init_cache(frames, actions, torch.arange(2)), torch.zeros(2, dtype=torch.long))
    np.testing.assert_allclose(calls, karras_grid(5, 0.002, 5.0)[:-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("frames", "actions", "says"),
    [
        (torch.zeros(1, 3, 3, 8, 8), 2, r"3 frames .* needs 4 or more"),
        (torch.zeros(1, 4, 3, 8, 8), 4, r"4 frames have 3 actions between them, not 4"),
        (torch.zeros(1, 4, 3, 9, 8), 3, r"frames must be \[b, t, 3, 8, 8\], they are \[1, 4, 3, 9"),
        (torch.zeros(1, 4, 1, 8, 8), 3, r"they are \[1, 4, 1, 8, 8\]"),
        (torch.zeros(1, 4, 3, 8, 8).byte(), 3, r"numbers in \[0, 1\], they are torch\.uint8"),
        (torch.full((1, 4, 3, 8, 8), 255.0), 3, r"numbers in \[0, 1\], the largest is 255"),
    ],
)
def test_frames_that_are_not_what_they_should_be_are_refused(
    frames: torch.Tensor, actions: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        diamond().init_cache(
            frames, torch.zeros(1, actions, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        )


def test_actions_outside_the_set_are_refused() -> None:
    model, (frames, actions) = diamond(), clip(4)
    cache = model.init_cache(frames, actions, torch.arange(2))
    for action, says in ((torch.tensor([0, 3]), r"action 3: the world has 0 to 2"),
                         (torch.tensor([0, -1]), r"action -1"),
                         (torch.tensor([0.0, 1.0]), r"actions must be integers")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            model.step(cache, action)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": []}, r"model\.widths=\[\]"),
        ({"condition": 60}, r"model\.condition=60 must be a multiple of 2 model\.context=8"),
        ({"sigma_max": 0.001}, r"model\.sigma_max=0\.001 must be above model\.sigma_min"),
        ({"widths": [8, 12]}, r"model\.widths=\[8, 12\]: with model\.attention .* multiple of 8"),
        ({"steps": 0}, r"model\.steps=0 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        diamond(**changes)
