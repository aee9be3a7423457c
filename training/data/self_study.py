"""Self-study of documents of statements: conversations about them, as a cartridge is trained on.

Cartridges, 2025, arXiv:2506.06266, section 4: a chunk of the corpus and one of a few generic
prompts make the model talk to itself; a cartridge is then trained to predict the answers as the
model does that sees the chunk. Here the grammar of `statements.py` writes the questions, or the
model itself does, after `ask` (the recipe lets it).

What is asked directly is only a part of the statements, the *asked* ones. The others are seen in
rewritings (`list`, `json`, `flip`) alone: whether a cartridge answers for them shows that it holds
the document, not a table of answers.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from training.data.config import SelfStudyConfig
from training.data.generated import GeneratedTokens
from training.data.statements import Documents, ask, draw, prompt_unstated
from training.seeding import numpy_rng

DIRECT = ("what", "give", "who", "hop")
"Kinds of prompts that ask for a statement directly."


class SelfStudyData(GeneratedTokens[SelfStudyConfig]):
    """Conversations about a few documents, drawn with the seed.

    Attributes:
        documents: what cartridges are to stand for, one row each.
        studied: what the conversations are about: the same, or with their objects shuffled among
            the statements (`scrambled`, a control).
        others: as many documents that have nothing to do with them.
        asked: of each document, the statements that may be asked for directly.
    """

    def __init__(
        self, config: SelfStudyConfig, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(config, seed=seed, rank=rank, world=world)
        count, stated = config.documents, config.statements[0]
        order = numpy_rng(seed, "study/keys").permutation(config.keys)
        parts = np.array_split(order, count) if config.disjoint else [None] * count
        self.documents = [
            draw(config, numpy_rng(seed, "study/documents", i), 1, stated, keys=parts[i])
            for i in range(count)
        ]
        self.others = [
            draw(config, numpy_rng(seed, "study/others", i), 1, stated) for i in range(count)
        ]
        self.studied = self.documents
        if config.scrambled:
            self.studied = [
                scrambled(document, numpy_rng(seed, "study/scrambled", i))
                for i, document in enumerate(self.documents)
            ]
        self.asked = [
            sorted(
                numpy_rng(seed, "study/asked", i)
                .permutation(stated)[: round(config.asked * stated)]
                .tolist()
            )
            for i in range(count)
        ]

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return self.documents[0].tokens.shape[1]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's conversations of a step: as many about each document.

        Returns:
            `context` int32 [b, c], what the teacher sees before a conversation; `tokens` int32
            [b, seq_len + 1] and `weight` float32 [b, seq_len], 1 where the next token is of an
            answer; `owner` int32 [b], the document.
        """
        config, rows = self.config, []
        for owner, document in enumerate(self.studied):
            for index in range(config.batch_size):
                rng = numpy_rng(self._seed, "data/self_study", step, owner, index)
                context, seen = self.context(document, rng)
                tokens, weight = self.conversation(document, owner, seen, rng)
                rows.append((context, tokens, weight, owner))
        context, tokens, weight, owners = zip(*rows, strict=True)
        return {
            "context": self.mine(np.stack(context)),
            "tokens": self.mine(np.stack(tokens)),
            "weight": self.mine(np.stack(weight)),
            "owner": self.mine(np.array(owners, np.int32)),
        }

    def ids(self, step: int) -> list[str]:
        """Names of the conversations of a step, as `batch` has them."""
        config = self.config
        rows = [
            f"conversation {index} of step {step} about document {owner}"
            for owner in range(config.documents)
            for index in range(config.batch_size)
        ]
        return [rows[i] for i in self.mine(np.arange(len(rows)))]

    def context(
        self, document: Documents, rng: np.random.Generator
    ) -> tuple[Int32[np.ndarray, " c"], set[int]]:
        """The chunk that the teacher sees, and the statements that are whole in it."""
        tokens, size = document.tokens[0], self.config.chunk
        if size is None or size >= len(tokens):
            return tokens, set(range(document.count))
        first = int(rng.integers(1, len(tokens) - size + 2))  # behind <s>
        last = first + size - 1
        begins = [1, *document.ends[:-1]]
        seen = {
            i
            for i, (begin, end) in enumerate(zip(begins, document.ends, strict=True))
            if begin >= first and end <= last
        }
        return np.concatenate([tokens[:1], tokens[first:last]]), seen

    def conversation(
        self, document: Documents, owner: int, seen: set[int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and answers, one after the other, until seq_len is full."""
        config, size = self.config, self.config.seq_len + 1
        kinds = [kind for kind, share in config.prompts.items() if share > 0]
        share = np.array([config.prompts[kind] for kind in kinds])
        tokens, weight, asked = [], [], set()
        while len(tokens) < size:
            for _ in range(20):
                kind = kinds[rng.choice(len(kinds), p=share / share.sum())]
                among = seen & set(self.asked[owner]) if kind in DIRECT else seen
                prompt = ask(document, kind, rng, among=among)
                fits = prompt is not None and seen.issuperset(prompt.about)
                if fits and (kind, prompt.about) not in asked:
                    break
            else:  # little is left to ask for
                asked = set()
                prompt = prompt_unstated(document, "what", int(rng.integers(10**6)))
            asked.add((prompt.kind, prompt.about))
            tokens += [*prompt.question[0], *prompt.answer[0]]
            weight += [0.0] * prompt.question.shape[1] + [1.0] * prompt.answer.shape[1]
        return np.array(tokens[:size], np.int32), np.array(weight[1:size], np.float32)


def scrambled(document: Documents, rng: np.random.Generator) -> Documents:
    """The document with the objects of its statements shuffled; each is another one's."""
    n = document.count
    while True:
        order = rng.permutation(n)
        objects = document.objects[:, order]
        if (objects != document.objects).all():
            break
    tokens = document.tokens.copy()
    begins = [1, *document.ends[:-1]]
    for i, (begin, end) in enumerate(zip(begins, document.ends, strict=True)):
        for row in range(len(tokens)):
            statement = tokens[row, begin:end]
            at = begin + np.flatnonzero(statement == document.objects[row, i])[-1]
            if document.objects[row, i] == document.subjects[row, i]:
                raise ValueError("a statement about itself cannot be scrambled")
            tokens[row, at] = objects[row, i]
    return Documents(
        tokens, document.subjects, objects, document.absent, document.ends, document.replaced, {}
    )
