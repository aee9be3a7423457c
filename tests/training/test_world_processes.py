"""Models of worlds in two processes, whose weights are shards, learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import (
    SMALL_AGENT,
    SMALL_BATCH,
    SMALL_FILM,
    SMALL_FILMS,
    SMALL_FORCED,
    SMALL_FROZEN,
    SMALL_IMAGES,
    SMALL_PINFALL,
    SMALL_WORLD,
    train,
    train_one_and_two,
)
from training.config import compose
from training.run import run
from training.run_directory import run_path

CASES = {
    "ijepa": [*SMALL_IMAGES["ijepa"], *SMALL_BATCH],
    "rollout": [*SMALL_FILMS["rollout"], *SMALL_FILM],
    "masked": [*SMALL_FILMS["masked"], *SMALL_FILM],
    "diamond": [*SMALL_PINFALL["diamond"], *SMALL_WORLD],
    "dreamer4": [*SMALL_PINFALL["dreamer4"], *SMALL_WORLD],
    "genie": [*SMALL_PINFALL["genie"], *SMALL_WORLD],
    "diffusion_forcing": [*SMALL_PINFALL["diffusion_forcing"], *SMALL_WORLD],
    "dream_agent": SMALL_AGENT,
    "self_forcing": SMALL_FORCED,
    "vjepa2_ac": [*SMALL_FROZEN, "recipe.policies=[]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, tmp_path: Path) -> None:
    sets = [*CASES[case], "loop.steps=3", "loop.log_every=1", "run=x"]
    if case == "self_forcing":
        of = [*SMALL_PINFALL["diffusion_forcing"], *SMALL_WORLD, "loop.steps=2", "optim.lr=0.01"]
        teacher = compose([*of, "run=teacher", f"runs_dir={tmp_path / 'of'}"])
        run(teacher)
        sets.append(f"recipe.teacher={run_path(teacher)}")
    found = [
        [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in train_one_and_two(tmp_path, *sets)
    ]
    for one, two in zip(*found, strict=True):
        for key in one:
            if key.startswith("train/") or key in ("opt/grad_norm", "eval/probe"):
                assert two[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("case", ["diamond", "diffusion_forcing", "genie", "masked", "rollout"])
def test_two_processes_compute_in_bf16(case: str, tmp_path: Path) -> None:
    """Also what the models make themselves, which FSDP does not cast."""
    sets = [*CASES[case], "scale.precision=bf16", "loop.steps=2", "run=x"]
    done = train(tmp_path, *sets, processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    (file,) = tmp_path.glob("*/*/x/results.json")
    metrics = json.loads(file.read_text())["metrics"]
    assert any(key.startswith("eval/") for key in metrics)
