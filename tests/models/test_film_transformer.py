"""Films token by token: what is cached is what would be computed again, whatever was dropped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from models.worlds.video.config import (
    DiffusionForcingConfig,
    Dreamer4Config,
    FilmTransformerConfig,
    MaskedTokenizerConfig,
    Schedule,
)
from models.worlds.video.diffusion_forcing import DiffusionForcing
from models.worlds.video.film_transformer import FilmTransformer, TimeAttention, rotate
from models.worlds.video.film_world import patches_of, pictures_of, widened
from models.worlds.video.noise import normal
from models.worlds.video.schedules import (
    LEVELS,
    ddim_levels,
    noised,
    signal,
    snr_weight,
    told_apart,
    velocity,
    with_clean,
)

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
WINDOW = 4
U_NET: dict = {"patch": 1, "widths": [16, 32]}


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: a silenced block would make any two things equal."""
    generator = torch.Generator().manual_seed(FRESH)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def transformer(**changes: int) -> FilmTransformer:
    sizes = {"dim": 12, "depth": 6, "heads": 2, "time_every": 2, "window": WINDOW}
    return drawn(FilmTransformer(FilmTransformerConfig(**(sizes | changes))))  # type: ignore[return-value]


def film(frames: int, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH + 1)
    x = torch.randn(2, frames, tokens, 12, generator=generator)
    return x, torch.randn(2, frames, 12, generator=generator)


@torch.no_grad()
def one_by_one(model: FilmTransformer, x: torch.Tensor, c: torch.Tensor, first: int = 3):
    """The first few together, then frame by frame beside the cache; how many it kept."""
    out, cache = model(x[:, :first], c[:, :first])
    found, kept = [out], []
    for t in range(first, x.shape[1]):
        out, cache = model(x[:, t : t + 1], c[:, t : t + 1], cache)
        found.append(out)
        kept.append(cache.frames)
    return torch.cat(found, dim=1), kept


@torch.no_grad()
def test_the_cache_is_what_a_banded_pass_over_everything_computes() -> None:
    model, (x, c) = transformer(), film(14)
    whole, _ = model(x, c)
    found, kept = one_by_one(model, x, c)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    assert max(kept) == WINDOW - 1, "memory is flat"
    last, _ = model(x[:, -WINDOW:], c[:, -WINDOW:])  # forgets what frames before had passed on
    assert (last[:, -1] - whole[:, -1]).abs().max() > 1e-3
    early, _ = model(x[:, :WINDOW], c[:, :WINDOW])
    torch.testing.assert_close(early, whole[:, :WINDOW], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_over_time_beside_sinks_is_that_of_the_frames_kept_at_their_new_places() -> None:
    """By hand: each frame sees the first two and the last four, numbered in the order they lie."""
    sinks = 2
    layer = drawn(TimeAttention(FilmTransformerConfig(12, 2, 2, window=WINDOW, sinks=sinks)))
    x, _ = film(13)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 6)).unbind(-3)  # [b, t, s, h, hd]
    q, k = (torch.nn.functional.rms_norm(y, (6,)) for y in (q, k))
    past, found = None, []
    for t in range(13):
        out, past = layer(x[:, t : t + 1], past)
        found.append(out)
        seen = [i for i in range(t + 1) if i < sinks or i > t - WINDOW]
        keys = rotate(k[:, seen].transpose(1, 2).flatten(0, 1))  # [b s, n, h, hd]
        query = rotate(q[:, t : t + 1].transpose(1, 2).flatten(0, 1), len(seen) - 1)
        score = torch.einsum("bqhd,bkhd->bhqk", query, keys) / 6**0.5
        value = v[:, seen].transpose(1, 2).flatten(0, 1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), value)
        told = layer.out(mixed.flatten(2)).unflatten(0, (2, 3)).transpose(1, 2)
        torch.testing.assert_close(out, told, atol=1e-5, rtol=1e-4)
    assert past[0].shape[1] == WINDOW - 1 + sinks


@torch.no_grad()
def test_a_frame_sees_itself_and_what_was_before_in_its_window_and_nothing_later() -> None:
    model, (x, c) = transformer(depth=2), film(9)
    base, _ = model(x, c)
    for changed_at in range(9):
        other = x.clone()
        other[:, changed_at, 1] += 1
        moved = (model(other, c)[0] - base).abs().amax((0, 2, 3)) > 1e-6
        wanted = [changed_at <= t < changed_at + WINDOW for t in range(9)]
        assert moved.tolist() == wanted


@torch.no_grad()
def test_rotations_know_differences_alone() -> None:
    x, y = film(6)[0].flatten(0, 1).unflatten(-1, (2, 6))[:, :3].split(6)
    near = torch.einsum("bnhd,bmhd->bhnm", rotate(x), rotate(y))
    far = torch.einsum("bnhd,bmhd->bhnm", rotate(x, 70), rotate(y, 70))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    turned = torch.einsum("bnhd,bmhd->bhnm", rotate(x, 1), rotate(y))
    assert (near - turned).abs().max() > 1e-2


