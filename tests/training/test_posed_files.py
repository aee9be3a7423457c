"""A ray-traced scene, written as each program writes scenes, is read back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scene_files import POINTS, colmap_binary, put_images, quaternion
from training.data.config_scenes import (
    BlenderConfig,
    ColmapConfig,
    LlffConfig,
    NerfstudioConfig,
    TabletopConfig,
)
from training.data.corpus import DataError
from training.data.posed import Posed
from training.data.posed_files import OPENGL
from training.data.tabletop import TabletopData
from training.scenes import scene_data

SIZE, VIEWS = 24, 9


@pytest.fixture(scope="module")
def scene() -> Posed:
    config = TabletopConfig(image_size=SIZE, views=VIEWS, heldout=1, samples=1, things=3)
    return TabletopData(config, seed=3).train


def blender(scene: Posed, folder: Path) -> BlenderConfig:
    focal = float(scene.Ks[0, 0, 0])
    parts = {"train": range(6), "test": range(6, VIEWS)}
    for part, rows in parts.items():
        matrices = np.linalg.inv(scene.viewmats.astype(np.float64)) @ OPENGL
        frames = [
            {"file_path": f"./{part}/r_{i}", "transform_matrix": matrices[i].tolist()} for i in rows
        ]
        angle = 2 * np.arctan(SIZE / 2 / focal)
        content = {"camera_angle_x": angle, "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(content))
    names = [f"{'train' if i < 6 else 'test'}/r_{i}.png" for i in range(VIEWS)]
    put_images(scene, folder, names)
    return BlenderConfig(path=str(folder))


def nerfstudio(scene: Posed, folder: Path) -> NerfstudioConfig:
    names = [f"images/{i:02}.png" for i in range(VIEWS)]
    put_images(scene, folder, names)
    K = scene.Ks[0].astype(float)
    frames = [
        {
            "file_path": name,
            "transform_matrix": (np.linalg.inv(m.astype(np.float64)) @ OPENGL).tolist(),
        }
        for name, m in zip(names, scene.viewmats, strict=True)
    ]
    content = {
        "fl_x": K[0, 0],
        "fl_y": K[1, 1],
        "cx": K[0, 2],
        "cy": K[1, 2],
        "k1": 0.0,
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(content))
    return NerfstudioConfig(path=str(folder), heldout_every=3)


def llff(scene: Posed, folder: Path) -> LlffConfig:
    put_images(scene, folder, [f"images/{i:02}.png" for i in range(VIEWS)])
    rows = []
    for viewmat, K in zip(scene.viewmats.astype(np.float64), scene.Ks, strict=True):
        right, down, forward, eye = np.linalg.inv(viewmat)[:3].T
        pose = np.stack([down, right, -forward, eye, [SIZE, SIZE, K[0, 0]]], axis=1)
        rows.append([*pose.ravel(), 1.0, 9.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return LlffConfig(path=str(folder), heldout_every=3)


def colmap_text(scene: Posed, folder: Path) -> ColmapConfig:
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    names = [f"{i:02}.png" for i in range(VIEWS)]
    put_images(scene, folder / "images", names)
    K = scene.Ks[0].astype(float)
    cameras = f"# cameras\n7 SIMPLE_RADIAL {SIZE} {SIZE} {float(K[0, 0])!r} {K[0, 2]} {K[1, 2]} 0\n"
    images = "# images\n"
    for i, (name, m) in enumerate(zip(names, scene.viewmats.astype(np.float64), strict=True)):
        pose = " ".join(repr(float(x)) for x in (*quaternion(m[:3, :3]), *m[:3, 3]))
        images += f"{i + 1} {pose} 7 {name}\n{'1.0 2.0 5' if i % 2 else ''}\n"
    points = "".join(f"{i} {a} {b} {c} 255 0 51 0.1 1 0\n" for i, (a, b, c) in enumerate(POINTS))
    for name, content in (("cameras", cameras), ("images", images), ("points3D", points)):
        (sparse / f"{name}.txt").write_text(content)
    return ColmapConfig(path=str(folder), heldout_every=3)


WRITERS = [blender, nerfstudio, llff, colmap_binary, colmap_text]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_cameras_and_images_come_back(write, scene: Posed, tmp_path: Path) -> None:
    data = scene_data(write(scene, tmp_path), seed=0)
    rows = [int("".join(c for c in Path(n).stem if c.isdigit())) for n in data.train.names]
    held = [int("".join(c for c in Path(n).stem if c.isdigit())) for n in data.heldout.names]
    assert sorted([*rows, *held]) == list(range(VIEWS)) and len(held) == 3
    for part, own in ((data.train, rows), (data.heldout, held)):
        np.testing.assert_allclose(part.viewmats, scene.viewmats[own], atol=2e-6)
        np.testing.assert_allclose(part.Ks, scene.Ks[own], rtol=1e-6)
        assert np.abs(part.images - scene.images[own]).max() <= 0.5 / 255 + 1e-6
    low, high = data.box
    assert (low < 0).all() and (high > 0).all()  # what all look at is inside
    if "colmap" in write.__name__:
        assert data.cloud is not None
        np.testing.assert_allclose(data.cloud.points, POINTS, atol=1e-6)
        np.testing.assert_allclose(data.cloud.colors, [[1, 0, 0.2]] * 2, atol=1e-6)


def test_smaller_images_are_averages_with_cameras_to_match(scene: Posed, tmp_path: Path) -> None:
    config = blender(scene, tmp_path)
    whole = scene_data(config, seed=0)
    config.downscale = 4
    small = scene_data(config, seed=0)
    wanted = whole.train.images.reshape(6, SIZE // 4, 4, SIZE // 4, 4, 3).mean((2, 4))
    np.testing.assert_allclose(small.train.images, wanted, atol=1e-6)
    np.testing.assert_allclose(small.train.Ks[:, :2], whole.train.Ks[:, :2] / 4)


def test_what_is_transparent_shows_the_background(scene: Posed, tmp_path: Path) -> None:
    config = blender(scene, tmp_path)
    glass = np.zeros((SIZE, SIZE, 4), np.uint8)
    glass[:, :, 0], glass[: SIZE // 2, :, 3] = 255, 255
    Image.fromarray(glass).save(tmp_path / "train" / "r_0.png")
    for white, below in ((True, 1.0), (False, 0.0)):
        config.white = white
        image = scene_data(config, seed=0).train.images[0]
        assert (image[0, 0] == [1, 0, 0]).all() and (image[-1, 0] == below).all()


def test_images_that_are_missing_are_left_out_with_a_warning(scene: Posed, tmp_path: Path) -> None:
    config = nerfstudio(scene, tmp_path)
    (tmp_path / "images" / "04.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 6 images that are listed are missing.*04\.png"):
        data = scene_data(config, seed=0)
    assert len(data.train.names) == 5


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_files_that_are_cut_short_are_refused_in_one_sentence(write, scene, tmp_path) -> None:
    config, rng = write(scene, tmp_path), np.random.default_rng(0)
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix not in (".png", ".txt")]
    for file in files:
        content = file.read_bytes()
        for size in (0, 1, len(content) // 2, int(rng.integers(2, len(content) - 2))):
            file.write_bytes(content[:size])
            with pytest.raises(DataError) as raised:
                scene_data(config, seed=0)
            assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
        file.write_bytes(content)


def test_what_cannot_be_used_is_refused(scene: Posed, tmp_path: Path) -> None:
    config = nerfstudio(scene, tmp_path)
    file = tmp_path / "transforms.json"
    content = json.loads(file.read_text())
    for change, says in (
        ({"k1": 0.1}, r"a lens bends its images \(k1=0.1\): undistort them before"),
        ({"fl_x": 0}, "make no camera"),
        ({"fl_x": "wide"}, "lacks could not convert"),
        ({"frames": [{"file_path": "images/00.png"}]}, "lacks 'transform_matrix'"),
        ({"frames": [{"file_path": "a", "transform_matrix": [[1, 2], [3, 4]]}]}, "is not 4 x 4"),
        (
            {"frames": [{"file_path": "a", "transform_matrix": [[2, 0, 0, 0]] * 4}]},
            "is no rotation",
        ),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=says):
            scene_data(config, seed=0)
    file.write_text(json.dumps(content))
    Image.new("RGB", (SIZE, SIZE + 2)).save(tmp_path / "images" / "04.png")
    with pytest.raises(DataError, match="24 x 24 and of 24 x 26 pixels: give images of one size"):
        scene_data(config, seed=0)
    (tmp_path / "images" / "04.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"04\.png is no image"):
        scene_data(config, seed=0)
    for path, says in ((None, "data=nerfstudio needs data.path"), ("/nowhere", "is no folder")):
        with pytest.raises(DataError, match=says):
            scene_data(NerfstudioConfig(path=path), seed=0)
