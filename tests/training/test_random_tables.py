"""Scenes that are seen once: what is given and asked for, floors, and models that learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.splats.constants import BLUR
from kernels.splats.harmonics import of_color
from kernels.splats.op import rasterize
from kernels.splats.project import rotations
from models.worlds.splats.rays import directions, points_at, sampled
from tests.helpers import SMALL_GLIMPSES, SMALL_TABLES
from training import formats
from training.config import compose
from training.data.config_scenes import RandomTablesConfig
from training.data.random_tables import CONTEXT, FURTHEST, NEAREST, RandomTablesData
from training.distributed import Processes
from training.envs.ray_tracer import intrinsics
from training.errors import UserError
from training.evaluation import glimpses
from training.formats.gaussians import sigmoid
from training.recipes import lvsm, mvsplat

CPU = torch.device("cpu")
FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
SMALL = RandomTablesConfig(image_size=24, scenes=6, heldout=4, samples=2, batch_size=3)


@pytest.fixture(scope="module")
def data() -> RandomTablesData:
    return RandomTablesData(SMALL, seed=FRESH)


def test_cameras_are_told_as_seen_from_the_first_and_agree_with_depths(data) -> None:
    """What the first view shows of a scene lies where the second says that it is."""
    train = data.train
    np.testing.assert_allclose(train.viewmats[:, 0], np.tile(np.eye(4), (6, 1, 1)), atol=1e-6)
    depth, viewmats, Ks = (torch.from_numpy(x) for x in (train.depths, train.viewmats, train.Ks))
    seen = depth[:, 0].isfinite()
    points = points_at(torch.where(seen, depth[:, 0], 1.0), viewmats[:, 0], Ks[:, 0])
    known = torch.where(depth[:, 1].isfinite(), depth[:, 1], 0.0)[:, None]
    found, there = sampled(known, points, viewmats[:, 1], Ks[:, 1])
    R, t = viewmats[:, 1, 2, :3], viewmats[:, 1, 2, 3]
    expected = torch.einsum("nj,nhwj->nhw", R, points) + t[:, None, None]
    close = (found[:, 0] - expected).abs() < 0.05 * expected
    assert close[seen & (there > 0)].float().mean() > 0.6  # the rest is hidden, or at an edge


def test_the_plane_is_that_of_the_table(data) -> None:
    train = data.train
    depth, viewmats, Ks = (torch.from_numpy(x) for x in (train.depths, train.viewmats, train.Ks))
    points = points_at(depth[:, 0], viewmats[:, 0], Ks[:, 0])
    plane = torch.from_numpy(train.table)
    height = (points * plane[:, None, None, :3]).sum(-1) - plane[:, None, None, 3]
    seen = height[depth[:, 0].isfinite()]
    there = depth[depth.isfinite()]
    assert there.min() >= NEAREST and there.max() <= FURTHEST
    assert seen.min() > -1e-4 and (seen.abs() < 1e-3).float().mean() > 0.5 and seen.max() < 0.8


def test_no_image_shows_how_large_a_scene_is(data) -> None:
    """Cameras' ways, depths and the table's plane do, by one number of each scene."""
    other = RandomTablesData(replace(SMALL, scale=2.0), seed=FRESH).train
    train = data.train
    assert np.array_equal(other.images, train.images)
    assert np.array_equal(other.viewmats[..., :3, :3], train.viewmats[..., :3, :3])
    times = other.table[:, 3] / train.table[:, 3]
    assert 0.5 <= times.min() < times.max() <= 2
    seen = np.isfinite(train.depths)
    expected = (times[:, None, None, None] * train.depths)[seen]
    np.testing.assert_allclose(other.depths[seen], expected, rtol=1e-5)
    ways = times[:, None, None] * train.viewmats[..., :3, 3]
    np.testing.assert_allclose(other.viewmats[..., :3, 3], ways, rtol=1e-4, atol=1e-5)


def test_scenes_are_others_and_the_same_every_time(data) -> None:
    again = RandomTablesData(SMALL, seed=FRESH)
    assert again.content_hash == data.content_hash
    images = np.concatenate([data.train.images, data.heldout.images])[:, 0]
    apart = np.abs(images[:, None] - images).mean((2, 3, 4)) + np.eye(len(images))
    assert apart.min() > 0.005


def test_views_of_others_are_asked_for_with_the_cameras_that_are_given(data) -> None:
    made = RandomTablesData.__new__(RandomTablesData)
    config = replace(SMALL, shuffled=True)
    made.__dict__.update(data.__dict__ | {"config": config})
    right, wrong = data.batch(1), made.batch(1)
    assert np.array_equal(right["images"][:, :CONTEXT], wrong["images"][:, :CONTEXT])
    assert np.array_equal(right["viewmats"], wrong["viewmats"])
    for i, image in enumerate(wrong["images"][:, CONTEXT]):
        assert np.array_equal(image, right["images"][i - 1, CONTEXT])


class Painter(torch.nn.Module):
    """Shows what it is told to."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images, self.at = images, 0

    def forward(self, images, viewmats, Ks):
        shown = self.images[self.at : self.at + len(images)]
        self.at = (self.at + len(images)) % len(self.images)
        return shown


