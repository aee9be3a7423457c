"""Documents packed into one array of tokens, and the split that holds some of them out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from training.errors import UserError
from training.seeding import numpy_rng

Document = tuple[str, bytes]
"Name (stable across machines, unique within the corpus) and contents."

BYTE_SEPARATOR = 256
BYTE_VOCAB_SIZE = 257


class DataError(UserError, ValueError):
    """The data cannot be used as configured; the message says what to change."""


@dataclass(frozen=True)
class Corpus:
    """Packed documents: a separator, the tokens of the first document, a separator, ..."""

    tokens: Shaped[np.ndarray, " n"]
    "uint16 for vocabularies up to 65536, else uint32."
    offsets: Int64[np.ndarray, " documents_plus_1"]
    "Where each document's separator stands; the last entry is the number of tokens."
    names: tuple[str, ...]
    vocab_size: int
    "Number of token ids, the separator included."
    separator: int
    num_bytes: int
    "Bytes of the documents' contents, separators excluded."
    content_hash: str
    "sha256 over the names and contents, hex."

    def document_at(self, position: int) -> str:
        """Name of the document that holds the token at `position`."""
        return self.names[int(np.searchsorted(self.offsets, position, side="right")) - 1]

    def tokens_of(self, document: int) -> Shaped[np.ndarray, " n"]:
        """Tokens of one document, without its separator."""
        return self.tokens[self.offsets[document] + 1 : self.offsets[document + 1]]

    def bytes_of(self, document: int) -> bytes:
        """Contents of one document of a byte corpus (permuted if the corpus was).

        Raises:
            DataError: if the corpus is not made of bytes.
        """
        if self.vocab_size != BYTE_VOCAB_SIZE:
            raise DataError("only byte corpora give back their bytes: set data.tokenizer=null")
        return self.tokens_of(document).astype(np.uint8).tobytes()


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def pack(
    documents: Iterable[Document],
    encode: Callable[[bytes], np.ndarray],
    *,
    separator: int,
    vocab_size: int,
    shuffle: bool = False,
) -> Corpus:
    """Encode the documents and join them, each after a separator.

    Args:
        documents: names and contents.
        encode: bytes to token ids below `vocab_size`.
        separator: the id that starts every document.
        vocab_size: number of token ids, the separator included.
        shuffle: permute the tokens of the whole corpus, separators excepted: a negative control
            that keeps how often each token occurs and nothing else.

    Raises:
        DataError: if a document is not UTF-8 and `encode` needs text.
    """
    dtype = token_dtype(vocab_size)
    start = np.array([separator], dtype=dtype)
    digest = hashlib.sha256()
    parts, names, lengths, num_bytes = [], [], [], 0
    for name, content in documents:
        tokens = encode_document(name, content, encode).astype(dtype)
        parts += [start, tokens]
        names.append(name)
        lengths.append(1 + len(tokens))
        num_bytes += len(content)
        for field in (name.encode(), content):
            digest.update(len(field).to_bytes(8, "little") + field)
    packed = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    if shuffle:
        content = packed != separator
        packed[content] = numpy_rng(0, "data/shuffle_bytes").permutation(packed[content])
    return Corpus(
        tokens=packed,
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        names=tuple(names),
        vocab_size=vocab_size,
        separator=separator,
        num_bytes=num_bytes,
        content_hash=digest.hexdigest(),
    )


def encode_document(
    name: str, content: bytes, encode: Callable[[bytes], np.ndarray]
) -> Shaped[np.ndarray, " n"]:
    """`encode(content)`, with a bad byte reported by the document's name and its offset."""
    try:
        return encode(content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 at byte {error.start}, and a tokenizer needs text: convert the "
            "file, leave it out of data.paths, or train on bytes (data.tokenizer=null)"
        ) from error


def segment_ids(tokens: np.ndarray, separator: int) -> Int32[np.ndarray, "b t"]:
    """Number of each token's document within its window: 0 for the one the window starts in."""
    segments = np.cumsum(tokens == separator, axis=1, dtype=np.int32)
    return segments - segments[:, :1]


def name_hash(name: str) -> int:
    """A 64-bit hash of a document's name, the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split(
    documents: Iterable[Document], fraction: float, max_bytes: int | None
) -> tuple[list[Document], list[Document]]:
    """Part the documents into (train, held out) by the hash of their names.

    A document is a candidate when its hash falls below `fraction`; candidates are held out in the
    order of their hashes as long as they fit into `max_bytes`. If none qualifies, the smallest
    hash that fits (else the shortest document) is held out. A single document is cut near its end,
    after a line.

    Raises:
        DataError: if there is nothing to split.
    """
    documents = list(documents)
    if len(documents) == 1:
        return _cut(documents[0], fraction, max_bytes)
    if not documents:
        raise DataError("the corpus is empty: give data.paths that hold text")
    limit = float("inf") if max_bytes is None else max_bytes
    ranked = sorted(documents, key=lambda document: name_hash(document[0]))
    chosen, held_bytes = set(), 0
    for name, content in ranked:
        if name_hash(name) >= fraction * 2**64:
            break
        if held_bytes + len(content) <= limit:
            chosen.add(name)
            held_bytes += len(content)
    if not chosen:
        fitting = [name for name, content in ranked if len(content) <= limit]
        chosen = {fitting[0] if fitting else min(ranked, key=lambda item: len(item[1]))[0]}
    train = [document for document in documents if document[0] not in chosen]
    return train, [document for document in documents if document[0] in chosen]


def _cut(
    document: Document, fraction: float, max_bytes: int | None
) -> tuple[list[Document], list[Document]]:
    """Hold out the end of a lone document."""
    name, content = document
    held_bytes = max(1, round(fraction * len(content)))
    if max_bytes is not None:
        held_bytes = min(held_bytes, max_bytes)
    at = len(content) - held_bytes
    line_end = content.find(b"\n", at) + 1
    if 0 < line_end < len(content):
        at = line_end
    while at < len(content) and 0x80 <= content[at] < 0xC0:  # inside a UTF-8 character
        at += 1
    if not 0 < at < len(content):
        raise DataError(f"{name} is too short to hold out a part: add documents to data.paths")
    return [(f"{name}[:{at}]", content[:at])], [(f"{name}[{at}:]", content[at:])]
