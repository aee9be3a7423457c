"""Looking at scenes: what a browser shows of them, and what cannot be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.splats.harmonics import of_color
from scripts import play
from scripts.scene_viewer import SceneViewer, scene_of
from tests.browser import CHROME, Browser
from training import formats
from training.errors import UserError
from training.formats.gaussians import Splats

SOFTWARE = "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=800,600"


def two() -> Splats:
    """A red ball, and a fainter blue one beside it."""
    colors = np.array([[0.9, 0.0, 0.0], [0.0, 0.0, 0.9]], np.float32)
    return Splats(
        np.array([[-0.5, 0, 0], [0.5, 0, 0]], np.float32),
        np.array([[1, 0, 0, 0], [0.6, 0.8, 0, 0]], np.float32),
        np.full((2, 3), np.log(0.12), np.float32),
        np.array([4.0, 1.0], np.float32),
        of_color(colors)[:, None],
    )


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[SceneViewer]:
    formats.write(tmp_path / "two.spz", two())
    made = SceneViewer(tmp_path / "two.spz", "127.0.0.1", 0)
    yield made
    made.close()


def share(screen: np.ndarray, channel: int) -> float:
    """Of pixels that are of that colour, below what the page shows besides the scene."""
    others = [c for c in range(3) if c != channel]
    x = screen[screen.shape[0] // 3 :].astype(int)
    return float((x[..., channel] - x[..., others].max(-1) > 60).mean())


@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome to open the page with")
def test_a_browser_shows_the_scene_and_hides_what_is_too_faint(viewer, tmp_path: Path) -> None:
    assert viewer.url.startswith("http://127.0.0.1:")
    browser = Browser(viewer.url, tmp_path / "profile", *SOFTWARE)
    try:
        browser.until(
            lambda: share(browser.screen(), 0) > 1e-3 and share(browser.screen(), 2) > 1e-3, 60
        )
        browser.until(lambda: "2 of 2 Gaussians" in browser.read("document.body.innerText"), 60)
        before = share(browser.screen(), 2)  # the page's axes are blue too, and few pixels
        viewer.faintest.value = 0.9
        viewer.show()
        browser.until(lambda: share(browser.screen(), 2) < 0.2 * before, 60)
        assert share(browser.screen(), 0) > 1e-3
        browser.until(lambda: "1 of 2 Gaussians" in browser.read("document.body.innerText"), 60)
    finally:
        browser.close()


def test_what_is_a_scene_is_told_by_its_file_or_its_run(tmp_path: Path) -> None:
    assert scene_of(str(tmp_path)) is None, "a run of something else"
    assert scene_of("a.txt") is None
    assert scene_of("a.splat") == Path("a.splat")
    formats.write(tmp_path / "scene.ply", two())
    assert scene_of(str(tmp_path)) == tmp_path / "scene.ply"


def test_covariances_are_those_of_turned_axes() -> None:
    splats = two()
    splats.scales[1] = np.log([0.1, 0.2, 0.3])
    turned = splats.covariances()[1]
    c, s = 0.6**2 - 0.8**2, 2 * 0.6 * 0.8  # twice the half angle, about x
    R = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    np.testing.assert_allclose(turned, R @ np.diag([0.01, 0.04, 0.09]) @ R.T, atol=1e-6)


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        SceneViewer(tmp_path / "missing.ply", "127.0.0.1", 0)
    (tmp_path / "cut.spz").write_bytes(b"NGSP")
    with pytest.raises(UserError, match="no whole"):
        SceneViewer(tmp_path / "cut.spz", "127.0.0.1", 0)
    nothing = Splats(*(x[:0] for x in vars(two()).values()))
    formats.write(tmp_path / "empty.ply", nothing)
    with pytest.raises(UserError, match="no Gaussians"):
        SceneViewer(tmp_path / "empty.ply", "127.0.0.1", 0)
    with pytest.raises(UserError, match="in a browser"):
        play.look_at(tmp_path / "empty.ply", play.Asked(model="x", terminal=True))


def test_a_scene_that_moves_goes_on_until_it_is_told_not_to(tmp_path: Path) -> None:
    import torch

    from models.worlds.splats.config import DynamicGaussiansConfig, Motion
    from models.worlds.splats.dynamic_gaussians import DynamicGaussians
    from models.worlds.splats.gaussians import begin
    from training.exchange import write_model

    config = DynamicGaussiansConfig(
        motion=Motion.polynomial, capacity=2, begin_count=2, degree=0, begin_opacity=0.5
    )
    rows = DynamicGaussians(config).motion.first(2)
    rows["velocities"][:, 0, 0] = 2.0
    weights = begin(torch.tensor([[0.0, 0, 0], [0, 1, 0]]), torch.rand(2, 3), 0.5, 0) | rows
    write_model(tmp_path, weights, config)
    formats.write(tmp_path / "scene.ply", two())
    viewer = SceneViewer(tmp_path / "scene.ply", "127.0.0.1", 0)
    try:
        assert viewer.at is not None
        early, late = viewer.at(0.0).means, viewer.at(1.0).means
        np.testing.assert_allclose(late[:, 0] - early[:, 0], 2.0, atol=1e-5)
        viewer.go_on()
        assert viewer.time.value == pytest.approx(1 / 48)
        viewer.goes_on.value = False
        viewer.go_on()
        assert viewer.time.value == pytest.approx(1 / 48)
        viewer.time.value, viewer.goes_on.value = 0.99, True
        viewer.go_on()
        assert viewer.time.value < 0.05, "from the last time on to the first"
    finally:
        viewer.close()
