"""Local files as documents: text and source code, JSON lines, parquet. Everything fits in memory.

A document's name is its path relative to the directory or glob that found it (for JSON lines and
parquet with the row's number), so that the held-out split survives moving the folder.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.data.corpus import DataError, Document

PROSE_SUFFIXES = frozenset([".txt", ".md", ".rst", ".tex", ".html"])
CODE_SUFFIXES = frozenset([".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".js", ".ts", ".rs"])
TEXT_SUFFIXES = PROSE_SUFFIXES | CODE_SUFFIXES | {".go", ".java", ".sh"}
ROW_SUFFIXES = frozenset([".jsonl", ".parquet"])


def read_documents(paths: Sequence[str], text_field: str) -> Iterator[Document]:
    """Documents of all files, in the order of their names.

    Args:
        paths: files (any suffix; unknown ones are read as text), directories (walked for the known
            suffixes, hidden files left out) or globs.
        text_field: field of a JSON line or column of a parquet file that holds the text.

    Raises:
        DataError: if a path matches nothing, a file is empty or broken, or the field is missing.
            Empty files inside a directory or glob are skipped.
    """
    if not paths:
        raise DataError("data.paths is empty: give files, directories or globs, e.g. [texts/]")
    found = 0
    for name, file in sorted(_named_files(paths).items()):
        found += file.stat().st_size > 0
        if file.suffix == ".jsonl":
            yield from _json_lines(name, file, text_field)
        elif file.suffix == ".parquet":
            yield from _parquet_rows(name, file, text_field)
        elif content := file.read_bytes():
            yield name, content
    if not found:
        raise DataError(f"data.paths={list(paths)}: every file found there is empty")


def _named_files(paths: Sequence[str]) -> dict[str, Path]:
    """Document name -> file, each file once; files of the same name are told apart by ~2, ~3."""
    named: dict[str, Path] = {}
    seen: set[Path] = set()
    for given in paths:
        for name, file in _matches(given):
            if (real := file.resolve()) in seen:
                continue
            seen.add(real)
            unique, copies = name, 1
            while unique in named:
                copies += 1
                unique = f"{name}~{copies}"
            named[unique] = file
    return named


def _matches(given: str) -> list[tuple[str, Path]]:
    """(name, file) pairs of one entry of data.paths, sorted."""
    path = Path(given).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"data.paths: {given} is an empty file: leave it out")
        return [(path.name, path)]
    if path.is_dir():
        files = [file for file in path.rglob("*") if _is_readable(file.relative_to(path))]
        base = path
    elif glob.has_magic(given):
        base = _fixed_part(path)
        files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise DataError(f"data.paths: there is no {given} (tried as file, directory and glob)")
    matches = sorted((file.relative_to(base).as_posix(), file) for file in files if file.is_file())
    if not matches:
        known = " ".join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))
        raise DataError(f"data.paths: no file matches {given}; a directory is searched for {known}")
    return matches


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a glob, up to its first wildcard."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _is_readable(relative: Path) -> bool:
    """Whether a walk of a directory takes this file."""
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix in TEXT_SUFFIXES | ROW_SUFFIXES


def _json_lines(name: str, file: Path, text_field: str) -> Iterator[Document]:
    """One document per line of a .jsonl file; blank lines are skipped."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                raise DataError(f"{where} is no JSON object: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                raise DataError(_no_text(where, text_field, row))
            if row[text_field]:
                yield f"{name}:{number}", row[text_field].encode(errors="surrogatepass")


def _no_text(where: str, text_field: str, row: object) -> str:
    """Why a JSON line gives no text."""
    if not isinstance(row, dict):
        return f"{where} holds a JSON {type(row).__name__}: expected an object, one per line"
    if text_field in row:
        kind = type(row[text_field]).__name__
        return f"{where}: data.text_field={text_field} holds a {kind}, expected a string"
    fields = ", ".join(map(str, row)) or "none"
    return f"{where} has no field data.text_field={text_field}; its fields: {fields}"


def _parquet_rows(name: str, file: Path, text_field: str) -> Iterator[Document]:
    """One document per row of a .parquet file; null and empty rows are skipped."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no parquet file: {error}") from error
    with table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise DataError(
                f"{file} has no column data.text_field={text_field}; its columns: "
                f"{', '.join(columns)}"
            )
        number = 0
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"{file}: column data.text_field={text_field} holds "
                        f"{type(text).__name__}, expected strings"
                    )
                if text:
                    yield f"{name}:{number}", text.encode()
                number += 1