def test_who_knows_the_view_has_no_error_and_floors_need_no_model(data) -> None:
    held = data.heldout
    found, known, figure = glimpses.judge(
        Painter(torch.from_numpy(held.images[:, CONTEXT])), held, CPU, True
    )
    assert found["psnr"] == pytest.approx(100) and found["ssim"] == pytest.approx(1, abs=1e-6)
    assert found["floors/best"] == max(found[f"floors/{x}"] for x in ("nearest", "mean", "turned"))
    assert found["plane"] > found["floors/turned"] + 2  # the table is most of what is seen
    assert "depth" not in found and "<svg" in figure and known["latency"]["p50_ms"] >= 0


class Seer(torch.nn.Module):
    """Of scenes that it has seen, knows by the cameras and by both images what is asked for."""

    def __init__(self, held: glimpses.Glimpses) -> None:
        super().__init__()
        self.held = held

    def forward(self, images, viewmats, Ks):
        eyes = viewmats[:, CONTEXT, :3, 3]
        return eyes[:, None, None].sigmoid().expand(*images.shape[:1], *images.shape[2:])

    def scenes(self, images, viewmats, Ks):
        rows = [int((torch.from_numpy(self.held.viewmats[:, :CONTEXT]) - v).abs()
                    .sum((1, 2, 3)).argmin()) for v in viewmats]  # fmt: skip
        assert torch.equal(torch.from_numpy(self.held.viewmats[rows, :CONTEXT]), viewmats)
        depth = torch.from_numpy(self.held.depths[rows, :CONTEXT]).clone()
        known = torch.from_numpy(self.held.images[rows, :CONTEXT])
        other = (images != known).flatten(2).any(2).flip(1)  # is the other view another scene's?
        return {}, torch.where(other[..., None, None], 1.5 * depth, depth)


def test_what_is_judged_depends_on_cameras_and_on_both_images(data) -> None:
    held = data.heldout
    seer = Seer(held)
    images = held.images.copy()
    given, viewmats, Ks = (torch.from_numpy(x) for x in (images, held.viewmats, held.Ks))
    images[:, CONTEXT] = seer(given[:, :CONTEXT], viewmats, Ks).numpy()
    found, _, _ = glimpses.judge(seer, replace(held, images=images), CPU, True)
    assert found["psnr"] == pytest.approx(100) and found["elsewhere"] < 60
    assert found["depth"] == found["depth_things"] == 0
    assert found["depth_things_other"] == pytest.approx(0.5)
    assert 0.03 < found["depth_things_plane"] < 0.6 and found["depth_flat"] > 0.03


