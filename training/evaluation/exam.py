"""Exams: every question that documents of statements allow, and how many are answered rightly.

    retrieval   what k =      of a key that is stated once
    paraphrase  give k =      the same in another form
    reversed    who v =       the key of a value
    two_hop     hop k =       the object of a key's object
    conflict    what k =      of a key that is stated again: the later object is right, the earlier
                              one is stale
    unstated    what k =      of a key that is not stated: `none`

An answer is right if its token is the most likely of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32

from training.data.statements import (
    Documents,
    Prompt,
    prompt_about,
    prompt_unstated,
    statements_for,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMS = {
    "retrieval": "what",
    "paraphrase": "give",
    "reversed": "who",
    "two_hop": "hop",
    "conflict": "what",
    "unstated": "what",
}
"Kind of question -> prompt that asks it."
UNSTATED = 8  # questions of a document about keys that it does not have


@dataclass(frozen=True)
class Questions:
    """Questions of one kind, about any of the documents."""

    tokens: Int32[np.ndarray, "n q"]
    answers: Int32[np.ndarray, " n"]
    owners: Int32[np.ndarray, " n"]
    "Index of the document that each is about."
    stale: Int32[np.ndarray, " n"]
    "The replaced answer, or -1."

    def __len__(self) -> int:
        return len(self.answers)

    def part(self, rows: slice) -> Questions:
        """Some of them."""
        return Questions(*(getattr(self, item.name)[rows] for item in fields(self)))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Their tokens [n, q] and owners [n], for a model."""
        import torch

        tokens, owners = torch.from_numpy(self.tokens), torch.from_numpy(self.owners)
        return tokens.long().to(device), owners.long().to(device)


Answer = Callable[[Questions], Int32[np.ndarray, " n"]]
"Questions -> the most likely token after each."


def answering(score: Callable[[Questions], Tensor], rows: int = 256) -> Answer:
    """Answers by the likeliest token, so many questions at a time.

    Args:
        score: some questions -> logits [n, vocab] after each.
    """

    def answer(asked: Questions) -> Int32[np.ndarray, " n"]:
        parts = [asked.part(slice(i, i + rows)) for i in range(0, len(asked), rows)]
        return np.concatenate([score(part).argmax(-1).cpu().numpy() for part in parts])

    return answer


def questions(
    documents: Sequence[Documents],
    kind: str,
    among: Sequence[Sequence[int]] | None = None,
) -> Questions:
    """All questions of a kind.

    Args:
        documents: one row each.
        among: of each document, the statements that may be asked for; None: all.
    """
    found: list[tuple[int, Prompt]] = []
    for owner, document in enumerate(documents):
        if kind == "unstated":
            found += [(owner, prompt_unstated(document, "what", i)) for i in range(UNSTATED)]
            continue
        allowed = None if among is None else among[owner]
        restated = set(document.replaced.values())
        for slot in statements_for(document, FORMS[kind], among=allowed):
            if kind in ("retrieval", "paraphrase") and slot in restated:
                continue
            if kind == "conflict" and slot not in restated:
                continue
            found.append((owner, prompt_about(document, FORMS[kind], slot)))
    if not found:
        empty = np.zeros(0, np.int32)
        return Questions(np.zeros((0, 3), np.int32), empty, empty, empty)
    return Questions(
        np.concatenate([prompt.question for _, prompt in found]),
        np.concatenate([prompt.answer[:, 0] for _, prompt in found]),
        np.array([owner for owner, _ in found], np.int32),
        np.concatenate([[-1] if p.stale is None else p.stale for _, p in found]).astype(np.int32),
    )


def grade(asked: Questions, answer: Answer, documents: int) -> dict[str, Any] | None:
    """Share of right answers; None where there was no question.

    Returns:
        `accuracy`, `questions`, `by_document` [right, asked] of each document, and where answers
        can be stale, their share `stale`.
    """
    if not len(asked):
        return None
    given = answer(asked)
    right: Bool[np.ndarray, " n"] = given == asked.answers
    counts = np.bincount(asked.owners, minlength=documents)
    hits = np.bincount(asked.owners, weights=right, minlength=documents)
    found: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "questions": len(asked),
        "by_document": [[int(a), int(b)] for a, b in zip(hits, counts, strict=True)],
    }
    if (asked.stale >= 0).any():
        found["stale"] = float((given == asked.stale).mean())
    return found


def examine(
    documents: Sequence[Documents],
    answer: Answer,
    kinds: Sequence[str] = tuple(FORMS),
    among: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Kind of question -> grade, for those that the documents allow; `among` as of `questions`."""
    grades = {
        kind: grade(questions(documents, kind, among), answer, len(documents)) for kind in kinds
    }
    return {kind: found for kind, found in grades.items() if found is not None}
