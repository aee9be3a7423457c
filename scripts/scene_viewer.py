"""`afferent play model=<run or file>` of a scene of Gaussians: walk through it in the browser.

The viewer is viser's (an extra: pip install "afferent[viewer]"), which sorts and draws in the
browser; it is sent each Gaussian once, in the colour that it has from everywhere. What is seen is
decided by the mouse: drag turns, the wheel comes nearer, the right button moves.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from kernels.splats.harmonics import Y0
from training import formats
from training.errors import UserError
from training.formats.gaussians import sigmoid

SCENE = "scene.ply"
"What a run leaves."


def scene_of(model: str) -> Path | None:
    """The file of the scene that `model` is: one of Gaussians, or a run's; None of other runs."""
    path = Path(model)
    if path.is_dir():
        return path / SCENE if (path / SCENE).is_file() else None
    return path if path.suffix.lower() in formats.FORMATS else None


class SceneViewer:
    """A page that shows a scene. `url` is where."""

    def __init__(self, file: Path, host: str, port: int) -> None:
        try:
            import viser
        except ImportError:
            raise UserError(
                'scenes are looked at with viser: pip install "afferent[viewer]"'
            ) from None
        self.splats = formats.read(file)
        if not len(self.splats):
            raise UserError(f"{file} holds no Gaussians: there is nothing to be seen")
        self.opacities = sigmoid(self.splats.opacities)[:, None].astype(np.float32)
        self.colors = (Y0 * self.splats.sh[:, 0] + 0.5).clip(0, 1)
        self.covariances = self.splats.covariances()
        try:
            self.server = viser.ViserServer(host=host, port=port, label=file.name, verbose=False)
        except OSError as error:
            raise UserError(f"cannot bind to {host}:{port}: {error}") from error
        self.url = f"http://{host}:{self.server.get_port()}/"
        self.server.scene.set_up_direction("+z")
        self.look()
        self.facts = self.server.gui.add_markdown("")
        self.faintest: Any = self.server.gui.add_slider(
            "faintest", min=0.0, max=0.95, step=0.05, initial_value=0.0,
            hint="Gaussians that are fainter are hidden",
        )  # fmt: skip
        self.faintest.on_update(lambda _: self.show())
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
        there = self.opacities[:, 0] >= self.faintest.value
        self.server.scene.add_gaussian_splats(
            "/scene", self.splats.means[there], self.covariances[there], self.colors[there],
            self.opacities[there],
        )  # fmt: skip
        took = 1e3 * (time.perf_counter() - began)
        self.facts.content = f"{there.sum():,} of {len(there):,} Gaussians, {took:.0f} ms to send"

    def run(self) -> None:
        self.server.sleep_forever()

    def close(self) -> None:
        self.server.stop()