def test_a_plane_is_as_far_away_as_what_lies_on_it(data) -> None:
    held = data.heldout
    viewmats, Ks, true, plane = (
        torch.from_numpy(x)
        for x in (held.viewmats[:, :CONTEXT], held.Ks[:, :CONTEXT], held.depths[:, :CONTEXT],
                  held.table)
    )  # fmt: skip
    high = glimpses.above(plane, true, viewmats, Ks)
    lies = true.isfinite() & (high.abs() < 1e-4)
    told = glimpses.on_plane(plane, viewmats, Ks, *true.shape[2:])
    torch.testing.assert_close(told[lies], true[lies], rtol=1e-3, atol=1e-3)
    assert lies.float().mean() > 0.1


def test_the_nearest_is_turned_as_the_camera_is() -> None:
    """Of a sky, which is as far away from everywhere, that tells all there is to see."""
    rng = torch.Generator().manual_seed(FRESH)
    turned = torch.eye(4).repeat(5, 3, 1, 1)
    by = 0.2 * torch.rand(5, 2, 3, generator=rng) - 0.1
    skew = torch.stack([torch.zeros_like(by), by.roll(1, -1), -by], dim=-1)
    turned[:, 1:, :3, :3] = torch.linalg.matrix_exp(skew - skew.mT)
    Ks = intrinsics(30.0, 24, 24).expand(5, 3, 3, 3)
    d = torch.einsum("nkji,nkhwj->nkhwi", turned[..., :3, :3], directions(Ks, 24, 24))
    sky = 0.5 + 0.5 * torch.sin(3 * torch.nn.functional.normalize(d, dim=-1))
    found = glimpses.warped(sky[:, :CONTEXT], turned, Ks, None)
    inner = (found - sky[:, CONTEXT])[:, 9:15, 9:15].abs()
    assert inner.max() < 0.02


def test_the_loss_is_of_the_view_that_is_asked_for(data) -> None:
    made = recipe("lvsm")
    made.model = Painter(torch.full((3, 24, 24, 3), 0.25))
    batch = {name: torch.from_numpy(x) for name, x in data.batch(0).items()}
    expected = (batch["images"][:, CONTEXT] - 0.25).square().mean()
    assert made.loss(batch) == pytest.approx(expected.item())


def test_processes_share_a_batch_and_ask_for_others_of_the_whole(data) -> None:
    """One process's half, of views of other scenes too."""
    for shuffled in (False, True):
        config = replace(SMALL, shuffled=shuffled, batch_size=4)
        whole, *halves = (RandomTablesData.__new__(RandomTablesData) for _ in range(3))
        for rank, made in enumerate((whole, *halves)):
            world = {"rank": max(rank - 1, 0), "world": 1 if rank == 0 else 2}
            made.__dict__.update(data.__dict__ | {"config": config} | world)
        expected, parts = whole.batch(2), [half.batch(2) for half in halves]
        for key, x in expected.items():
            assert np.array_equal(np.concatenate([part[key] for part in parts]), x)


def test_the_nearest_view_is_one_of_those_that_are_given(data) -> None:
    viewmats = torch.from_numpy(data.heldout.viewmats)
    swapped = viewmats[:, [1, 0, 2]]
    assert torch.equal(glimpses.nearer(viewmats), 1 - glimpses.nearer(swapped))
    alike = torch.cat([viewmats[:, :1], viewmats[:, 1:2], viewmats[:, 1:2]], dim=1)
    assert (glimpses.nearer(alike) == 1).all()


def recipe(name: str, *words: str, steps: int = 8):
    module = {"lvsm": lvsm, "mvsplat": mvsplat}[name]
    given = [*SMALL_GLIMPSES[name], *SMALL_TABLES, f"loop.steps={steps}", f"seed={FRESH}", *words]
    return module.build(compose(given), Processes(), CPU)


@pytest.mark.parametrize("name", SMALL_GLIMPSES)
def test_a_run_that_was_stopped_ends_with_the_same_bits(name: str) -> None:
    whole, first, second = (recipe(name) for _ in "abc")
    for step in range(8):
        whole.step(whole.data.batch(step))
    for step in range(3):
        first.step(first.data.batch(step))
    second.load_state_dict({k: v for k, v in first.state_dict().items()})
    for step in range(3, 8):
        second.step(second.data.batch(step))
    for key, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[key]), key
    assert whole.evaluate() == second.evaluate()


