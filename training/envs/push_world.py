"""PushWorld3D: a ball pushes a box, a cylinder and a T over a table, with MuJoCo's contacts.

    world = PushWorld(placed(rng))                nothing touches anything
    world.step(action)                            a tenth of a second: a velocity, SPEED at 1
    push_scene(world.state())                     what the ray tracer shows of it

MuJoCo (an extra: pip install "afferent[physics]") moves things and no more: they are seen by
ray_tracer.py, so that images need no GL and are the same on every machine. The pusher goes where it
is told, as long as it stays on the table; what it pushes slides on, turns, and pushes others.

    ids      0 table   1 box   2 cylinder   3 T, of a bar and a stem   4 pusher
    pose     position of the body and quaternion wxyz, [7]; what it is turned about is its middle
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from training.envs.ray_tracer import Lamp, Scene, Solid

HALF = 0.1  # height of things
BOX, CYLINDER = (0.2, 0.14, HALF), (0.16, HALF)
BAR, STEM = (0.24, 0.07, HALF), (0.07, 0.1, HALF)
BAR_AT, STEM_AT = (0.0, 0.05, 0.0), (0.0, -0.12, 0.0)  # of the T, about its centre of mass
PUSHER = 0.07  # radius
THINGS = 3
NAMES = "box", "cylinder", "t", "pusher"
REACHES = 0.25, 0.17, 0.27  # radii of the places they take
TABLE, LIMIT, PLACED = 1.3, 1.0, 0.75  # radii: of the table, of where pusher and things may be
SPEED, DT, SUBSTEPS = 0.8, 0.1, 20
FRICTION, DENSITY = 0.5, 200.0
GAP = 0.04
COLORS = (0.85, 0.45, 0.15), (0.2, 0.65, 0.35), (0.3, 0.4, 0.85), (0.85, 0.15, 0.25)

XML = f"""
<mujoco>
  <option timestep="{DT / SUBSTEPS}" integrator="implicitfast"/>
  <default><geom density="{DENSITY}" friction="{FRICTION} 0.005 0.0001"/></default>
  <worldbody>
    <geom type="plane" size="3 3 0.1"/>
    <body name="box"><freejoint/><geom type="box" size="{BOX[0]} {BOX[1]} {BOX[2]}"/></body>
    <body name="cylinder"><freejoint/><geom type="cylinder" size="{CYLINDER[0]} {CYLINDER[1]}"/>
    </body>
    <body name="t"><freejoint/>
      <geom type="box" size="{BAR[0]} {BAR[1]} {BAR[2]}" pos="{BAR_AT[0]} {BAR_AT[1]} 0"/>
      <geom type="box" size="{STEM[0]} {STEM[1]} {STEM[2]}" pos="{STEM_AT[0]} {STEM_AT[1]} 0"/>
    </body>
    <body name="pusher" mocap="true"><geom type="sphere" size="{PUSHER}"/></body>
  </worldbody>
