"""Language data for one process: batch i of a corpus, its held-out windows, and facts about both.

Window w of a corpus covers the tokens w T .. w T + T (T = data.seq_len): T inputs, and T targets
that are the same tokens one later. Which windows make up step i depends on (seed, i) alone; each
process takes its slice of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from training.data.config import (
    CorpusConfig,
    DataConfig,
    FilesConfig,
    HubConfig,
    MarkovConfig,
    StdlibConfig,
)
from training.data.corpus import Corpus, DataError, pack, segment_ids, split
from training.data.order import rank_slice, visit
from training.data.tokenizer import Tokenizer, build_tokenizer
from training.distributed import Processes
from training.schema import TrainConfig


class Windows(Protocol):
    """Training windows of T + 1 tokens, numbered."""

    def order(self, first: int, count: int, seed: int) -> Int64[np.ndarray, " count"]:
        """Window ids at positions first .. first + count - 1 of the endless visiting order."""
        ...

    def tokens(self, ids: np.ndarray) -> Int32[np.ndarray, "b t"]:
        """Tokens of the windows, T + 1 each."""
        ...

    def name(self, window: int) -> str:
        """What a person needs to find the window."""
        ...

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Tokens of the windows of sorted distinct ids, neighbours merged."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-able facts."""
        ...


