"""Genie: codes without a codebook, tokens the surest first, and dreams of them beside a cache."""

from __future__ import annotations

import math

import pytest
import torch

from models.worlds.video.config import FilmTransformerConfig, GenieConfig
from models.worlds.video.fsq import code_of, index_of, joined, moved, quantise, size_of
from models.worlds.video.genie import Genie, after
from models.worlds.video.maskgit import counts, fill
from models.worlds.video.noise import even
from tests.models.test_film_transformer import FRESH, WINDOW, clip, drawn

SIZE, ACTIONS = 8, 3  # of the clips of test_film_transformer


def genie(**changes: object) -> Genie:
    layers = FilmTransformerConfig(12, 4, 2, window=WINDOW, time_every=2)
    sizes = {"channels": 3, "image_size": SIZE, "actions": ACTIONS, "steps": 2, "patch": 4,
             "outcome_width": 4, "levels": [5, 4], "transformer": layers}  # fmt: skip
    return drawn(Genie(GenieConfig(**(sizes | changes))))  # type: ignore


@pytest.mark.parametrize("levels", [(2,), (5,), (8, 5, 5, 5), (2, 2, 2), (3, 4, 7)])
def test_every_code_has_a_number_and_every_number_its_code(levels: tuple[int, ...]) -> None:
    every = torch.arange(size_of(levels))
    codes = code_of(every, levels)
    assert torch.equal(index_of(codes, levels), every)
    assert len(codes.unique(dim=0)) == math.prod(levels)
    generator = torch.Generator().manual_seed(FRESH)
    z = 3 * torch.randn(20_000, len(levels), generator=generator)
    told = quantise(z, levels)
    torch.testing.assert_close(code_of(index_of(told, levels), levels), told)
    for i, level in enumerate(levels):  # what is far out reaches the ends, in even steps
        found = told[:, i].unique()
        assert len(found) == level and found.min() == -1
        assert found.max() == 1
        torch.testing.assert_close(found.diff(), torch.full((level - 1,), 2 / (level - 1)))


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (3, 4, 7)])
def test_a_code_is_as_likely_as_its_numbers_are_together(levels: tuple[int, ...]) -> None:
    logits = torch.randn(3, sum(levels), generator=torch.Generator().manual_seed(FRESH))
    found = joined(logits, levels).log_softmax(-1)
    apart = [one.log_softmax(-1) for one in logits.split(levels, dim=-1)]
    half = (torch.tensor(levels) - 1) / 2
    for code in range(size_of(levels)):
        digits = ((code_of(torch.tensor(code), levels) + 1) * half).round().int()
        wanted = sum(one[:, digit] for one, digit in zip(apart, digits.tolist(), strict=True))
        torch.testing.assert_close(found[:, code], wanted)


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (3, 4, 7)])
def test_a_code_is_moved_by_levels_as_far_as_there_are_any(levels: tuple[int, ...]) -> None:
    every = torch.arange(size_of(levels))
    by = torch.randint(-2, 3, (len(every), len(levels)), generator=torch.Generator().manual_seed(5))
    wanted = code_of(every, levels) + 2 * by / (torch.tensor(levels) - 1)
    torch.testing.assert_close(code_of(moved(every, by, levels), levels), wanted.clamp(-1, 1))
    assert torch.equal(moved(every, 0 * by, levels), every)


def test_a_gradient_flows_through_the_rounding_as_if_there_were_none() -> None:
    z = torch.tensor([[0.3, -0.2]], requires_grad=True)
    quantise(z, (5, 4)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, 1 - torch.tanh(z.detach()).square())
    # Whatever is below 0 is below the middle, and what is above it is above: of two levels, too.
    side = torch.tensor([[0.7] * 4, [-0.7] * 4])
    assert torch.equal(quantise(side, (8, 5, 4, 2)).sign(), side.sign())
    assert quantise(torch.zeros(1, 1), (5,)) == 0


def test_known_tokens_grow_as_a_cosine_and_every_step_adds_one() -> None:
    assert counts(64, 1) == [64] and counts(5, 5) == [1, 2, 3, 4, 5]
    for n, steps in ((64, 8), (256, 25), (16, 12), (7, 3)):
        found = counts(n, steps)
        assert found[-1] == n and all(b > a for a, b in zip([0, *found], found, strict=False))
        wanted = [n * (1 - math.cos(math.pi * (s + 1) / (2 * steps))) for s in range(steps)]
        assert all(f >= min(w, n - (steps - 1 - i)) - 1e-6 for i, (f, w) in
                   enumerate(zip(found, wanted, strict=True)))  # fmt: skip
    assert counts(64, 8)[3] == math.ceil(64 * (1 - math.cos(math.pi / 4)))
    with pytest.raises(ValueError, match="9 steps for 8 tokens"):
        counts(8, 9)


