"""A run that is killed at random moments, also inside a save, ends exactly as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import TINY, environment, only_run, train, train_command, weights, write_corpus

pytestmark = pytest.mark.slow

KINDS = {
    "torch": ([], 1, {}),
    "torch-fsdp2": ([], 2, {}),
    "jax-4-devices": (
        ["recipe=language_model_jax"],
        1,
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    ),
}
# Saving after every step makes most moments of a run moments inside a save.
OVERRIDES = [*TINY, "loop.checkpoint_every=1", "loop.steps=30", "optim.ema_decay=0.9"]


def kill_everything_about(text: str) -> None:
    """SIGKILL every process with `text` in its command line (workers lead groups of their own)."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in words:
            os.kill(int(entry.name), signal.SIGKILL)


def run_with_kills(runs: Path, overrides: list[str], processes: int, extra: dict, seed: int) -> int:
    """Start, SIGKILL every process of the run at a random moment; twice. Returns the kills."""
    corpus = next(word for word in overrides if word.startswith("data.paths"))
    rng = random.Random(seed)
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(
            train_command(*overrides, processes=processes),
            env=environment(runs, **extra),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = newest(runs)
        deadline = time.monotonic() + 120
        while newest(runs) < before + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        if process.poll() is None:
            kill_everything_about(corpus)
            kills += 1
        process.wait()
    return kills


def newest(runs: Path) -> int:
    checkpoints = runs.glob("*/*/*/checkpoints/step_????????")
    steps = [int(path.name.removeprefix("step_")) for path in checkpoints]
    return max(steps, default=0)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_resumes_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    more, processes, extra = KINDS[kind]
    overrides = [*OVERRIDES, write_corpus(tmp_path / "text"), *more]
    whole = train(tmp_path / "whole", *overrides, processes=processes, **extra)
    assert whole.returncode == 0, whole.stderr[-3000:]

    kills = run_with_kills(tmp_path / "killed", overrides, processes, extra, seed=len(kind))
    assert kills > 0, "every run finished before it was killed: the test tests nothing"
    last = train(tmp_path / "killed", *overrides, processes=processes, **extra)
    assert last.returncode == 0, last.stderr[-3000:]
    assert "resuming after step" in last.stderr

    a, b = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    expected, got = weights(a), weights(b)
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], got[name], err_msg=name)
    assert json.loads((b / "results.json").read_text())["steps"] == 30


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    """The negative control: the comparison above can fail."""
    overrides = [*TINY, write_corpus(tmp_path / "text")]
    for seed in (0, 1):
        assert train(tmp_path / str(seed), *overrides, f"seed={seed}").returncode == 0
    a, b = (only_run(tmp_path / str(seed)) for seed in (0, 1))
    assert (a / "metrics.jsonl").read_bytes() != (b / "metrics.jsonl").read_bytes()
