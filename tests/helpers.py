"""Shared by the tests: tiny runs through the real entry point, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "experiment=quickstart/stdlib",
    "data=files",
    "model.d_model=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ngram_buckets=64",
    "data.seq_len=32",
    "data.eval_stride=null",
    "data.batch_size=8",
    "data.heldout_fraction=0.3",
    "recipe.floors=false",
    "recipe.sample_tokens=0",
    "optim.warmup_steps=0",
    "loop.steps=12",
    "loop.log_every=2",
    "loop.eval_every=5",
    "loop.checkpoint_every=4",
    "report=false",
]
"A run of seconds: the quickstart's recipe on a few kilobytes."


def write_corpus(directory: Path, seed: int = 0) -> str:
    """Files with some structure to learn; returns the override that trains on them."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), size=4)) for _ in range(20)]
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(12):
        text = " ".join(rng.choice(words, size=200))
        (directory / f"doc{index:02d}.txt").write_text(text)
    return f"data.paths=[{directory}]"


def environment(runs: Path, **extra: str) -> dict[str, str]:
    """One thread, no network, runs below `runs`."""
    return {
        **os.environ,
        "AFFERENT_RUNS": str(runs),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


def train_command(*overrides: str, processes: int = 1) -> list[str]:
    """The command line of a run, through torchrun for several processes."""
    if processes == 1:
        return [sys.executable, "-m", "scripts.train", *overrides]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "scripts.train", *overrides]


def train(
    runs: Path, *overrides: str, processes: int = 1, cwd: Path = ROOT, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller looks at the exit code."""
    return subprocess.run(
        train_command(*overrides, processes=processes),
        cwd=cwd,
        env=environment(runs, **extra),
        capture_output=True,
        text=True,
        timeout=300,
    )


def only_run(runs: Path, experiment: str = "quickstart/stdlib") -> Path:
    """The one run directory of an experiment."""
    (found,) = [path for path in (runs / experiment).iterdir() if path.is_dir()]
    return found


def weights(run: Path) -> dict[str, np.ndarray]:
    """The exported weights of a finished run."""
    return load_file(run / "model.safetensors")
