"""Scenes that move, fitted to their images: what is learned, what stays, what is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import SMALL_MOVING, SMALL_TABLETOP, SMALL_TRACKED
from training import formats
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.evaluation.dynamic_scenes import nearest, where_it_moves
from training.exchange import write_model
from training.moving_scenes import open_moving
from training.recipes import dynamic_gaussians
from training.scenes import scene_data

CPU = torch.device("cpu")
FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


def recipe(*words: str):
    return dynamic_gaussians.build(compose([f"seed={FRESH}", *words]), Processes(), CPU)


def trained(made, until: int):
    while made.count < until:
        made.step(made.data.batch(made.count))
    return made


KINDS = {
    "deformation": [*SMALL_MOVING, "model.motion=deformation", "loop.steps=40"],
    "hexplane": [*SMALL_MOVING, "model.motion=hexplane", "loop.steps=40"],
    "polynomial": [*SMALL_MOVING, "model.motion=polynomial", "loop.steps=40"],
    "tracked": [*SMALL_TRACKED, "loop.steps=39"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind: str) -> None:
    whole, first, second = (recipe(*KINDS[kind]) for _ in "abc")
    trained(whole, whole.steps)
    state = trained(first, 27).state_dict()
    second.load_state_dict({k: v for k, v in state.items()})
    trained(second, second.steps)
    assert second.gaussians.count == whole.gaussians.count
    mine, theirs = whole.model.state_dict(), second.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert torch.equal(x, theirs[name]), name
    assert whole.evaluate() == second.evaluate()


def test_a_still_scene_is_the_same_at_all_times_and_is_scored_so() -> None:
    made = recipe(*SMALL_MOVING, "model.motion=still", "loop.steps=30")
    found = trained(made, 30).evaluate(final=True)
    for part in ("", "/cameras", "/times"):
        assert found[f"eval/moving{part}"] == found[f"eval/floors/frozen{part}"]
    assert found.get("eval/tracking/error") == found.get("eval/tracking/still")
    assert found["eval/floors/nearest"] > found["eval/floors/background"]
    assert "<svg" in made.figures["film"]


def test_after_the_first_time_only_places_and_rotations_change() -> None:
    made = trained(recipe(*SMALL_TRACKED, "loop.steps=39"), 24)
    before = {name: x.clone() for name, x in made.gaussians.fields().items()}
    trained(made, 39)
    for name, x in made.gaussians.fields().items():
        assert torch.equal(x, before[name]) == (name not in ("means", "quats")), name
    motion = made.model.motion
    assert int(motion.known) == 4
    assert not torch.equal(motion.means[0], motion.means[3])


def test_things_that_stand_still_are_tracked_without_an_error() -> None:
    """Gaussians that truly go with their things have no error; those that stay have that of
    staying."""
    from training.evaluation.dynamic_scenes import tracking

    made = recipe(*SMALL_TRACKED, "loop.steps=39", "seed=7")
    data, motion, n = made.data, made.model.motion, made.gaussians.count
    with torch.no_grad():
        fields, homes = made.gaussians.fields(), [s for s in data.table.at(0.0).solids if s.id]
        fields["means"].fill_(50.0)  # out of sight
        fields["scales"].fill_(-2.0)
        fields["opacities"].fill_(4.0)
        for row, solid in enumerate(homes):
            fields["means"][row] = torch.tensor(solid.position)
        rows, ids = range(len(homes)), [s.id for s in homes]
        for moment, time in enumerate(data.moments):
            motion.means[moment, :n] = fields["means"]
            motion.quats[moment, :n] = fields["quats"]
            for row, id in zip(rows, ids, strict=True):
                place = fields["means"][row : row + 1].numpy()
                carried = data.carried(place, id, float(time))
                motion.means[moment, row] = torch.from_numpy(carried[0])
        motion.known.fill_(len(data.moments))
    found, _ = tracking(made.model, data, CPU)
    assert found["tracking/followed"] == len(homes)
    # at times that are not trained on Gaussians are on straight lines, and things are not
    assert found["tracking/error"] < 0.25 * found["tracking/still"]
    assert found["tracking/kept"] > 0.7
    motion.means[1:] = motion.means[0]
    stayed, _ = tracking(made.model, data, CPU)
    assert stayed["tracking/error"] == pytest.approx(stayed["tracking/still"])


def test_the_score_of_what_moves_is_blind_to_what_does_not() -> None:
    data = scene_data(compose([*SMALL_MOVING, f"seed={FRESH}"]).data, seed=FRESH)
    truth, changing = (torch.from_numpy(getattr(data.heldout, k)) for k in ("images", "changing"))
    elsewhere = torch.where(changing[..., None], truth, 1 - truth)
    there = torch.where(changing[..., None], truth + 0.1, truth)
    assert where_it_moves("x", elsewhere, data)["x"] > 99
    assert where_it_moves("x", there, data)["x"] == pytest.approx(20, abs=1e-3)


def test_the_nearest_view_is_of_the_same_camera_or_the_same_time() -> None:
    data = scene_data(compose([*SMALL_MOVING, f"seed={FRESH}"]).data, seed=FRESH)
    train, held = data.train, data.heldout
    known = {x.tobytes() for x in train.viewmats}
    for row, other in enumerate(nearest(data)):
        if held.viewmats[row].tobytes() in known:  # the time is held out, the camera is not
            assert (train.viewmats[other] == held.viewmats[row]).all()
        elif held.times[row] in train.times:
            assert train.times[other] == held.times[row]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_leaves_is_the_scene_at_all_times(kind: str, tmp_path: Path) -> None:
    made = recipe(*KINDS[kind])
    trained(made, made.steps).evaluate(final=True)
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    at = open_moving(tmp_path)
    assert at is not None
    for time in (0.0, 0.3, 1.0):
        scene, splats = made.model.scene(time), at(time)
        np.testing.assert_allclose(splats.means, scene["means"].detach().numpy(), atol=1e-6)
        opacities = 1 / (1 + np.exp(-splats.opacities))
        np.testing.assert_allclose(opacities, scene["opacities"].detach().numpy(), atol=1e-5)
    first = formats.read(tmp_path / "scene.ply")
    np.testing.assert_allclose(first.means, at(float(made.data.moments[0])).means, atol=1e-6)
    found = made.summary()["parameters"]
    own = sum(x.numel() for x in made.gaussians.fields().values())
    assert found == own + sum(p.numel() for p in made.model.motion.parameters())
    assert (tmp_path / "figures" / "film.svg").is_file()


def test_what_is_no_scene_that_moves_is_none_or_refused(tmp_path: Path) -> None:
    assert open_moving(tmp_path) is None
    made = recipe(*KINDS["deformation"])
    write_model(tmp_path, made.more_weights(), made.config.model)  # no Gaussians
    with pytest.raises(UserError, match="does not fit"):
        open_moving(tmp_path)
    made.export(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert open_moving(tmp_path) is not None and "motion.network.last.weight" in weights
    (tmp_path / "model.json").write_text('{"name": "dynamic_gaussians", "motion": "sideways"}')
    with pytest.raises(UserError, match="does not describe"):
        open_moving(tmp_path)
    (tmp_path / "model.json").write_text('{"name": "gaussian_splatting"}')
    assert open_moving(tmp_path) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL_MOVING, "model.motion=tracked"], "model.motion=tracked needs data.first_steps"),
        ([*SMALL_TRACKED, "model.motion=still"], "model.motion=still needs data.first_steps"),
        ([*SMALL_TRACKED, "loop.steps=33"], "make 39"),
        ([*SMALL_TRACKED, "data.shuffled_times=true"], "data.shuffled_times=true"),
        ([*SMALL_MOVING, "data.batch_size=2"], "data.batch_size=2"),
        ([*SMALL_MOVING, "optim.accumulate=2"], "optim.accumulate=2: recipe=dynamic_gaussians"),
        ([*SMALL_TABLETOP, "recipe=dynamic_gaussians", "model=dynamic_gaussians"],
         "recipe=dynamic_gaussians takes data="),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(*words)
