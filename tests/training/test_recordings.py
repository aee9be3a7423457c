"""Data sets as others recorded them: what is in their files is what is learned from."""

from __future__ import annotations

import importlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from models.worlds.video.actions import ActionTable, packed, strides
from tests.helpers import SMALL_PINFALL, SMALL_WORLD
from training.config import compose
from training.data.config_episodes import BUTTONS, CsgoConfig, ProcgenConfig, VptConfig
from training.data.corpus import DataError
from training.data.csgo import CsgoData
from training.data.episodes import RecordedData
from training.data.procgen import ProcgenData
from training.data.vpt import VptData, places
from training.distributed import Processes
from training.errors import UserError
from training.recipes import diamond, genie
from training.worlds import choices_of

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
SIZES: dict[str, Any] = {"image_size": 16, "seq_len": 4, "batch_size": 4, "heldout": 0.3}


def frames(count: int, height: int, width: int, number: int = 0) -> np.ndarray:
    rng = np.random.default_rng([FRESH, number])
    return rng.integers(256, size=(count, height, width, 3), dtype=np.uint8)


def parts_of(action: np.ndarray, counts: list[int]) -> np.ndarray:
    return action[..., None] // np.array(strides(counts)) % np.array(counts)


def test_an_action_of_several_parts_is_the_sum_of_their_vectors() -> None:
    counts = [2, 11, 3]
    table = ActionTable(counts, 5, none=True)
    rng = np.random.default_rng(FRESH)
    parts = rng.integers(counts, size=(7, 3))
    actions = torch.from_numpy(packed(parts, counts))
    assert actions.max() < 66 and len({*range(66)} & {*actions.tolist()}) == len(actions.unique())
    np.testing.assert_array_equal(parts_of(actions.numpy(), counts), parts)
    weight = table.weight.detach()
    wanted = weight[parts[:, 0]] + weight[2 + parts[:, 1]] + weight[13 + parts[:, 2]]
    torch.testing.assert_close(table(actions), wanted)
    torch.testing.assert_close(table(torch.tensor([66])), weight[-1:])
    torch.testing.assert_close(ActionTable([4], 5, none=True).state_dict()["weight"].shape, (5, 5))
    everything = torch.arange(66)
    assert len(table(everything).unique(dim=0)) == 66, "no two actions are alike"


def write_csgo(path: Path, count: int = 9, **changes: Any) -> dict[str, np.ndarray]:
    """Two files; what is in the first."""
    h5py = pytest.importorskip("h5py")
    rng, told = np.random.default_rng(FRESH), {}
    for name in ("b.hdf5", "a.hdf5"):
        told = {
            "x": frames(count, 30, 56, ord(name[0])),
            "y": np.zeros((count, 51), np.float32),
            "helperarr": rng.integers(2, size=(count, 2)),
        }
        told["y"][:, :13] = rng.integers(2, size=(count, 13))
        told["y"][np.arange(count), 13 + rng.integers(23, size=count)] = 1
        told["y"][np.arange(count), 36 + rng.integers(15, size=count)] = 1
        told |= changes
        with h5py.File(path / name, "w") as content:
            for i in range(count):
                for key in ("x", "y", "helperarr"):
                    content[f"frame_{i}_{key}"] = told[key][i]
    return told


def test_csgo_is_read_with_its_keys_its_mouse_and_its_colours_in_order(tmp_path: Path) -> None:
    told = write_csgo(tmp_path)
    data = CsgoData(CsgoConfig(path=str(tmp_path), **SIZES), seed=0)
    assert data.lengths == [9, 9] and sum(data.held) == 1
    one = data.part(0, 2, 4)
    parts = parts_of(one.actions, [part.values for part in CsgoConfig.parts])
    np.testing.assert_array_equal(parts[:, :13], told["y"][2:5, :13])
    np.testing.assert_array_equal(parts[:, 13], told["y"][2:5, 13:36].argmax(1))
    np.testing.assert_array_equal(parts[:, 14], told["y"][2:5, 36:].argmax(1))
    np.testing.assert_array_equal(one.rewards, told["helperarr"][3:6] @ [1, -1])
    np.testing.assert_array_equal(one.ends, told["helperarr"][3:6, 1] > 0)
    whole = CsgoData(CsgoConfig(path=str(tmp_path), **SIZES), seed=0).episode(0)
    assert whole.frames.shape == (9, 16, 16, 3)
    mean = told["x"].mean((1, 2))[:, ::-1]
    assert np.abs(whole.frames.mean((1, 2)) - mean).max() < 4, "red is the last of the file's"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y": np.zeros((9, 51))}, "the mouse must be in one place of 23"),
        ({"y": np.full((9, 51), 0.5)}, "must be 51 of 0 and 1"),
        ({"y": np.zeros((9, 50))}, "must be 51 of 0 and 1"),
        ({"x": np.zeros((9, 4, 4))}, r"frame_0_x must be uint8 \[h, w, 3\], it is"),
        ({"helperarr": np.zeros((9, 3))}, r"helperarr must be \[2\]"),
    ],
)
def test_other_files_than_those_of_csgo_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_csgo(tmp_path, **changes)
    data = CsgoData(CsgoConfig(path=str(tmp_path), **SIZES), seed=0)
    with pytest.raises(DataError, match=r"a\.hdf5.*" + says):
        data.part(0, 0, 4)


