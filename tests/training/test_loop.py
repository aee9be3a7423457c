"""The loop around a recipe that only counts: cadence, budgets, signals, non-finite values."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from training.checkpoint import Checkpoints
from training.distributed import Processes
from training.errors import RunStopped
from training.logging import JsonlFile, Logger, read_rows
from training.loop import fit
from training.schema import LoggerConfig, LoopConfig


class Counting:
    """Adds up its batches; its metrics are a function of the batches seen so far."""

    framework, unit, units_per_step, flops_per_step = "torch", "items", 3, 0.0
    remedy = "Lower optim.lr"
    alarm = None

    def __init__(self, at: dict[int, object] | None = None) -> None:
        self.total, self.count, self.at = torch.zeros(2), 0, at or {}
        self.evaluations: list[tuple[int, bool]] = []

    def step(self, batch):
        self.total += torch.from_numpy(batch)
        self.count += 1
        action = self.at.get(self.count)
        if callable(action):
            action()
        return {"train/loss": action if isinstance(action, float) else self.total[0].clone()}

    def evaluate(self, final: bool = False):
        self.evaluations.append((self.count, final))
        return {"eval/total": self.total.sum().item()}

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state) -> None:
        self.total.copy_(state["total"])
        self.count = state["count"]


class Numbers:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int):
        self.asked.append(step)
        return np.array([step, 1], np.float32)

    def ids(self, step: int) -> list[str]:
        return [f"number {step}"]


class Directory:
    def __init__(self, path: Path) -> None:
        self.path = path

    def heartbeat(self, step: int) -> None:
        pass


def run(path: Path, recipe: Counting, **config):
    path.mkdir(exist_ok=True)
    logger = Logger(LoggerConfig(), path, "test", "test")
    logger.progress.every_s = math.inf
    settings = LoopConfig(**{"steps": 10, "log_every": 4, "checkpoint_every": 3, **config})
    try:
        return fit(recipe, Numbers(), settings, Directory(path), logger, Processes())
    finally:
        logger.close()


def test_rows_average_the_steps_since_the_last_and_the_end_is_logged(tmp_path: Path) -> None:
    outcome = run(tmp_path, Counting())
    rows = read_rows(tmp_path / "metrics.jsonl")
    sums = np.cumsum(np.arange(10))
    assert [row["step"] for row in rows] == [4, 8, 10, 10]
    assert [row.get("train/loss") for row in rows[:3]] == [
        sums[:4].mean(),
        sums[4:8].mean(),
        sums[8:].mean(),
    ]
    assert rows[-1] == {"step": 10, "eval/total": 55.0}
    assert outcome.state.units == 30 and outcome.stopped_by == "steps"


def test_evaluation_and_checkpoints_keep_their_cadence(tmp_path: Path) -> None:
    recipe = Counting()
    run(tmp_path, recipe, eval_every=4, keep_checkpoints=9)
    assert recipe.evaluations == [(4, False), (8, False), (10, True)]
    assert Checkpoints(tmp_path / "checkpoints", Processes()).steps() == [3, 6, 9, 10]


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_stopped_at_any_step_the_files_end_up_the_same(tmp_path: Path, stop_at: int) -> None:
    run(tmp_path / "whole", Counting(), eval_every=4)
    ask = {stop_at: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(RunStopped, match="the same command resumes") as caught:
        run(tmp_path / "parts", Counting(ask), eval_every=4)
    assert caught.value.code == 85
    run(tmp_path / "parts", Counting(), eval_every=4)
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_interrupt_from_the_keyboard_saves_and_says_so(tmp_path: Path) -> None:
    ask = {5: lambda: os.kill(os.getpid(), signal.SIGINT)}
    with pytest.raises(RunStopped, match="SIGINT after step 5") as caught:
        run(tmp_path, Counting(ask))
    assert caught.value.code == 130
    assert Checkpoints(tmp_path / "checkpoints", Processes()).newest() == 5


def test_rows_written_after_the_last_checkpoint_are_written_once(tmp_path: Path) -> None:
    run(tmp_path / "whole", Counting())

    def crash() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # after the row of step 8, before the save of step 9
        run(tmp_path / "parts", Counting({9: crash}))
    assert [row["step"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [4, 8]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "cut sho')  # as a kill inside a write leaves it
    run(tmp_path / "parts", Counting())
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss_names_step_batch_and_last_good_checkpoint(
    tmp_path: Path, bad: float
) -> None:
    with pytest.raises(RunStopped) as caught:  # once a loss is not finite it stays so
        run(tmp_path, Counting(dict.fromkeys(range(6, 11), bad)), log_every=10, checkpoint_every=0)
    assert "at step 5, batch number 5" in str(caught.value)
    with pytest.raises(RunStopped) as caught:
        run(tmp_path / "saved", Counting({6: bad}))
    message = str(caught.value)
    assert "at step 5, batch number 5" in message  # the sixth step
    with pytest.raises(RunStopped, match=r"at step 0, .*Nothing was trained yet: look at that"):
        run(tmp_path / "first", Counting({1: bad}))
    assert "step_00000003" in message
    assert Checkpoints(tmp_path / "saved" / "checkpoints", Processes()).steps() == [3]


def test_budgets_end_the_run_early_with_everything_saved(tmp_path: Path) -> None:
    outcome = run(tmp_path, Counting(), max_units=12)
    assert outcome.stopped_by == "budget" and outcome.state.step == 4
    assert Checkpoints(tmp_path / "checkpoints", Processes()).newest() == 4
    assert run(tmp_path / "time", Counting(), time_limit_s=0.0).state.step == 1
    again = run(tmp_path, Counting(), max_units=12)  # as if killed before the results were written
    assert again.stopped_by == "budget" and again.state.step == 4


@pytest.mark.parametrize("units", [3, 9, 12, 15])
def test_a_run_continued_beyond_its_budget_is_the_run_without_one(
    tmp_path: Path, units: int
) -> None:
    run(tmp_path / "whole", Counting(), eval_every=4)
    run(tmp_path / "parts", Counting(), eval_every=4, max_units=units)
    run(tmp_path / "parts", Counting(), eval_every=4)
    whole, parts = (tmp_path / name / "metrics.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_full_disk_ends_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(JsonlFile, "rewind", lambda *_: None)  # /dev/full has no end to read to
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunStopped, match=r"could not write .*No space left"):
        run(tmp_path, Counting())