def test_tokens_are_drawn_as_often_as_the_model_says_and_none_is_changed_again() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    seen = []

    def tell(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return p.clamp(min=1e-9).log().expand(*tokens.shape, 4)

    episodes = torch.arange(4000)
    numbers = even(FRESH, episodes, (0,), (3, 2, 6))
    surer = fill(tell, numbers, mask=4, temperature=1.0, choice=0.0)
    assert (surer == 0).float().mean() > 0.55, "who keeps the surest draws what is likely too often"
    seen.clear()
    found = fill(tell, numbers, mask=4, temperature=1.0, choice=1e6)
    share = torch.bincount(found.flatten(), minlength=4) / found.numel()
    assert (share - p).abs().max() < 0.015
    assert [int((t != 4).sum(1).unique()) for t in seen] == [0, *counts(6, 3)[:-1]]
    for now, then in zip(seen, [*seen[1:], found], strict=True):
        assert torch.equal(now[now != 4], then[now != 4])
    likeliest = fill(tell, numbers, mask=4, temperature=0.0, choice=0.0)
    assert (likeliest == 0).all()


def test_the_surest_tokens_are_kept_first() -> None:
    sure = torch.tensor([0.1, 3.0, 1.0, 5.0])  # of the first code, at four places

    def tell(tokens: torch.Tensor) -> torch.Tensor:
        known.append((tokens[0] != 2).tolist())
        return torch.stack([sure, torch.zeros(4)], dim=-1)[None]

    known: list[list[bool]] = []
    fill(tell, torch.full((1, 4, 2, 4), 0.5), mask=2, temperature=0.0, choice=0.0)
    assert known == [
        [False] * 4,
        [False, False, False, True],
        [False, True, False, True],
        [False, True, True, True],
    ]


@pytest.mark.parametrize("margin", [0, 1])
@torch.no_grad()
def test_dreams_beside_a_cache_are_those_that_compute_the_whole_past_again(margin: int) -> None:
    model, (frames, actions) = genie(margin=margin), clip(4)
    model.named = torch.tensor([5, 0, 7])
    episodes = torch.tensor([3, 8])
    memory = model.init_cache(frames, actions, episodes, seed=5)
    past = model.encode(frames)
    done = torch.nn.functional.pad(model.named[actions], (1, 0), value=8)
    for count in range(10):
        action = torch.tensor([count % 3, (count + 1) % 3])
        found, memory = model.step(memory, action)
        done = torch.cat([done, model.named[action][:, None]], dim=1)

        def tell(tokens: torch.Tensor, past=past, done=done) -> torch.Tensor:
            whole = torch.cat([past, tokens[:, None]], dim=1)
            return model.dynamics(whole, done, after(model.looks(whole)))[0][:, -1]

        numbers = even(5, episodes, (past.shape[1], 0), (2, 2, model.places))
        new = fill(tell, numbers, model.dynamics.mask, 1.0, 2.0)[:, None]
        torch.testing.assert_close(found, model.decode(new)[:, 0])
        past = torch.cat([past, new], dim=1)
    assert memory.cache.film.frames == WINDOW - 1 and past.shape[1] == 14


@pytest.mark.parametrize("local", [False, True])
@torch.no_grad()
def test_a_latent_action_sees_the_frame_after_it_and_none_later(local: bool) -> None:
    model, (frames, _) = genie(local=local), clip(5)
    assert model.latents is not None
    x = model.cut(frames)
    moved = x.clone()
    moved[:, 3] = -moved[:, 3]
    z = [model.latents.numbers(y) for y in (x, moved)]
    changed = (z[0] - z[1]).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, True]
    code = model.latents.encode(x)
    told = [model.latents.decode(x[:, :-1], c) for c in (code, -1 - code)]
    for t in range(4):  # what is told of a frame depends on the codes up to it alone
        mixed = torch.cat([code[:, :t], -1 - code[:, t:]], dim=1)
        now = model.latents.decode(x[:, :-1], mixed)
        assert torch.allclose(now[:, :t], told[0][:, :t], atol=1e-6)
        assert not torch.allclose(now[:, t], told[0][:, t], atol=1e-6)


