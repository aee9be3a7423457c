"""Scenes that are fitted to their images: what is learned, what changes nothing, what is left."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import rasterize
from models.worlds.splats.gaussians import activated
from tests.helpers import SMALL_TABLETOP
from training import formats
from training.config import compose
from training.data.config import MarkovConfig
from training.distributed import Processes
from training.errors import UserError
from training.evaluation import scene_agreement
from training.evaluation.scene_agreement import agreement
from training.evaluation.scene_objects import owners
from training.evaluation.scenes import apart, eyes, flat, off, seen_at
from training.recipes import gaussian_splatting

CPU = torch.device("cpu")
FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


def recipe(*overrides: str, steps: int = 60):
    words = [*SMALL_TABLETOP, f"loop.steps={steps}", f"seed={FRESH}", *overrides]
    return gaussian_splatting.build(compose(words), Processes(), CPU)


def trained(made, until: int):
    while made.count < until:
        made.step(made.data.batch(made.count))
    return made


KINDS = {
    "default": [],
    "absolute": ["recipe.density=absolute", "recipe.pull_least=1e-4"],
    "mcmc": ["recipe.density=mcmc", "recipe.refine_every=5", "model.begin_opacity=0.5",
             "recipe.opacity_weight=0.01", "recipe.growth=1.2"],
    "corrected": ["recipe.poses_lr=1e-3", "recipe.exposures_lr=1e-3", "data.batch_size=2",
                  "recipe.reset_every=30", "recipe.refine_every=15"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind: str) -> None:
    whole, first = (recipe(*KINDS[kind]) for _ in "ab")
    counts = {whole.gaussians.count}
    for step in range(40):
        trained(whole, step + 1)
        counts.add(whole.gaussians.count)
    assert len(counts) > 1, "Gaussians came or went"
    state = trained(first, 20).state_dict()
    second = recipe(*KINDS[kind])
    second.load_state_dict({k: v for k, v in state.items()})
    trained(second, 40)
    assert second.gaussians.count == whole.gaussians.count
    for name, x in whole.model.named_parameters():
        assert torch.equal(x, dict(second.model.named_parameters())[name]), name
    assert whole.evaluate() == second.evaluate()


LEARNED = ["data.views=30", "data.heldout=8", "data.image_size=32", "data.samples=2",
           "model.capacity=800", "model.begin_count=400", "recipe.refine_every=20"]  # fmt: skip


@pytest.fixture(scope="module")
def learned():
    """A scene after a few hundred steps, and what it is worth."""
    made = trained(recipe(*LEARNED, steps=250), 250)
    return made, made.evaluate(final=True)


def test_held_out_views_are_better_than_the_nearest_and_only_with_the_right_cameras(
    learned,
) -> None:
    """What is learned from images with the cameras of others is no scene."""
    right, found = learned
    lost = trained(recipe(*LEARNED, "data.shuffled=true", steps=250), 250).evaluate()
    assert found["eval/psnr"] > max(found["eval/floors/nearest"], lost["eval/psnr"] + 2)
    assert found["eval/depth"] < min(0.4 * found["eval/depth_flat"], 0.8 * lost["eval/depth"])
    assert found["eval/floors/mean"] > found["eval/floors/background"]
    assert right.found["latency"]["fps"] > 0 and len(right.found["views"]["psnr"]) == 8
    assert "<svg" in right.figures["views"]


def test_things_that_are_taken_away_are_gone_and_nothing_else(learned) -> None:
    _, found = learned
    assert found["eval/removed/depth"] < 0.7 * found["eval/removed/depth_kept"]
    assert found["eval/removed/elsewhere"] < 0.02 * found["eval/removed/there"]


def test_a_gaussian_belongs_to_what_it_covers() -> None:
    """One Gaussian in the middle of each thing of the scene, and one behind the camera."""
    made = recipe("data.views=20")
    solids = [s for s in made.data.scene.solids if s.id > 0]
    n = len(solids)
    fields = {
        "means": torch.tensor([*(s.position for s in solids), (0.0, 0.0, 50.0)]).float(),
        "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(n + 1, 1),
        "scales": torch.full((n + 1, 3), -3.5),
        "opacities": torch.zeros(n + 1),
        "sh0": torch.zeros(n + 1, 1, 3),
        "shN": torch.zeros(n + 1, 3, 3),
    }
    found, covered = owners(activated(fields), made.data.train, made.data.things, CPU, 8)
    assert found.tolist() == [*(s.id for s in solids), -1]
    assert covered[-1] == 0 and (covered[:-1] > 1).all()


def test_cameras_that_are_said_to_be_elsewhere_are_found() -> None:
    made = recipe(*LEARNED, "data.pose_noise=0.05", "recipe.poses_lr=2e-3", steps=400)
    before = made.evaluate()
    after = trained(made, 400).evaluate()
    assert before["eval/pose"] == pytest.approx(before["eval/pose_said"], rel=1e-4)
    assert after["eval/pose"] < 0.8 * after["eval/pose_said"]


def test_points_are_seen_where_a_pinhole_sees_them() -> None:
    view = torch.eye(4)[None].clone()
    view[0, :3, 3] = torch.tensor([1.0, 2, 3])
    K = torch.tensor([[[10.0, 0, 4], [0, 20, 5], [0, 0, 1]]])
    assert seen_at(torch.tensor([[1.0, 0, 1]]), view, K).tolist() == [[[9.0, 15.0]]]
    assert eyes(view).tolist() == [[-1, -2, -3]]
    assert apart(torch.zeros(5, 2), torch.tensor([3.0, 4.0])) == 5.0


def test_light_of_each_image_is_learned_and_held_out_ones_are_in_the_mean_of_it() -> None:
    words = [*LEARNED, "data.exposure_noise=0.3"]
    made = recipe(*words, "recipe.exposures_lr=1e-2", steps=300)
    plain = recipe(*words, steps=300)
    lit, unlit = (trained(x, 300).evaluate()["eval/psnr"] for x in (made, plain))
    assert lit > unlit + 1


def test_a_flat_depth_is_the_best_one_number() -> None:
    true = torch.tensor([[[1.0, 2.0], [torch.inf, 4.0]]])
    assert flat(true).tolist() == [[[2.0, 2.0], [2.0, 2.0]]]
    assert off(flat(true), true) == 0.5


def test_every_backend_shows_the_same_and_one_that_does_not_is_told(monkeypatch) -> None:
    made = trained(recipe(), 20)
    assert agreement(made.model, made.data, CPU)["agreement/worst"] < 1e-5
    own = scene_agreement.by_jax
    monkeypatch.setattr(scene_agreement, "by_jax", lambda *a: own(*a) + 0.01)
    monkeypatch.setattr(scene_agreement, "interpreted", lambda *a: own(*a))
    found = agreement(made.model, made.data, CPU)
    assert found["agreement/jax"] == pytest.approx(0.01, rel=1e-2) == found["agreement/worst"]


def test_files_that_a_run_leaves_show_what_it_shows(learned, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    made, _ = learned
    made.export(tmp_path)
    cameras = (torch.from_numpy(x) for x in (made.data.heldout.viewmats, made.data.heldout.Ks))
    viewmats, Ks = cameras
    own = made.model(viewmats, Ks, 32, 32).color
    for ending, close in ((".ply", 1e-6), (".spz", 0.03)):
        s = formats.read(tmp_path / f"scene{ending}")
        fields = {"means": s.means, "quats": s.quats, "scales": s.scales, "opacities": s.opacities,
                  "sh0": s.sh[:, :1], "shN": s.sh[:, 1:]}  # fmt: skip
        scene = activated({k: torch.from_numpy(x) for k, x in fields.items()})
        again = rasterize(**scene, viewmats=viewmats, Ks=Ks, width=32, height=32, tile=8).color
        assert (again - own).abs().mean() < close, ending
    assert (tmp_path / "figures" / "views.svg").is_file()


def test_a_scene_that_loses_its_last_gaussian_is_told_of() -> None:
    made = recipe("recipe.largest=0.001", "recipe.largest_from=0.0", "recipe.refine_from=0.0")
    with pytest.raises(UserError, match=r"no Gaussian is left after step 10: .*recipe\.largest"):
        trained(made, 10)


def test_runs_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.begin=cloud: data=tabletop comes without points"):
        recipe("model.begin=cloud")
    with pytest.raises(UserError, match=r"optim\.accumulate=2: .* leave it at 1"):
        recipe("optim.accumulate=2")
    with pytest.raises(UserError, match="one process"):
        gaussian_splatting.build(compose(SMALL_TABLETOP), Processes(rank=0, world=2), CPU)
    with pytest.raises(UserError, match="data=markov"):
        gaussian_splatting.build(
            dataclasses.replace(compose(SMALL_TABLETOP), data=MarkovConfig()), Processes(), CPU
        )
