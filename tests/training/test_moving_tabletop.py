"""A table whose things move: where they are, which images are held out, in which order."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.scene_files import write_dnerf
from training.data.config_scenes import DnerfConfig, MovingTabletopConfig
from training.data.corpus import DataError
from training.data.moving_tabletop import MovingTabletopData
from training.envs.moving_tabletop import WAYS, moving_tabletop
from training.scenes import scene_data

FRESH = int.from_bytes(np.random.default_rng().bytes(3), "little")  # printed when a test fails
SMALL = {"image_size": 16, "cameras": 3, "heldout": 1, "times": 7, "things": 4, "samples": 1}


def data(**keys) -> MovingTabletopData:
    return MovingTabletopData(MovingTabletopConfig(**{**SMALL, **keys}), seed=FRESH)


def test_points_are_carried_as_their_thing_is_posed() -> None:
    """What is fixed in a thing's own frame, by the quaternions that the tracer is given."""
    rng = np.random.default_rng(FRESH)
    table = moving_tabletop(rng, 5)

    def own(points: np.ndarray, id: int, time: float, back: bool) -> np.ndarray:
        (solid,) = (s for s in table.at(time).solids if s.id == id)
        R = Rotation.from_quat(solid.rotation, scalar_first=True).as_matrix()
        return (points - solid.position) @ R if back else points @ R.T + solid.position

    for id, time in zip((1, 2, 3, 4, 5), rng.uniform(0, 1, 5), strict=True):
        points = rng.normal(size=(8, 3))
        expected = own(own(points, id, 0.0, back=True), id, time, back=False)
        np.testing.assert_allclose(table.carried(points, id, time), expected, atol=1e-6)


def test_things_go_their_ways_and_keep_out_of_each_others() -> None:
    table = moving_tabletop(np.random.default_rng(FRESH), 5)
    assert {path.way for path in table.paths.values()} == set(WAYS)
    times = np.linspace(0, 1, 41)
    places = np.array([[s.position for s in table.at(t).solids if s.id] for t in times])
    moved = np.ptp(places, axis=0)  # [things, xyz]
    ways = [table.paths[id].way for id in sorted(table.paths)]
    for way, (x, y, z) in zip(ways, moved, strict=True):
        assert (math.hypot(x, y) > 0.2) == (way in ("orbit", "slide"))
        assert (z > 0.3) == (way == "hop")
    radii = {"sphere": lambda s: s[0], "box": lambda s: math.hypot(*s[:2]),
             "capsule": sum, "cylinder": lambda s: s[0]}  # fmt: skip
    reach = [radii[s.kind](s.size) for s in table.home.solids if s.id]
    for i in range(5):
        for j in range(i):
            apart = np.linalg.norm(places[:, i, :2] - places[:, j, :2], axis=-1)
            assert apart.min() > reach[i] + reach[j]


def test_every_image_is_trained_on_or_held_out_by_its_camera_or_its_time() -> None:
    made = data()
    train, held = made.train, made.heldout
    assert len(train.names) + len(held.names) == 7 * 4
    assert not {*train.names} & {*held.names}
    assert {*train.times} & {*held.times} == {*train.times}  # the held-out camera sees them all
    between = {*held.times} - {*train.times}
    assert between == {np.float32(2 / 6), np.float32(1.0)}
    cameras = [{x.tobytes() for x in part.viewmats} for part in (train, held)]
    assert len(cameras[0]) == 3 and len(cameras[1] - cameras[0]) == 1


def test_pixels_that_do_not_change_are_the_same_at_all_times() -> None:
    made = data()
    everything = [(i, p) for p in (made.train, made.heldout) for i in range(len(p.names))]
    by_camera: dict[bytes, list] = {}
    for i, part in everything:
        by_camera.setdefault(part.viewmats[i].tobytes(), []).append((part.images[i], part, i))
    for seen in by_camera.values():
        films = np.stack([image for image, _, _ in seen])
        changing = seen[0][1].changing[seen[0][2]]
        assert np.ptp(films, axis=0)[~changing].max() <= 0.1
        assert (np.ptp(films, axis=0)[changing].max(-1) > 0.1).all() and changing.any()


def test_one_time_comes_after_the_other_and_all_images_of_it() -> None:
    made = data(first_steps=10, steps_per_time=6)
    seen = [made.batch(step) for step in range(10 + 4 * 6)]
    times = [float(batch["times"][0]) for batch in seen]
    assert times == sorted(times) and times[:10] == [0.0] * 10
    assert [times.count(float(t)) for t in made.moments] == [10, 6, 6, 6, 6]
    for first in (10, 16):
        assert len({int(b["rows"][0]) for b in seen[first : first + 6]}) == 3  # of all cameras
    assert made.moment(1000) == len(made.moments) - 1


def test_times_of_others_are_those_of_no_image() -> None:
    right, wrong = data(), data(shuffled_times=True)
    pairs = [(a.batch(s)["times"][0], a.batch(s)["rows"][0]) for a in (right, wrong)
             for s in range(15)]  # fmt: skip
    told = np.array([t for t, _ in pairs]).reshape(2, 15)
    assert sorted(told[0]) == sorted(told[1]) and (told[0] != told[1]).mean() > 0.4


def test_frames_of_dnerf_come_back_with_their_times(tmp_path: Path) -> None:
    made = data()
    read = scene_data(DnerfConfig(path=str(write_dnerf(tmp_path, made))), seed=0)
    for own, found in ((made.train, read.train), (made.heldout, read.heldout)):
        np.testing.assert_array_equal(found.times, own.times)
        np.testing.assert_allclose(found.viewmats, own.viewmats, atol=2e-6)
        assert np.abs(found.images - own.images).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("time", ["missing", 1.5, "early"])
def test_a_time_that_is_none_is_refused(time, tmp_path: Path) -> None:
    config = DnerfConfig(path=str(write_dnerf(tmp_path, data())))
    file = tmp_path / "transforms_train.json"
    content = json.loads(file.read_text())
    if time == "missing":
        del content["frames"][0]["time"]
    else:
        content["frames"][0]["time"] = time
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"time|early"):
        scene_data(config, seed=0)


def test_configurations_that_contradict_themselves_are_refused() -> None:
    for keys in ({"first_steps": 5}, {"steps_per_time": 5}, {"things": 0}, {"times": 2}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            dataclasses.replace(MovingTabletopConfig(), **keys)
