"""Dreamer 4's step: most clips are told clean from any noise, some learn to take larger steps."""

from __future__ import annotations

import pytest
import torch

from models.worlds.video.config import (
    Dreamer4Config,
    FilmTransformerConfig,
    MaskedTokenizerConfig,
    Objective,
)
from models.worlds.video.dreamer4 import TOLD, Dreamer4
from models.worlds.video.masked_tokenizer import SplitAttention
from models.worlds.video.noise import even, normal
from models.worlds.video.shortcut import between
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from tests.models.test_film_transformer import WINDOW, clip, drawn
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.evaluation import dreams
from training.recipes import dreamer4
from training.seeding import stream_seed


def recipe(*overrides: str):
    config = compose([*SMALL_PINFALL["dreamer4"], *SMALL_WORLD, *overrides])
    return dreamer4.build(config, Processes(), torch.device("cpu"))


def dreamer(**changes: object) -> Dreamer4:
    layers = FilmTransformerConfig(12, 4, 2, window=WINDOW, time_every=2)
    sizes = {"channels": 3, "image_size": 8, "actions": 3, "steps": 2, "outcome_width": 4,
             "transformer": layers}  # fmt: skip
    return drawn(Dreamer4(Dreamer4Config(**(sizes | changes))))  # type: ignore


TOKENIZER = MaskedTokenizerConfig(latents=4, channels=48, dim=16, depth=2, heads=2)


@pytest.mark.parametrize(
    ("tokenizer", "margin"),
    [(MaskedTokenizerConfig(), 0), (MaskedTokenizerConfig(), 1), (TOKENIZER, 0)],
)
@torch.no_grad()
def test_dreams_beside_a_cache_are_those_that_compute_the_whole_past_again(
    tokenizer: MaskedTokenizerConfig, margin: int
) -> None:
    model, (frames, actions) = dreamer(tokenizer=tokenizer, margin=margin), clip(4)
    episodes, most = torch.tensor([3, 8]), model.most
    level = round(0.9 * most)
    memory = model.init_cache(frames, actions, episodes, seed=5)
    past, done = model.encode(frames), torch.nn.functional.pad(actions, (1, 0), value=3)
    noise = [normal(5, episodes, (i, 1), (4, 48)) for i in range(14)]
    for count in range(10):
        action = torch.tensor([count % 3, (count + 1) % 3])
        found, memory = model.step(memory, action)
        done = torch.cat([done, action[:, None]], dim=1)
        t = past.shape[1]
        tau, stride = torch.full((2, t), level), torch.ones(2, t, dtype=torch.long)
        shown = between(torch.stack(noise[:t], 1), past, tau, most)
        z = normal(5, episodes, (t, 0), (4, 48))[:, None]
        for now, size in ((0, 4), (4, 4)):
            new = torch.full((2, 1), now), torch.full((2, 1), size)
            told, _ = model(torch.cat([shown, z], 1), torch.cat([tau, new[0]], 1),
                            torch.cat([stride, new[1]], 1), done)  # fmt: skip
            z = told[:, -1:] if now else z + (told[:, -1:] - z) * 0.5
        z = z.clamp(-1, 1)
        torch.testing.assert_close(found, model.decode(z)[:, 0], atol=2e-3, rtol=0)
        past = torch.cat([past, z], dim=1)
    assert memory.cache.frames == WINDOW - 1


@torch.no_grad()
def test_a_velocity_is_the_way_from_what_is_shown_to_the_frame() -> None:
    model, (frames, actions) = dreamer(objective=Objective.v), clip(3)
    before = torch.nn.functional.pad(actions, (1, 0), value=3)
    z, tau = model.encode(frames), torch.tensor([[0, 2, 7], [4, 1, 6]])
    stride, most = torch.ones_like(tau), model.most
    told, _ = model(z, tau, stride, before)
    model.config.objective = Objective.x
    v, _ = model(z, tau, stride, before)
    torch.testing.assert_close(told, z + (1 - tau[..., None, None] / most) * v)


@torch.no_grad()
def test_what_is_told_depends_on_the_signal_the_step_and_the_action_of_its_frame() -> None:
    model, (frames, actions) = dreamer(), clip(3)
    before = torch.nn.functional.pad(actions, (1, 0), value=3)
    tau, stride = torch.full((2, 3), 4), torch.ones(2, 3, dtype=torch.long)
    z = model.encode(frames)
    base = model(z, tau, stride, before)[0]
    other = before.clone()
    other[:, 1] = (other[:, 1] + 1) % 3
    for moved in (
        model(z, tau + torch.tensor([0, 1, 0]), stride, before)[0],
        model(z, tau, stride * torch.tensor([1, 2, 1]), before)[0],
        model(z, tau, stride, other)[0],
    ):
        changed = (moved - base).abs().amax((0, 2, 3)) > 1e-6
        assert changed.tolist() == [False, True, True]
    assert model.place.shape[0] == TOLD + 4 + 1