def write_procgen(path: Path, files: int = 2, rows: int = 11) -> dict[str, np.ndarray]:
    count, rng = files * rows, np.random.default_rng(FRESH)
    told = {
        "observation": frames(count, 64, 64),
        "action": rng.integers(15, size=count).astype(np.uint8),
        "reward": rng.normal(size=count).astype(np.float32),
        "done": np.isin(np.arange(count), (6, 15)),
    }
    for number in range(files):
        part = {k: v[number * rows : (number + 1) * rows] for k, v in told.items()}
        columns = {k: v.tolist() for k, v in part.items()}
        kind = pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
        columns["observation"] = pyarrow.array(columns["observation"], kind)
        columns["action"] = pyarrow.array(columns["action"], pyarrow.uint8())
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path / f"t-{number}.parquet", row_group_size=4)
    return told


def test_episodes_of_procgen_go_on_over_files_and_groups_of_rows(tmp_path: Path) -> None:
    told = write_procgen(tmp_path)
    data = ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES | {"image_size": 64}), seed=0)
    assert data.lengths == [7, 9, 6] and 0 < sum(data.held) < 3
    for number, first in enumerate((0, 7, 16)):
        one, length = data.episode(number), data.lengths[number]
        np.testing.assert_array_equal(one.frames, told["observation"][first : first + length])
        np.testing.assert_array_equal(one.actions, told["action"][first : first + length - 1])
        np.testing.assert_array_equal(one.rewards, told["reward"][first : first + length - 1])
        assert not one.ends.any(), "what came after the last step is not known"
    (tmp_path / "t-1.parquet").rename(tmp_path / "u-1.parquet")
    parted = ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES), seed=0)
    assert parted.lengths == [7, 4, 5, 6], "no episode goes on in another part"
    table = pyarrow.parquet.read_table(tmp_path / "t-0.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["done"]), tmp_path / "t-1.parquet")
    with pytest.raises(DataError, match=r"t-1\.parquet has no column `done`"):
        ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES), seed=0)
    (tmp_path / "t-1.parquet").write_bytes(b"PAR1 not this")
    with pytest.raises(DataError, match=r"t-1\.parquet cannot be read"):
        ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES), seed=0)


def test_procgen_is_read_as_pictures_and_with_other_names_for_an_end(tmp_path: Path) -> None:
    from PIL import Image

    told = write_procgen(tmp_path)
    pictures = []
    for frame in told["observation"]:
        Image.fromarray(frame).save(file := io.BytesIO(), "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    count = len(pictures)
    columns = {
        "observation": pictures,
        "action": pyarrow.array(told["action"], pyarrow.uint8()),
        "reward": told["reward"],
        "terminated": np.arange(count) == 6,
        "truncated": np.arange(count) == 15,
    }
    for file in tmp_path.iterdir():
        file.unlink()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t-0.parquet", row_group_size=4)
    data = ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES | {"image_size": 64}), seed=0)
    assert data.lengths == [7, 9, 6]
    np.testing.assert_array_equal(data.episode(1).frames, told["observation"][7:16])
    columns["observation"] = [{"bytes": b"GIF89a", "path": None}] * count
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t-0.parquet")
    data = ProcgenData(ProcgenConfig(path=str(tmp_path), **SIZES), seed=0)
    with pytest.raises(DataError, match=r"t-0\.parquet: a picture of 64 x 64 is none"):
        data.part(0, 0, 2)


def tick(
    keys: tuple[str, ...] = (),
    buttons: tuple[int, ...] = (),
    fresh: tuple[int, ...] = (),
    view: tuple[float, float] = (0, 0),
    hotbar: int = 0,
) -> str:
    mouse = {"dx": view[0], "dy": view[1], "buttons": [*buttons], "newButtons": [*fresh]}
    keyboard = {"keys": [f"key.keyboard.{key}" for key in keys]}
    return json.dumps({"mouse": mouse, "keyboard": keyboard, "hotbar": hotbar})


