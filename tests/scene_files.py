"""Scenes in files, as programs other than ours write them."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.config_scenes import ColmapConfig, MovingTabletopConfig, TabletopConfig
from training.data.moving_tabletop import MovingTabletopData
from training.data.posed import Posed
from training.data.posed_files import OPENGL
from training.data.tabletop import TabletopData

POINTS = np.array([[0.0, 0.1, 0.2], [-1.0, 2.0, 0.5]])


def quaternion(R: np.ndarray) -> np.ndarray:
    """wxyz of a rotation."""
    w = np.sqrt(max(0.0, 1 + np.trace(R))) / 2
    if w > 1e-3:
        axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / (4 * w)
        return np.array([w, *axis])
    values, vectors = np.linalg.eigh(R)
    return np.array([0.0, *vectors[:, values.argmax()]])


def put_images(scene: Posed, folder: Path, names: list[str]) -> None:
    for image, name in zip(scene.images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(folder / name)


def colmap_binary(scene: Posed, folder: Path, points: np.ndarray = POINTS) -> ColmapConfig:
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    size, names = scene.images.shape[1], [f"{i:02}.png" for i in range(len(scene.images))]
    put_images(scene, folder / "images", names)
    K = scene.Ks[0].astype(float)
    cameras = struct.pack("<QiiQQ4d", 1, 7, 1, size, size, K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    images = struct.pack("<Q", len(names))
    for i, (name, m) in enumerate(zip(names, scene.viewmats.astype(np.float64), strict=True)):
        images += struct.pack("<i7di", i + 1, *quaternion(m[:3, :3]), *m[:3, 3], 7)
        images += name.encode() + b"\0" + struct.pack("<Q", 1) + struct.pack("<ddq", 1.0, 2.0, 5)
    packed = struct.pack("<Q", len(points))
    for i, point in enumerate(points):
        packed += struct.pack("<Q3d3BdQii", i, *point, 255, 0, 51, 0.1, 1, 1, 0)
    for name, content in (("cameras", cameras), ("images", images), ("points3D", packed)):
        (sparse / f"{name}.bin").write_bytes(content)
    return ColmapConfig(path=str(folder), heldout_every=3)


def write_colmap(folder: Path) -> Path:
    """A small table as COLMAP leaves scenes."""
    config = TabletopConfig(image_size=24, views=9, heldout=1, samples=1, things=2)
    points = np.random.default_rng(0).uniform((-1, -1, 0), (1, 1, 0.5), (100, 3))
    colmap_binary(TabletopData(config, seed=3).train, folder, points)
    return folder


def write_dnerf(folder: Path, made: MovingTabletopData | None = None) -> Path:
    """A small table whose things move as D-NeRF's scenes are written."""
    folder.mkdir(exist_ok=True)
    if made is None:
        small = {"image_size": 24, "cameras": 3, "heldout": 1, "times": 5, "samples": 1}
        made = MovingTabletopData(MovingTabletopConfig(things=2, **small), seed=3)
    focal, size = float(made.train.Ks[0, 0, 0]), made.train.images.shape[1]
    for part, posed in (("train", made.train), ("test", made.heldout)):
        names = [f"{part}/r_{i:03}" for i in range(len(posed.names))]
        frames = [
            {
                "file_path": f"./{name}",
                "time": float(time),
                "transform_matrix": (np.linalg.inv(m.astype(np.float64)) @ OPENGL).tolist(),
            }
            for name, time, m in zip(names, posed.times, posed.viewmats, strict=True)
        ]
        content = {"camera_angle_x": 2 * math.atan(size / 2 / focal), "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(content))
        put_images(posed, folder, [f"{name}.png" for name in names])
    return folder
