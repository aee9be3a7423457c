"""Documents of statements in several wordings, and questions about them whose answers are exact.

    <s>  k3 is v7 ;  v9 of k1 ;  ~2 k4 : k1 ,  k8 v2 ;  k3 v5 ;      a document
    what k8 = v2 ;  who v9 = k1 ;  hop k4 = v9 ;  list k4 = k4 = k1 ; k8 = v2 ;  what k6 = none ;

A statement gives its subject (a key) its object: a value, or another subject of the document (a
link, so that a question can take two hops). A subject that is stated again has the later object.
Subjects, objects, their order, their wording and the filler words (~) between them are drawn anew
for every document, so that no answer can be known but from the document.

The questions and rewritings stand for the generic prompts of self-study (Cartridges, 2025,
arXiv:2506.06266): `what`, `give`, `who` and `hop` ask, `list` and `json` put a part of the document
into another form, `flip` rewrites it value first. After `ask` a prompt's question is the model's
to write: trained with a small weight, so that it can propose questions by itself.

The rows of one batch share everything but subjects, objects and filler words: where statements
begin, how they are worded, what is asked. Dimensions: b documents, n statements, t tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from training.data.config import StatementsConfig, statements_length
from training.data.generated import GeneratedTokens
from training.seeding import numpy_rng

WORDS = (
    *("<s>", "none", ";", ",", ":", "=", "is", "of"),
    *("what", "give", "who", "hop", "list", "json", "flip", "ask"),
    *(f"~{i}" for i in range(8)),
)
BEGIN, NONE = WORDS.index("<s>"), WORDS.index("none")
FIRST_FILLER = WORDS.index("~0")
ENDS = tuple(WORDS.index(word) for word in (";", ","))
"Of a statement."

WORDINGS = ("s o ;", "s is o ;", "s : o ,", "o of s ;")
"Of a statement: s its subject, o its object."

REWRITINGS = {"list": "s = o ;", "json": "s : o ,", "flip": "o of s ;"}
"Kind of rewriting -> wording of each statement of the part that is rewritten."


@dataclass(frozen=True)
class Documents:
    """Documents that share a layout."""

    tokens: Int32[np.ndarray, "b t"]
    subjects: Int32[np.ndarray, "b n"]
    objects: Int32[np.ndarray, "b n"]
    absent: Int32[np.ndarray, "b m"]
    "Keys that no statement has."
    ends: tuple[int, ...]
    "Tokens up to and with each statement."
    replaced: dict[int, int]
    "Statement -> the later one of the same subject."
    links: dict[int, int]
    "Statement -> the one about its object."

    @property
    def count(self) -> int:
        return self.subjects.shape[1]


@dataclass(frozen=True)
class Prompt:
    """A question, or the request to rewrite a part, with its answer; for each document."""

    kind: str
    question: Int32[np.ndarray, "b q"]
    answer: Int32[np.ndarray, "b a"]
    about: tuple[int, ...]
    "Statements that the answer needs; none for a key that was never stated."
    stale: Int32[np.ndarray, " b"] | None = None
    "The object that a later statement has replaced."


class StatementsData(GeneratedTokens[StatementsConfig]):
    """Training sequences: a document with prompts after it, and in every other one also within.

    The seed's `data/statements` stream gives the batches, `eval/statements` the held-out documents.
    """

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's sequences of the batch of `step`.

        Returns:
            `tokens` int32 [b, seq_len + 1]; `weight` float32 [b, seq_len], of each next token;
            `positions` int32 [seq_len + 1], with a gap before the prompts in every other batch;
            `stated` int32 [b, seq_len + 1, 2], at the last token of each statement its subject and
            its object, elsewhere -1.
        """
        config = self.config
        rng = numpy_rng(self._seed, "data/statements", step)
        stated = self.stated(rng, step)
        documents = draw(config, rng, config.batch_size, stated)
        parts: list[tuple[np.ndarray, float | np.ndarray]] = []
        length, asked = 0, set()

        def put(tokens: np.ndarray, weight: float | np.ndarray) -> None:
            nonlocal length
            parts.append((tokens, weight))
            length += tokens.shape[1]

        def put_prompts(last: int, until: int) -> None:
            while length < until:
                prompt = self.prompt(rng, documents, last, asked)
                if rng.random() < config.ask:
                    put(_words("ask", len(documents.tokens)), 0.0)
                    written = np.full(prompt.question.shape[1], config.context_weight)
                    written[-1] = 0.0  # the sign of equality
                    put(prompt.question, written)
                else:
                    put(prompt.question, 0.0)
                put(prompt.answer, 1.0)

        whole, size = documents.tokens, config.seq_len + 1
        ends = np.array(documents.ends)
        room = size - whole.shape[1]
        if rng.random() < 0.5 and stated > 1:
            last = int(rng.integers(1, stated))
            cut = documents.ends[last - 1]
            put(whole[:, :cut], config.context_weight)
            put_prompts(last, cut + room // 4)
            ends[last:] += length - cut
            put(whole[:, cut:], config.context_weight)
        else:
            put(whole, config.context_weight)
        gap_at = length
        put_prompts(stated, size)
        tokens = np.concatenate([part for part, _ in parts], axis=1)[:, :size]
        weight = np.concatenate([np.broadcast_to(w, p.shape[1]) for p, w in parts])[1:size]
        gap = int(rng.integers(1, config.gap + 1)) if config.gap and rng.random() < 0.5 else 0
        positions = np.arange(size, dtype=np.int32)
        positions[gap_at:] += gap
        rows = np.broadcast_to(weight.astype(np.float32), (len(tokens), config.seq_len))
        said = np.full((*tokens.shape, 2), -1, np.int32)
        said[:, ends - 1] = np.stack([documents.subjects, documents.objects], axis=-1)
        return {
            "tokens": self.mine(tokens),
            "weight": self.mine(rows).copy(),
            "positions": positions,
            "stated": self.mine(said),
        }

    def stated(self, rng: np.random.Generator, step: int) -> int:
        """Statements of a batch's documents: in half of the batches the most so far, or fewer."""
        numbers = self.config.statements
        reached = sum(step >= first for first in self.config.from_step or [0] * len(numbers))
        return int(numbers[reached - 1 if rng.random() < 0.5 else rng.integers(reached)])

    def prompt(
        self, rng: np.random.Generator, documents: Documents, last: int, asked: set[Any]
    ) -> Prompt:
        """One of the prompts that the first `last` statements allow; a new one, if there is."""
        kinds = list(self.config.prompts)
        share = np.array([self.config.prompts[kind] for kind in kinds], dtype=float)
        for _ in range(8):
            kind = kinds[rng.choice(len(kinds), p=share / share.sum())]
            found = ask(documents, kind, rng, last=last)
            if found is not None and (kind, found.about) not in asked:
                break
        else:
            found = prompt_unstated(documents, "what", int(rng.integers(10**6)), last=last)
        asked.add((found.kind, found.about))
        return found

    def heldout(self, count: int, stated: int) -> list[Documents]:
        """Fresh documents, each of a layout of its own; the same for every model of the seed."""
        return [
            draw(self.config, numpy_rng(self._seed, "eval/statements", stated, index), 1, stated)
            for index in range(count)
        ]


def draw(
    config: StatementsConfig,
    rng: np.random.Generator,
    count: int,
    stated: int,
    keys: Int32[np.ndarray, " k"] | None = None,
) -> Documents:
    """`count` documents of one layout, each of `statements_length(stated)` tokens.

    Args:
        keys: those that they may use, 0 to config.keys - 1; None: all.
    """
    n = stated
    replaced, links = relations(rng, n, config.conflicts, config.links)
    known = np.arange(config.keys) if keys is None else keys
    names = known[rng.random((count, len(known))).argsort(axis=1)].astype(np.int32) + len(WORDS)
    subjects, absent = names[:, :n].copy(), names[:, n:]
    values = rng.random((count, config.values)).argsort(axis=1).astype(np.int32)
    objects = values[:, :n] + len(WORDS) + config.keys
    for earlier, later in replaced.items():
        subjects[:, later] = subjects[:, earlier]
    for source, target in links.items():
        objects[:, source] = subjects[:, target]
    # A link has its subject first: in front, an object is a value.
    wordings = [WORDINGS[rng.integers(len(WORDINGS) - (i in links))] for i in range(n)]
    filler = statements_length(n) - 1 - sum(len(wording.split()) for wording in wordings)
    before = np.bincount(rng.integers(n, size=filler), minlength=n)
    parts, ends, length = [np.full((count, 1), BEGIN, np.int32)], [], 1
    for i, wording in enumerate(wordings):
        fill = FIRST_FILLER + rng.integers(len(WORDS) - FIRST_FILLER, size=(count, before[i]))
        parts += [fill.astype(np.int32), worded(wording, subjects[:, i], objects[:, i])]
        length += int(before[i]) + len(wording.split())
        ends.append(length)
    tokens = np.concatenate(parts, axis=1)
    return Documents(tokens, subjects, objects, absent, tuple(ends), replaced, links)


def relations(
    rng: np.random.Generator, stated: int, conflicts: float, links: float
) -> tuple[dict[int, int], dict[int, int]]:
    """Which statements replace which, and which speak of another's object; no one is in two."""
    order = rng.permutation(stated).tolist()
    pairs = [sorted(order[i : i + 2]) for i in range(0, stated - 1, 2)]
    restated = int(rng.binomial(len(pairs), conflicts))
    linked = int(rng.binomial(len(pairs) - restated, min(1.0, links / (1 - conflicts))))
    replaced = {first: second for first, second in pairs[:restated]}
    spare = pairs[restated : restated + linked]
    return replaced, {(p := pair if rng.random() < 0.5 else pair[::-1])[0]: p[1] for pair in spare}


def worded(
    wording: str, subject: Int32[np.ndarray, " b"], obj: Int32[np.ndarray, " b"]
) -> Int32[np.ndarray, "b m"]:
    """A statement in some wording."""
    columns = [
        subject if word == "s" else obj if word == "o" else np.full_like(obj, WORDS.index(word))
        for word in wording.split()
    ]
    return np.stack(columns, axis=1)


def statements_for(
    documents: Documents,
    kind: str,
    *,
    last: int | None = None,
    among: Collection[int] | None = None,
) -> list[int]:
    """Statements that a prompt of some kind can be about.

    Args:
        last: the prompt stands after so many statements; None: after all.
        among: the only ones that may be asked for, or that a rewriting may begin with; None: all.
    """
    last = documents.count if last is None else last
    links = {i for i, j in documents.links.items() if max(i, j) < last}
    older = {i for i, j in documents.replaced.items() if j < last}
    restated = {*documents.replaced, *documents.replaced.values()}
    slots = set(range(last)) if among is None else {i for i in among if i < last}
    if kind == "hop":
        return sorted(slots & links)
    if kind in ("what", "give"):
        return sorted(slots - older)
    # What a value belongs to is asked only of plain statements: a replaced one has no good answer.
    return sorted(slots - restated - (documents.links.keys() if kind == "who" else set()))


def prompt_about(
    documents: Documents, kind: str, slot: int, *, last: int | None = None, items: int = 1
) -> Prompt:
    """The prompt of some kind about a statement, or about the `items` that begin with it."""
    last = documents.count if last is None else last
    subject, obj = documents.subjects[:, slot], documents.objects[:, slot]
    if kind in REWRITINGS:
        about = tuple(range(slot, slot + items))
        parts = [
            worded(REWRITINGS[kind], documents.subjects[:, i], documents.objects[:, i])
            for i in about
        ]
        return Prompt(kind, _question(kind, subject), np.concatenate(parts, axis=1), about)
    if kind == "who":
        return Prompt(kind, _question(kind, obj), _answer(subject), (slot,))
    if kind == "hop":
        target = documents.links[slot]
        answer = _answer(documents.objects[:, target])
        return Prompt(kind, _question(kind, subject), answer, (slot, target))
    earlier = [i for i, j in documents.replaced.items() if j == slot < last]
    stale = documents.objects[:, earlier[0]] if earlier else None
    return Prompt(kind, _question(kind, subject), _answer(obj), (slot,), stale)


def prompt_unstated(
    documents: Documents, word: str, which: int, *, last: int | None = None
) -> Prompt:
    """A question about a key that the first `last` statements do not have."""
    last = documents.count if last is None else last
    later = [
        documents.subjects[:, j]
        for j in range(last, documents.count)
        if not any(i < last and k == j for i, k in documents.replaced.items())
    ]
    keys = [*later, *documents.absent.T]
    key = keys[which % len(keys)]
    return Prompt("none", _question(word, key), _answer(np.full_like(key, NONE)), ())


def ask(
    documents: Documents,
    kind: str,
    rng: np.random.Generator,
    *,
    last: int | None = None,
    among: Collection[int] | None = None,
    items: int = 4,
) -> Prompt | None:
    """A prompt of some kind, drawn; or None where the document allows none.

    Args:
        last, among: as of `statements_for`.
        items: most statements that are rewritten.
    """
    if kind == "none":
        return prompt_unstated(
            documents, str(rng.choice(["what", "give"])), int(rng.integers(10**6)), last=last
        )
    if not (slots := statements_for(documents, kind, last=last, among=among)):
        return None
    slot = slots[rng.integers(len(slots))]
    run = 1
    if kind in REWRITINGS:
        allowed = set(statements_for(documents, kind, last=last))
        while run < items and slot + run in allowed:
            run += 1
        run = int(rng.integers(1, run + 1))
    return prompt_about(documents, kind, slot, last=last, items=run)


def vocabulary(config: StatementsConfig) -> list[str]:
    """Words by token id: keys are k0, k1, ..., values v0, v1, ..."""
    keys = [f"k{i}" for i in range(config.keys)]
    return [*WORDS, *keys, *(f"v{i}" for i in range(config.values))]


def spell(config: StatementsConfig, tokens: Int32[np.ndarray, " t"]) -> str:
    """Tokens as words."""
    names = vocabulary(config)
    return " ".join(names[token] for token in tokens.tolist())


def tokenizer_json(config: StatementsConfig) -> str:
    """A tokenizer.json that reads and writes these words, between blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(vocabulary(config))}
    tokenizer = Tokenizer(models.WordLevel(ids))  # no unknown word: one is refused, not replaced
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str(pretty=True)


def _words(word: str, rows: int) -> Int32[np.ndarray, "b 1"]:
    return np.full((rows, 1), WORDS.index(word), np.int32)


def _question(word: str, about: Int32[np.ndarray, " b"]) -> Int32[np.ndarray, "b 3"]:
    rows = len(about)
    return np.concatenate([_words(word, rows), about[:, None], _words("=", rows)], axis=1)


def _answer(obj: Int32[np.ndarray, " b"]) -> Int32[np.ndarray, "b 2"]:
    return np.concatenate([obj[:, None], _words(";", len(obj))], axis=1)
