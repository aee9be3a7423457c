"""Where a result comes from: code, versions, hardware, command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from training.profiling import hardware

PACKAGES = ("torch", "triton", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit this code is: of its checkout, or as its archive's COMMIT file says."""
    file = ROOT / "COMMIT"
    return git("rev-parse", "HEAD") or (file.read_text().strip() if file.exists() else "unknown")


def git(*arguments: str) -> str:
    """Output of a git command in the checkout that this code is, or '' where it is none."""
    if not (ROOT / ".git").exists():
        return ""  # an archive may lie inside another checkout
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """Where a result comes from: code, versions, hardware, command."""
    return {
        "commit": commit(),
        "dirty_diff": git("diff", "HEAD")[:100_000],
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "hardware": hardware(),
        "platform": platform.platform(),
    }
