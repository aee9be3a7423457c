"""Recorded episodes of every kind of file, and games that are recorded first."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.data.config_episodes import AtariConfig, EpisodesConfig
from training.data.corpus import DataError
from training.data.episodes import EpisodesData, Played, scaled
from training.distributed import Processes
from training.errors import UserError
from training.recipes import diamond

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails


def episode(frames: int, number: int = 0, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([FRESH, number])
    return {
        "frames": rng.integers(256, size=(frames, size, size, 3), dtype=np.uint8),
        "actions": rng.integers(3, size=frames - 1),
        "rewards": rng.normal(size=frames - 1).astype(np.float32),
        "ends": np.arange(frames - 1) == frames - 2,
    }


def as_npz(file: Path, one: dict[str, np.ndarray]) -> None:
    np.savez(file.with_suffix(".npz"), **one)


def as_hdf5(file: Path, one: dict[str, np.ndarray]) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(file.with_suffix(".h5"), "w") as content:
        for name, value in one.items():
            content[name] = value


def as_table(file: Path, one: dict[str, np.ndarray]) -> None:
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    def png(frame: np.ndarray) -> bytes:
        content = io.BytesIO()
        Image.fromarray(frame).save(content, "PNG")
        return content.getvalue()

    last = {"actions": 0, "rewards": 0.0, "ends": False}
    columns = {"frame": [{"bytes": png(frame), "path": None} for frame in one["frames"]]}
    columns |= {k[:-1]: [*one[k].tolist(), value] for k, value in last.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), file.with_suffix(".parquet"))


def as_film(file: Path, one: dict[str, np.ndarray]) -> None:
    av = pytest.importorskip("av")
    with av.open(str(file.with_suffix(".mkv")), "w") as content:
        stream = content.add_stream("ffv1", rate=10)
        stream.width = stream.height = one["frames"].shape[1]
        stream.pix_fmt = "bgr0"
        for frame in one["frames"]:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            content.mux(stream.encode(picture.reformat(format="bgr0")))
        content.mux(stream.encode())
    np.savez(file.with_suffix(".npz"), **{k: v for k, v in one.items() if k != "frames"})


def opened(path: Path, **changes: object) -> EpisodesData:
    sizes = {"image_size": 16, "seq_len": 4, "batch_size": 6, "heldout": 0.3}
    return EpisodesData(EpisodesConfig(path=str(path), **(sizes | changes)), seed=1)  # type: ignore


@pytest.mark.parametrize("write", [as_npz, as_hdf5, as_table, as_film])
def test_what_was_recorded_is_what_is_read(write, tmp_path: Path) -> None:
    told = [episode(7 + number, number) for number in range(3)]
    for number, one in enumerate(told):
        write(tmp_path / f"e{number}", one)
    data = opened(tmp_path)
    assert len(data.files) == 3 and 0 < sum(data.held) < 3
    for number, one in enumerate(told):
        read = data.episode(number)
        for name in Played._fields:
            np.testing.assert_array_equal(getattr(read, name), one[name], err_msg=name)


def test_windows_are_of_one_episode_every_one_of_an_epoch_once_and_none_that_is_held_out(
    tmp_path: Path,
) -> None:
    told = [episode(7 + number, number) for number in range(4)]
    for number, one in enumerate(told):
        as_npz(tmp_path / f"e{number}", one)
    data = opened(tmp_path)

    def where(window: np.ndarray) -> tuple[int, int]:
        (found,) = [
            (number, first)
            for number, one in enumerate(told)
            for first in range(len(one["frames"]) - len(window) + 1)
            if np.array_equal(one["frames"][first : first + len(window)], window)
        ]
        return found

    shown = [number for number, out in enumerate(data.held) if not out]
    count = sum(len(told[number]["frames"]) - 3 for number in shown)
    seen = []
    for step in range(-(-count // 6)):
        batch = data.batch(step)
        for i in range(6):
            number, first = where(batch["frames"][i])
            assert number in shown
            for name in ("actions", "rewards", "ends"):
                np.testing.assert_array_equal(batch[name][i], told[number][name][first : first + 3])
            seen.append((number, first))
    assert len(set(seen[:count])) == count
    out = data.heldout(5, 6)
    assert {where(window)[0] for window in out.frames} <= {i for i, o in enumerate(data.held) if o}
    parts = [
        EpisodesData(data.config, seed=1, rank=rank, world=2).batch(3)["actions"] for rank in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), data.batch(3)["actions"])
    was = data.content_hash
    assert opened(tmp_path).content_hash == was
    as_npz(tmp_path / "e0", told[0] | {"actions": 2 - told[0]["actions"]})
    assert opened(tmp_path).content_hash != was


def test_frames_of_other_sizes_are_averaged_over_what_they_cover() -> None:
    frames = episode(2, size=16)["frames"]
    small = scaled(frames, 8)
    blocks = frames.reshape(2, 8, 2, 8, 2, 3).mean((2, 4))
    assert np.abs(small - blocks).max() <= 1
    assert scaled(frames, 16) is frames


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frames": None}, r"frames must be uint8 \[t, h, w, 3\], they are none"),
        ({"frames": np.zeros((7, 16, 16, 3))}, r"they are float64 \[7, 16, 16, 3\]"),
        ({"actions": np.full(6, 3)}, r"actions\[0\] is 3: with data\.actions=3 they are 0 to 2"),
        ({"actions": np.zeros(6)}, r"actions must be \[6\], a number each, they are float64"),
        ({"actions": np.zeros(4, int)}, r"7 frames have 6 actions, not 4"),
        ({"rewards": np.full(6, np.nan)}, r"a reward is no number below"),
        ({"ends": np.zeros((6, 2), bool)}, r"ends must be \[6\], a number each"),
        ({"frames": np.array([{"a": 1}], object)}, r"cannot be read: .*[Pp]ickle"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run_begins(change, says: str, tmp_path: Path) -> None:
    as_npz(tmp_path / "e0", episode(7))
    bad = {k: v for k, v in (episode(7, 1) | change).items() if v is not None}
    as_npz(tmp_path / "e1", bad)
    with pytest.raises(DataError, match=r"e1\.npz.*" + says):
        opened(tmp_path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=None: 0 episodes; name a directory"):
        EpisodesData(EpisodesConfig(), seed=0)
    as_npz(tmp_path / "e0", episode(7))
    with pytest.raises(DataError, match="1 episodes; name a directory with at least two"):
        opened(tmp_path)
    for name in ("e1.h5", "e1.parquet", "e1.mkv", "e1.npz"):
        (tmp_path / name).write_bytes(b"not this")
        if name == "e1.mkv":
            np.savez(tmp_path / "e1.npz", actions=np.zeros(3, int))
        with pytest.raises(DataError, match=r"e1\.\w+ cannot be read"):
            opened(tmp_path)
        (tmp_path / name).unlink()
    as_npz(tmp_path / "e1", episode(7))
    with pytest.raises(DataError, match=r"no episode has the 9 frames of a window, the longest"):
        opened(tmp_path, seq_len=9).batch(0)


def test_a_world_is_learned_from_recorded_films(tmp_path: Path) -> None:
    for number in range(4):
        as_npz(tmp_path / f"e{number}", episode(14, number))
    small = [o for o in (*SMALL_PINFALL["diamond"], *SMALL_WORLD) if not o.startswith(
        ("data.worlds", "data.length"))]  # fmt: skip
    sets = [*small, "data=episodes", f"data.path={tmp_path}", "data.heldout=0.5"]
    made = diamond.build(compose([*sets, "recipe.splits=[]"]), Processes(), torch.device("cpu"))
    made.step(made.data.batch(0))
    found = made.evaluate(final=True)
    assert {"eval/psnr/5", "eval/ssim/5", "eval/delta_psnr", "eval/shuffled_actions"} <= {*found}
    assert not any("error" in name or "alive" in name for name in found)
    blind = compose([*sets, "recipe.splits=[]", "recipe.blind=true"])
    found = diamond.build(blind, Processes(), torch.device("cpu")).evaluate()
    assert found["eval/delta_psnr"] == 0
    with pytest.raises(UserError, match=r"recipe\.splits=\['pairs'\] are of data=pinfall"):
        diamond.build(compose(sets), Processes(), torch.device("cpu"))


def test_a_game_is_played_before_the_run_and_the_seed_decides_all_of_it() -> None:
    pytest.importorskip("ale_py")
    from training.data.atari import AtariData, names_of

    config = AtariConfig(frames=300, image_size=32, batch_size=4)
    data = AtariData(config, seed=3)
    assert names_of(config) == ("noop", "fire", "right", "left") and sum(data.lengths) == 300 + len(
        data.lengths
    )
    assert AtariData(config, seed=3).content_hash == data.content_hash
    assert AtariData(config, seed=4).content_hash != data.content_hash
    batch = data.batch(0)
    assert batch["frames"].shape == (4, 5, 32, 32, 3) and batch["frames"].max() > 50
    ends = [one.ends for one in data.episodes]
    assert all(not e[:-1].any() for e in ends) and all(e[-1] for e in ends[:-1])
    with pytest.raises(DataError, match=r"data\.game=brakeout: there is no such game"):
        AtariData(AtariConfig(game="brakeout"), seed=0)
