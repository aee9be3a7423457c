"""A corpus on every machine: the running interpreter's own standard-library sources.

Without the test suites and IDLE it is about 11 MB of code and prose (Python 3.11). The text differs
between Python versions: compare losses within one version only, or check `Corpus.content_hash`.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from training.data.corpus import DataError

EXCLUDED = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib"]
)


def stdlib_documents(
    root: str | Path | None = None, by_package: bool = False
) -> Iterator[tuple[str, bytes]]:
    """Documents (relative name, source bytes), sorted by name; empty files are left out.

    Args:
        root: folder to walk; None means the running interpreter's standard library.
        by_package: the files of a package make one document, each after a line with its name;
            modules that belong to no package stay documents of their own.

    Raises:
        DataError: if the interpreter ships no sources.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    names = sorted(_source_names(root))
    if not names:
        raise DataError(
            f"data=stdlib found no .py sources under {root} (a zipped or stripped interpreter): "
            "use data=files with data.paths=[...]"
        )
    contents = ((name, (root / name).read_bytes()) for name in names)
    filled = ((name, content) for name, content in contents if content)
    yield from sorted(_joined(filled)) if by_package else filled


def _joined(documents: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """One document per folder below the root."""
    for package, files in groupby(documents, key=lambda document: document[0].split("/")[0]):
        parts = [f"# {name}\n".encode() + content for name, content in files]
        yield package, b"\n".join(parts)


def _source_names(root: Path) -> Iterator[str]:
    """Relative POSIX names of the sources below `root`, in no particular order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED]
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in files if name.endswith(".py"))