@pytest.mark.parametrize("name", SMALL_GLIMPSES)
def test_a_few_scenes_can_be_learned_by_heart(name: str, tmp_path: Path) -> None:
    made = recipe(name, "data.scenes=4", "optim.lr=3e-3", "optim.warmup_steps=5", steps=60)
    losses = [float(made.step(made.data.batch(step))["train/loss"]) for step in range(60)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    found = made.evaluate(final=True)
    assert ("eval/depth_things" in found) == (name == "mvsplat")
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    assert (tmp_path / "figures" / "views.svg").is_file()


def test_a_scene_is_left_with_its_table_level(tmp_path: Path) -> None:
    """What other programs are given is seen by the first camera as the model has it seen."""
    made = recipe("mvsplat")
    made.export(tmp_path)
    held = made.data.heldout
    plane = torch.from_numpy(held.table[0])
    pose = mvsplat.level(plane)
    file = formats.read(tmp_path / "scene.ply")
    rendered = {
        "means": file.means, "quats": file.quats, "scales": np.exp(file.scales),
        "opacities": sigmoid(file.opacities), "sh": file.sh,
    }  # fmt: skip
    camera = torch.eye(4)
    camera[:3, :3] = rotations(pose[3:]).T
    camera[:3, 3] = -camera[:3, :3] @ pose[:3]
    images, viewmats, Ks = (torch.from_numpy(x[:1]) for x in (held.images, held.viewmats, held.Ks))
    cameras = viewmats[:, :CONTEXT], Ks[:, :CONTEXT]
    with torch.no_grad():
        scenes, _ = made.model.scenes(images[:, :CONTEXT], *cameras)
    whole = {k: x[0] for k, x in scenes.items()}
    kept = mvsplat.colored(whole)
    white = whole["sh"][:, 0].min(-1).values > of_color(0.95)
    assert 0 < len(kept["means"]) == len(file) == int((~white).sum()) < len(white)
    wide = mvsplat.widened(kept, float(Ks[0, 0, 0, 0]))
    pixel = kept["means"][:, 2] / Ks[0, 0, 0, 0]
    added = (wide["scales"] ** 2 - kept["scales"] ** 2) / pixel[:, None] ** 2
    torch.testing.assert_close(added, torch.full_like(added, BLUR), rtol=1e-2, atol=1e-3)
    expected = rasterize(
        **wide, viewmats=viewmats[0, :1], Ks=Ks[0, :1], width=16, height=16,
        background=torch.ones(3), tile=8,
    ).color  # fmt: skip
    seen = rasterize(
        **{k: torch.from_numpy(x) for k, x in rendered.items()}, viewmats=camera[None],
        Ks=Ks[0, :1], width=16, height=16, background=torch.ones(3), tile=8,
    ).color  # fmt: skip
    close = (seen - expected).abs() < 1e-4  # but where 1/255 of a pixel is a Gaussian too few
    assert close.float().mean() > 0.99 and (seen - expected).abs().max() < 2e-2
    R = rotations(pose[3:])
    points = torch.randn(50, 3)
    above = points @ plane[:3] - plane[3]
    torch.testing.assert_close((points @ R.T + pose[:3])[:, 2], above, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "scene.spz").is_file()


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.image_size=18 must be a multiple of model\.patch"):
        recipe("lvsm", "data.image_size=18")
    with pytest.raises(UserError, match=r"model\.near=1\.4 and model\.far=6\.3 must hold all"):
        recipe("mvsplat", "data.scale=2")
    with pytest.raises(UserError, match=r"recipe=mvsplat runs in one process"):
        few = [*SMALL_GLIMPSES["mvsplat"], *SMALL_TABLES]
        mvsplat.build(compose(few), Processes(rank=0, world=2), CPU)
    refused = {"apart": {"apart": 150.0}, "heldout": {"heldout": 1}, "scale": {"scale": 0.5},
               "batch_size": {"batch_size": 1, "shuffled": True}}  # fmt: skip
    for key, given in refused.items():
        with pytest.raises(ValueError, match=rf"data\.{key}="):
            RandomTablesConfig(**given)
