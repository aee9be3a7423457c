"""Pushing, learned: from which objects, how it is judged, what is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import SMALL_PUSHES
from tests.push_files import write_table
from training import formats
from training.config import compose
from training.distributed import Processes
from training.envs.push_world import NAMES
from training.envs.ray_tracer import intrinsics
from training.envs.tabletop import cameras_around
from training.errors import UserError
from training.evaluation import push_planning, push_tracking, pushing
from training.formats.gltf import parse_moving
from training.object_scenes import open_push_model, open_push_scene, with_pusher
from training.recipes import mro_gwm
from training.seeding import numpy_rng

CPU = torch.device("cpu")
FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


def recipe(table: Path, *words: str, steps: int = 12):
    given = [*SMALL_PUSHES, f"recipe.scene={table}", f"loop.steps={steps}", f"seed={FRESH}"]
    return mro_gwm.build(compose([*given, *words]), Processes(), CPU)


def trained(made, until: int):
    while made.trainer.count < until:
        made.step(made.data.batch(made.trainer.count))
    return made


def four(rng: np.random.Generator) -> push_tracking.Cameras:
    """That look at the table."""
    Ks = intrinsics(52.8, 48, 48).expand(4, 3, 3)
    return push_tracking.Cameras(cameras_around(rng, 4), Ks, 48)


class Knowing:
    """A model whose members say what MuJoCo would, if nothing but an offset were wrong."""

    def __init__(self, true: torch.Tensor, off: float, members: int = 1) -> None:
        self.true, self.off, self.members = true, off, range(members)
        self.config = type("Config", (), {"history": 3})()

    def imagine(self, seen, actions, pusher):
        told = self.true.clone()
        told[..., 0] += self.off
        return told, torch.zeros(told.shape[:-1])


def test_a_run_that_was_stopped_ends_with_the_same_bits(table: Path) -> None:
    whole, first, second = (recipe(table) for _ in "abc")
    trained(whole, 12)
    state = trained(first, 5).state_dict()
    second.load_state_dict({k: v for k, v in state.items()})
    trained(second, 12)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name
    assert whole.evaluate() == second.evaluate()


def test_every_member_learns_however_many_windows_there_are(table: Path) -> None:
    made = trained(recipe(table, "data.batch_size=5", "model.members=3"), 4)
    heads = [member.head.weight.abs().max() for member in made.model.members]
    assert min(heads) > 0


def test_the_error_of_who_knows_is_nothing_and_floors_are_those_of_staying(table: Path) -> None:
    made = recipe(table)
    windows = pushing.cut(made.data.heldout, 3, 10)
    true = torch.from_numpy(windows.poses[:, 3:])
    found = pushing.open_loop(Knowing(true, 0.0), made.data.heldout, 10, 0.05, 0, CPU)
    assert found["error"] < 1e-6 and found["angle"] < 0.1
    wrong = pushing.open_loop(Knowing(true, 0.03), made.data.heldout, 10, 0.05, 0, CPU)
    assert wrong["error"] == pytest.approx(0.03, abs=1e-5)
    assert wrong["share_of_position"] == pytest.approx(0.03 / wrong["floors/position"], abs=1e-4)
    went = np.linalg.norm(windows.poses[:, -1, :, :3] - windows.poses[:, 2, :, :3], axis=-1)
    flat = np.linalg.norm(windows.poses[:, -1, :, :2] - windows.poses[:, 2, :, :2], axis=-1)
    assert wrong["floors/position"] == pytest.approx(went[flat > 0.05].mean(), abs=1e-5)


def test_nobody_is_told_their_own_actions_when_they_are_shuffled() -> None:
    for count in (2, 7, 40):
        other = pushing.deranged(count, FRESH)
        assert sorted(other) == list(range(count)) and (other != np.arange(count)).all()


def test_each_thing_has_its_gaussians_and_they_go_with_it(table: Path) -> None:
    scene = open_push_scene(str(table), CPU)
    counts = [len(x["means"]) for x in scene.scene.objects]
    assert min(counts[:3]) > 30 and counts[3] > 2, counts
    for thing in scene.scene.objects[:3]:
        assert thing["means"].norm(dim=-1).max() < 0.5, "in its own frame"
    poses = torch.zeros(3, 7)
    poses[:, 3], poses[:, 2] = 1.0, 5.0
    moved = scene.at(poses, torch.zeros(2))["means"]
    background = len(scene.scene.background["means"])
    assert moved[:background, 2].max() < 1 and moved[background : -counts[3], 2].min() > 4


def test_poses_are_found_from_images_of_gaussians(table: Path) -> None:
    """Images are the scene's own renders, so that the truth is exact."""
    made = recipe(table, "recipe.tracking_steps=40", "recipe.cameras=4", "recipe.image_size=48")
    scene, rng = made.scene, numpy_rng(0, "test")
    cameras = four(rng)
    true = torch.from_numpy(made.data.heldout.poses[0, 0])
    pusher = torch.from_numpy(made.data.heldout.pusher[0, 0])
    images = cameras.draw(scene, true, pusher)
    by = torch.tensor([[0.04, -0.03, 0.0, 0.0, 0.0, 0.15]]).repeat(3, 1)
    start = push_tracking.stirred(true, by[:, :3], by[:, 3:])
    found = push_tracking.found_in(scene, start, pusher, images, cameras, made.recipe)
    before, after = (pushing.off(x, true).mean() for x in (start, found))
    assert after < 0.2 * before
    assert pushing.turned(found, true)[[0, 2]].mean() < 0.4 * pushing.turned(start, true).mean()