def test_frames_beside_a_cache_are_told_one_by_one() -> None:
    model, (x, c) = transformer(), film(5)
    _, cache = model(x[:, :3], c[:, :3])
    with pytest.raises(ValueError, match="2 frames beside a cache: they are told one by one"):
        model(x[:, 3:], c[:, 3:], cache)


def test_a_silenced_transformer_does_nothing() -> None:
    model, (x, c) = transformer(), film(5)
    model.silence()
    assert torch.equal(model(x, c)[0], x)


# Levels of noise


@pytest.mark.parametrize("schedule", list(Schedule))
def test_signal_falls_from_nearly_all_to_nearly_none(schedule: Schedule) -> None:
    abar = signal(schedule)
    assert len(abar) == LEVELS and (abar.diff() < 0).all()
    assert 0.99 < abar[0] < 1 and 0 < abar[-1] < 1e-3
    beta = 1 - abar[1:] / abar[:-1]
    assert (beta > 0).all() and (beta <= 0.999 + 1e-9).all()
    assert with_clean(abar)[-1] == 1


def test_a_frame_and_its_noise_are_told_apart_exactly() -> None:
    generator = torch.Generator().manual_seed(FRESH)
    x, eps = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    abar = signal(Schedule.cosine)[::20]
    found = told_apart(noised(x, eps, abar), velocity(x, eps, abar), abar)
    torch.testing.assert_close(found[0], x)
    torch.testing.assert_close(found[1], eps)


def test_steps_begin_at_the_last_level_and_end_clean() -> None:
    assert ddim_levels(1) == [999, -1]
    assert ddim_levels(4) == [999, 749, 499, 249, -1]


