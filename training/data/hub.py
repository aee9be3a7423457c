"""A Hugging Face data set, streamed by name, with exact resume from the integer step alone.

A shuffle buffer cannot be resumed exactly, so there is none: the stream becomes, in its own order,
cached blocks of `block_tokens` tokens (training/data/blocks.py), and windows are visited in a
random order inside each block. Any window of any step is thus reached at any number of processes,
and cached blocks work offline. The first `heldout_documents` documents never reach a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64

from training.data.blocks import BlockStream, DocumentStream
from training.data.config import HubConfig
from training.data.corpus import DataError, Document, token_dtype
from training.data.order import permute
from training.data.tokenizer import Tokenizer
from training.seeding import stream_seed

if TYPE_CHECKING:
    from datasets import IterableDataset

FORMAT = 1  # of the cached records; a change of their meaning must change it


def load_streaming(config: HubConfig, revision: str | None) -> tuple[IterableDataset, str | None]:
    """The data set as a stream, and the commit it is pinned to.

    Raises:
        DataError: if the hub cannot be reached or does not give out the data set.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        # Asks once, where `load_dataset` would retry for half a minute.
        info = HfApi().dataset_info(
            config.dataset, revision=revision or config.revision, timeout=10
        )
        stream = datasets.load_dataset(
            config.dataset, config.subset, split=config.split, streaming=True, revision=info.sha
        )
    except Exception as error:
        summary = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"data.dataset={config.dataset} could not be opened on the hub "
            f"({type(error).__name__}: {summary}): connect, or use local text with data=stdlib "
            "or data=files data.paths=[...]"
        ) from error
    return stream, info.sha


class HubDocuments:
    """The texts of a hub data set in the hub's own order, resumable at any document.

    Args:
        config: what to stream.
        load: gives the stream and its commit; replaced by tests with local files.
    """

    def __init__(
        self,
        config: HubConfig,
        load: Callable[
            [HubConfig, str | None], tuple[IterableDataset, str | None]
        ] = load_streaming,
    ):
        self._config, self._load = config, load
        self._dataset: IterableDataset | None = None
        self._revision: str | None = None

    def open(self, state: dict[str, Any] | None) -> Iterator[str]:
        """Texts behind `state`, of the commit that the state belongs to."""
        revision = state["revision"] if state else None
        self._dataset, self._revision = self._load(self._config, revision)
        if state:
            self._dataset.load_state_dict(state["stream"])
        return self._texts(self._dataset)

    def state(self) -> dict[str, Any]:
        """The commit, and the library's own position behind the last text."""
        assert self._dataset is not None, "state() before open()"
        return {"revision": self._revision, "stream": self._dataset.state_dict()}

    def _texts(self, dataset: IterableDataset) -> Iterator[str]:
        field = self._config.text_field
        try:
            for row in dataset:
                text = row.get(field)
                if field not in row or not isinstance(text, str | None):
                    raise DataError(
                        f"{self._config.dataset} has no text in data.text_field={field}; its "
                        f"columns: {', '.join(row)}"
                    )
                yield text or ""
        except OSError as error:
            raise DataError(
                f"the stream of data.dataset={self._config.dataset} broke off ({error}): start the "
                "same command again when the network is back; what was read is cached"
            ) from error