@torch.no_grad()
def test_what_is_local_sees_no_further_than_its_margin() -> None:
    frames, _ = clip(2)
    dotted = frames.clone()
    dotted[..., 0, 0] = 1 - dotted[..., 0, 0]  # in the first of four patches of 4 x 4
    for local, margin, seen in ((True, 0, [0]), (True, 4, [0, 1, 2, 3]), (False, 0, [0, 1, 2, 3])):
        model = genie(local=local, margin=margin)
        told = [model.tokenizer.to_code(model.tokenizer.encoder(
            model.tokenizer.enter(model.cut(x)), None)[0]) for x in (frames, dotted)]  # fmt: skip
        changed = (told[0] - told[1]).abs().amax((0, 1, 3)) > 1e-7
        assert changed.nonzero().flatten().tolist() == seen


def test_latent_actions_that_are_all_the_same_are_led_apart() -> None:
    model, (frames, _) = genie(latent_levels=[2, 2, 2]).train(), clip(9)
    assert model.latents is not None
    readout = model.latents.to_code[1]
    with torch.no_grad():
        readout.weight.mul_(1e-3)
        readout.bias.fill_(0.5)
    assert model.done(frames, torch.zeros(len(frames), 8).long()).unique().numel() == 1
    assert 0.9 < model.prepare(frames)["alike"] < 1
    optimizer = torch.optim.Adam(model.latents.to_code.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model.prepare(frames)["alike"].backward()
        optimizer.step()
    assert model.prepare(frames)["alike"] < 0.1
    assert model.done(frames, torch.zeros(len(frames), 8).long()).unique().numel() > 3


@torch.no_grad()
def test_the_dynamics_is_shown_numbers_of_codes_but_none_of_what_is_masked() -> None:
    model, (frames, actions) = genie(), clip(3)
    tokens = model.encode(frames)
    before = torch.nn.functional.pad(model.done(frames, actions), (1, 0), value=8)
    masked = torch.full_like(tokens, model.dynamics.mask)
    past = after(model.looks(tokens))
    shown = [model(x, before, past)[0] for x in (tokens, masked)]
    model.dynamics.number.weight.add_(1.0)
    again = [model(x, before, past)[0] for x in (tokens, masked)]
    assert not torch.allclose(shown[0], again[0])
    assert torch.equal(shown[1], again[1])


@torch.no_grad()
def test_the_dynamics_is_shown_the_frame_before_and_none_later() -> None:
    model, (frames, actions) = genie(margin=1), clip(4)
    tokens = model.encode(frames)
    before = torch.nn.functional.pad(model.done(frames, actions), (1, 0), value=8)
    looks = model.looks(tokens)
    other = torch.cat([looks[:, :2], -looks[:, 2:3], looks[:, 3:]], dim=1)
    told = [model(tokens, before, after(x))[0] for x in (looks, other)]
    changed = (told[0] - told[1]).abs().amax((0, 2, 3)) > 1e-7
    assert changed.tolist() == [False, False, False, True]


def test_latent_actions_are_jittered_before_they_are_rounded() -> None:
    model, (frames, _) = genie(latent_levels=[2]), clip(5)
    assert model.latents is not None
    numbers = model.latents.numbers(model.cut(frames))
    told = [model.prepare(frames, jitter)["latents"] for jitter in (0.0, 1e-6, -2 * numbers)]
    assert torch.equal(told[0], told[1]), "rounded alike"
    assert not torch.equal(told[0], told[2])


def test_no_part_learns_from_the_error_of_another() -> None:
    model, (frames, actions) = genie().train(), clip(5)
    model.prepare(frames)["tokenizer"].backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"tokenizer"}
    model.zero_grad(set_to_none=True)
    model.prepare(frames)["latents"].backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"latents"}
    model.zero_grad(set_to_none=True)
    tokens = model.encode(frames)
    before = torch.nn.functional.pad(model.done(frames, actions), (1, 0), value=8)
    model(tokens, before, after(model.looks(tokens)))[0].sum().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"dynamics"}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.levels=\[5, 1\] must be numbers of 2 or more"):
        genie(levels=[5, 1])
    with pytest.raises(ValueError, match=r"model\.levels=\[\] must be numbers"):
        genie(levels=[])
    with pytest.raises(ValueError, match=r"model\.latent_depth=1 must be at least .*time_every=2"):
        genie(latent_depth=1)
    model, (frames, actions) = genie(latent_levels=[]), clip(4)
    assert model.latents is None and torch.equal(model.done(frames, actions), actions)
    model.initialise(torch.Generator().manual_seed(0))
    assert torch.equal(model.latent(actions), actions) and len(model.named) == 0
