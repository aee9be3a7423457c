"""A document stream as fixed-size blocks of tokens, cached on disk and verified by hash.

A record is a payload (raw bytes) and a sidecar (JSON: sha256, the stream's state behind it,
counts). Record -1 holds the held-out documents, record i the i-th block followed by the tokens that
were read but did not fit. Both files are written to a temporary name, synced and renamed, under a
file lock, so that several processes share the work and a killed one leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from training.data.corpus import DataError
from training.files import write_atomic

HELDOUT = -1
DOCUMENTS_PER_READ = 128
BLOCKS_KEPT_OPEN = 4

Record = tuple[np.ndarray, dict[str, Any]]
"Payload (uint8) and facts."


class DocumentStream(Protocol):
    """Texts in a fixed order, from any point reached before."""

    def open(self, state: dict[str, Any] | None) -> Iterator[str]:
        """The texts behind `state`; None means from the first."""
        ...

    def state(self) -> dict[str, Any]:
        """The point behind the last text read, as plain JSON values."""
        ...


@dataclass(frozen=True)
class Block:
    """Tokens of one block."""

    tokens: Shaped[np.ndarray, " n"]
    documents_before: int
    "Documents of the stream that began before this block."
    last: bool
    "Whether the stream ends with this block, which may then be shorter."


class BlockStream:
    """Random access to the blocks of a document stream.

    Args:
        documents: the stream.
        encode: texts -> token ids of each, without separators.
        folder: where the records live; one folder per stream, tokenizer and block size.
        block_tokens: tokens per block, separators included.
        heldout_documents: documents at the start that are kept out of the blocks.
        separator: id put before every document.
        dtype: of the stored tokens.
    """

    def __init__(
        self,
        documents: DocumentStream,
        encode: Callable[[list[str]], list[np.ndarray]],
        folder: Path,
        *,
        block_tokens: int,
        heldout_documents: int,
        separator: int,
        dtype: type[np.unsignedinteger],
    ):
        from filelock import FileLock

        self._documents, self._encode, self._folder = documents, encode, folder
        self._block_tokens, self._heldout_documents = block_tokens, heldout_documents
        self._separator, self._dtype = separator, np.dtype(dtype)
        self._texts: Iterator[str] = iter(())
        self._serves: int | None = None  # the record that the open iterator would build next
        self._open: dict[int, Block] = {}
        self._expected: dict[int, str] = {}  # hashes of records found broken
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock")

    def heldout(self) -> list[str]:
        """Texts of the held-out documents."""
        payload, facts = self._read(HELDOUT) or self._build_up_to(HELDOUT)
        ends = np.cumsum(facts["lengths"], dtype=np.int64)
        content = payload.tobytes()
        return [
            content[end - length : end].decode(errors="surrogatepass")
            for end, length in zip(ends, facts["lengths"], strict=True)
        ]

    def block(self, index: int) -> Block | None:
        """The block at `index`, read or built; None behind the stream's end. Threads may share it.

        Raises:
            DataError: if the stream cannot be read, or what it holds now differs from what a
                broken block held.
        """
        block = self._open.get(index)
        if block is None:
            record = self._read(index) or self._build_up_to(index)
            if record[1]["index"] != index:
                return None
            block = self._as_block(record)
            kept = list(self._open.items())[1 - BLOCKS_KEPT_OPEN :]
            self._open = dict([*kept, (index, block)])
        return block

    def last_index(self, index: int) -> int:
        """Index of the last block of a stream that is known to end at or before `index`."""
        return self._build_up_to(index)[1]["index"]

    def _as_block(self, record: Record) -> Block:
        payload, facts = record
        tokens = payload.view(self._dtype)[: facts["tokens"]]
        return Block(tokens, facts["documents_before"], facts["last"])

    def _build_up_to(self, index: int) -> Record:
        """Record `index`, or the stream's last one if it ends earlier."""
        with self._lock:
            at, record = index, self._read(index)
            while record is None and at > HELDOUT:
                at -= 1
                record = self._read(at)
            if record is None:
                record = self._build_heldout()
            while at < index and not record[1]["last"]:
                at += 1
                record = self._build(at, record)
            return record

    def _build_heldout(self) -> Record:
        """Read the first documents of the stream."""
        self._texts, self._serves = self._documents.open(None), None
        texts = list(islice(self._texts, self._heldout_documents))
        if len(texts) < self._heldout_documents:
            raise DataError(
                f"data.heldout_documents={self._heldout_documents}, but the data set has only "
                f"{len(texts)} documents: use fewer"
            )
        contents = [text.encode(errors="surrogatepass") for text in texts]
        facts = {
            "lengths": [len(content) for content in contents],
            "documents": len(texts),
            "state": self._documents.state(),
            "ended": False,
            "last": False,
        }
        self._serves = 0
        return self._write(HELDOUT, b"".join(contents), facts)

    def _build(self, index: int, previous: Record) -> Record:
        """The block behind `previous`: what that left over, then what the stream must add."""
        left, before = self._behind(previous)
        facts = previous[1]
        parts, size, documents, ended = [left], len(left), facts["documents"], facts["ended"]
        if size < self._block_tokens and not ended and self._serves != index:
            self._texts = self._documents.open(facts["state"])
            self._serves = index
        serves, self._serves = self._serves, None  # a failed read leaves no iterator to trust
        state = facts["state"]
        while size < self._block_tokens and not ended:
            texts = list(islice(self._texts, DOCUMENTS_PER_READ))
            ended = len(texts) < DOCUMENTS_PER_READ
            for tokens in self._encode(texts):
                parts.append(np.concatenate([[self._separator], tokens]).astype(self._dtype))
                size += len(parts[-1])
            documents += len(texts)
            state = self._documents.state()
        self._serves = index + 1 if serves == index else None
        built = {
            "tokens": min(size, self._block_tokens),
            "documents_before": before,
            "documents": documents,
            "state": state,
            "ended": ended,
            "last": ended and size <= self._block_tokens,
        }
        return self._write(index, np.concatenate(parts).tobytes(), built)

    def _behind(self, record: Record) -> tuple[np.ndarray, int]:
        """Tokens a record left over, and the documents that began before the next block."""
        payload, facts = record
        if facts["index"] == HELDOUT:
            return np.empty(0, dtype=self._dtype), self._heldout_documents
        tokens = payload.view(self._dtype)
        inside = tokens[: facts["tokens"]]
        begun = int(np.count_nonzero(inside == self._separator))
        return tokens[facts["tokens"] :], facts["documents_before"] + begun

    def _paths(self, index: int) -> tuple[Path, Path]:
        stem = "heldout" if index == HELDOUT else f"block_{index:06d}"
        return self._folder / f"{stem}.bin", self._folder / f"{stem}.json"

    def _read(self, index: int) -> Record | None:
        """A record from disk; None if it is missing or broken (then it will be rebuilt)."""
        payload_path, sidecar_path = self._paths(index)
        try:
            facts = json.loads(sidecar_path.read_text())
            size = payload_path.stat().st_size
            payload = np.memmap(payload_path, np.uint8, "r") if size else np.empty(0, np.uint8)
        except FileNotFoundError:
            return None
        except ValueError:
            warnings.warn(f"{sidecar_path} is unreadable: it is rebuilt", stacklevel=2)
            return None
        if hashlib.sha256(payload).hexdigest() == facts["sha256"]:
            return np.asarray(payload), facts
        self._expected[index] = facts["sha256"]
        warnings.warn(f"{payload_path} is corrupted (sha256 differs): it is rebuilt", stacklevel=2)
        return None

    def _write(self, index: int, payload: bytes, facts: dict[str, Any]) -> Record:
        """Store a record; the sidecar last, since it vouches for the payload."""
        digest = hashlib.sha256(payload).hexdigest()
        payload_path, sidecar_path = self._paths(index)
        if self._expected.pop(index, digest) != digest:
            raise DataError(
                f"{payload_path} was corrupted and the data set has changed since it was written: "
                f"remove {self._folder} to start over, and pin data.revision"
            )
        facts = {"index": index, "sha256": digest, **facts}
        write_atomic(payload_path, payload)
        write_atomic(sidecar_path, json.dumps(facts).encode())
        return np.frombuffer(payload, np.uint8), facts
