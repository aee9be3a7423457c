"""Conversations about a corpus, from a directory of shards: what its cartridge is trained on.

    conversations-00007.safetensors      conversations 7 n ... 8 n - 1, written whole or not at all
        tokens   int32 [t]      all of them, one after the other    offsets int64 [n + 1]
        weight   uint8 [t]      1 for tokens of answers
        likely   int32 [t, k]   the teacher's most likely tokens instead of each token of an answer,
        logprobs float32 [t, k]  and their natural log-probabilities; k = 0 if none were recorded
    metadata["conversations"]   JSON: corpus, model, tokenizer, seed, and of each conversation its
                                chunk and kind

`training/synthesis.py` writes them. A conversation's tokens follow the cartridge directly: the
corpus itself, a system message, is not part of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from training.data.config import ConversationsConfig
from training.data.corpus import DataError
from training.data.order import rank_slice, visit
from training.files import replace_with

FORMAT = 1
PATTERN = "conversations-*.safetensors"


@dataclass(frozen=True)
class Conversation:
    """One conversation, as it is trained on."""

    tokens: Int32[np.ndarray, " t"]
    weight: Bool[np.ndarray, " t"]
    likely: Int32[np.ndarray, "t k"]
    logprobs: Float32[np.ndarray, "t k"]
    facts: dict[str, Any] = field(default_factory=dict)
    "Chunk, kind, author."


def shard_path(directory: Path, index: int) -> Path:
    return directory / f"conversations-{index:05d}.safetensors"


def write_shard(path: Path, conversations: Sequence[Conversation], header: dict[str, Any]) -> None:
    """Write conversations as one file, atomically."""
    from safetensors.numpy import save_file

    offsets = np.cumsum([0, *(len(c.tokens) for c in conversations)]).astype(np.int64)
    tensors = {
        "tokens": np.concatenate([c.tokens for c in conversations]).astype(np.int32),
        "weight": np.concatenate([c.weight for c in conversations]).astype(np.uint8),
        "likely": np.concatenate([c.likely for c in conversations]).astype(np.int32),
        "logprobs": np.concatenate([c.logprobs for c in conversations]).astype(np.float32),
        "offsets": offsets,
    }
    facts = {"format": FORMAT, **header, "each": [c.facts for c in conversations]}
    metadata = {"conversations": json.dumps(facts, sort_keys=True)}
    replace_with(path, partial(save_file, tensors, metadata=metadata))


def read_shard(path: Path) -> tuple[list[Conversation], dict[str, Any]]:
    """The conversations of a file, and its header. Raises DataError."""
    import safetensors
    from safetensors.numpy import load_file

    try:
        with safetensors.safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})["conversations"])
        tensors = load_file(path)
        each, offsets = header.pop("each"), tensors["offsets"]
        parts = {name: tensors[name] for name in ("tokens", "weight", "likely", "logprobs")}
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is damaged or holds no conversations: {error}") from error
    whole = len(parts["tokens"])
    if header.get("format") != FORMAT:
        raise DataError(f"{path} has format {header.get('format')}, this version reads {FORMAT}")
    if (
        any(len(part) != whole for part in parts.values())
        or len(offsets) != len(each) + 1
        or (np.diff(offsets, prepend=0) < 0).any()
        or offsets[0] != 0
        or offsets[-1] != whole
    ):
        raise DataError(f"{path} is damaged: its parts do not fit each other")
    found = [
        Conversation(
            parts["tokens"][a:b],
            parts["weight"][a:b].astype(bool),
            parts["likely"][a:b],
            parts["logprobs"][a:b],
            facts,
        )
        for a, b, facts in zip(offsets[:-1], offsets[1:], each, strict=True)
    ]
    return found, header


class ConversationsData:
    """Batches of conversations in an order drawn anew for every epoch; the last ones are held out.

    Attributes:
        header: corpus (token ids of what the cartridge stands for are in corpus.safetensors), model
            and tokenizer that they were synthesised with.
    """

    def __init__(
        self, config: ConversationsConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        directory = Path(config.path).expanduser()
        files = sorted(directory.glob(PATTERN))
        if not files:
            raise DataError(
                f"data.path={config.path} holds no {PATTERN}: make them with `afferent synthesise`"
            )
        if config.batch_size % world:
            raise DataError(
                f"data.batch_size={config.batch_size} does not divide over {world} processes"
            )
        self.config, self._seed, self._rank, self._world = config, seed, rank, world
        every: list[Conversation] = []
        for file in files:
            found, header = read_shard(file)
            if every and header["corpus"] != self.header["corpus"]:
                raise DataError(f"{file} is about another corpus than {files[0]}")
            self.header = header
            every += found
        if len(every) <= config.heldout:
            raise DataError(
                f"data.path={config.path} holds {len(every)} conversations, data.heldout="
                f"{config.heldout} leaves none to train on: synthesise more"
            )
        self.train, self.heldout = every[: -config.heldout], every[-config.heldout :]
        self.corpus = read_corpus(directory)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's conversations of a step, cut or filled up to seq_len.

        Returns:
            `tokens` int32 [b, seq_len + 1], `weight` float32 [b, seq_len] of each next token,
            `owner` int32 [b] (zeros), `likely` int32 and `logprobs` float32 [b, seq_len, k].
        """
        size = self.config.batch_size
        chosen = [self.train[i] for i in visit(step * size, size, len(self.train), self._seed)]
        return {
            name: rank_slice(rows, self._rank, self._world)
            for name, rows in padded(chosen, self.config.seq_len).items()
        }

    def ids(self, step: int) -> list[str]:
        return [f"conversation {i} of step {step}" for i in range(self.config.batch_size)]

    @property
    def content_hash(self) -> str:
        found = hashlib.sha256(self.header["corpus"].encode())
        for conversation in (*self.train, *self.heldout):
            found.update(conversation.tokens.tobytes())
        return found.hexdigest()


def padded(conversations: Sequence[Conversation], seq_len: int) -> dict[str, np.ndarray]:
    """Rows of seq_len + 1 tokens; what is filled up has no weight."""
    rows, k = len(conversations), conversations[0].likely.shape[1]
    tokens = np.zeros((rows, seq_len + 1), np.int32)
    weight = np.zeros((rows, seq_len), np.float32)
    likely = np.full((rows, seq_len, k), -1, np.int32)
    logprobs = np.zeros((rows, seq_len, k), np.float32)
    for row, conversation in enumerate(conversations):
        n = min(len(conversation.tokens), seq_len + 1)
        tokens[row, :n] = conversation.tokens[:n]
        weight[row, : n - 1] = conversation.weight[1:n]
        likely[row, : n - 1] = conversation.likely[1:n]
        logprobs[row, : n - 1] = conversation.logprobs[1:n]
    owner = np.zeros(rows, np.int32)
    return {
        "tokens": tokens, "weight": weight, "owner": owner, "likely": likely, "logprobs": logprobs,
    }  # fmt: skip


def write_corpus(directory: Path, tokens: Sequence[int]) -> str:
    """Keep the token ids that a cartridge is to stand for; returns their sha256."""
    from safetensors.numpy import save_file

    array = np.array(tokens, np.int32)
    path = directory / "corpus.safetensors"
    replace_with(path, partial(save_file, {"tokens": array}))
    return hashlib.sha256(array.tobytes()).hexdigest()


def read_corpus(directory: Path) -> Int32[np.ndarray, " t"]:
    """The inverse. Raises DataError."""
    import safetensors
    from safetensors.numpy import load_file

    path = directory / "corpus.safetensors"
    try:
        return load_file(path)["tokens"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error