@torch.no_grad()
def test_latents_are_told_from_all_patches_and_patches_from_all_latents() -> None:
    model, (frames, _) = dreamer(tokenizer=TOKENIZER), clip(3)
    assert model.tokenizer is not None
    x = model.cut(frames)
    z = model.encode(frames)
    assert z.shape == (2, 3, 4, 48) and z.abs().max() <= 1
    for patch in range(4):
        moved = x.clone()
        moved[:, 1, patch] += 0.5
        off = (model.tokenizer.encode(moved) - z).abs().amax((0, 3)) > 1e-7
        assert off[1].all() and not off[[0, 2]].any(), "of its own frame"
    told = model.tokenizer.decode(z)
    for latent in range(4):
        moved = z.clone()
        moved[:, 1, latent] += 0.5
        off = (model.tokenizer.decode(moved) - told).abs().amax((0, 3)) > 1e-7
        assert off[1].all() and not off[[0, 2]].any()
    masked = torch.zeros(x.shape[:3], dtype=torch.bool)
    masked[:, :, 2] = True
    other = x.clone()
    other[:, :, 2] = torch.rand(other[:, :, 2].shape)
    hidden = [model.tokenizer.encode(y, masked) for y in (x, other)]
    assert torch.equal(*hidden) and not torch.equal(hidden[0], z)


def test_in_the_encoder_patches_do_not_see_latents_nor_in_the_decoder_latents_patches() -> None:
    x = torch.randn(2, 9, 16)
    for encodes in (True, False):
        layer = drawn(SplitAttention(TOKENIZER, encodes))
        base = layer(x)
        for first, count in ((0, 4), (4, 5)):  # latents, patches
            moved = x.clone()
            moved[:, first : first + count] += torch.randn(2, count, 16)
            off = (layer(moved) - base).abs().amax((0, 2)) > 1e-7
            others = off[4:] if first == 0 else off[:4]
            seen = encodes if first else not encodes
            assert others.all() if seen else not others.any()


def test_first_the_tokenizer_learns_and_then_the_dynamics_alone() -> None:
    small = ["model.margin=0", *(f"model.tokenizer.{size}" for size in (
        "latents=3", "channels=4", "dim=8", "depth=1", "heads=2"))]  # fmt: skip
    made = recipe(*small, "recipe.prepare=0.5", "recipe.jumps_after=0.75", "loop.steps=4",
                  "optim.ema_decay=null")  # fmt: skip
    for step in range(4):
        before = {k: p.detach().clone() for k, p in made.model.named_parameters()}
        metrics = made.step(made.data.batch(step))
        moved = {k.split(".")[0] for k, p in made.model.named_parameters()
                 if not torch.equal(p, before[k])} - {"outcomes"}  # fmt: skip
        assert (moved == {"tokenizer"}) == (step < 2) and ("tokenizer" in moved) == (step < 2)
        assert ("train/tokenizer" in metrics) == (step < 2)
    share = made.masked(torch.zeros(600, 6, 3, 16, 16), torch.arange(600)).float().mean(-1)
    assert share.min() == 0 and abs(share.mean() - 0.45) < 0.03
    assert "eval/error/5" in made.evaluate()
    with pytest.raises(UserError, match=r"recipe\.jumps_after=0\.2 must be recipe\.prepare=0\.5"):
        recipe(*small, "recipe.prepare=0.5", "recipe.jumps_after=0.2")


def test_most_clips_learn_the_smallest_step_and_a_quarter_learns_larger_ones_later() -> None:
    made = recipe("data.batch_size=64", "recipe.jumps_after=0.5", "loop.steps=10")
    batch = made.trainer.to_device(made.data.batch(0))
    asked: list[tuple[int, bool, set[int]]] = []
    forward = made.model.forward

    def noted(z, tau, stride, before, cache=None):
        assert (tau % stride == 0).all() and (tau + stride <= 8).all()
        asked.append((len(z), torch.is_grad_enabled(), set(stride.flatten().tolist())))
        return forward(z, tau, stride, before, cache)

    made.model.forward = noted
    made.loss(made.see(batch), batch["actions"], torch.arange(64))
    assert asked == [(64, True, {1})]
    asked.clear()
    made.trainer.count = 5
    made.loss(made.see(batch), batch["actions"], torch.arange(64))
    small, large, *halves = asked
    assert small[1:] == (True, {1}) and large[1:] == (True, {2, 4, 8})
    assert 12 <= large[0] <= 20 and small[0] + large[0] == 64
    assert [half[:2] for half in halves] == [(large[0], False)] * 2
    assert halves[0][2] == halves[1][2] == {1, 2, 4}


