"""A directory is a run's from the moment it was not refused; what it rests on does not change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from training.config import compose
from training.distributed import Processes
from training.errors import RunStopped, UserError, memory_errors
from training.pretrained import fingerprint
from training.run import read_weights, run
from training.run_directory import RunDirectory
from training.schema import TrainConfig


def config(runs: Path, *overrides: str) -> TrainConfig:
    return compose(["experiment=vjepa2_ac/planning", f"runs_dir={runs}", "run=mine", *overrides])


def opened(config: TrainConfig) -> RunDirectory:
    return RunDirectory(config, Processes())


def test_what_was_refused_before_it_began_leaves_its_name_free(tmp_path: Path) -> None:
    with pytest.raises(UserError), opened(config(tmp_path, "seed=1")):
        raise UserError("the data is not there")
    with opened(config(tmp_path, "seed=2")) as directory:
        directory.claim()
    with pytest.raises(UserError, match=r"another configuration; seed: 2 -> 1\. Set run="):
        opened(config(tmp_path, "seed=1")).__enter__()
    with opened(config(tmp_path, "seed=2")) as directory:
        directory.claim()


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_directory_whose_records_are_damaged_is_refused(content: str, tmp_path: Path) -> None:
    with opened(config(tmp_path)) as directory:
        directory.claim()
        (directory.path / "bound.json").write_text(content)
        with pytest.raises(UserError, match=r"bound\.json .*set run=<another name>"):
            directory.bind("data", "abc")
        (directory.path / "identity.json").write_text(content)
    with pytest.raises(UserError, match=r"identity\.json .*set run=<another name>"):
        opened(config(tmp_path)).__enter__()
    assert (tmp_path / "vjepa2_ac/planning/mine/identity.json").read_text() == content


def test_a_run_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    def write(value: float, name: str = "model") -> dict[str, str]:
        (tmp_path / "trained").mkdir(exist_ok=True)
        weights = {"w": np.full(3, value, np.float32)}
        save_file(weights, tmp_path / "trained" / f"{name}.safetensors")
        return read_weights(made.recipe)

    made = config(tmp_path, f"recipe.weights={tmp_path / 'trained'}")
    first, again, other = write(1.0), write(1.0), write(2.0)
    assert first == again and first.keys() == other.keys() == {"recipe.weights"}
    with opened(made) as directory:
        directory.bind("recipe.weights", first["recipe.weights"])
        directory.bind("recipe.weights", again["recipe.weights"])
        with pytest.raises(UserError, match=r"recipe\.weights changed since this run began"):
            directory.bind("recipe.weights", other["recipe.weights"])
        kept = json.loads((directory.path / "bound.json").read_text())
    assert kept == first
    file = tmp_path / "trained" / "model.safetensors"
    assert fingerprint(str(file), "recipe.start_from") == other["recipe.weights"]
    assert fingerprint([str(file), str(file)], "k") != fingerprint([str(file)], "k")
    assert read_weights(config(tmp_path, "recipe.weights=null").recipe) == {}


@pytest.mark.parametrize(
    "overrides", [["data.batch_size=1000000000000000"], ["model.predictor_dim=30000000"]]
)
def test_what_does_not_fit_the_memory_is_said_in_one_sentence(
    overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RunStopped, match=r"memory of this machine does not suffice: .*batch_size"):
        run(config(tmp_path, "recipe.weights=null", *overrides))
    status = json.loads((tmp_path / "vjepa2_ac/planning/mine/status.json").read_text())
    assert status["status"] == "interrupted" and "does not suffice" in status["message"]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), memory_errors():
        raise RuntimeError("shapes differ")
    for said in ("CUDA out of memory. Tried to allocate", "RESOURCE_EXHAUSTED: Out of memory"):
        with pytest.raises(RunStopped, match=said[:18]), memory_errors():
            raise RuntimeError(said)