TICKS = [
    tick(buttons=(0,), fresh=(0,)),  # hangs
    tick(keys=("w", "left.control"), buttons=(0,)),
    tick(keys=("f3",), view=(1000, -1000)),
    tick(hotbar=4, view=(1, 0)),
    tick(keys=("5",), buttons=(0, 1), fresh=(0,), hotbar=4, view=(-12, 12)),
    *(tick(keys=("space",), buttons=(2, 7), hotbar=4) for _ in range(30)),
]
HELD = [set(), {"forward", "sprint"}, set(), {"5"}, {"5", "attack", "use"}, {"jump", "pick"}]


def write_vpt(path: Path, count: int = 35, codec: str = "mpeg4", **options: str) -> np.ndarray:
    """Two films; the frames of the first."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this av cannot write {codec}")
    told = frames(1, 24, 32)
    for name in ("b", "a"):
        # Blocks of one grey each survive an encoder that loses detail.
        grey = np.random.default_rng([FRESH, ord(name)]).integers(256, size=(count, 3, 4))
        told = np.repeat(grey[..., None].repeat(8, 1).repeat(8, 2), 3, -1).astype(np.uint8)
        with av.open(str(path / f"{name}.mp4"), "w") as content:
            stream = content.add_stream(codec, rate=20, options=options)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            stream.bit_rate, stream.gop_size = 4_000_000, 12
            for frame in told:
                content.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            content.mux(stream.encode())
        (path / f"{name}.jsonl").write_text("\n".join(TICKS[:count]) + "\n")
    return told


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_minecraft_is_read_from_any_frame_on_with_what_was_done_there(
    codec: str, tmp_path: Path
) -> None:
    """Frames that are told of by later ones (bf) are decoded in another order than shown."""
    options = {"bf": "3", "x264-params": "open-gop=1:keyint=12:b-adapt=0"}
    told = write_vpt(tmp_path, codec=codec, **(options if codec == "libx264" else {}))
    data = VptData(VptConfig(path=str(tmp_path), **SIZES), seed=0)
    assert data.lengths == [35, 35] and sum(data.held) == 1
    for first in range(32):  # in the first group of pictures, on its edge, later
        seen = data.part(0, first, 4).frames[..., 0]
        assert seen.shape == (4, 16, 16)
        cells = seen.reshape(4, 16, 4, 4).mean(-1)[:, [2, 8, 13]]  # middles of three rows of blocks
        exact = told[first : first + 4, ::8, ::8, 0]
        assert np.abs(cells - exact).mean() < 12, first
    counts = [part.values for part in VptConfig.parts]
    parts = parts_of(data.actions(0), counts)
    for number, held in enumerate(HELD):
        assert {name for name, on in zip(BUTTONS, parts[number], strict=False) if on} == held
    np.testing.assert_array_equal(parts[:5, -2:], [[5, 5], [5, 5], [10, 0], [5, 5], [3, 7]])
    assert (data.part(0, 3, 4).actions == data.actions(0)[3:6]).all()


def test_early_lines_of_minecraft_lack_what_was_not_yet_recorded(tmp_path: Path) -> None:
    write_vpt(tmp_path)
    rest = json.loads(tick())
    old = {k: v for k, v in json.loads(tick(keys=("w",))).items() if k != "hotbar"}
    lines = [old, rest | {"mouse": None}, rest | {"keyboard": None}, rest | {"hotbar": None}]
    lines += [rest | {"hotbar": 3}, json.loads(tick(keys=("d",), hotbar=4))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = VptData(VptConfig(path=str(tmp_path), **SIZES), seed=0)
    parts = parts_of(data.actions(0), [part.values for part in VptConfig.parts])
    held = [{name for name, on in zip(BUTTONS, row, strict=False) if on} for row in parts]
    assert held == [{"forward"}, set(), set(), set(), {"4"}, {"right", "5"}]
    assert (parts[:, -2:] == 5).all()


def test_films_of_a_session_are_held_out_together(tmp_path: Path) -> None:
    write_vpt(tmp_path)
    for session in range(8):
        for at in range(3):
            for kind in ("mp4", "jsonl"):
                name = f"cheeky-{session:x}f-20220{at + 1}01-10{at}000.{kind}"
                (tmp_path / name).write_bytes((tmp_path / f"a.{kind}").read_bytes())
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").unlink()
    data = VptData(VptConfig(path=str(tmp_path), **SIZES), seed=0)
    held = np.array(data.held).reshape(8, 3)
    assert (held == held[:, :1]).all() and 0 < held[:, 0].sum() < 8


def test_small_turns_of_the_view_are_told_apart_better_than_large_ones() -> None:
    assert places(np.array([0.0, 10.0, 99.0, -10.0, np.nan])).tolist() == [5, 10, 10, 0, 5]
    degrees = np.linspace(-10, 10, 2001)
    widths = np.bincount(places(degrees), minlength=11)
    assert (np.diff(widths[5:10]) > 0).all() and (widths[::-1] == widths).all()
    np.testing.assert_array_equal(places(-degrees), 10 - places(degrees))


@pytest.mark.parametrize("line", ["{", "7", '{"mouse": {}}', "[" * 10**5])
def test_lines_that_are_none_of_vpts_are_refused(line: str, tmp_path: Path) -> None:
    write_vpt(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join([*TICKS[:3], line, *TICKS[:30]]))
    data = VptData(VptConfig(path=str(tmp_path), **SIZES), seed=0)
    with pytest.raises(DataError, match=r"a\.jsonl, line 4, is none of VPT's"):
        data.part(0, 0, 4)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read"):
        VptData(VptConfig(path=str(tmp_path), **SIZES), seed=0)


WRITE = {"csgo": write_csgo, "procgen": write_procgen, "vpt": write_vpt}


@pytest.mark.parametrize("name", WRITE)
def test_a_world_is_learned_from_them(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path)
    small = [o for o in (*SMALL_PINFALL["diamond"], *SMALL_WORLD) if not o.startswith(
        ("data.worlds", "data.length"))]  # fmt: skip
    sets = [*small, f"data={name}", f"data.path={tmp_path}", "recipe.splits=[]", "model.context=2",
            "data.seq_len=3", "recipe.horizon=5", "data.heldout=0.4"]  # fmt: skip
    made = diamond.build(compose(sets), Processes(), torch.device("cpu"))
    made.step(made.data.batch(0))
    found = made.evaluate(final=True)
    assert {"eval/psnr/5", "eval/delta_psnr", "eval/shuffled_actions"} <= {*found}
    choices = choices_of(made.data.config)
    assert all(0 <= one.action < made.model.actions for one in choices)
    assert len({one.action for one in choices}) == len(choices)
    rest = choices[0].action
    told = made.model.action(torch.tensor([one.action for one in choices]))
    assert name == "procgen" or ((told[1:] != told[0]).any(1).all() and rest > 0)
    assert isinstance(made.data, RecordedData) and made.data.content_hash


@pytest.mark.parametrize("name", ["diffusion_forcing", "dreamer4"])
def test_transformers_are_told_actions_of_several_parts(name: str, tmp_path: Path) -> None:
    write_csgo(tmp_path)
    small = [o for o in (*SMALL_PINFALL[name], *SMALL_WORLD) if not o.startswith(
        ("data.worlds", "data.length"))]  # fmt: skip
    sets = [*small, "data=csgo", f"data.path={tmp_path}", "recipe.splits=[]", "recipe.horizon=5",
            "data.seq_len=4", "model.context=2", "optim.lr=0.01"]  # fmt: skip
    recipe = importlib.import_module(f"training.recipes.{name}")
    made = recipe.build(compose(sets), Processes(), torch.device("cpu"))
    for step in range(2):
        made.step(made.data.batch(step))
    assert math.isfinite(made.evaluate(final=True)["eval/delta_psnr"])


def test_latent_actions_are_not_named_one_by_one_where_there_are_billions(tmp_path: Path) -> None:
    write_csgo(tmp_path)
    small = [o for o in (*SMALL_PINFALL["genie"], *SMALL_WORLD) if not o.startswith(
        ("experiment", "data.worlds", "data.length"))]  # fmt: skip
    sets = ["experiment=genie/coinrun", *small, "data=csgo", f"data.path={tmp_path}",
            "recipe.splits=[]", "recipe.horizon=5", "data.seq_len=4",
            "model.context=2"]  # fmt: skip
    with pytest.raises(UserError, match=r"data=csgo: its actions are too many to be named by lat"):
        genie.build(compose(sets), Processes(), torch.device("cpu"))
    own = compose([*sets, "model.latent_levels=[]"])
    made = genie.build(own, Processes(), torch.device("cpu"))
    made.step(made.data.batch(0))
    assert "eval/delta_psnr" in made.evaluate()
    assert len(made.model.named) == 0