def test_weights_are_those_of_min_snr_and_grow_with_the_signal_before() -> None:
    abar = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(FRESH))
    snr = abar / (1 - abar)
    plain = snr_weight(abar)
    torch.testing.assert_close(plain, snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(snr_weight(abar[:, :1], fade=0.9), plain[:, :1])
    # By hand, of the second frame.
    g, c, n = 0.9, snr.clamp(max=5) / 5, snr / 5
    before = (1 - g) * c[:, 0]
    fused = [1 - (1 - g * before) * (1 - y[:, 1]) for y in (c, n)]
    torch.testing.assert_close(snr_weight(abar, fade=g)[:, 1], 5 * fused[0] / (5 * fused[1] + 1))


# Diffusion Forcing


@torch.no_grad()
def test_guidance_goes_on_from_what_is_told_without_a_past() -> None:
    (frames, actions), episodes = clip(4), torch.tensor([3, 8])
    x, level, before = torch.randn(2, 1, 3, 8, 8), torch.full((2, 1), 500), torch.ones(2, 1).long()
    told = {}
    for guidance in (0.0, 1.0, 2.5):
        model = forcing(guidance=guidance)
        cache = model.init_cache(frames, actions, episodes).cache
        told[guidance] = model.guided(x, level, before, cache)
    first = torch.full_like(before, model.actions)  # of a film: no action is known
    torch.testing.assert_close(told[0.0], model(x, level, first)[0])
    torch.testing.assert_close(told[1.0], model(x, level, before, cache)[0])
    torch.testing.assert_close(told[2.5], 2.5 * told[1.0] - 1.5 * told[0.0], atol=1e-4, rtol=1e-4)
    assert (told[1.0] - told[0.0]).abs().max() > 1e-2


@torch.no_grad()
def test_fresh_noise_is_another_at_every_step_and_the_same_every_time() -> None:
    (frames, actions), episodes = clip(4), torch.tensor([3, 8])
    model = forcing(fresh=True)
    memory = model.init_cache(frames, actions, episodes, seed=5)
    noise = model.noise(memory)
    assert noise.shape == (2, 3, 3, 8, 8)
    assert torch.equal(noise[:, :1], forcing().noise(memory))
    assert all((a - b).abs().mean() > 0.5 for a, b in pairwise(noise.unbind(1)))
    found, _ = model.step(memory, actions[:, 0])
    assert torch.equal(model.step(memory, actions[:, 0])[0], found)
    abar, before, x = model.abar, actions[:, :1], noise[:, :1].clamp(-6, 6)
    for step, (now, then) in enumerate(pairwise(ddim_levels(3))):
        v, _ = model(x, torch.full((2, 1), now), before, memory.cache)
        clean = told_apart(x, v, abar[now])[0].clamp(-1, 1)
        x = clean if then < 0 else noised(clean, noise[:, step + 1, None].clamp(-6, 6), abar[then])
    torch.testing.assert_close(found, (x[:, 0] + 1) / 2)
    plain = forcing()
    assert not torch.equal(plain.step(plain.init_cache(frames, actions, episodes, 5),
                                      actions[:, 0])[0], found)  # fmt: skip


def forcing(**changes: object) -> DiffusionForcing:
    layers = FilmTransformerConfig(12, 4, 2, window=WINDOW, time_every=2)
    sizes = {"channels": 3, "image_size": 8, "actions": 3, "steps": 3, "outcome_width": 4,
             "transformer": layers}  # fmt: skip
    return drawn(DiffusionForcing(DiffusionForcingConfig(**(sizes | changes))))  # type: ignore


def clip(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(FRESH)
    seen = torch.randint(256, (2, frames, 3, 8, 8), generator=generator) / 255
    return seen, torch.randint(3, (2, frames - 1), generator=generator)


@pytest.mark.parametrize("network", [{"margin": 0}, {"margin": 1}, U_NET], ids=str)
@torch.no_grad()
def test_dreams_beside_a_cache_are_those_that_compute_the_whole_past_again(network: dict) -> None:
    """Ten frames, of which the window forgets most: each step over everything, in one band."""
    model, (frames, actions) = forcing(**network), clip(4)
    episodes, label = torch.tensor([3, 8]), model.config.stabilise - 1
    cache = model.init_cache(frames, actions, episodes, seed=5)
    past, done = frames * 2 - 1, torch.nn.functional.pad(actions, (1, 0), value=3)
    for count in range(10):
        action = torch.tensor([count % 3, (count + 1) % 3])
        found, cache = model.step(cache, action)
        x = normal(5, episodes, (4 + count, 0), (3, 8, 8))[:, None].clamp(-6, 6)
        done = torch.cat([done, action[:, None]], dim=1)
        levels = ddim_levels(3)
        for now, then in pairwise(levels):
            level = torch.full(done.shape, label)
            level[:, -1] = now
            shown = torch.cat([past * model.abar[label].sqrt(), x], dim=1)
            v = model(shown, level, done)[0][:, -1:]
            clean, eps = told_apart(x, v, model.abar[now])
            x = noised(clean.clamp(-1, 1), eps, model.abar[then])
        torch.testing.assert_close(found, (x[:, 0] + 1) / 2, atol=2e-3, rtol=0)
        past = torch.cat([past, x], dim=1)
    assert cache.cache.frames == WINDOW - 1


def test_only_clean_frames_are_remembered_after_as_many_passes_as_steps_and_one() -> None:
    model, (frames, actions) = forcing(), clip(4)
    cache = model.init_cache(frames, actions, torch.arange(2))
    passes = []
    forward = model.forward

    def noted(x, level, before, cache=None):
        passes.append(level.flatten().tolist())
        return forward(x, level, before, cache)

    model.forward = noted  # type: ignore[method-assign]
    _, after = model.step(cache, torch.tensor([0, 1]))
    label = model.config.stabilise - 1
    assert passes == [[999, 999], [666, 666], [332, 332], [label, label]]
    assert torch.equal(after.cache.keys[0][:, :-1], cache.cache.keys[0][:, -WINDOW + 2 :])


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_a_patch_has_its_margin_and_nothing_further(margin: int) -> None:
    """Each pixel is in the patches whose squares, so much larger, hold it, and is found there."""
    frames = torch.rand(1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(FRESH)) + 1
    p, size = 4, 4 + 2 * margin
    found = patches_of(frames, p, margin)
    assert found.shape == (1, 1, 4, 3 * size**2)
    assert torch.equal(widened(patches_of(frames, p), p, margin), found)
    assert torch.equal(pictures_of(patches_of(frames, p), p), frames)
    wide = torch.nn.functional.pad(frames, (margin,) * 4)[0, 0]
    for place in range(4):
        top, left = p * (place // 2), p * (place % 2)
        square = wide[:, top : top + size, left : left + size]
        assert torch.equal(found[0, 0, place], square.flatten())


def test_an_action_moves_the_frame_after_it_and_a_cache_is_of_one_model() -> None:
    model, (frames, actions) = forcing(), clip(4)
    cache = model.init_cache(frames, actions, torch.arange(2))
    first = model.step(cache, torch.tensor([0, 1]))[0]
    assert torch.equal(model.step(cache, torch.tensor([0, 1]))[0], first)
    other = model.step(cache, torch.tensor([2, 1]))[0]
    assert torch.equal(other[1], first[1]) and not torch.equal(other[0], first[0])
    with pytest.raises(ValueError, match="the cache of another model"):
        forcing().step(cache, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (FilmTransformerConfig, {"heads": 5}, r"heads=5 must divide model\.transformer\.dim=96"),
        (FilmTransformerConfig, {"time_every": 7}, r"none would be over time"),
        (FilmTransformerConfig, {"window": 1}, r"window=1 must be at least 2"),
        (DiffusionForcingConfig, {"context": 17}, r"model\.context=17 must be at most the frames"),
        (DiffusionForcingConfig, {"stabilise": -1}, r"model\.stabilise=-1 must be 0 to 1000"),
        (DiffusionForcingConfig, {"steps": 0}, r"model\.steps=0 must be at least 1"),
        (DiffusionForcingConfig, {"margin": -1}, r"model\.margin=-1 must be at least 0"),
        (
            Dreamer4Config,
            {"margin": 2, "tokenizer": MaskedTokenizerConfig(latents=4)},
            r"model\.margin=2 is of patches of pixels: give 0 with model\.tokenizer\.latents=4",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    kind: type, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**changes)