def test_who_tells_nothing_errs_by_the_frame_or_by_the_way_to_it() -> None:
    losses = []
    for objective in Objective:
        made = recipe("recipe.jumps=0", f"model.objective={objective}")
        batch = made.trainer.to_device(made.data.batch(0))
        frames, rows = made.see(batch), torch.arange(len(batch["actions"]))
        losses.append(made.loss(frames, batch["actions"], rows).item())
        x, seed = made.model.encode(frames), stream_seed(made.config.seed, "noise")
        eps = normal(seed, rows, (1,), x.shape[1:])
        tau = (even(seed, rows, (0,), (x.shape[1], 2))[..., 1] * made.model.most).long()
        target = x - eps if objective == Objective.v else x
        wanted = (0.9 * tau / made.model.most + 0.1) * target.square().mean((2, 3))
        assert losses[-1] == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert losses[0] > 1.2 * losses[1]


def test_every_process_goes_through_the_same_passes_whatever_its_clips() -> None:
    made, calls = recipe("data.batch_size=4"), []
    forward = made.model.forward

    def noted(*given):
        calls.append(len(given[0]))
        return forward(*given)

    made.model.forward = noted
    batch = made.trainer.to_device(made.data.batch(0))
    counts = set()
    for first in range(40):  # of clips, one at a time: it jumps, or it does not
        calls.clear()
        made.loss(made.see(batch)[:1], batch["actions"][:1], torch.tensor([first]))
        counts.add(len(calls))
    assert counts == {4}


def test_a_step_learns_and_dreams_send_nothing_back() -> None:
    made = recipe()
    first = [float(made.step(made.data.batch(i))["train/frame"]) for i in range(3)]
    assert len(set(first)) == 3
    before = [p.clone() for p in made.model.parameters()]
    metrics = made.evaluate(final=True)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert {"eval/error/5", "eval/pairs/error/5", "eval/separation"} <= metrics.keys()
    latency = made.summary()["latency"]
    assert latency["over_uncached"] > 0 and "endured" not in latency
    assert metrics["eval/shuffled_actions"] != 1
    assert recipe("recipe.blind=true").evaluate(final=True)["eval/shuffled_actions"] == 1


def test_a_long_dream_is_remembered_in_as_much_as_a_short_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dreams, "TIMED", 2)
    made = recipe("recipe.endure=20", "recipe.splits=[]")
    made.evaluate(final=True)
    latency = made.summary()["latency"]
    assert latency["endured"] == 20 and latency["memory_growth"] == 1
    assert latency["late_over_early"] > 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("recipe.endure=20", r"recipe\.endure=20 must be 9\d or more"),
        ("model.most=6", r"model\.most=6 must be a power of two"),
        ("model.steps=3", r"model\.steps=3 must divide model\.most=8"),
        ("model.context_noise=1", r"model\.context_noise=1.* must be from 0 to below 1"),
        ("recipe.jumps=1.5", r"recipe\.jumps=1\.5"),
        ("model.tokenizer.heads=3", r"model\.tokenizer\.heads=3 must divide model\.tokenizer\.dim"),
        ("model.tokenizer.masked=1", r"model\.tokenizer\.masked=1.* from 0 to below 1"),
        ("recipe.prepare=2", r"recipe\.prepare=2"),
        ("model.registers=-1", r"model\.registers=-1 must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(override)


def test_the_same_weights_are_judged_in_every_number_of_steps() -> None:
    config = compose([*SMALL_PINFALL["dreamer4"], *SMALL_WORLD, "recipe.splits=[]"])
    made = dreamer4.build(config, Processes(), torch.device("cpu"))
    made.step(made.data.batch(0))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    found = made.evaluate(final=True)
    own, most = made.model.config.steps, made.model.most
    for n in (n for n in (1, 2, 4, 8) if n <= most and n != own):
        assert found[f"eval/steps_{n}/psnr/5"] != found["eval/psnr/5"]
    assert f"eval/steps_{own}/psnr/5" not in found and made.model.config.steps == own
    assert found["eval/psnr/5"] == made.evaluate()["eval/psnr/5"]
