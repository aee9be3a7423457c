"""Writing files so that a kill or a full disk leaves the old one or the new one, never half."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import RunStopped


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes under a temporary name, sync, rename."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=True) + "\n")


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name, sync it, rename it. Raises RunStopped."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        except OSError:
            raise
        except Exception as error:  # writers in other languages have errors of their own
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one sentence: which path, why, what to do."""
    try:
        yield
    except OSError as error:
        raise RunStopped(
            f"could not write {path}: {error.strerror or error}. What was saved before is intact; "
            "make room or change the permissions, or set runs_dir=<a writable directory>, "
            "and give the same command again"
        ) from error
