"""`afferent play model=<run of mro_gwm/push_world>`: push things about in a learned world.

In the browser, by viser: whoever drags the handle leads the pusher, which comes after it as fast as
it can, and the model says where things go, ten times a second. Each object was sent once; where it
is takes 28 bytes a step. Beside it: how long a step takes, and how far the members of the model
disagree about where things are.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from scripts.scene_viewer import drawn, serve
from training import formats
from training.envs.push_world import DT, LIMIT, NAMES, PUSHER, SPEED, placed
from training.envs.push_worlds import LearnedWorld
from training.object_scenes import open_push_model

REST = 0.01  # metres from the handle at which the pusher is there


class PushViewer:
    """A page on which things are pushed. `url` is where."""

    def __init__(self, run: Path, host: str, port: int, seed: int = 0) -> None:
        self.world = LearnedWorld(open_push_model(run))
        parts = [formats.read(run / f"{name}.ply") for name in ("table", *NAMES)]
        self.server, self.url = serve(host, port, run.name)
        camera = self.server.initial_camera
        camera.position, camera.look_at = np.array([0.0, -2.6, 2.0]), np.zeros(3)
        scene = self.server.scene
        scene.add_gaussian_splats("/table", **drawn(parts[0]))
        self.objects = [
            scene.add_gaussian_splats(f"/{name}", **drawn(part))
            for name, part in zip(NAMES, parts[1:], strict=True)
        ]
        limits = ((-LIMIT, LIMIT), (-LIMIT, LIMIT), (0.0, 0.0))
        self.handle: Any = scene.add_transform_controls(
            "/handle", 0.3, active_axes=(True, True, False), disable_rotations=True,
            translation_limits=limits, depth_test=False,
        )  # fmt: skip
        self.facts = self.server.gui.add_markdown("")
        self.again = self.server.gui.add_button("begin anew", hint="Things stand elsewhere")
        self.again.on_click(lambda _: self.ask())
        self.seed, self.wanted, self.times = seed, True, deque[float](maxlen=50)
        self.begin()

    def ask(self) -> None:
        """Begin anew, before the next step."""
        self.wanted = True

    def begin(self) -> None:
        """Things anywhere, the handle where the pusher is."""
        self.wanted = False
        self.state = placed(np.random.default_rng(self.seed))
        self.seed += 1
        self.world.begin(self.state)
        self.handle.position = (*self.state.pusher, 0.0)
        self.steps, self.times = 0, deque(maxlen=50)
        self.show()

    def step(self) -> None:
        """A tenth of a second, unless nothing is asked for."""
        if self.wanted:
            self.begin()
        way = np.array(self.handle.position[:2]) - self.state.pusher
        if np.linalg.norm(way) < REST:
            return
        began = time.perf_counter()
        self.state = self.world.step(way / (SPEED * DT))
        self.times.append(time.perf_counter() - began)
        self.steps += 1
        self.show()

    def show(self) -> None:
        """Everything where it is."""
        poses = [(pose[:3], pose[3:]) for pose in self.state.poses]
        poses.append((np.array([*self.state.pusher, PUSHER]), np.array([1.0, 0.0, 0.0, 0.0])))
        for thing, (position, wxyz) in zip(self.objects, poses, strict=True):
            thing.position, thing.wxyz = position, wxyz
        latency = 1e3 * float(np.mean(self.times)) if self.times else 0.0
        self.facts.content = (
            f"Drag the handle: the pusher comes after it.\n\nstep {self.steps}, {latency:.0f} ms, "
            f"members {100 * self.world.apart:.1f} cm apart"
        )

    def run(self) -> None:
        """Until it is interrupted."""
        while True:
            began = time.perf_counter()
            self.step()
            time.sleep(max(0.0, DT - (time.perf_counter() - began)))

    def close(self) -> None:
        self.server.stop()
