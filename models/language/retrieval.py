"""Memories that keep text: the last tokens, sentences to look up, the most surprising sentences.

What is kept is read again for every question, so it takes the keys and values of its tokens while
the question is answered: those count as resident. The text itself, and an index, are stored.

    Window         the last tokens
    Lookup         sentences that a question finds: by words (BM25: Robertson and Zaragoza, The
                   Probabilistic Relevance Framework, 2009, eq. 3.15) or by the cosine of mean
                   hidden states
    Compaction     the sentences whose tokens surprised the model most, in order

A document is `first token, sentences`; every text that is read begins with that first token.

Dimensions: b documents, t tokens, n questions of q tokens, u sentences of w tokens at most.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.language.memory_budget import ContextMemory, State, forward_flops, row_bytes
from models.language.transformer import Transformer

ABSENT = -1  # a place without a token
K1, B = 1.5, 0.75  # of BM25: saturation of a word's count, weight of a sentence's length


class TextMemory(ContextMemory):
    """Keeps text within a budget of tokens, and reads it before each question.

    Args:
        budget: tokens that are read before a question, the first one included.
        ends: tokens that end a sentence.
    """

    def __init__(self, model: Transformer, budget: int, ends: Collection[int] = ()) -> None:
        super().__init__(model)
        if budget < 2:
            raise ValueError(f"budget={budget} must hold the first token and another")
        self.budget, self.ends = budget, frozenset(ends)
        self.texts, self.tokens = 0, 0
        "Texts that questions read since the memory was built, and their tokens."

    @abstractmethod
    def text(self, state: State, question: list[int], document: int) -> list[int]:
        """What is read before a question."""

    @torch.no_grad()
    def score(self, state: State, questions: Tensor, owner: Tensor) -> Tensor:
        """Texts of one length are read together."""
        asked, owners = questions.tolist(), owner.tolist()
        texts = [self.text(state, q, i) for q, i in zip(asked, owners, strict=True)]
        self.texts += len(texts)
        self.tokens += sum(map(len, texts))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for length in sorted(set(map(len, texts))):
            rows = [i for i, text in enumerate(texts) if len(text) == length]
            tokens = torch.tensor([texts[i] + asked[i] for i in rows], device=questions.device)
            logits = self.model(tokens)[:, length:]
            for i, row in zip(rows, logits, strict=True):
                found[i] = row
        return torch.stack(found)

    def resident_bytes(self, state: State) -> float:
        return row_bytes(self.model) * self.read

    @property
    def read(self) -> float:
        """Tokens that a question read, on average over all so far; before any, the budget."""
        return self.tokens / self.texts if self.texts else self.budget

    def flops(self, what: str, tokens: int) -> float:
        if what == "absorb":
            return 0.0
        return forward_flops(self.config, tokens + self.read)


class Window(TextMemory):
    """The first token and the last ones."""

    def absorb(self, tokens: Tensor) -> State:
        last = tokens[:, max(1, tokens.shape[1] - self.budget + 1) :]
        return {"tokens": torch.cat([tokens[:, :1], last], dim=1).int()}

    def text(self, state: State, question: list[int], document: int) -> list[int]:
        return state["tokens"][document].tolist()


class Lookup(TextMemory):
    """The sentences that fit a question best, in the order of the text.

    Args:
        embed: by mean hidden states; else by words.
    """

    def __init__(
        self, model: Transformer, budget: int, ends: Collection[int], *, embed: bool = False
    ) -> None:
        super().__init__(model, budget, ends)
        self.embed = embed

    def absorb(self, tokens: Tensor) -> State:
        every = [sentences(row, self.ends) for row in tokens.tolist()]
        table = padded(every).to(tokens.device)
        state = {"first": tokens[:, :1].int(), "tokens": table.int()}
        if self.embed:
            state["vectors"] = torch.stack(
                [self.vectors(table[i], tokens[i, :1]) for i in range(len(table))]
            )
        return state

    @torch.no_grad()
    def vectors(self, table: Int[Tensor, "u w"], first: Int[Tensor, " 1"]) -> Float[Tensor, "u d"]:
        """Mean hidden state of each sentence, read by itself."""
        there = table != ABSENT
        tokens = torch.cat([first.expand(len(table), 1), table.clamp(min=0)], dim=1).long()
        hidden = self.model.hidden(tokens)[:, 1:].float()
        total = (hidden * there[..., None]).sum(1)
        return F.normalize(total / there.sum(1, keepdim=True).clamp(min=1), dim=-1)

    def text(self, state: State, question: list[int], document: int) -> list[int]:
        table = state["tokens"][document].tolist()
        every = [[token for token in row if token != ABSENT] for row in table]
        every = [sentence for sentence in every if sentence]
        if self.embed:
            asked = torch.tensor([question], device=state["tokens"].device)
            vector = self.vectors(asked, state["first"][document])[0]
            fits = (state["vectors"][document, : len(every)] @ vector).tolist()
        else:
            fits = bm25(question, every)
        room, chosen = self.budget - 1, []
        for i in sorted(range(len(every)), key=lambda i: (-fits[i], i)):
            if not self.embed and fits[i] <= 0:
                break
            if len(every[i]) <= room:
                chosen.append(i)
                room -= len(every[i])
        kept = [token for i in sorted(chosen) for token in every[i]]
        return state["first"][document].tolist() + kept

    def flops(self, what: str, tokens: int) -> float:
        cost = super().flops(what, tokens)
        if self.embed:  # the sentences, or the question, once by themselves
            cost += forward_flops(self.config, tokens)
        return cost


class Compaction(TextMemory):
    """The sentences of the highest mean surprise that fit the budget, in the order of the text."""

    @torch.no_grad()
    def absorb(self, tokens: Tensor) -> State:
        logits = self.model(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nats = nats.view(len(tokens), -1).tolist()
        texts = []
        for row, own in zip(tokens.tolist(), nats, strict=True):
            every, at = sentences(row, self.ends), 0
            means = []
            for sentence in every:
                means.append(sum(own[at : at + len(sentence)]) / len(sentence))
                at += len(sentence)
            room, chosen = self.budget - 1, []
            for i in sorted(range(len(every)), key=lambda i: (-means[i], i)):
                if len(every[i]) <= room:
                    chosen.append(i)
                    room -= len(every[i])
            texts.append([row[:1] + [token for i in sorted(chosen) for token in every[i]]])
        return {"tokens": padded(texts)[:, 0].int().to(tokens.device)}

    def text(self, state: State, question: list[int], document: int) -> list[int]:
        return [token for token in state["tokens"][document].tolist() if token != ABSENT]

    def flops(self, what: str, tokens: int) -> float:
        own = forward_flops(self.config, tokens) if what == "absorb" else 0.0
        return own + super().flops(what, tokens)


def sentences(tokens: list[int], ends: Collection[int]) -> list[list[int]]:
    """The text after its first token, cut after every end."""
    found: list[list[int]] = [[]]
    for token in tokens[1:]:
        found[-1].append(token)
        if token in ends:
            found.append([])
    return [sentence for sentence in found if sentence]


def padded(rows: list[list[list[int]]]) -> Int[Tensor, "b u w"]:
    """Ragged lists as one table, ABSENT where there is nothing."""
    most = max((len(row) for row in rows), default=0)
    width = max((len(item) for row in rows for item in row), default=0)
    table = torch.full((len(rows), most, width), ABSENT)
    for i, row in enumerate(rows):
        for j, item in enumerate(row):
            table[i, j, : len(item)] = torch.tensor(item)
    return table


def bm25(query: list[int], every: list[list[int]]) -> list[float]:
    """How well each sentence fits the words of a query."""
    counts = [Counter(sentence) for sentence in every]
    mean = sum(map(len, every)) / max(1, len(every))
    found = [0.0] * len(every)
    for word in set(query):
        having = sum(word in count for count in counts)
        rarity = math.log(1 + (len(every) - having + 0.5) / (having + 0.5))
        for i, count in enumerate(counts):
            often = count[word]
            found[i] += (
                rarity * often * (K1 + 1) / (often + K1 * (1 - B + B * len(every[i]) / mean))
            )
    return found
