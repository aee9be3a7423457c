"""The kernels in Triton's interpreter, in processes of their own, two at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


def interpret(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """Every file, started."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpret, file) for file in FILES}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, runs) -> None:
    """Every test of the file runs, none is skipped, all pass."""
    assert tuple(map(int, np.__version__.split(".")[:2])) < (2, 4), "it needs numpy<2.4"
    done = runs[file].result()
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] >= 1 and "skipped" not in counts, done.stdout


def test_there_is_a_file_for_every_op() -> None:
    from kernels.parity.run import operations

    tested = {file.stem.removeprefix("test_").removeprefix("kv_") for file in FILES}
    assert {op.removesuffix("_states") for op in operations()} <= {
        name.removesuffix("_states") for name in tested
    }
