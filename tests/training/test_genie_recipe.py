"""Genie's steps: tokens and latent actions first, then masked tokens beside whole frames."""

from __future__ import annotations

import pytest
import torch

from models.worlds.video.fsq import code_of, size_of
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import genie


def recipe(*overrides: str):
    config = compose([*SMALL_PINFALL["genie"], *SMALL_WORLD, *overrides])
    return genie.build(config, Processes(), torch.device("cpu"))


@pytest.mark.parametrize("settle", [1.0, 0.5])
def test_first_the_tokens_and_latent_actions_learn_and_then_the_dynamics_alone(
    settle: float,
) -> None:
    sets = "loop.steps=4", "recipe.prepare=0.5", "optim.ema_decay=null", "optim.weight_decay=0.1"
    made = recipe(*sets, f"recipe.settle={settle}")
    learn = [{"tokenizer", "latents"}, {"tokenizer", "latents"}, {"dynamics"}, {"dynamics"}]
    if settle < 1:
        learn[1] = {"tokenizer"}
    parts = ("tokenizer", "latents", "dynamics")

    def now() -> dict[str, list[torch.Tensor]]:
        own = {part: getattr(made.model, part) for part in parts}
        return {part: [p.detach().clone() for p in m.parameters()] for part, m in own.items()}

    for step in range(4):
        before, metrics = now(), made.step(made.data.batch(step))
        moved = {part for part, after in now().items() if not all(
            torch.equal(a, b) for a, b in zip(before[part], after, strict=True))}  # fmt: skip
        assert moved == learn[step]
        assert {name for name in parts if f"train/{name}" in metrics} == learn[step] - {"dynamics"}


def test_told_the_true_actions_the_tokenizer_learns_first_and_then_the_dynamics() -> None:
    made = recipe("model.latent_levels=[]", "loop.steps=2", "recipe.prepare=0.5")
    told = [made.step(made.data.batch(step)) for step in range(2)]
    assert ["train/tokenizer" in metrics for metrics in told] == [True, False]
    assert not any("train/latents" in metrics for metrics in told)


def test_masks_are_those_that_the_recipe_says() -> None:
    made = recipe("recipe.clean=0.25", "recipe.masked=0.5")
    tokens = torch.zeros(500, 6, 16, dtype=torch.long)
    masked = made.masked(tokens, torch.arange(500))
    assert not masked[:, 0].any()
    share = masked[:, 1:].float().mean(-1).flatten()
    whole = (share == 0).float().mean()
    assert abs(whole - 0.25) < 0.04
    assert masked.float().mean() == pytest.approx(made.share, abs=0.02)
    assert abs(share[share > 0].mean() - 0.75) < 0.02 and share[share > 0].std() > 0.15
    assert torch.equal(made.masked(tokens[100:], torch.arange(100, 500)), masked[100:])
    shown = recipe("recipe.clean=0", "recipe.masked=1").masked(tokens, torch.arange(500))
    assert shown[:, 1:].all()


