"""Self-study: a model makes conversations about a corpus with itself (arXiv:2506.06266, section 4).

    conversation i of a seed:
        chunk    a part of the corpus, its length and place uniform
        A        the model that sees the chunk and one of five generic requests writes a question
        B        the model that sees the chunk, and not the request, answers it at temperature 0;
                 the 20 most likely tokens of each step are kept

Everything that is drawn is a function of (seed, i), so a synthesis that was interrupted goes on
where it ended, on another machine too, and two of the same corpus differ only by what the model
says. Questions may come from the model in this process or from a server (`endpoint.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.chat import Chat
from training.data.conversations import (
    Conversation,
    read_shard,
    shard_path,
    write_corpus,
    write_shard,
)
from training.endpoint import Completion, Engine, Request
from training.errors import UserError
from training.seeding import numpy_rng, stream_seed

KINDS = {
    "structuring": (
        "Pick one section of the text above and ask for its facts in a structured form: JSON, "
        "YAML, TOML, INI, XML or a plain table. Name the section. Write the request only."
    ),
    "summarisation": (
        "Pick one section of the text above, name it, and ask for a summary of it. Write the "
        "request only."
    ),
    "question": (
        "Ask one precise question that the text above answers, with names, dates or numbers so "
        "that someone without the text knows what it is about. Write the question only."
    ),
    "use_case": (
        "Think of somebody who needs the text above for their work, and ask one question as they "
        "would. Write the question only."
    ),
    "creative": (
        "Begin a conversation about something surprising in the text above. Write the first "
        "message only."
    ),
}
"Kind of conversation -> what A is asked to write."

SEEDS = 2**31  # what every server takes


@dataclass(frozen=True)
class Study:
    """What is synthesised."""

    conversations: int = 1024
    seed: int = 0
    chunk: tuple[int, int] = (512, 4096)
    "Least and most tokens of a chunk."
    question_tokens: int = 512
    answer_tokens: int = 1024
    temperature: float = 0.6
    "Of the questions."
    top_k: int = 20
    shard: int = 64
    "Conversations per file."
    workers: int = 8
    "Requests at a time."

    def __post_init__(self) -> None:
        low, high = self.chunk
        if not 1 <= low <= high:
            raise UserError(f"chunk={low},{high} must be the least and the most tokens of a chunk")
        for key in ("conversations", "question_tokens", "answer_tokens", "top_k", "shard"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be at least 1")
        if self.temperature < 0 or self.workers < 1:
            raise UserError("temperature must be at least 0 and workers at least 1")


def synthesise(
    corpus: str,
    engine: Engine,
    chat: Chat,
    study: Study,
    directory: Path,
    *,
    context: int | None = None,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> dict[str, Any]:
    """Write the conversations of a study to a directory, or what of them is missing.

    Args:
        corpus: the text.
        context: most tokens that the model reads at once; None: no limit.
        progress: called with the conversations that are done, and all.
    Returns:
        The header of the shards.
    Raises:
        UserError: an empty corpus, chunks that the model cannot read, a directory with another
            study, or an endpoint that fails; shards that were written stay.
    """
    tokens = chat.encode(corpus)
    if not corpus.strip() or not tokens:
        raise UserError("the corpus is empty: there is nothing to study")
    longest = min(study.chunk[1], len(tokens))
    needed = longest + study.question_tokens + study.answer_tokens + 256
    if context is not None and needed > context:
        raise UserError(
            f"a chunk of {longest} tokens with its question and answer needs {needed} tokens, the "
            f"model reads {context}: lower chunk, question_tokens or answer_tokens"
        )
    directory.mkdir(parents=True, exist_ok=True)
    stands_for = [*chat.begin(), *chat.message("system", tokens)]
    digest = hashlib.sha256(np.array(stands_for, np.int32).tobytes()).hexdigest()
    header = {
        "corpus": digest,
        "corpus_tokens": len(stands_for),
        "model": engine.identity,
        "tokenizer": chat.tokenizer.identity,
        "chat": chat.name,
        "seed": study.seed,
        "shard": study.shard,
        "top_k": study.top_k,
    }
    refuse_another(directory, header)
    write_corpus(directory, stands_for)
    shards = -(-study.conversations // study.shard)
    with ThreadPoolExecutor(study.workers) as pool:
        for index in range(shards):
            path = shard_path(directory, index)
            first = index * study.shard
            last = min(first + study.shard, study.conversations)
            if not path.exists() or len(read_shard(path)[0]) < last - first:
                made = pool.map(
                    lambda i: converse(i, tokens, engine, chat, study), range(first, last)
                )
                write_shard(path, list(made), header)
            progress(last, study.conversations)
    return header


def refuse_another(directory: Path, header: dict[str, Any]) -> None:
    """Raise UserError if the directory holds shards of another study."""
    for path in sorted(directory.glob("conversations-*.safetensors"))[:1]:
        found = read_shard(path)[1]
        if different := [key for key in header if found.get(key) != header[key]]:
            raise UserError(
                f"{directory} holds conversations of another study: {', '.join(different)} differ; "
                "give another out=<directory>"
            )


def converse(
    index: int, corpus: Sequence[int], engine: Engine, chat: Chat, study: Study
) -> Conversation:
    """Conversation `index` of a study."""
    rng = numpy_rng(study.seed, "synthesis", index)
    length = int(
        rng.integers(min(study.chunk[0], len(corpus)), min(study.chunk[1], len(corpus)) + 1)
    )
    first = int(rng.integers(len(corpus) - length + 1))
    kind = list(KINDS)[rng.integers(len(KINDS))]
    seen = [*chat.begin(), *chat.message("system", corpus[first : first + length])]
    asked = engine.complete(
        Request(
            (*seen, *chat.message("user", KINDS[kind]), *chat.open("assistant")),
            study.question_tokens,
            study.temperature,
            seed=stream_seed(study.seed, "synthesis/question", index) % SEEDS,
            stop=chat.stop,
        )
    )
    question = chat.until_stop(asked.tokens) or chat.encode(KINDS[kind])
    prompt = [*chat.message("user", question), *chat.open("assistant")]
    answer = engine.complete(
        Request(
            (*seen, *prompt),
            study.answer_tokens,
            0.0,
            study.top_k,
            seed=stream_seed(study.seed, "synthesis/answer", index) % SEEDS,
            stop=chat.stop,
        )
    )
    facts = {"kind": kind, "chunk": [first, length], "author": engine.identity}
    return recorded(prompt, answer, study.top_k, facts)


def recorded(
    prompt: Sequence[int], answer: Completion, top_k: int, facts: dict[str, Any]
) -> Conversation:
    """A prompt and its answer as they are trained on."""
    tokens = np.array([*prompt, *answer.tokens], np.int32)
    weight = np.zeros(len(tokens), bool)
    weight[len(prompt) :] = True
    likely = np.full((len(tokens), top_k), -1, np.int32)
    logprobs = np.zeros((len(tokens), top_k), np.float32)
    for place, step in enumerate(answer.top, start=len(prompt)):
        for rank, (token, value) in enumerate(step[:top_k]):
            likely[place, rank], logprobs[place, rank] = token, value
    return Conversation(tokens, weight, likely, logprobs, facts)
