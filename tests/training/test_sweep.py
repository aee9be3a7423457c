"""A sweep's table says what its runs say, and which have not said anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.evaluation.sweep import write_sweep_summary

VALUES = {"0.1": [2.10, 2.30, 2.25], "0.01": [2.60, 2.55, 2.71]}


def write_sweep(root: Path, **extra: Any) -> Path:
    """Two learning rates of three seeds each."""
    number = 0
    for lr, values in VALUES.items():
        for seed, value in enumerate(values):
            metrics = {"eval/loss": value / 1.4427, "eval/bpb": value, "eval/tokens": 1000.0}
            add_run(root, number, [f"optim.lr={lr}", f"seed={seed}"], metrics=metrics)
            number += 1
    return root


def add_run(
    root: Path,
    number: int,
    overrides: list[str],
    metrics: dict[str, Any] | None = None,
    status: str | None = None,
) -> None:
    """A note, and as much of the run as there is."""
    path = root / "runs" / f"run{number}"
    path.mkdir(parents=True, exist_ok=True)
    note = {"overrides": overrides, "path": str(path)}
    (root / f"run_{number:04d}.json").write_text(json.dumps(note))
    if metrics is not None:
        (path / "results.json").write_text(json.dumps({"metrics": metrics}))
    if status is not None:
        (path / "status.json").write_text(json.dumps({"status": status}))


def test_means_equal_numpys(tmp_path: Path) -> None:
    text = write_sweep_summary(write_sweep(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert text.splitlines()[-1] == str(tmp_path / "summary.md")
    assert [c["overrides"] for c in summary["combinations"]] == [
        ["optim.lr=0.1"],
        ["optim.lr=0.01"],
    ]
    assert summary["metrics"] == ["eval/bpb", "eval/loss"], "headline first, no constant counts"
    for combination, values in zip(summary["combinations"], VALUES.values(), strict=True):
        found = combination["metrics"]["eval/bpb"]
        half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
        assert found["values"] == values
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
        assert f"{np.mean(values):.4g} [" in text
    assert (tmp_path / "summary.md").read_text().startswith("| combination ")


def test_the_plot_has_every_combination(tmp_path: Path) -> None:
    write_sweep_summary(write_sweep(tmp_path))
    svg = (tmp_path / "summary.svg").read_text()
    assert "optim.lr=0.1<" in svg and "optim.lr=0.01<" in svg and "bits per byte" in svg
    write_sweep_summary(tmp_path)
    assert (tmp_path / "summary.svg").read_text() == svg


def test_unfinished_runs_are_listed_and_in_no_mean(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    add_run(tmp_path, 6, ["optim.lr=0.1", "seed=3"], status="failed")
    add_run(tmp_path, 7, ["optim.lr=0.1", "seed=4"])
    add_run(tmp_path, 8, ["optim.lr=9", "seed=0"], status="interrupted")
    text = write_sweep_summary(tmp_path)
    assert re.search(r"optim.lr=0.1 +\| 3 of 5 +\| 2.217 \[", text)
    assert re.search(r"optim.lr=9 +\| 0 of 1 +\| - ", text)
    assert "- failed: optim.lr=0.1 seed=3" in text
    assert "- not run: optim.lr=0.1 seed=4" in text
    assert "- interrupted: optim.lr=9 seed=0" in text


def test_a_diverged_seed_is_not_hidden(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    add_run(tmp_path, 6, ["optim.lr=0.1", "seed=3"], metrics={"eval/bpb": None})
    assert re.search(r"optim.lr=0.1 +\| 4 +\| not finite", write_sweep_summary(tmp_path))
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_seeds_alone(tmp_path: Path) -> None:
    """One combination without overrides, metrics of another field."""
    for seed in range(2):
        add_run(tmp_path, seed, [f"seed={seed}"], metrics={"eval/return": 100.0 + seed})
    text = write_sweep_summary(tmp_path)
    assert re.search(r"\(no overrides\) +\| 2 +\| 100.5 \[94.15, 106.9\]", text)


def test_nothing_finished(tmp_path: Path) -> None:
    add_run(tmp_path, 0, ["seed=0"])
    assert "not run" in write_sweep_summary(tmp_path)
    assert not (tmp_path / "summary.svg").exists()


def test_what_all_combinations_share_is_said_once(tmp_path: Path) -> None:
    for number, lr in enumerate(("0.1", "0.2")):
        overrides = ["loop.steps=5", f"optim.lr={lr}", "seed=0"]
        add_run(tmp_path, number, overrides, metrics={"eval/bpb": 2.0 + number})
    text = write_sweep_summary(tmp_path)
    assert text.count("loop.steps=5") == 1 and "In every combination: loop.steps=5." in text
    assert "| optim.lr=0.1 |" in text
