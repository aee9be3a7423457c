"""Films in a file: every window once an epoch, none of those held out, files checked first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import SMALL_FILMS
from training.config import compose
from training.data.config_worlds import RecordedFilmsConfig
from training.data.recorded_films import RecordedFilmsData
from training.distributed import Processes
from training.errors import UserError
from training.recipes import jepa_video, jepa_video_masked
from training.recipes.jepa_video_films import RecordedFilms

FRESH = int.from_bytes(np.random.default_rng().bytes(4), "little")  # printed when a test fails
FRAMES, FILMS, SIZE = 7, 20, 16


def films() -> np.ndarray:
    return np.random.default_rng(FRESH).integers(0, 256, (FRAMES, FILMS, SIZE, SIZE), np.uint8)


def config(path: Path, **changes: object) -> RecordedFilmsConfig:
    sizes = {"image_size": SIZE, "seq_len": 5, "batch_size": 6}
    return RecordedFilmsConfig(path=str(path), **(sizes | changes))  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "films.npy", films())
    return tmp_path / "films.npy"


def test_an_epoch_shows_every_window_of_every_film_once_and_none_that_is_held_out(
    file: Path,
) -> None:
    data, whole = RecordedFilmsData(config(file), seed=FRESH), films()
    windows = {whole[t : t + 5, i].tobytes(): (i, t) for i in range(FILMS) for t in range(3)}
    seen = [windows[row.tobytes()] for step in range(9) for row in data.batch(step)["frames"]]
    assert sorted(seen) == [(i, t) for i in range(18) for t in range(3)]
    held = data.heldout(99, 7)["frames"]
    np.testing.assert_array_equal(held[:, :, 0], whole[:, 18:].swapaxes(0, 1))


def test_processes_share_the_batch_of_one(file: Path) -> None:
    whole = RecordedFilmsData(config(file), seed=3).batch(4)["frames"]
    parts = [RecordedFilmsData(config(file), seed=3, rank=i, world=2).batch(4) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part["frames"] for part in parts]), whole)


def test_what_the_data_is_changes_with_any_pixel_and_not_with_its_place(file: Path) -> None:
    base = RecordedFilmsData(config(file), seed=0).content_hash
    moved = file.with_name("moved.npy")
    file.rename(moved)
    assert RecordedFilmsData(config(moved), seed=0).content_hash == base
    changed = films()
    changed[-1, -1, -1, -1] ^= 1
    np.save(moved, changed)
    assert RecordedFilmsData(config(moved), seed=0).content_hash != base


def test_a_cell_holds_something_where_one_of_its_pixels_is_bright(tmp_path: Path) -> None:
    whole = np.full((FRAMES, FILMS, SIZE, SIZE), 127, np.uint8)  # just not bright
    whole[3, -1, 13, 6] = 128
    np.save(tmp_path / "films.npy", whole)
    data = RecordedFilmsData(config(tmp_path / "films.npy"), seed=0)
    seen = RecordedFilms(data, torch.device("cpu"), 7)
    cells = seen.cells(seen.heldout(2), 4)
    assert cells.nonzero().tolist() == [[1, 3, 3, 1]]


@pytest.mark.parametrize("name", ["rollout", "masked"])
def test_recorded_films_are_learned_from_and_drawn(name: str, file: Path, tmp_path: Path) -> None:
    recipe = {"rollout": jepa_video, "masked": jepa_video_masked}[name]
    given = compose(
        [*SMALL_FILMS[name], "data=recorded_films", f"data.path={file}", f"data.image_size={SIZE}",
         "data.batch_size=6", "optim.warmup_steps=0", "data.heldout=0.3"]
    )  # fmt: skip
    assert recipe.estimate(given).parameters > 0
    made = recipe.build(given, Processes(), torch.device("cpu"))
    before = [p.clone() for p in made.model.parameters()]
    made.step(made.data.batch(0))
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    metrics = made.evaluate(final=True)
    assert all(value == value for value in metrics.values()), "no nan"
    assert ("eval/ap/mean" in metrics) == (name == "rollout")
    assert not any(key.startswith("eval/probe") for key in metrics), "nothing is known of them"
    (tmp_path / "figures").mkdir()
    made.export(tmp_path)
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"there is no such file"),
        (b"not an array", r"is no \.npy file of uint8 \[frames, films, 16, 16\]: "),
        (np.array([object()] * 4), r"is no \.npy file .*Python objects in dtype"),
        (np.zeros((7, 20, 16, 16)), r"must be uint8 .*, it is float64 \[7, 20, 16, 16\]"),
        (np.zeros((7, 20, 8, 8), np.uint8), r"it is uint8 \[7, 20, 8, 8\]: .* data\.image_size"),
        (np.zeros((7, 16, 16), np.uint8), r"it is uint8 \[7, 16, 16\]"),
        (np.zeros((4, 20, 16, 16), np.uint8), r"films of 4 frames .* data\.seq_len=5"),
        (np.zeros((7, 3, 16, 16), np.uint8), r"has 3 films .* 4 are expected"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_refused(
    content: np.ndarray | bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "films.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        RecordedFilmsData(config(path), seed=0)


def test_several_arrays_and_horizons_beyond_the_films_are_refused(
    file: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "several.npz", a=films())
    with pytest.raises(UserError, match="holds several arrays"):
        RecordedFilmsData(config(tmp_path / "several.npz"), seed=0)
    with pytest.raises(UserError, match=r"path=null: name a \.npy file"):
        RecordedFilmsData(RecordedFilmsConfig(), seed=0)
    given = compose([*SMALL_FILMS["rollout"], "data=recorded_films", f"data.path={file}",
                     f"data.image_size={SIZE}", "recipe.horizon=6"])  # fmt: skip
    with pytest.raises(UserError, match=r"films of 7 frames, fewer than the 8 of recipe\.horizon"):
        jepa_video.build(given, Processes(), torch.device("cpu"))
