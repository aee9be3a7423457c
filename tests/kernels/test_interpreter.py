"""The kernels in Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    """Every test of the file runs, none is skipped, all pass."""
    assert tuple(map(int, np.__version__.split(".")[:2])) < (2, 4), "it needs numpy<2.4"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"(\d+) (passed|skipped|failed)", done.stdout)[::-1])
    passed = [int(n) for n, word in re.findall(r"(\d+) (\w+)", done.stdout) if word == "passed"]
    assert sum(passed) >= 3 and "skipped" not in counts.values(), done.stdout


def test_there_is_a_file_for_every_op() -> None:
    assert len(FILES) >= 5
