"""A checkpoint is there completely or not at all, and says so when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.checkpoint import Checkpoints, flatten, unflatten
from training.distributed import Processes
from training.errors import RunStopped


class Toy:
    framework = "torch"

    def __init__(self, value: float = 0.0, shape: tuple[int, ...] = (3, 2)) -> None:
        self.weight = torch.full(shape, value)
        self.count = int(value)

    def state_dict(self):
        return {"a": {"weight": self.weight}, "count": self.count, "names": ["x"]}

    def load_state_dict(self, state) -> None:
        self.weight.copy_(state["a"]["weight"])
        self.count = state["count"]


def make(tmp_path: Path, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", Processes(), keep)
    for step in steps:
        checkpoints.save(step, Toy(float(step)), {"step": step})
    return checkpoints


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 1, 2)
    toy = Toy()
    assert checkpoints.newest() == 2
    assert checkpoints.load(2, toy) == {"step": 2}
    assert toy.count == 2 and torch.equal(toy.weight, torch.full((3, 2), 2.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    assert make(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    make(tmp_path, 1)
    names = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
@pytest.mark.parametrize("victim", ["arrays", "state.json", "manifest.json"])
def test_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage, victim) -> None:
    checkpoints = make(tmp_path, 1, 2)
    target = checkpoints.path(2) / victim
    target = next(target.iterdir()) if target.is_dir() else target
    if victim == "manifest.json" and damage is damage_flip:
        damage = damage_truncate  # a flipped digit of a hash is one more mismatch
    damage(target)
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoints.newest() == 1
    assert checkpoints.steps() == [1], "what is damaged is put aside, not counted"
    assert checkpoints.newest() == 1


def test_the_checkpoint_just_saved_is_never_pruned(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 10, keep=1)
    checkpoints.save(3, Toy(3.0), {})
    assert checkpoints.steps() == [3]


def test_an_unfinished_save_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 1)
    (tmp_path / "checkpoints" / "step_00000002.tmp").mkdir()
    assert checkpoints.newest() == 1
    checkpoints.save(3, Toy(3.0), {})
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_checkpoint_of_other_shapes_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 1)
    with pytest.raises(RunStopped, match=r"recipe/a/weight: saved \(3, 2\), expected \(4, 2\)"):
        checkpoints.load(1, Toy(shape=(4, 2)))


def test_failed_save_says_what_is_left_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    checkpoints = make(tmp_path, 1)
    from training import checkpoint

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.TorchArrays, "save", no_space)
    with pytest.raises(RunStopped, match=r"No space left.*step 1 is intact"):
        checkpoints.save(2, Toy(2.0), {})
    assert checkpoints.newest() == 1


def test_flatten_and_unflatten_are_inverse() -> None:
    tree = {"a": {"b.c": 1, "d": {"e": [2]}}, "f": "g"}
    assert unflatten(flatten(tree)) == tree
    assert json.loads(json.dumps(flatten(tree))) == {"a/b.c": 1, "a/d/e": [2], "f": "g"}
