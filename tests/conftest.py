"""Options and shared state of the tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"
MADE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from what is composed"
    )


def pytest_configure(config: pytest.Config) -> None:
    """What XLA compiles for one test it need not compile for the next, or for its children."""
    if not hasattr(config, "workerinput") and CACHE not in os.environ:
        config.stash[MADE] = os.environ[CACHE] = tempfile.mkdtemp(prefix="afferent-xla-")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def pytest_unconfigure(config: pytest.Config) -> None:
    """What was compiled goes with the session."""
    if MADE in config.stash:
        shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")
