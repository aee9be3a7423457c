"""Sweeps and launchers: basic, joblib, local submitit, Slurm through a fake `srun` on PATH."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT, TINY, environment, train, write_corpus

pytestmark = pytest.mark.slow

SWEEP = [*TINY, "loop.steps=2", "-m", "seed=0,1", "optim.lr=1e-3,1e-2"]

FAKE_SRUN = """#!/usr/bin/env bash
# Runs its command here, as the one task of a job.
while [[ "$1" == --* ]]; do
  case "$1" in --output | --error) shift ;; esac
  shift
done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 exec "$@"
"""
FAKE_SBATCH = """#!/usr/bin/env bash
# "Queues" every task of the array: runs them here, in the background, one after the other.
script=${@: -1}
last=$(grep -oP '(?<=--array=0-)[0-9]+' "$script" || echo 0)
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=77 SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NODELIST=here \\
    bash "$script"
done > "$script.log" 2>&1 &
echo "Submitted batch job 77"
"""
FAKE_SACCT = """#!/usr/bin/env bash
echo "JobID|State|NodeList"
for task in 0 1 2 3; do echo "77_$task|RUNNING|here"; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo here
echo "$@" >> "$FAKE_LOG"
"""


def check_sweep(runs: Path, done: subprocess.CompletedProcess[str], combinations: int = 2) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = [path for path in (runs / "sweeps").iterdir() if path.is_dir()]
    assert len(list(sweep.glob("run_*.json"))) == 4
    summary = json.loads((sweep / "summary.json").read_text())
    assert "eval/bpb" in json.dumps(summary)
    assert (sweep / "summary.md").exists() and (sweep / "summary.svg").exists()
    assert "optim.lr=0.01" in done.stdout or "optim.lr=1e-2" in done.stdout
    assert len(list((runs / "quickstart" / "stdlib").glob("cpu-seed*/results.json"))) == 4


@pytest.mark.parametrize("launcher", ["local", "joblib", "submitit_local"])
def test_sweep_runs_every_combination_and_ends_in_one_table(launcher: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    done = train(tmp_path / "runs", *SWEEP, corpus, f"launcher={launcher}")
    check_sweep(tmp_path / "runs", done)


def fake_slurm(directory: Path) -> str:
    """A PATH on which Slurm's commands run what they are given."""
    directory.mkdir()
    fakes = {"srun": FAKE_SRUN, "sbatch": FAKE_SBATCH, "sacct": FAKE_SACCT}
    for name, text in {**fakes, "scontrol": FAKE_SCONTROL}.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_slurm_sweep_through_a_fake_srun(tmp_path: Path) -> None:
    path = fake_slurm(tmp_path / "bin")
    corpus = write_corpus(tmp_path / "text")
    done = train(
        tmp_path / "runs", *SWEEP, corpus, "launcher=slurm", PATH=path, FAKE_LOG="/dev/null"
    )
    check_sweep(tmp_path / "runs", done)
    (script,) = (tmp_path / "runs").rglob("77_submission.sh")
    text = script.read_text()
    for directive in ("--gpus-per-node=1", "--time=720", "--signal=USR2@120"):
        assert directive in text, text


def test_slurm_without_slurm_is_one_sentence(tmp_path: Path) -> None:
    done = train(tmp_path / "runs", *SWEEP, write_corpus(tmp_path / "text"), "launcher=slurm")
    assert done.returncode == 2
    assert "launcher=slurm needs Slurm" in done.stderr and "Traceback" not in done.stderr


def test_a_failing_combination_is_named_and_the_others_are_in_the_table(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    done = train(tmp_path / "runs", *TINY, corpus, "loop.steps=2", "-m", "model.num_heads=2,5")
    assert done.returncode == 2
    assert "model.num_heads=5 does not divide" in done.stderr and "Traceback" not in done.stderr
    assert "model.num_heads=2" in done.stdout and "summary" in done.stdout


def test_a_sweep_over_what_changes_nothing_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    sweep = ["loop.steps=1", "-m", "loop.checkpoint_every=1,2"]
    done = train(tmp_path / "runs", *TINY, corpus, *sweep)
    assert done.returncode == 2 and "cannot be swept" in done.stderr


def test_sweep_groups_are_multiruns(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    done = train(tmp_path / "runs", *TINY, corpus, "loop.steps=1", "sweep=seeds")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "runs" / "quickstart" / "stdlib").glob("cpu-seed*"))) == 4


def test_the_sbatch_script_runs_saves_and_requeues(tmp_path: Path) -> None:
    """With the fake commands the script trains; a run that exits with 85 is requeued."""
    script = ROOT / "scripts" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    log = tmp_path / "scontrol.log"
    fake_python = tmp_path / "python"
    fake_python.write_text('#!/usr/bin/env bash\necho "$@ rank $RANK of $WORLD_SIZE"\nexit $CODE\n')
    fake_python.chmod(0o755)
    for code, requeued in ((0, False), (85, True), (2, False)):
        log.write_text("")
        env = environment(
            tmp_path / f"runs{code}",
            PATH=fake_slurm(tmp_path / f"bin{code}"),
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID="5",
            SLURM_JOB_NODELIST="here",
            AFFERENT_PYTHON=str(fake_python),
            FAKE_LOG=str(log),
            CODE=str(code),
        )
        done = subprocess.run(
            ["bash", script, "experiment=quickstart/stdlib"],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert "experiment=quickstart/stdlib rank 0 of 1" in done.stdout
        assert bool(re.search("requeue 5", log.read_text())) == requeued
        assert (tmp_path / f"runs{code}" / "code" / "job-5" / "training" / "loop.py").exists()