class PackedWindows:
    """Windows of a corpus in memory.

    Raises:
        DataError: if the corpus is shorter than one window.
    """

    def __init__(self, corpus: Corpus, seq_len: int):
        self._corpus, self._seq_len = corpus, seq_len
        self.num_windows = (len(corpus.tokens) - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"the training part has only {len(corpus.tokens)} tokens, fewer than "
                f"data.seq_len={seq_len} + 1: lower data.seq_len or give more text"
            )

    def order(self, first: int, count: int, seed: int) -> Int64[np.ndarray, " count"]:
        """Epoch after epoch, each a permutation of all windows."""
        return visit(first, count, self.num_windows, seed)

    def tokens(self, ids: np.ndarray) -> Int32[np.ndarray, "b t"]:
        """Tokens of the windows, T + 1 each."""
        index = np.asarray(ids)[:, None] * self._seq_len + np.arange(self._seq_len + 1)
        return self._corpus.tokens[index].astype(np.int32)

    def name(self, window: int) -> str:
        """The window's id and the document it starts in."""
        return f"window {window} ({self._corpus.document_at(window * self._seq_len)})"

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Tokens of the windows of sorted distinct ids, neighbours merged."""
        runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        spans = [(run[0] * self._seq_len, (run[-1] + 1) * self._seq_len + 1) for run in runs]
        return [self._corpus.tokens[begin:end] for begin, end in spans]

    def describe(self) -> dict[str, Any]:
        """Sizes of the training part."""
        return {
            "train_documents": len(self._corpus.names),
            "train_bytes": self._corpus.num_bytes,
            "train_tokens": len(self._corpus.tokens),
            "num_windows": self.num_windows,
        }


class LanguageData:
    """What the loop and the recipes ask of a text corpus.

    Args:
        config: a stdlib, files or hub configuration.
        seed: of the run; decides the order of the windows and nothing else.
        rank: this process, in [0, world).
        world: number of processes that share a batch.

    Raises:
        DataError: if the data cannot be used as configured.
        ValueError: if data.batch_size does not divide by `world`.
    """

    train: Corpus | None
    "The training part; None when it is streamed."
    heldout: Corpus

    def __init__(self, config: CorpusConfig, *, seed: int, rank: int = 0, world: int = 1):
        rank_slice(np.empty(config.batch_size), rank, world)  # fail now, not at the first batch
        self.config, self._seed, self._rank, self._world = config, seed, rank, world
        self.tokenizer: Tokenizer = build_tokenizer(config.tokenizer)
        self.train, self.heldout, self._windows = _open(config, self.tokenizer)
        if self.heldout.num_bytes == 0:
            raise DataError("the held-out documents are empty: raise data.heldout_documents")

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the separator included."""
        return self.tokenizer.vocab_size

    @property
    def separator(self) -> int:
        """The id that starts every document."""
        return self.tokenizer.separator

    @property
    def heldout_bytes(self) -> int:
        """Bytes that the held-out tokens stand for: the denominator of bits per byte."""
        return self.heldout.num_bytes

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of all that decides which tokens there are; not of their order."""
        config = self.config
        facts = [self.heldout.content_hash, self.tokenizer.identity, config.shuffle_bytes]
        if self.train is not None:
            facts.append(self.train.content_hash)
        elif isinstance(config, HubConfig):
            facts += [config.dataset, config.subset, config.split, config.revision]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encode(self, text: str) -> Shaped[np.ndarray, " n"]:
        """Token ids of a text, without separators."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; separators vanish."""
        return self.tokenizer.decode(ids)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's share of the batch of `step`.

        Returns:
            `tokens` int32 [b, T + 1]; with data.document_mask also `segments` int32 [b, T + 1],
            equal where two tokens belong to one document.
        """
        return self._with_segments({"tokens": self._windows.tokens(self._window_ids(step))})

    def ids(self, step: int) -> list[str]:
        """Which windows the batch of `step` holds, for error messages."""
        return [self._windows.name(int(window)) for window in self._window_ids(step)]

    def seen(self, steps: int) -> list[Shaped[np.ndarray, " n"]]:
        """Token chunks trained on in steps [0, steps) by all processes, each token range once.

        In corpus order, neighbouring windows merged; separators are kept.
        """
        if steps < 1:
            return []
        ids = self._windows.order(0, steps * self.config.batch_size, self._seed)
        return self._windows.chunks(np.unique(ids))

    @property
    def num_heldout_windows(self) -> int:
        """Windows that `heldout_batches` covers the held-out part with."""
        stride = self.config.eval_stride or self.config.seq_len
        return 1 + max(0, -(-(len(self.heldout.tokens) - 1 - self.config.seq_len) // stride))

    def heldout_batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Windows that together score every held-out token but the separators exactly once.

        Windows advance by data.eval_stride; a token that an earlier window scored only gives
        context. The last batch is filled with windows of weight 0. The same on every process.

        Yields:
            `tokens` int32 [b, T + 1], `weight` float32 [b, T] (1 where the target, tokens[:, 1:],
            is to be scored), and `segments` as in `batch`.
        """
        seq_len = self.config.seq_len
        stride = self.config.eval_stride or seq_len
        tokens = self.heldout.tokens.astype(np.int32)
        num_windows = self.num_heldout_windows
        padded = np.full((num_windows - 1) * stride + seq_len + 1, self.separator, dtype=np.int32)
        padded[: len(tokens)] = tokens
        for first in range(0, num_windows, batch_size):
            windows = np.arange(first, first + batch_size)
            real = windows < num_windows
            starts = np.where(real, windows, 0) * stride
            batch = padded[starts[:, None] + np.arange(seq_len + 1)]
            is_new = (windows == 0)[:, None] | (np.arange(seq_len) >= seq_len - stride)
            weight = is_new & real[:, None] & (batch[:, 1:] != self.separator)
            yield self._with_segments({"tokens": batch, "weight": weight.astype(np.float32)})

    def heldout_sequences(self, count: int, length: int) -> dict[str, np.ndarray]:
        """Up to `count` stretches of held-out documents, evenly spaced, none across two documents.

        Returns:
            `tokens` int32 [n, length + 1].
        Raises:
            DataError: no held-out document is that long.
        """
        tokens = self.heldout.tokens
        begins = np.flatnonzero(tokens == self.separator) + 1
        ends = np.append(begins[1:] - 1, len(tokens))
        starts = np.concatenate(
            [np.arange(a, b - length, length) for a, b in zip(begins, ends, strict=True)]
        )
        if not len(starts):
            raise DataError(
                f"no held-out document has {length + 1} tokens (the longest has "
                f"{int((ends - begins).max())}): shorten recipe.eval_lengths, or raise "
                "data.heldout_bytes"
            )
        chosen = starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(np.int64)]
        return {"tokens": tokens[chosen[:, None] + np.arange(length + 1)].astype(np.int32)}

    def describe(self) -> dict[str, Any]:
        """JSON-able facts, for a run's records."""
        return {
            "name": self.config.name,
            "seq_len": self.config.seq_len,
            "batch_size": self.config.batch_size,
            "vocab_size": self.vocab_size,
            "separator": self.separator,
            "shuffle_bytes": self.config.shuffle_bytes,
            **self._windows.describe(),
            "heldout_documents": len(self.heldout.names),
            "heldout_bytes": self.heldout_bytes,
            "heldout_tokens": len(self.heldout.tokens),
            "content_hash": self.content_hash,
        }

    def _window_ids(self, step: int) -> np.ndarray:
        """Window ids of this process at `step`."""
        batch_size = self.config.batch_size
        ids = self._windows.order(step * batch_size, batch_size, self._seed)
        return rank_slice(ids, self._rank, self._world)

    def _with_segments(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.config.document_mask:
            batch["segments"] = segment_ids(batch["tokens"], self.separator)
        return batch


def documents_for_run(config: TrainConfig, processes: Processes) -> LanguageData | MarkovData:
    """Batches of a run and held-out sequences to read, generated or of a corpus."""
    if isinstance(config.data, MarkovConfig):
        from training.data.markov import MarkovData

        return MarkovData(config.data, seed=config.seed, rank=processes.rank, world=processes.world)
    return for_run(config, processes)


def for_run(config: TrainConfig, processes: Processes) -> LanguageData:
    """The corpus of a run and its order, as this process sees them. Raises DataError."""
    assert isinstance(config.data, CorpusConfig)
    if config.data.batch_size % processes.world:
        raise DataError(
            f"data.batch_size={config.data.batch_size} does not divide over {processes.world} "
            "processes: make it a multiple of them"
        )
    return build(config.data, seed=config.seed, rank=processes.rank, world=processes.world)


def build(config: DataConfig, *, seed: int, rank: int = 0, world: int = 1) -> LanguageData:
    """The data of a text configuration, for one of `world` processes.

    Raises:
        DataError: if the configuration is not one of a text corpus, or its data is unusable.
    """
    if not isinstance(config, CorpusConfig):
        raise DataError(f"data={config.name} is no text corpus: use data=stdlib, files or hub")
    return LanguageData(config, seed=seed, rank=rank, world=world)


def _open(
    config: CorpusConfig, tokenizer: Tokenizer
) -> tuple[Corpus | None, Corpus, PackedWindows | Windows]:
    """Training part (None if streamed), held-out part, training windows."""

    def packed(documents) -> Corpus:
        return pack(
            documents,
            tokenizer.encode,
            separator=tokenizer.separator,
            vocab_size=tokenizer.vocab_size,
            shuffle=config.shuffle_bytes,
        )

    if isinstance(config, HubConfig):
        from training.data.hub import open_hub

        heldout, windows = open_hub(config, tokenizer)
        return None, packed(heldout), windows
    train, heldout = split(_documents(config), config.heldout_fraction, config.heldout_bytes)
    corpus = packed(train)
    return corpus, packed(heldout), PackedWindows(corpus, config.seq_len)


def _documents(config: CorpusConfig) -> Iterator[tuple[str, bytes]]:
    """Documents of a configuration whose text fits in memory."""
    if isinstance(config, FilesConfig):
        from training.data.files import read_documents

        return read_documents(config.paths, config.text_field)
    if isinstance(config, StdlibConfig):
        from training.data.stdlib import stdlib_documents

        return stdlib_documents(by_package=config.by_package)
    raise DataError(f"data={config.name} is no known corpus: use stdlib, files or hub")