def test_who_stays_reaches_nothing_and_who_is_there_has_succeeded() -> None:
    starts, goals = zip(*(push_planning.drawn(np.random.default_rng([FRESH, i])) for i in range(3)),
                        strict=True)  # fmt: skip
    anchors = torch.randn(3, 8, 3) * 0.1

    def stay(step, states):
        return np.zeros((3, 2))

    for targets, reached in ((goals, False), ([s.poses[2] for s in starts], True)):
        given = torch.from_numpy(np.float32(targets))
        distances = push_planning.carried_out(stay, list(starts), given, anchors, 2)
        assert distances.shape == (3, 3)
        assert (distances.min(1) < push_planning.NEAR).all() == reached
        assert np.ptp(distances, axis=1).max() < 0.01


def test_what_a_run_leaves_can_be_opened_and_looked_at(table: Path, tmp_path: Path) -> None:
    made = trained(recipe(table), 12)
    found = made.evaluate(final=True)
    for name in (
        "error",
        "found",
        "psnr",
        "blind",
        "again",
        "psnr/flat",
        "plans/success",
        "explorer/success",
    ):
        assert np.isfinite(found[f"eval/{name}"]), name
    assert found["eval/revisited"] == 1.0
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    again = open_push_model(tmp_path)
    for name, x in made.model.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    for name in ("table", *NAMES):
        assert len(formats.read(tmp_path / f"{name}.ply")) > 2
    motion = parse_moving((tmp_path / "pushed.glb").read_bytes())
    assert motion.names == ("table", *NAMES) and motion.poses.shape == (5, 13, 7)
    assert "<svg" in (tmp_path / "figures" / "film.svg").read_text()
    assert made.way.shape == (13, 4, 7)
    assert with_pusher(torch.zeros(2, 3, 7), torch.ones(2, 2)).shape == (2, 4, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe.scene=null"], "afferent train experiment=mro_gwm/table"),
        (["recipe.scene=nowhere"], "recipe.scene=nowhere"),
        (["model.objects=2"], "model.objects=2: there are 3"),
        (["model.history=1"], "model.history=1"),
        (["model.anchors=500"], "opaque Gaussians, and 500 are asked for"),
        (["data.batch_size=1"], "data.batch_size=1 must be model.members=2"),
        (["data.batch_size=8", "optim.accumulate=8"], "data.batch_size=8 must be model.members=2"),
        (["recipe.ahead=4"], "recipe.ahead=4 must be 5 or more, or recipe.tracked=0"),
        (["recipe.consulted=3"], "recipe.consulted=3 must be model.members=2"),
        (["data.steps=12", "recipe.ahead=11"], "data.steps=12"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    words: list[str], message: str, table: Path
) -> None:
    with pytest.raises(UserError, match=message):
        recipe(table, *words)


def test_a_run_of_something_else_is_no_table(table: Path, tmp_path: Path) -> None:
    other = write_table(tmp_path / "other")
    (other / "config.yaml").write_text("seed: 0\ndata: {name: tabletop}\n")
    with pytest.raises(UserError, match="it is of data=tabletop, not of push_table"):
        open_push_scene(str(other), CPU)
    (other / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml is missing"):
        open_push_scene(str(other), CPU)
    content = json.loads((table / "model.json").read_text()) | {"tile": 5}
    broken = write_table(tmp_path / "broken")
    (broken / "model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no reconstructed table"):
        open_push_scene(str(broken), CPU)