def test_the_dynamics_is_shown_numbers_that_are_a_level_off_and_asked_for_the_true_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = recipe("recipe.blur=0.5", "recipe.clean=0.5")
    levels, rows = made.model.config.levels, torch.arange(400)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(size_of(levels), (400, 6, 16), generator=generator)
    near = made.near(tokens, rows)
    most = torch.tensor(levels) - 1
    off = ((code_of(near, levels) - code_of(tokens, levels)) * most / 2).round()
    assert set(off.unique().tolist()) == {-1.0, 0.0, 1.0}
    within = off[(code_of(tokens, levels).abs() < 0.99)]  # at the ends half of the ways are closed
    assert within.abs().mean() == pytest.approx(0.25, abs=0.02)
    assert within.mean() == pytest.approx(0.0, abs=0.02)
    frames = (off != 0).float().mean((2, 3))
    assert frames.min() < 0.03 and frames.max() > 0.3, "each frame has a share of its own"
    assert torch.equal(made.near(tokens[100:], rows[100:]), near[100:])
    assert torch.equal(recipe("recipe.blur=0").near(tokens, rows), tokens)

    batch = made.trainer.to_device(made.data.batch(0))
    frames, actions = made.see(batch), batch["actions"]
    asked: dict[str, torch.Tensor] = {}

    def forward(shown: torch.Tensor, before: torch.Tensor, past: torch.Tensor):
        asked.update(shown=shown, past=past)
        return (torch.zeros(*shown.shape, size_of(levels), requires_grad=True), None)

    def masked_loss(logits: torch.Tensor, tokens: torch.Tensor, *_: object) -> torch.Tensor:
        asked.update(tokens=tokens)
        return logits.sum()

    monkeypatch.setattr(made.model, "forward", forward)
    monkeypatch.setattr(genie, "masked_loss", masked_loss)
    made.trainer.count = made.config.loop.steps - 1
    made.loss(frames, actions, torch.arange(len(frames)))
    true = made.model.encode(frames)
    near = made.near(true, torch.arange(len(frames)))
    whole = asked["shown"] != made.model.dynamics.mask
    assert torch.equal(asked["tokens"], true)
    assert torch.equal(asked["shown"][whole], near[whole]) and (near != true).any()
    torch.testing.assert_close(asked["past"][:, 1:], made.model.looks(near)[:, :-1])


def test_only_masked_tokens_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 7, generator=generator)
    tokens = torch.randint(7, (2, 3, 4), generator=generator)
    masked = torch.rand(2, 3, 4, generator=generator) < 0.5
    each = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    share = masked.float().mean().item()
    torch.testing.assert_close(
        genie.masked_loss(logits, tokens, masked, share), each[masked].mean()
    )
    assert genie.masked_loss(logits, tokens, torch.zeros_like(masked), share) == 0
    halves = [genie.masked_loss(*(x[i : i + 1] for x in (logits, tokens, masked)), 0.5)
              for i in range(2)]  # fmt: skip
    whole = genie.masked_loss(logits, tokens, masked, 0.5)
    torch.testing.assert_close(sum(halves) / 2, whole, msg="what processes find is averaged")


def test_actions_are_named_after_the_latent_ones_that_are_found_beside_them() -> None:
    made = recipe()
    clips = made.data.bank(64, 6)
    actions = torch.from_numpy(clips.actions)
    told = {0: 6, 1: 2, 2: 3}
    swapped = torch.tensor([told[a] for a in range(3)])

    def done(frames: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        noisy = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)) < 0.2
        return torch.where(noisy, 7, swapped[given])

    found = made.evaluate()
    assert 0 <= found["eval/latents/nmi"] <= 1 and found["eval/latents/used"] >= 1 / 8
    made.model.done = done
    found = made.evaluate()
    assert made.model.named.tolist() == [6, 2, 3]
    assert found["eval/latents/used"] == 0.5 and 0.6 < found["eval/latents/nmi"] < 0.9
    assert set(actions.unique().tolist()) == {0, 1, 2}


def test_dreams_send_nothing_back() -> None:
    made = recipe("loop.steps=2")
    made.step(made.data.batch(0))
    before = [p.clone() for p in made.model.parameters()]
    metrics = made.evaluate(final=True)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    assert {"eval/error/5", "eval/pairs/error/5", "eval/separation"} <= metrics.keys()
    told = recipe("model.latent_levels=[]").evaluate()
    assert "eval/separation" in told and "eval/latents/nmi" not in told


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.steps=17", r"model\.steps=17 must be at most 16"),
        ("recipe.prepare=1", r"recipe\.prepare=1.* must be between 0 and 1"),
        ("recipe.clean=1", r"recipe\.clean=1.* below 1"),
        ("recipe.blur=2", r"recipe\.blur=2"),
        ("recipe.labelled=0", r"recipe\.labelled=0"),
        ("model.levels=[1]", r"model\.levels=\[1\]"),
        ("model.temperature=-1", r"model\.temperature=-1"),
        ("model.patch=5", r"data\.image_size=16 must be a multiple of 40"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(override)
