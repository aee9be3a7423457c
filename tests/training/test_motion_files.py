"""Scenes whose parts move, as animated glTF: what comes back, what other programs see, refusals."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from training.formats.gaussians import Splats
from training.formats.gltf import JSON, Motion, parse, parse_moving, serialise_moving

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def some() -> Motion:
    """Two parts at five times; quaternions of any sign and length."""
    rng = np.random.default_rng(FRESH)

    def part(n: int) -> Splats:
        return Splats(rng.normal(size=(n, 3)), rng.normal(size=(n, 4)), rng.normal(size=(n, 3)),
                      rng.normal(size=n), rng.normal(size=(n, 4, 3))).checked()  # fmt: skip

    poses = rng.normal(size=(2, 5, 7)).astype(np.float32)
    times = np.cumsum(rng.uniform(0.1, 1, 5)).astype(np.float32)
    return Motion((part(7), part(4)), ("box", "ball"), times, poses)


def document_of(content: bytes) -> dict:
    length, kind = struct.unpack_from("<II", content, 12)
    assert kind == JSON
    return json.loads(content[20 : 20 + length])


def rewritten(content: bytes, document: dict) -> bytes:
    (length,) = struct.unpack_from("<I", content, 12)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    rest = content[20 + length :]
    head = struct.pack("<IIIII", 0x46546C67, 2, 20 + len(text) + len(rest), len(text), JSON)
    return head + text + rest


def test_parts_and_poses_come_back() -> None:
    motion = some()
    found = parse_moving(serialise_moving(motion))
    assert found.names == motion.names and (found.times == motion.times).all()
    np.testing.assert_array_equal(found.poses[..., :3], motion.poses[..., :3])
    told, true = (Rotation.from_quat(x.poses[..., 3:].reshape(-1, 4), scalar_first=True)
                  for x in (found, motion))  # fmt: skip
    assert (told.inv() * true).magnitude().max() < 1e-3
    for a, b in zip(found.parts, motion.parts, strict=True):
        assert (a.means == b.means).all() and (a.sh == b.sh).all()


def test_turns_take_the_shorter_way_between_times() -> None:
    """A player that mixes quaternions as they are turns as one that knows their two signs."""
    q = parse_moving(serialise_moving(some())).poses[..., 3:]
    assert ((q[:, 1:] * q[:, :-1]).sum(-1) >= 0).all()
    half = (q[0, 0] + q[0, 1]) / np.linalg.norm(q[0, 0] + q[0, 1])
    ends = Rotation.from_quat(q[0, :2], scalar_first=True)
    told = Rotation.from_quat(half, scalar_first=True)
    assert (Slerp([0, 1], ends)(0.5).inv() * told).magnitude() < 1e-3


def test_the_document_is_an_animation_of_named_nodes_below_one_that_is_upright() -> None:
    document = document_of(serialise_moving(some()))
    root, *nodes = document["nodes"]
    up = Rotation.from_quat(root["rotation"]).apply([0, 0, 1])
    np.testing.assert_allclose(up, [0, 1, 0], atol=1e-6)
    assert root["children"] == [1, 2] and [n["name"] for n in nodes] == ["box", "ball"]
    (animation,) = document["animations"]
    targets = {(c["target"]["node"], c["target"]["path"]) for c in animation["channels"]}
    assert targets == {(n, p) for n in (1, 2) for p in ("translation", "rotation")}
    times = document["accessors"][animation["samplers"][0]["input"]]
    motion = some()
    assert times["min"] == [pytest.approx(float(motion.times[0]))]
    assert times["max"] == [pytest.approx(float(motion.times[-1]))]
    used = [len(document["accessors"]), len(document["bufferViews"])]
    assert used[0] == used[1]


def test_one_part_can_be_read_as_a_scene() -> None:
    motion = some()
    assert (parse(serialise_moving(motion)).means == motion.parts[0].means).all()


def test_what_makes_no_motion_is_refused() -> None:
    motion = some()
    for wrong in (replace(motion, names=("box",)), replace(motion, poses=motion.poses[:1])):
        with pytest.raises(ValueError, match="do not belong together"):
            serialise_moving(wrong)
    with pytest.raises(ValueError, match="times must rise"):
        serialise_moving(replace(motion, times=motion.times[::-1].copy()))


def test_files_that_move_nothing_or_are_broken_are_refused() -> None:
    content = serialise_moving(some())
    document = document_of(content)
    for change, message in (
        (lambda d: d.pop("animations"), "lacks 'animations'"),
        (lambda d: d["animations"][0]["samplers"][0].update(interpolation="STEP"), "STEP"),
        (lambda d: d["animations"][0]["samplers"][0].update(input=0), "times of their own"),
        (lambda d: d["animations"][0]["channels"][0]["target"].update(node=99), "lacks"),
        (lambda d: d["animations"][0]["samplers"][1].update(output=999), "lacks"),
    ):
        broken = json.loads(json.dumps(document))
        change(broken)
        with pytest.raises(ValueError, match=message):
            parse_moving(rewritten(content, broken))
    for cut in (10, 40, len(content) - 5):
        with pytest.raises(ValueError):
            parse_moving(content[:cut])
