"""Text to token ids and back: bytes, or a tokenizer.json through the `tokenizers` library.

Every tokenizer has a separator, the id that starts each packed document. Of a tokenizer.json it is
the first of: `eos_token` of the tokenizer_config.json beside it, `bos_token` of the same, a
well-known end or start token found in the vocabulary (WELL_KNOWN); if there is none, one new id is
appended after the last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from training.data.corpus import BYTE_SEPARATOR, BYTE_VOCAB_SIZE, DataError, token_dtype

WELL_KNOWN = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
)


class Tokenizer(Protocol):
    """What a corpus needs of a tokenizer."""

    vocab_size: int
    "Number of token ids, the separator included."
    separator: int
    identity: str
    "Changes whenever the mapping does."

    def encode(self, text: str | bytes) -> Shaped[np.ndarray, " n"]:
        """Token ids; raises UnicodeDecodeError for bytes that are not the text it needs."""
        ...

    def encode_batch(self, texts: list[str]) -> list[Shaped[np.ndarray, " n"]]:
        """`encode` of each text, in parallel where the library can."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text, without separators."""
        ...


class ByteTokenizer:
    """The 256 byte values, and id 256 for the separator."""

    vocab_size = BYTE_VOCAB_SIZE
    separator = BYTE_SEPARATOR
    identity = "bytes"

    def encode(self, text: str | bytes) -> Shaped[np.ndarray, " n"]:
        """UTF-8 bytes of the text, as uint16 ids."""
        content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(content, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: list[str]) -> list[Shaped[np.ndarray, " n"]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the bytes; separators vanish, broken characters become U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < BYTE_SEPARATOR].astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, given as the file, the directory that holds it, or a name on the hub.

    Raises:
        DataError: if the file is missing or broken, or the hub cannot be reached.
    """

    def __init__(self, source: str):
        from tokenizers import Tokenizer as Library

        path, beside = _locate(source)
        try:
            content = path.read_bytes()
            self._library = Library.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"data.tokenizer={source!r}: {path} is no tokenizer.json the tokenizers library "
                f"reads ({error})"
            ) from error
        # Special tokens spelled out inside a document are text, not document boundaries.
        self._library.encode_special_tokens = True
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        self.separator = next((vocabulary[t] for t in beside if t in vocabulary), size)
        self.vocab_size = max(size, self.separator + 1)
        self.identity = f"{hashlib.sha256(content).hexdigest()}:{self.separator}"

    def encode(self, text: str | bytes) -> Shaped[np.ndarray, " n"]:
        """Token ids (uint16 or uint32), no special tokens added."""
        text = text.decode() if isinstance(text, bytes) else text
        ids = self._library.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str]) -> list[Shaped[np.ndarray, " n"]]:
        """`encode` of each text, on all cores."""
        dtype = token_dtype(self.vocab_size)
        encoded = self._library.encode_batch(texts, add_special_tokens=False)
        return [np.array(item.ids, dtype=dtype) for item in encoded]

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special ones included."""
        return self._library.token_to_id(token)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; separators vanish."""
        kept = [int(i) for i in ids if int(i) != self.separator]
        return self._library.decode(kept, skip_special_tokens=False)


def build_tokenizer(source: str | None) -> Tokenizer:
    """The tokenizer that data.tokenizer names; None means bytes."""
    return ByteTokenizer() if source is None else FileTokenizer(source)


def _locate(source: str) -> tuple[Path, list[str]]:
    """The tokenizer.json and the separator's candidate spellings, best first."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        beside = path.parent / "tokenizer_config.json"
        return path, _separator_names(beside if beside.is_file() else None)
    if path.suffix == ".json" or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(
            f"data.tokenizer={source!r}: there is no file {path}; give a tokenizer.json, a "
            "directory that holds one, a hub name, or null for bytes"
        )
    return _from_hub(source)


def _from_hub(name: str) -> tuple[Path, list[str]]:
    """Fetch (or find in the hub's cache) the two files of a published tokenizer."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    path = try_to_load_from_cache(name, "tokenizer.json") if name.count("/") <= 1 else None
    try:
        if not isinstance(path, str):
            HfApi().model_info(name, timeout=10)  # fails at once where a download would retry
            path = hf_hub_download(name, "tokenizer.json")
    except Exception as error:
        raise DataError(
            f"data.tokenizer={name!r} is neither a local path nor could it be fetched from the hub "
            f"({type(error).__name__}): give a local tokenizer.json, or null for bytes"
        ) from error
    try:
        beside = Path(hf_hub_download(name, "tokenizer_config.json"))
    except Exception:  # many tokenizers are published without it
        beside = None
    return Path(path), _separator_names(beside)


def _separator_names(config_file: Path | None) -> list[str]:
    """Spellings to look for: the configured eos and bos first, then the well-known ones."""
    config = json.loads(config_file.read_text()) if config_file else {}
    named = [config.get("eos_token"), config.get("bos_token")]
    spelled = [token.get("content") if isinstance(token, dict) else token for token in named]
    return [*(token for token in spelled if token), *WELL_KNOWN]
