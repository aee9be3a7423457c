"""Cartridges of documents of statements, judged by exams: the recipe behind `data=self_study`.

What is asked of a cartridge was asked in training (`asked`), or was seen in rewritings only
(`heldout`), in the form that training asked in (retrieval), or in forms that it never asked in
(paraphrase, reversed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.cross_entropy.op import linear_cross_entropy
from models.language.cartridges import CartridgeRows, first_tokens
from models.language.prefix import Prefix, read
from training.data.config import Author
from training.data.self_study import SelfStudyData
from training.data.statements import ENDS
from training.distributed import Processes
from training.evaluation.exam import FORMS, Questions, answering, examine, questions
from training.evaluation.memory_tables import BESIDE
from training.memories import memory
from training.recipes.cartridges import Cartridges, others_than
from training.recipes.cartridges_author import write
from training.recipes.config import CHOOSING, PRESS_NAMES
from training.schema import TrainConfig
from training.seeding import numpy_rng, torch_generator
from training.torch_step import Batch

SAID = ("what", "hop", "list", "json", "flip")  # kinds of prompts that are words themselves


class DocumentCartridges(Cartridges):
    """A cartridge for each document of statements."""

    data: SelfStudyData

    def __init__(
        self, config: TrainConfig, data: SelfStudyData, processes: Processes, device: torch.device
    ) -> None:
        texts, unrelated = (
            np.concatenate([document.tokens for document in documents])
            for documents in (data.studied, data.others)
        )
        super().__init__(config, data, processes, device, texts, unrelated)
        self.exam: dict[str, Any] = {}
        with torch.no_grad():
            tokens = torch.from_numpy(texts).long().to(device)
            self.whole = read(self.teacher, tokens).prefix()  # [documents, t, kv, hd]

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        if self.data.config.author == Author.model:
            batch = self.written(batch)
        return super().step(batch)

    def written(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As many conversations about the same documents, in the model's own words."""
        owner = torch.from_numpy(batch["owner"]).long().to(self.device)
        generator = torch_generator(
            self.config.seed, "cartridge/author", self.trainer.count, device=self.device
        )
        length = batch["tokens"].shape[1]
        documents = self.whole.map(lambda x: x[owner])
        kinds = [kind for kind, share in self.data.config.prompts.items() if share and kind in SAID]
        tokens, answers = write(self.teacher, documents, length, generator, kinds)
        weight = answers[:, 1:].float()
        return {
            **batch,
            "tokens": tokens.int().cpu().numpy(),
            "weight": weight.cpu().numpy(),
        }

    def seen(self, batch: Batch) -> Prefix:
        """The document, or the chunk of it that belongs to each conversation."""
        if self.data.config.chunk is None:
            owner = batch["owner"].long()
            return self.whole.map(lambda x: x[owner])
        return read(self.teacher, batch["context"].long()).prefix()

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Exams; final: also with others' cartridges beside, at other positions, about another
        document, and the loss of the documents themselves. Where all statements may be asked for,
        `heldout` is all of them, too."""
        every, kinds = range(self.data.config.statements[0]), tuple(FORMS)
        asked = self.data.asked
        held = [sorted(set(every) - set(own)) for own in asked]
        held = held if any(held) else [list(every)] * self.documents
        with self.trainer.averaged_weights(), self.trainer.autocast():
            self.exam = {
                "asked": self.examined(kinds[:2], among=asked),
                "heldout": self.examined(kinds[:4], among=held),
            }
            if final:
                self.exam |= self.final_exams(held)
            found = {
                f"eval/{part}/{kind}": grade["accuracy"]
                for part, grades in self.exam.items()
                for kind, grade in grades.items()
            }
            if final:
                found |= self.final_numbers()
        return found

    def final_numbers(self) -> dict[str, float]:
        """The loss of the documents; what the cartridge keeps of the full context's answers; and
        how far an untrained cartridge of the whole document is from the document itself."""
        ours, full = (self.exam[part]["retrieval"]["accuracy"] for part in ("heldout", "full"))
        return {
            "eval/document_nats": self.document_nats(),
            "eval/heldout_of_full": ours / full if full else 0.0,
            "eval/paraphrase_of_full": (
                self.exam["heldout"]["paraphrase"]["accuracy"] / full if full else 0.0
            ),
            "eval/identity": self.identity(0),
            "eval/identity_off_by_one": self.identity(1),
        }

    def identity(self, off: int) -> float:
        """Largest difference of logits, relative to the largest logit, between questions after the
        document and questions after a cartridge of all its rows on which no step was taken.

        Args:
            off: positions that the cartridge's questions are shifted by.
        """
        tokens, owner = questions(self.data.studied, "retrieval").on(self.device)
        texts = torch.from_numpy(self.texts).long().to(self.device)
        expected = self.teacher(torch.cat([texts[owner], tokens], dim=1))[:, texts.shape[1] :]
        start = first_tokens(self.teacher, texts, texts.shape[1])
        rows = CartridgeRows(start, self.recipe.frozen)().map(lambda x: x[owner])
        shifted = replace(rows, position=rows.position + off)
        difference = (self.teacher(tokens, cache=shifted) - expected).abs().max()
        return (difference / expected.abs().max()).item()

    def final_exams(self, held: list[list[int]]) -> dict[str, Any]:
        """Part -> kind -> grade."""
        found = {"all": self.examined(tuple(FORMS)), **self.beside(held)}
        if self.documents > 1:
            found["foreign"] = self.examined(("retrieval",), shift=1)
        for offset in self.recipe.eval_offsets:
            found[f"offset_{offset}"] = self.examined(("retrieval",), among=held, offset=offset)
        for count in self.recipe.eval_composed:
            found[f"composed_{count}"] = self.examined(("retrieval",), composed=count)
        return found

    def beside(self, held: list[list[int]]) -> dict[str, Any]:
        """What memories of as many rows that need no training answer of the same questions."""
        tokens = torch.from_numpy(self.texts).long().to(self.device)
        found, best = {}, 0.0
        for name in ("full", "none", "window", *PRESS_NAMES):
            own = memory(
                name, self.teacher, self.recipe.tokens, tokens, ends=ENDS,
                generator=torch_generator(self.config.seed, "beside/random"),
            )  # fmt: skip
            state = own.absorb(tokens)

            def score(asked: Questions, own: Any = own, state: Any = state) -> torch.Tensor:
                return own.score(state, *asked.on(self.device))[:, -1]

            found[name] = examine(self.data.documents, answering(score), ("retrieval",), held)
            if name in CHOOSING:
                best = max(best, found[name]["retrieval"]["accuracy"])
        return {**found, "best_press": {"retrieval": {"accuracy": best}}}

    def examined(
        self,
        kinds: Sequence[str],
        *,
        among: list[list[int]] | None = None,
        shift: int = 0,
        offset: int = 0,
        composed: int = 1,
    ) -> dict[str, Any]:
        """Grades of the student.

        Args:
            among: statements that may be asked for.
            shift: answer from the cartridge of so many documents further on: a control.
            offset: positions between the cartridge and the question.
            composed: cartridges that stand together, the document's own among them.
        """

        rng = numpy_rng(self.config.seed, "exam/others", 0)

        def score(asked: Questions) -> torch.Tensor:
            tokens, owners = asked.on(self.device)
            owners = (owners + shift) % self.documents
            others = others_than(owners.cpu().numpy(), self.documents, composed - 1, rng)
            beside = torch.from_numpy(others).to(self.device)
            hidden = self.student.hidden(tokens, owners, offset=offset, others=beside)
            return self.teacher.logits(hidden[:, -1])

        return examine(self.data.documents, answering(score), kinds, among)

    def document_nats(self) -> float:
        """Mean nats per token of the documents, read after their cartridges."""
        tokens = torch.from_numpy(self.texts).long().to(self.device)
        owner = torch.arange(self.documents, device=self.device)
        hidden = self.student.hidden(tokens[:, :-1], owner)
        return linear_cross_entropy(hidden, self.head.to(hidden.dtype), tokens[:, 1:]).item()

    def summary(self) -> dict[str, Any]:
        """Sizes and grades; `series` has those that a figure shows, as `BESIDE` names them."""
        found = super().summary()
        row = [found["bytes"] / found["context_bytes"]]
        for name in BESIDE[1:]:
            part, _, kind = name.partition("/")
            row.append(self.exam.get(part, {}).get(kind, {}).get("accuracy", math.nan))
        return {**found, "exam": self.exam, "series": {"beside": row}}
