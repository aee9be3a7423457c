"""Video encoders: rollouts that are their steps, nothing told from what comes later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL_FILM, SMALL_FILMS
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import jepa_video, jepa_video_masked

RECIPES = {"rollout": jepa_video, "masked": jepa_video_masked}


def recipe(name: str, *overrides: str):
    config = compose([*SMALL_FILMS[name], *SMALL_FILM, *overrides])
    return RECIPES[name].build(config, Processes(), torch.device("cpu"))


def test_where_nothing_is_seen_maps_are_the_same_at_every_place() -> None:
    model = recipe("rollout").model
    seen = torch.full((1, 1, 1, 16, 16), 0.3)
    z = model.encode(seen)[0, 0]
    torch.testing.assert_close(z, z[:, :1, :1].expand_as(z), atol=1e-5, rtol=1e-5)
    seen[..., 8, 8] = 1.0
    assert not torch.allclose(model.encode(seen)[0, 0], z)


def test_passes_are_rollouts() -> None:
    """Pass k tells frame t from what pass k - 1 told of t - 2 and t - 1, the first two given."""
    model = recipe("rollout", "model.passes=3").model
    frames = torch.rand(2, 6, 1, 16, 16)
    z = model.encode(frames)
    by_hand, known = [], [z[:, i] for i in range(6)]
    for _ in range(3):
        told = [z[:, 0], z[:, 1]]
        for t in range(2, 6):
            told.append(model.rollout(torch.stack([known[t - 2], known[t - 1]], 1), 1)[:, 0])
        known = told
        by_hand.append(torch.stack(told[2:], dim=1))
    found = model(frames)
    torch.testing.assert_close(
        found.predicted, torch.cat([model.project(part) for part in by_hand], dim=1)
    )
    torch.testing.assert_close(found.target, model.project(z[:, 2:]).repeat(1, 3, 1))
    whole = model.rollout(z[:, :2], 3)
    torch.testing.assert_close(by_hand[2][:, 2], whole[:, 2], msg="three ahead of the first two")


def test_later_frames_never_change_earlier_predictions() -> None:
    model = recipe("rollout").model
    frames = torch.rand(2, 6, 1, 16, 16)
    base = model(frames).predicted.unflatten(1, (model.passes, 4))
    changed = frames.clone()
    changed[:, 4:] = 0.3
    other = model(changed).predicted.unflatten(1, (model.passes, 4))
    assert torch.equal(base[:, :, :3], other[:, :, :3]), "of frames 2 to 4, from frames up to 3"
    assert not torch.equal(base[:, 0, 3], other[:, 0, 3])


def test_both_masks_are_told_against_one_target() -> None:
    made = recipe("masked")
    batch = made.data.batch(0)
    seen = {}

    def keep(given):
        seen.update(given)
        return torch.zeros((), requires_grad=True) * next(made.model.parameters()).sum()

    made.loss, loss = keep, made.loss
    made.step(batch)
    made.loss = loss
    assert {"context_0", "targets_0", "context_1", "targets_1"} <= seen.keys()
    found, _ = made.latents(seen)
    clips = made.clips.see(seen)
    alone = made.model(clips, [(seen["context_1"], seen["targets_1"])])
    told = alone.predicted.shape[1]
    torch.testing.assert_close(found.predicted[:, -told:], alone.predicted)
    torch.testing.assert_close(found.target[:, -told:], alone.target)
    assert made.prediction_error(torch.tensor([0.0, 3.0]), torch.zeros(2)).item() == 1.5


def test_probes_are_judged_by_scans_they_were_not_fitted_to() -> None:
    clips = recipe("masked").clips
    fitted, judged = clips.heldout(200)["sprite"].split(100)
    assert fitted.max() < clips.data.trained <= judged.min()


def test_clips_of_digits_have_mean_zero_and_variance_one() -> None:
    made = recipe("masked", "data.batch_size=64")
    clips = made.clips.see(made.clips.heldout(256))
    assert abs(clips.mean()) < 0.1
    assert 0.8 < clips.std() < 1.1, "drawing between pixels blurs"


@pytest.mark.parametrize("name", RECIPES)
def test_probes_send_nothing_back_and_pictures_are_drawn(name: str, tmp_path: Path) -> None:
    made = recipe(name)
    before = [p.clone() for p in made.model.parameters()]
    metrics = made.evaluate(final=True)
    assert all(p.grad is None for p in made.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    drawn = [file.read_text() for file in (tmp_path / "figures").glob("*.svg")]
    assert len(drawn) == 1 and "<svg" in drawn[0]
    assert all(value == value for value in metrics.values()), "no nan"


@pytest.mark.parametrize(
    ("name", "override", "says"),
    [
        ("rollout", "recipe.cells=5", r"recipe\.cells=5 must divide the 8 rows"),
        ("rollout", "recipe.regularizer=vc_idm", r"tells actions, which recipe=jepa_video has not"),
        ("rollout", "data.digit_size=16", r"data\.digit_size=16.* what fills a frame cannot move"),
        ("rollout", "model.passes=9", r"after 4 the predictions of data\.seq_len=6 frames stay"),
        ("rollout", "model.channels=3", r"model\.channels=3: the data decides it \(1\), leave"),
        ("masked", "data.objects=2", r"data\.objects=2: probes .* set digits and 1"),
        ("masked", "model.patch=[3,2,2]", r"model\.patch=\[3, 2, 2\] must be three numbers"),
        ("masked", "recipe.scales=[0.15]", r"must be one number each for every mask"),
        ("masked", "recipe.scales=[0.15,1.0]", r"leave no 1 of a grid of 8 x 8"),
    ],
)
def test_what_cannot_be_is_refused(name: str, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(name, override)