class StreamedWindows:
    """Training windows over the blocks of a stream; see `PackedWindows` for the interface.

    Window i of a block covers its tokens i T .. i T + T. Its id is block * windows_per_block + i.
    """

    def __init__(self, stream: BlockStream, config: HubConfig, separator: int):
        self._stream, self._config, self._separator = stream, config, separator
        self._seq_len = config.seq_len
        self.windows_per_block = (config.block_tokens - 1) // config.seq_len
        self._total: int | None = None

    def order(self, first: int, count: int, seed: int) -> Int64[np.ndarray, " count"]:
        """Window ids at positions first .. first + count - 1 of the visiting order.

        Blocks follow each other, inside one the order is random; after the last comes a new epoch.
        """
        positions = np.arange(first, first + count, dtype=np.int64)
        total = self._epoch_length(first + count - 1)
        epochs, positions = np.divmod(positions, total) if total else (0 * positions, positions)
        blocks, index = np.divmod(positions, self.windows_per_block)
        ids = np.empty(count, dtype=np.int64)
        for epoch, block in sorted(set(zip(epochs.tolist(), blocks.tolist(), strict=True))):
            here = (epochs == epoch) & (blocks == block)
            size = self.windows_per_block
            if total:
                size = min(size, total - block * size)
            key = stream_seed(seed, "data/order", epoch, block)
            ids[here] = block * self.windows_per_block + permute(index[here], size, key)
        return ids

    def tokens(self, ids: np.ndarray) -> Int32[np.ndarray, "b t"]:
        """Tokens of the windows, T + 1 each."""
        rows = [self._span(int(window), int(window)) for window in ids]
        return np.stack(rows).astype(np.int32)

    def name(self, window: int) -> str:
        """The window's id and the number of the document it starts in."""
        index, within = divmod(window, self.windows_per_block)
        block = self._stream.block(index)
        head = block.tokens[: within * self._seq_len + 1]
        document = block.documents_before + np.count_nonzero(head == self._separator) - 1
        return f"window {window} of block {index} ({self._config.dataset} document {document})"

    def chunks(self, ids: np.ndarray) -> list[np.ndarray]:
        """Tokens of the windows of sorted distinct ids, neighbours merged within a block."""
        breaks = (np.diff(ids) > 1) | (np.diff(ids // self.windows_per_block) > 0)
        runs = np.split(ids, np.flatnonzero(breaks) + 1)
        return [self._span(int(run[0]), int(run[-1])) for run in runs if len(run)]

    def describe(self) -> dict[str, Any]:
        """Facts of the training part."""
        config = self._config
        return {
            "dataset": config.dataset,
            "subset": config.subset,
            "split": config.split,
            "revision": config.revision,
            "block_tokens": config.block_tokens,
        }

    def _span(self, first: int, last: int) -> np.ndarray:
        """Tokens from the start of window `first` to the end of `last`, both of one block."""
        index, begin = divmod(first, self.windows_per_block)
        end = last - index * self.windows_per_block + 1
        block = self._stream.block(index)
        return block.tokens[begin * self._seq_len : end * self._seq_len + 1]

    def _epoch_length(self, position: int) -> int | None:
        """Windows per epoch, or None while `position` lies in a full block of the first one."""
        if self._total is None:
            index = position // self.windows_per_block
            block = self._stream.block(index)
            if block is not None and not block.last:
                return None
            if block is None:
                index = self._stream.last_index(index)
                block = self._stream.block(index)
            in_last = max(0, len(block.tokens) - 1) // self._seq_len
            self._total = index * self.windows_per_block + in_last
            if self._total == 0:
                raise DataError(
                    f"{self._config.dataset} has only {len(block.tokens)} training tokens, fewer "
                    f"than data.seq_len={self._seq_len} + 1: lower data.seq_len or "
                    "data.heldout_documents"
                )
        return self._total


def open_hub(
    config: HubConfig, tokenizer: Tokenizer, documents: DocumentStream | None = None
) -> tuple[list[Document], StreamedWindows]:
    """The held-out documents and the training windows of a hub data set.

    The held-out documents are those at the start of the stream, up to data.heldout_bytes.

    Raises:
        DataError: if nothing is cached and the hub cannot be reached.
    """
    if config.shuffle_bytes:
        raise DataError(
            "data.shuffle_bytes=true permutes a corpus in memory, a hub data set is streamed: use "
            "data=stdlib or data=files"
        )
    stream = BlockStream(
        documents or HubDocuments(config),
        tokenizer.encode_batch,
        _folder(config, tokenizer),
        block_tokens=config.block_tokens,
        heldout_documents=config.heldout_documents,
        separator=tokenizer.separator,
        dtype=token_dtype(tokenizer.vocab_size),
    )
    heldout, held_bytes = [], 0
    for number, text in enumerate(stream.heldout()):
        content = text.encode(errors="surrogatepass")
        limit = config.heldout_bytes
        if heldout and limit is not None and held_bytes + len(content) > limit:
            break
        heldout.append((_name(config, number), content))
        held_bytes += len(content)
    return heldout, StreamedWindows(stream, config, tokenizer.separator)


def _name(config: HubConfig, number: int) -> str:
    """Name of the stream's document of that number."""
    return f"{config.dataset}/{config.split}/{number}"


def _folder(config: HubConfig, tokenizer: Tokenizer) -> Path:
    """Where the blocks of this stream live: a readable name and a hash of all that shapes them."""
    from omegaconf import OmegaConf

    keys = ["dataset", "subset", "split", "revision", "text_field", "block_tokens"]
    keys += ["heldout_documents"]
    facts = {key: getattr(config, key) for key in keys}
    facts |= {"tokenizer": tokenizer.identity, "format": FORMAT}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    # A config built in code still holds the default's ${oc.env:...}.
    root = Path(OmegaConf.create({"path": config.cache_dir}).path).expanduser()
    return root / "hub" / f"{config.dataset.replace('/', '--')}-{digest}"
