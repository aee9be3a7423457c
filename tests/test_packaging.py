"""Our top-level names against those of other distributions, and running without installation."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment

FIND = "import kernels, models, training; print(kernels.__file__)"


def test_our_version_stays_out_of_the_window_transformers_probes() -> None:
    version = importlib.metadata.version("afferent")
    assert version.startswith("20"), "CalVer: see the comment in pyproject.toml"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_kernels_is_ours(elsewhere: bool, tmp_path: Path) -> None:
    """PyPI has a `kernels` too (of Hugging Face); installed beside ours it would win elsewhere."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FIND],
        cwd=tmp_path if elsewhere else ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(ROOT)


@pytest.mark.slow
def test_transformers_still_imports_beside_our_kernels() -> None:
    pytest.importorskip("transformers")
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM as M\n"
        "c = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=2)\nM(c)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_runs_from_a_clone_without_installation(tmp_path: Path) -> None:
    """As on a machine without network: `python -m scripts.train` from the root of a clone."""
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import runpy; sys.argv = ['train', '--help']\n"
        "runpy.run_module('scripts.train', run_name='__main__')"
    )
    env = environment(tmp_path)
    env.pop("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "quickstart/stdlib" in done.stdout, done.stderr


def test_the_console_script_works_from_another_directory(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "afferent"
    if not script.exists():
        pytest.skip("afferent is not installed in this environment")
    env = environment(tmp_path)
    env.pop("PYTHONPATH")
    words = [script, "train", "experiment=quickstart/stdlib", "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing was trained" in done.stdout, done.stderr


def test_help_is_quick_and_names_the_commands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "scripts.cli", "--help"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "reproduce", "report", "bench"))
    assert "hydra" not in done.stderr and "torch" not in done.stderr
