"""Files of Gaussians: what comes back, what is lost, what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from training import formats
from training.errors import UserError
from training.formats import Splats

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def some(n: int = 50, degree: int = 3, seed: int = FRESH) -> Splats:
    rng = np.random.default_rng(seed)
    return Splats(
        rng.normal(size=(n, 3)) * 3, rng.normal(size=(n, 4)), rng.uniform(-8, 1, (n, 3)),
        rng.normal(size=n) * 2, rng.normal(size=(n, (degree + 1) ** 2, 3)) * 0.3,
    ).checked()  # fmt: skip


def turned(q: np.ndarray) -> np.ndarray:
    """Of length 1, w >= 0: the same turn."""
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    return np.where(q[:, :1] < 0, -q, q)


def apart(one: np.ndarray, two: np.ndarray) -> float:
    """Largest angle between two turns, in radians."""
    p, q = (turned(x.astype(np.float64)) for x in (one, two))
    chord = np.minimum(np.linalg.norm(p - q, axis=1), np.linalg.norm(p + q, axis=1))
    return float(4 * np.arcsin(np.clip(chord / 2, 0, 1)).max())  # arccos loses half the digits


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("ending", ["ply", "glb"])
def test_floats_come_back_as_they_were(ending: str, degree: int, tmp_path: Path) -> None:
    splats, file = some(degree=degree), tmp_path / f"scene.{ending}"
    formats.write(file, splats)
    found = formats.read(file)
    if ending == "ply":
        for name in ("means", "quats", "scales", "opacities", "sh"):
            assert (getattr(found, name) == getattr(splats, name)).all(), name
        return
    assert (found.means == splats.means).all() and (found.sh == splats.sh).all()
    assert np.abs(found.scales - splats.scales).max() < 1e-5
    assert np.abs(found.opacities - splats.opacities).max() < 1e-4
    assert apart(found.quats, splats.quats) < 1e-3


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spz_comes_back_within_half_a_step(degree: int, tmp_path: Path) -> None:
    splats, file = some(degree=degree), tmp_path / "scene.spz"
    formats.write(file, splats)
    found = formats.read(file)
    assert np.abs(found.means - splats.means).max() <= 0.5 / 4096 + 1e-6
    assert np.abs(found.scales - splats.scales).max() <= 0.5 / 16 + 1e-6
    share = 1 / (1 + np.exp(-splats.opacities)), 1 / (1 + np.exp(-found.opacities))
    assert np.abs(share[0] - share[1]).max() <= 0.5 / 255 + 1e-4
    assert np.abs(found.sh[:, 0] - splats.sh[:, 0]).max() <= 0.5 / 255 / 0.15 + 1e-5
    inside = np.abs(splats.sh) < 0.85
    wrong = np.where(inside, np.abs(found.sh - splats.sh), 0)
    assert wrong[:, 1:4].max(initial=0) <= 4.5 / 128 and wrong[:, 4:].max(initial=0) <= 8.5 / 128
    assert apart(found.quats, splats.quats) < 0.006


def test_spz_of_version_2_is_read(tmp_path: Path) -> None:
    """Written here by hand, as its description says."""
    q = some(7, 0).quats
    q[:, 0] = 1 + np.abs(q[:, 0])  # a w near 0 is what the other three leave of it
    q = turned(q)
    means = np.array([[1.5, -2.0, 0.25]] * 7)
    own = (means * [1, -1, -1] * 4096).astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3]
    rot = np.round(q[:, 1:] * [1, -1, -1] * 127.5 + 127.5).astype(np.uint8)
    body = struct.pack("<IIIBBBB", 0x5053474E, 2, 7, 0, 12, 0, 0) + own.tobytes()
    body += bytes([128] * 7) + bytes([255] * 21) + bytes([16 * 8] * 21) + rot.tobytes()
    file = tmp_path / "old.spz"
    file.write_bytes(gzip.compress(body))
    found = formats.read(file)
    np.testing.assert_allclose(found.means, means)
    np.testing.assert_allclose(found.scales, -2)
    np.testing.assert_allclose(found.sh[:, 0], 0.5 / 0.15, rtol=1e-6)
    assert apart(found.quats, q) < 0.05


def test_splat_keeps_what_is_seen_and_comes_sorted(tmp_path: Path) -> None:
    splats, file = some(degree=0), tmp_path / "scene.splat"
    formats.write(file, splats)
    found = formats.read(file)
    assert file.stat().st_size == 32 * len(splats)
    shows = -splats.opacities.astype(np.float64)
    weight = 1 / (1 + np.exp(shows)) * np.exp(splats.scales.sum(1))
    order = np.argsort(-weight, kind="stable")
    np.testing.assert_allclose(found.means, splats.means[order])
    np.testing.assert_allclose(found.scales, splats.scales[order], atol=1e-5)
    color = np.clip(0.5 + 0.28209479 * splats.sh[order, 0], 0, 1)
    assert np.abs(0.5 + 0.28209479 * found.sh[:, 0] - color).max() <= 0.5 / 255 + 1e-5
    assert apart(found.quats, splats.quats[order]) < 0.03


@pytest.mark.parametrize("ending", ["ply", "splat", "spz", "glb"])
def test_none_is_a_scene_too(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"none.{ending}"
    formats.write(file, some(0, 0))
    assert len(formats.read(file)) == 0


@pytest.mark.parametrize("ending", ["ply", "splat", "spz", "glb"])
def test_what_is_cut_short_anywhere_is_refused_in_one_sentence(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"scene.{ending}"
    formats.write(file, some(9, 1))
    content, rng = file.read_bytes(), np.random.default_rng(FRESH)
    for size in [0, 1, len(content) - 1, *rng.integers(2, len(content) - 1, 30).tolist()]:
        if ending == "splat" and size % 32 == 0:
            continue  # a whole number of them
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"is no whole \.{ending} file"):
            formats.read(file)


@pytest.mark.parametrize("ending", ["ply", "splat", "spz", "glb"])
def test_damage_is_refused_or_read_but_never_more(ending: str, tmp_path: Path) -> None:
    """No byte that is changed leads to anything but a scene or the one sentence."""
    file = tmp_path / f"scene.{ending}"
    formats.write(file, some(9, 1))
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(FRESH)
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            formats.read(file).checked()
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"means": np.full((3, 3), np.nan)}, "means has infinite or undefined values"),
        ({"scales": np.full((3, 3), np.inf)}, "scales has infinite or undefined values"),
        ({"quats": np.zeros((2, 4))}, r"quats is \[2, 4\], expected \[3, 4\]"),
        ({"sh": np.zeros((3, 5, 3))}, "5 spherical harmonics"),
    ],
)
def test_what_is_no_scene_is_not_written(change: dict, says: str, tmp_path: Path) -> None:
    from dataclasses import replace

    file = tmp_path / "scene.ply"
    with pytest.raises(UserError, match=says):
        formats.write(file, replace(some(3, 0), **change))
    assert not file.exists()


def test_what_a_format_does_not_hold_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    far = replace(some(3, 0), means=np.full((3, 3), 3000.0))
    with pytest.raises(UserError, match="a place is 3000 away, SPZ reaches 2048"):
        formats.write(tmp_path / "far.spz", far)
    with pytest.raises(UserError, match=r"give a file that ends in \.ply, \.splat, \.spz, \.glb"):
        formats.write(tmp_path / "scene.obj", some(3, 0))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        formats.read(tmp_path / "nothing.ply")


def test_text_of_another_order_is_read_too(tmp_path: Path) -> None:
    names = ["opacity", "x", "y", "z", "red", *(f"f_dc_{i}" for i in range(3)),
             *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]  # fmt: skip
    header = ["ply", "format ascii 1.0", "comment by hand", "element vertex 2",
              *(f"property double {name}" for name in names), "end_header"]  # fmt: skip
    rows = ["0.5 1 2 3 9 .1 .2 .3 -1 -2 -3 1 0 0 0", "-1 4 5 6 9 0 0 0 0 0 0 0 1 0 0"]
    file = tmp_path / "text.ply"
    file.write_text("\n".join([*header, *rows]) + "\n")
    found = formats.read(file)
    np.testing.assert_allclose(found.means, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_allclose(found.quats, [[1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_allclose(found.opacities, [0.5, -1])
    file.write_text("\n".join(["ply", "format ascii 1.0", "element vertex 0", "property float x",
                               "end_header", ""]))  # fmt: skip
    with pytest.raises(UserError, match="it has no y, z, f_dc_0"):
        formats.read(file)
