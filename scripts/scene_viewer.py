"""`afferent play model=<run or file>` of a scene of Gaussians: walk through it in the browser.

The viewer is viser's (an extra: pip install "afferent[viewer]"), which sorts and draws in the
browser; it is sent each Gaussian once, in the colour that it has from everywhere. What is seen is
decided by the mouse: drag turns, the wheel comes nearer, the right button moves. Of a run whose
scene moves there is a time besides, which goes on by itself if it is told to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kernels.splats.harmonics import Y0
from training import formats
from training.errors import UserError
from training.formats.gaussians import Splats, sigmoid

FRAMES_PER_S = 12
"Of what moves."
SECONDS = 4
"From its first time to the last."
SCENE = "scene.ply"
"What a run leaves."


def scene_of(model: str) -> Path | None:
    """What is looked at: a file of Gaussians, that of a run, or, of a run that has learned to push
    things, the run; None of other runs."""
    path = Path(model)
    if not path.is_dir():
        return path if path.suffix.lower() in formats.FORMATS else None
    if name_of(path) == "mro_gwm":
        return path
    return path / SCENE if (path / SCENE).is_file() else None


def name_of(run: Path) -> str | None:
    """Of the model that a run has left."""
    try:
        content = json.loads((run / "model.json").read_text())
    except (OSError, ValueError):
        return None
    return content.get("name") if isinstance(content, dict) else None


def moving(file: Path) -> Callable[[float], Splats] | None:
    """Gaussians at times, of a run's scene that moves."""
    if file.name != SCENE or not (file.parent / "model.json").is_file():
        return None
    from training.moving_scenes import open_moving

    return open_moving(file.parent)


def serve(host: str, port: int, label: str) -> tuple[Any, str]:
    """A page of viser's without anything on it, and where it is. Raises UserError."""
    try:
        import viser
    except ImportError:
        raise UserError('scenes are looked at with viser: pip install "afferent[viewer]"') from None
    try:
        server = viser.ViserServer(host=host, port=port, label=label, verbose=False)
    except OSError as error:
        raise UserError(f"cannot bind to {host}:{port}: {error}") from error
    server.scene.set_up_direction("+z")
    return server, f"http://{host}:{server.get_port()}/"


def drawn(splats: Splats) -> dict[str, np.ndarray]:
    """What viser draws of them: in the colour that they have from everywhere."""
    return {
        "centers": splats.means,
        "covariances": splats.covariances(),
        "rgbs": (Y0 * splats.sh[:, 0] + 0.5).clip(0, 1),
        "opacities": sigmoid(splats.opacities)[:, None].astype(np.float32),
    }


class SceneViewer:
    """A page that shows a scene. `url` is where."""

    def __init__(self, file: Path, host: str, port: int) -> None:
        self.splats, self.at = formats.read(file), moving(file)
        if not len(self.splats):
            raise UserError(f"{file} holds no Gaussians: there is nothing to be seen")
        self.server, self.url = serve(host, port, file.name)
        self.look()
        self.facts = self.server.gui.add_markdown("")
        self.faintest: Any = self.server.gui.add_slider(
            "faintest", min=0.0, max=0.95, step=0.05, initial_value=0.0,
            hint="Gaussians that are fainter are hidden",
        )  # fmt: skip
        self.faintest.on_update(lambda _: self.show())
        if self.at:
            self.time: Any = self.server.gui.add_slider(
                "time", min=0.0, max=1.0, step=0.01, initial_value=0.0,
            )  # fmt: skip
            self.time.on_update(lambda _: self.show())
            self.goes_on: Any = self.server.gui.add_checkbox("goes on", initial_value=True)
        self.show()

    def look(self) -> None:
        """From where most of the scene is seen."""
        low, middle, high = np.quantile(self.splats.means, [0.02, 0.5, 0.98], axis=0)
        away = 1.4 * float(np.linalg.norm(high - low)) or 1.0
        camera = self.server.initial_camera
        camera.position = middle + away * np.array([0.6, -0.6, 0.5])
        camera.look_at = middle

    def show(self) -> None:
        """Send what is not too faint, and say how long that took."""
        began = time.perf_counter()
        splats = self.at(self.time.value) if self.at else self.splats
        parts = drawn(splats)
        there = parts["opacities"][:, 0] >= self.faintest.value
        self.server.scene.add_gaussian_splats("/scene", **{k: x[there] for k, x in parts.items()})
        took = 1e3 * (time.perf_counter() - began)
        self.facts.content = f"{there.sum():,} of {len(there):,} Gaussians, {took:.0f} ms to send"

    def run(self) -> None:
        """Until it is interrupted."""
        while self.at:
            self.go_on()
            time.sleep(1 / FRAMES_PER_S)
        self.server.sleep_forever()

    def go_on(self) -> None:
        """One frame further, if it goes on."""
        if self.goes_on.value:
            self.time.value = (self.time.value + 1 / (SECONDS * FRAMES_PER_S)) % 1.0

    def close(self) -> None:
        self.server.stop()
