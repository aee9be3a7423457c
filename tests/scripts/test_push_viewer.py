"""Pushing things in the browser, in a world that a model has learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.worlds.splats.config import MroGwmConfig
from models.worlds.splats.mro_gwm import MroGwm
from scripts.push_viewer import PushViewer
from scripts.scene_viewer import scene_of
from tests.browser import CHROME, Browser
from tests.push_files import write_table
from training.envs.push_world import DT, SPEED
from training.errors import UserError
from training.exchange import write_model
from training.object_scenes import open_push_model, open_push_scene, write_push_scene

SOFTWARE = "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=900,700"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves, of a model in which everything goes along with the pusher's action."""
    folder = tmp_path_factory.mktemp("pushes")
    write_push_scene(folder, open_push_scene(str(write_table(folder / "table")), "cpu"))
    model = MroGwm(MroGwmConfig(width=16, layers=1, members=2))
    model.initialise(torch.Generator().manual_seed(0), torch.rand(3, 8, 3))
    for number, member in enumerate(model.members):
        member.head.bias.data[0] = 0.2 + 0.1 * number  # along x, whatever is done
    weights = {name: x.contiguous() for name, x in model.state_dict().items()}
    write_model(folder, weights, model.config)
    return folder


@pytest.fixture
def viewer(run: Path) -> Iterator[PushViewer]:
    made = PushViewer(run, "127.0.0.1", 0)
    yield made
    made.close()


def test_the_pusher_comes_after_the_handle_and_things_go_as_the_model_says(viewer) -> None:
    begun = viewer.state
    viewer.step()
    assert viewer.steps == 0, "nobody has moved the handle"
    towards = begun.pusher * 0.5
    viewer.handle.position = (*towards, 0.0)
    for _ in range(20):
        viewer.step()
    assert np.linalg.norm(viewer.state.pusher - towards) < 0.011
    far = np.linalg.norm(begun.pusher - towards)
    assert viewer.steps == pytest.approx(np.ceil(far / (SPEED * DT)), abs=1)
    gone = viewer.state.poses[:, :3] - begun.poses[:, :3]
    np.testing.assert_allclose(gone[:, 0], 0.025 * viewer.steps, rtol=1e-3)
    np.testing.assert_allclose(viewer.objects[0].position, viewer.state.poses[0, :3], atol=1e-6)
    assert f"step {viewer.steps}" in viewer.facts.content and " ms" in viewer.facts.content
    assert "members 0.5 cm apart" in viewer.facts.content


def test_whoever_begins_anew_has_things_elsewhere(viewer) -> None:
    before = viewer.state.poses.copy()
    viewer.ask()
    viewer.step()
    assert np.abs(viewer.state.poses[:, :2] - before[:, :2]).max() > 0.05 and viewer.steps == 0
    assert viewer.handle.position[:2] == pytest.approx(viewer.state.pusher)


@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome to open the page with")
def test_a_browser_shows_things_that_move(viewer, tmp_path: Path) -> None:
    browser = Browser(viewer.url, tmp_path / "profile", *SOFTWARE)

    def orange() -> tuple[float, int]:
        """Mean column of orange pixels below the controls, and how many."""
        x = browser.screen()[150:].astype(int)
        there = (x[..., 0] > 150) & (x[..., 2] < 110) & (x[..., 1] > 60)
        return float(np.nonzero(there)[1].mean()) if there.any() else 0.0, int(there.sum())

    try:
        browser.until(lambda: orange()[1] > 30, 60)
        browser.until(lambda: "Drag the handle" in browser.read("document.body.innerText"), 60)
        before = orange()[0]
        viewer.handle.position = (*(viewer.state.pusher * 0.4), 0.0)
        for _ in range(8):
            viewer.step()
        browser.until(lambda: abs(orange()[0] - before) > 5, 60)
        browser.until(lambda: "cm apart" in browser.read("document.body.innerText"), 60)
    finally:
        browser.close()


def test_a_run_of_pushing_is_told_by_its_model(run: Path, tmp_path: Path) -> None:
    assert scene_of(str(run)) == run
    (tmp_path / "model.json").write_text(json.dumps({"name": "diamond"}))
    assert scene_of(str(tmp_path)) is None
    (tmp_path / "model.json").write_text("[1]")
    assert scene_of(str(tmp_path)) is None


def test_a_run_that_is_damaged_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text((run / "model.json").read_text())
    with pytest.raises(UserError, match="missing or damaged"):
        open_push_model(tmp_path)
    content = json.loads((run / "model.json").read_text()) | {"width": 24}
    (tmp_path / "model.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit its model\.json"):
        open_push_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"name": "mro_gwm", "members": 0}))
    with pytest.raises(UserError, match="does not describe a model of pushing"):
        open_push_model(tmp_path)