</mujoco>
"""


@dataclass(frozen=True)
class PushState:
    """Where everything is."""

    poses: Float[ndarray, "3 7"]
    "Of box, cylinder and T."
    pusher: Float[ndarray, " 2"]
    "x, y; it rolls on the table."


class PushWorld:
    """One table.

    Raises:
        ImportError: MuJoCo is not installed.
    """

    def __init__(self, state: PushState) -> None:
        import mujoco

        self.mujoco: Any = mujoco
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data = mujoco.MjData(self.model)
        self.reset(state)

    def reset(self, state: PushState) -> None:
        """Everything where it is said to be, at rest."""
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = state.poses.reshape(-1)
        self.data.mocap_pos[0] = (*state.pusher, PUSHER)
        self.mujoco.mj_forward(self.model, self.data)

    def state(self) -> PushState:
        poses = np.array(self.data.qpos, np.float64).reshape(THINGS, 7)
        return PushState(poses, np.array(self.data.mocap_pos[0, :2]))

    def step(self, action: Float[ndarray, " 2"]) -> PushState:
        """A tenth of a second of pushing. Actions longer than 1 are cut."""
        begun = np.array(self.data.mocap_pos[0, :2])
        towards = moved(begun, action)
        for share in np.linspace(0, 1, SUBSTEPS + 1)[1:]:
            self.data.mocap_pos[0, :2] = begun + share * (towards - begun)
            self.mujoco.mj_step(self.model, self.data)
        return self.state()


def within(action: Float[ndarray, "*n 2"]) -> Float[ndarray, "*n 2"]:
    """No longer than 1, its direction kept."""
    length = np.linalg.norm(action, axis=-1, keepdims=True)
    return action / np.maximum(length, 1.0)


def moved(pusher: Float[ndarray, "*n 2"], action: Float[ndarray, "*n 2"]) -> Float[ndarray, "*n 2"]:
    """Where the pusher is after an action."""
    towards = pusher + SPEED * DT * within(action)
    far = np.linalg.norm(towards, axis=-1, keepdims=True)
    return towards * np.minimum(1, LIMIT / np.maximum(far, 1e-9))


def placed(rng: np.random.Generator) -> PushState:
    """Things anywhere, turned anyhow, none near another, nor the pusher near one."""
    while True:
        angle, far = rng.uniform(0, 2 * math.pi, 4), np.sqrt(rng.uniform(size=4))
        far = far * np.array([PLACED] * THINGS + [LIMIT])
        places = far[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        reach = np.array([*REACHES, PUSHER])
        apart = np.linalg.norm(places[:, None] - places, axis=-1) - reach[:, None] - reach
        if apart[np.triu_indices(4, 1)].min() > GAP:
            break
    turn = rng.uniform(0, 2 * math.pi, 3)
    poses = np.zeros((3, 7))
    poses[:, :2], poses[:, 2] = places[:3], HALF
    poses[:, 3], poses[:, 6] = np.cos(turn / 2), np.sin(turn / 2)
    return PushState(poses, places[3])


def push_scene(state: PushState) -> Scene:
    """What there is to be seen. The lamp is right above, so that shadows stay under things, and
    turning about z changes no light."""
    poses = [(tuple(p[:3]), tuple(p[3:])) for p in state.poses.tolist()]
    orange, green, blue, red = COLORS
    paint = {"pattern": "checker", "width": 0.1}
    table = Solid("disc", (TABLE,), pattern="checker", width=0.25, color=(0.85, 0.82, 0.75),
                  other=(0.45, 0.5, 0.6))  # fmt: skip
    (box, cylinder, t) = poses
    solids = [
        table,
        Solid("box", BOX, *box, color=orange, other=(0.95, 0.75, 0.3), **paint, id=1),
        Solid("cylinder", CYLINDER, *cylinder, color=green, other=(0.1, 0.4, 0.3), **paint, id=2),
        *(Solid("box", size, on(t, at), t[1], color=blue, other=(0.6, 0.7, 0.95), **paint, id=3)
          for size, at in ((BAR, BAR_AT), (STEM, STEM_AT))),
        Solid("sphere", (PUSHER,), (*state.pusher.tolist(), PUSHER), color=red, id=4),
    ]  # fmt: skip
    return Scene(solids, Lamp(towards=(0.0, 0.0, 1.0), ambient=0.5))


def on(pose: tuple[tuple, tuple], at: tuple[float, ...]) -> tuple[float, float, float]:
    """Where a place of a thing's own frame is."""
    (x, y, z), (a, b, c, d) = pose
    u, v, w = at
    # the rotation of a unit quaternion, applied: p + 2 a (q x p) + 2 q x (q x p)
    m, n, o = c * w - d * v, d * u - b * w, b * v - c * u
    return (
        x + u + 2 * (a * m + c * o - d * n),
        y + v + 2 * (a * n + d * m - b * o),
        z + w + 2 * (a * o + b * n - c * m),
    )


@dataclass(frozen=True)
class Aim:
    """Where the pusher goes, and for how many steps more."""

    place: Float[ndarray, " 2"]
    left: int


def pushes(
    rng: np.random.Generator, state: PushState, steps: int
) -> tuple[list[PushState], Float[ndarray, "t 2"]]:
    """An episode of somebody who goes for one thing after the other, from behind and through it,
    now and then anywhere."""
    world, states, actions, aim = PushWorld(state), [state], np.zeros((steps, 2)), None
    for t in range(steps):
        actions[t], aim = led_by(rng, states[-1], aim)
        states.append(world.step(actions[t]))
    return states, actions


def led_by(
    rng: np.random.Generator, state: PushState, aim: Aim | None
) -> tuple[Float[ndarray, " 2"], Aim | None]:
    """An action towards an aim, a new one if there is none, and the aim that is left."""
    if aim is None:
        aim = Aim(_aim(rng, state), int(rng.integers(4, 12)))
    way = aim.place - state.pusher
    far = float(np.linalg.norm(way))
    action = way / max(far, SPEED * DT) * rng.uniform(0.6, 1.0) + rng.normal(scale=0.2, size=2)
    done = far < 0.05 or aim.left == 1
    return within(action), None if done else Aim(aim.place, aim.left - 1)


def _aim(rng: np.random.Generator, state: PushState) -> Float[ndarray, " 2"]:
    """Beyond a thing, mostly."""
    if rng.uniform() < 0.2:
        return rng.uniform(-LIMIT, LIMIT, 2)
    thing = state.poses[rng.integers(THINGS), :2]
    way = thing - state.pusher
    way /= max(np.linalg.norm(way), 1e-9)
    return thing + rng.uniform(0.1, 0.5) * way + rng.normal(scale=0.08, size=2)
