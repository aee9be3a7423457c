"""DIAMOND's steps: what is asked for, what is seen while it is, and dreams that change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.worlds.video.diamond import Diamond
from models.worlds.video.outcome import outcome_loss, steps_of
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.data.pinfall import cut
from training.distributed import Processes
from training.errors import UserError
from training.evaluation.dreams import outcomes
from training.recipes import diamond, video_world
from training.recipes.diamond import unrolled


def recipe(*overrides: str):
    return diamond.build(
        compose([*SMALL_PINFALL["diamond"], *SMALL_WORLD, *overrides]),
        Processes(),
        torch.device("cpu"),
    )


def test_frames_after_the_first_are_asked_for_beside_what_was_told_before() -> None:
    """The error of frame n stands beside frames that were told, not beside the truth."""
    made = recipe("data.seq_len=7")
    x = torch.rand(2, 7, 3, 16, 16) * 2 - 1
    actions = torch.randint(3, (2, 6))
    asked: list[tuple[torch.Tensor, ...]] = []

    def loss(frame, seen, done, draw):
        asked.append((frame, seen, done))
        return frame.mean(), torch.full_like(frame, len(asked) / 10)

    made.model.loss = loss
    found = unrolled(made.model, x, actions, torch.arange(2), 0, 0.0)
    torch.testing.assert_close(found, x[:, 4:].mean(dim=(0, 2, 3, 4)).mean())
    for count, (frame, seen, done) in enumerate(asked):
        assert torch.equal(frame, x[:, 4 + count])
        assert torch.equal(done, actions[:, count : count + 4])
        for back in range(4):
            at = count + back  # number of the frame that is seen
            told = torch.full_like(frame, (at - 3) / 10)
            assert torch.equal(seen[:, back], x[:, at] if at < 4 else told)


def test_noise_of_the_context_is_drawn_for_each_clip_up_to_its_bound() -> None:
    made = recipe()
    loud = []

    def loss(frame, seen, done, draw):
        loud.append(seen.flatten(1).std(dim=1))
        return frame.mean(), frame

    made.model.loss = loss
    x, actions = torch.zeros(200, 5, 3, 16, 16), torch.zeros(200, 4, dtype=torch.long)
    for noise in (0.0, 0.3):
        unrolled(made.model, x, actions, torch.arange(200), 0, noise)
    assert loud[0].max() == 0
    assert 0.25 < loud[1].max() < 0.32 and loud[1].min() < 0.05 and 0.1 < loud[1].mean() < 0.2


def test_a_step_learns_and_is_the_same_when_it_is_made_again() -> None:
    first, again = recipe(), recipe()
    for made in (first, again):
        made.losses = [float(made.step(made.data.batch(i))["train/loss"]) for i in range(3)]
    assert first.losses == again.losses and len(set(first.losses)) == 3
    ours, theirs = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_blind_control_sees_no_action_in_training_or_in_dreams() -> None:
    made = recipe("recipe.blind=true")
    seen = []
    tell = made.model.forward

    def noted(noisy, sigma, context, actions):
        seen.append(actions)
        return tell(noisy, sigma, context, actions)

    made.model.forward = noted
    batch = made.data.batch(0)
    assert batch["actions"].any()
    made.step(batch)
    metrics = made.evaluate(final=True)
    assert not torch.cat([x.flatten() for x in seen]).any()
    assert metrics["eval/separation"] == 0 and metrics["eval/delta_psnr"] == 0


def test_dreams_send_nothing_back_are_alike_each_time_and_are_drawn(tmp_path: Path) -> None:
    made = recipe()
    made.step(made.data.batch(0))
    before = [p.clone() for p in made.model.parameters()]
    metrics = made.evaluate(final=True)
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    again = made.evaluate()
    assert all(metrics[name] == value for name, value in again.items())
    assert {"eval/pairs/error/5", "eval/retrieved/error/5"} <= metrics.keys()
    timed = made.summary()["latency"]
    assert timed["fps"] > 0 and timed["p50_ms"] <= timed["p95_ms"] <= timed["p99_ms"]
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    assert "<svg" in (tmp_path / "figures" / "dream.svg").read_text()


def test_a_fork_is_judged_in_all_steps_and_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_world, "FORKS", 2)
    made = recipe("data.variant=fork", "recipe.splits=[]")
    asked = []
    denoise = made.model.denoise
    made.model.denoise = lambda *given: (asked.append(len(given[0])), denoise(*given))[1]
    metrics = made.evaluate(final=True)
    assert {"eval/fork/alike", "eval/one_step/fork/decided"} <= metrics.keys()
    assert asked.count(16) == 6 * 2 + 6, "two steps for each of six frames, then one"
    assert made.model.config.steps == 2


def test_the_published_sizes_are_those_of_the_paper() -> None:
    """4.4 million parameters of the denoiser."""
    config = compose(["experiment=diamond/pinfall", "scale=h200"])
    with torch.device("meta"):
        model = Diamond(diamond.fill_shapes(config))
    own = sum(p.numel() for p in model.parameters())
    beside = sum(p.numel() for p in model.outcomes.parameters())
    assert own - beside == pytest.approx(4.4e6, rel=0.01)
    assert diamond.estimate(config).parameters == own


def test_rewards_and_ends_are_learned_from_true_frames_and_bend_nothing_else() -> None:
    made = recipe("data.worlds=128")
    clips = made.data.draw_round(0)[0]
    worth = np.argwhere(clips.rewards[:, 1:] != 0)  # so that every step of these clips is
    clips = cut(clips, worth[~clips.begins[worth[:, 0], worth[:, 1] + 1]], 3)
    assert min((clips.rewards[:, 1] > 0).sum(), (clips.rewards[:, 1] < 0).sum()) > 5
    given = made.exam()._replace(clips=clips, frames=made.watch(clips))
    actions = torch.from_numpy(clips.actions)
    wanted = [torch.from_numpy(getattr(clips, k)[:, 1:].flatten()) for k in ("rewards", "ends")]
    own = torch.optim.Adam(made.model.outcomes.parameters(), lr=3e-3)
    for _ in range(100):
        own.zero_grad()
        outcome_loss(*made.model.outcome(*steps_of(given.frames, actions)), *wanted).backward()
        own.step()
    for name, parameter in made.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("outcomes."), name
    found = outcomes(made.model, given)
    assert all(found[f"{kind}/found"] > 0.8 for kind in ("hits", "misses", "ends")), found


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.seq_len=4", r"data\.seq_len=4 must be above model\.context=4"),
        ("recipe.horizon=21", r"data\.length=24: .* recipe\.horizon=21 more"),
        ("data.image_size=20", r"data\.image_size=20 must be a multiple of 8"),
        ("model.actions=5", r"model\.actions=5: the data decides it \(3\)"),
        ("recipe.context_noise=-1", r"recipe\.context_noise=-1"),
        ("data.variant=pinball", r"data\.variant.*uniform.*paddle"),
    ],
)
def test_what_cannot_be_is_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(override)
