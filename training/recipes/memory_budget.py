"""Every memory of a text in one table, at equal resident bytes.

    for each group of fresh documents:
        for each memory, at each budget of resident bytes:
            state  <- absorb(documents)                 the documents are gone from here on
            answers to every question that they allow   (training/evaluation/exam.py)

A step of the loop is a group of documents; nothing is trained but what a memory trains to absorb
them (a cartridge, LoRA). All memories answer the same questions with the same model, those with
fast weights with a model of their own that was trained in the same way. Reported for each: accuracy
by kind of question with intervals clustered by document, paired differences to the cartridge, both
ledgers (resident and stored bytes), floating-point operations and seconds to absorb a document and
to answer a question; and two controls, which every memory must fail: another document's memory, and
answers by a key whose values were shuffled after the memory was built.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.language.lora import Lora
from models.language.memory_budget import (
    ContextMemory,
    FastWeightMemory,
    PrefixMemory,
    State,
    forward_flops,
    pack,
)
from training.data.config import SelfStudyConfig
from training.data.self_study import SelfStudyData, scrambled
from training.data.statements import ENDS
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.evaluation.exam import FORMS, Questions, answering, grade, questions
from training.evaluation.memory_tables import COLUMNS
from training.evaluation.statistics import clustered_bootstrap
from training.memories import WHOLE, memory
from training.pretrained import load_decoder, locate
from training.recipes import cartridges
from training.recipes.cartridges_documents import DocumentCartridges
from training.recipes.config import (
    CHOOSING,
    Adapter,
    CartridgesConfig,
    MemoryBudgetConfig,
    check_parts,
)
from training.schema import OptimConfig, Schedule, TrainConfig
from training.seeding import numpy_rng, stream_seed, torch_generator

FRAMEWORK = "torch"


class Studied(ContextMemory):
    """A memory that is trained on documents by self-study.

    Args:
        recipe: of a run of `recipe=cartridges` on these documents.
    """

    def __init__(self, recipe: DocumentCartridges) -> None:
        super().__init__(recipe.teacher)
        self.recipe, self.rows = recipe, 0

    def absorb(self, tokens: Tensor) -> State:
        data = self.recipe.data
        expected = np.concatenate([document.tokens for document in data.documents])
        if not np.array_equal(tokens.cpu().numpy(), expected):
            raise ValueError("these are not the documents that this memory studies")
        for step in range(self.recipe.config.loop.steps):
            self.recipe.step(data.batch(step))
        return self.state()

    def state(self) -> State:
        """What was trained, as it is now."""
        raise NotImplementedError

    def flops(self, what: str, tokens: int) -> float:
        """Of all steps: the teacher's forward pass, and the student's with its backward."""
        if what == "score":
            return forward_flops(self.config, tokens, self.rows)
        data = self.recipe.data
        teacher = forward_flops(self.config, data.config.seq_len, data.length)
        student = 3 * forward_flops(self.config, data.config.seq_len, self.rows)
        conversations = self.recipe.config.loop.steps * data.config.batch_size
        return forward_flops(self.config, data.length) + conversations * (teacher + student)


class CartridgeMemory(Studied, PrefixMemory):
    """Rows of keys and values."""

    def __init__(self, recipe: DocumentCartridges) -> None:
        super().__init__(recipe)
        self.rows = recipe.recipe.tokens

    @torch.no_grad()
    def state(self) -> State:
        assert self.recipe.student.rows is not None
        return {name: x.clone() for name, x in pack(self.recipe.student.rows()).items()}


class LoraMemory(Studied):
    """Low-rank changes of the weights."""

    @torch.no_grad()
    def state(self) -> State:
        every = [dict(lora.named_parameters()) for lora in self.recipe.student.loras]
        return {name: torch.stack([own[name].detach() for own in every]) for name in every[0]}

    @torch.no_grad()
    def score(self, state: State, questions: Tensor, owner: Tensor) -> Tensor:
        rank = next(x.shape[1] for name, x in state.items() if name.startswith("down."))
        shape = (*questions.shape, self.config.resolved_vocab_size)
        found = torch.empty(shape, device=questions.device)
        for document in owner.unique().tolist():
            lora = Lora(self.model, rank)
            lora.load_state_dict({name: x[document] for name, x in state.items()})
            found[owner == document] = lora(self.model, questions[owner == document])
        return found

    def resident_bytes(self, state: State) -> float:
        return sum(x.numel() * x.itemsize / len(x) for x in state.values())


class MemoryBudget:
    """Puts documents into memories and asks them."""

    framework = FRAMEWORK
    unit = "documents"
    remedy = "Lower recipe.cartridge_lr or recipe.lora_lr"
    alarm = None

    def __init__(
        self, config: TrainConfig, data: SelfStudyData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, MemoryBudgetConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.device = device
        directory = locate(config.recipe.weights)
        cartridges.check_model(config, directory)
        self.model = load_decoder(directory, device=device)
        self.fast = {
            Path(where).name: fast_weights(where, data.config, device)
            for where in config.recipe.fast_weights
        }
        self.units_per_step = data.config.documents
        self.flops_per_step = 0.0
        self.cells: dict[str, dict[str, Any]] = {}

    def step(self, batch: SelfStudyData) -> dict[str, float]:
        """All memories of a group of documents."""
        found = {}
        for name, ratio in self.table():
            cell = self.measure(batch, name, ratio)
            key = name if ratio is None else f"{name}_{ratio}"
            self.cells[key] = merged(self.cells.get(key), cell)
            if name in ("full", "none", "cartridge"):
                found[f"train/{key}"] = cell["exam"]["retrieval"]["accuracy"]
        return found

    def table(self) -> list[tuple[str, int | None]]:
        """(memory, budget) of every cell; those of one size have no budget."""
        single = [name for name in self.recipe.memories if name in WHOLE]
        swept = [name for name in self.recipe.memories if name not in single]
        return [
            *((name, None) for name in single),
            *((name, ratio) for name in swept for ratio in self.recipe.ratios),
            *((name, None) for name in self.fast),
        ]

    def measure(self, group: SelfStudyData, name: str, ratio: int | None) -> dict[str, Any]:
        """One memory of a group's documents: what it costs and what it answers."""
        held = self.build(group, name, ratio)
        texts = np.concatenate([document.tokens for document in group.documents])
        tokens = torch.from_numpy(texts).long().to(self.device)
        began = time.perf_counter()
        state = held.absorb(tokens)
        absorbed = time.perf_counter() - began

        count = len(group.documents)

        def score(shift: int, asked: Questions) -> Tensor:
            tokens, owners = asked.on(self.device)
            return held.score(state, tokens, (owners + shift) % count)[:, -1]

        own, foreign = (answering(partial(score, shift)) for shift in (0, 1))
        asked = {kind: questions(group.documents, kind) for kind in FORMS}
        began = time.perf_counter()
        exam = {kind: grade(q, own, count) for kind, q in asked.items()}
        answered = time.perf_counter() - began
        number = sum(map(len, asked.values()))
        resident, score_flops = held.resident_bytes(state), held.flops("score", 3)
        shuffled = [
            scrambled(document, numpy_rng(self.config.seed, "memory/shuffled", i))
            for i, document in enumerate(group.documents)
        ]
        controls = {
            "foreign": grade(asked["retrieval"], foreign, count),
            "shuffled": grade(questions(shuffled, "retrieval"), own, count),
        }
        with tempfile.TemporaryDirectory() as folder:
            stored = [
                held.export(state, i, Path(folder) / "state.safetensors") for i in range(count)
            ]
        return {
            "documents": count,
            "exam": {kind: found for kind, found in exam.items() if found is not None},
            "controls": {kind: found for kind, found in controls.items() if found is not None},
            "resident_bytes": resident * count,
            "stored_bytes": float(sum(stored)),
            "absorb_s": absorbed,
            "score_s": answered / max(1, number) * count,
            "absorb_flops": held.flops("absorb", tokens.shape[1]) * count,
            "score_flops": score_flops * count,
        }

    def build(self, group: SelfStudyData, name: str, ratio: int | None) -> ContextMemory:
        """The memory of a name, within a budget."""
        if name in self.fast:
            return self.fast[name]
        rows = max(2, group.length // (ratio or 1))
        if name in ("cartridge", "lora"):
            return self.studied(group, name, rows)
        texts = np.concatenate([document.tokens for document in group.documents])
        return memory(
            name, self.model, rows, torch.from_numpy(texts).long().to(self.device), ends=ENDS,
            window=self.recipe.window,
            generator=torch_generator(self.config.seed, "memory/random", rows),
        )  # fmt: skip

    def studied(self, group: SelfStudyData, name: str, rows: int) -> Studied:
        """A memory that is trained."""
        rate = self.recipe.cartridge_lr if name == "cartridge" else self.recipe.lora_lr
        optim = OptimConfig(
            lr=rate, beta2=0.99, schedule=Schedule.cosine, final_lr_ratio=0.05,
            warmup_steps=min(20, self.recipe.study_steps // 4), clip_norm=None,
        )  # fmt: skip
        config = dataclasses.replace(
            self.config,
            recipe=CartridgesConfig(
                weights=self.recipe.weights,
                tokens=rows,
                page=1,
                adapter=Adapter.lora if name == "lora" else Adapter.rows,
            ),
            data=group.config,
            optim=optim,
            loop=dataclasses.replace(self.config.loop, steps=self.recipe.study_steps),
        )
        recipe = DocumentCartridges(config, group, Processes(), self.device)
        return LoraMemory(recipe) if name == "lora" else CartridgeMemory(recipe)

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Accuracy of every cell so far."""
        return {
            f"eval/{key}": cell["exam"]["retrieval"]["accuracy"] for key, cell in self.cells.items()
        }

    def summary(self) -> dict[str, Any]:
        """Every cell, per document; and the cartridge's lead over the others at its budget."""
        whole = self.cells["full"]["resident_bytes"] / self.cells["full"]["documents"]
        memories = {key: described(cell, whole) for key, cell in self.cells.items()}
        leads = {
            key: lead(self.cells[f"cartridge_{key.rpartition('_')[2]}"], cell)
            for key, cell in self.cells.items()
            if f"cartridge_{key.rpartition('_')[2]}" in self.cells
        }
        best = {str(ratio): self.best_press(ratio) for ratio in self.recipe.ratios}
        rows = {
            f"memory/{key}": [number(cell, leads.get(key), column) for column in COLUMNS]
            for key, cell in memories.items()
        }
        return {
            "context_bytes": whole,
            "memories": memories,
            "lead": leads,
            "best_press": {ratio: memories[key] for ratio, key in best.items() if key},
            "best_press_lead": {r: leads[key] for r, key in best.items() if key in leads},
            "series": rows,
        }

    def best_press(self, ratio: int) -> str | None:
        """The press of a budget that answers most without seeing the questions."""
        keys = [f"{name}_{ratio}" for name in CHOOSING]
        found = {key: self.cells[key]["exam"] for key in keys if key in self.cells}
        return max(found, key=lambda key: found[key]["retrieval"]["accuracy"], default=None)

    def export(self, directory: Path) -> None:
        """There is no weight to exchange."""

    def state_dict(self) -> dict[str, Any]:
        """The table so far, as text: its rows differ from run to run."""
        return {"cells": json.dumps(self.cells), "cells_so_far": torch.tensor(len(self.cells))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cells = json.loads(state["cells"])


def fast_weights(where: str, data: SelfStudyConfig, device: torch.device) -> FastWeightMemory:
    """The memory that a model with fast weights is. Raises UserError unless it fits the data."""
    model = load_decoder(locate(where, "recipe.fast_weights"), device=device)
    if (words := model.config.resolved_vocab_size) != data.vocab_size:
        raise UserError(
            f"recipe.fast_weights={where} knows {words} tokens, the data has {data.vocab_size}: "
            "it must be trained on data of the same data.keys and data.values"
        )
    try:
        return FastWeightMemory(model)
    except ValueError as error:
        raise UserError(f"recipe.fast_weights={where}: {error}") from error


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Two groups of documents as one; sums of everything but the exams, which are joined."""
    if old is None:
        return new
    found: dict[str, Any] = {}
    for key, value in new.items():
        if key in ("exam", "controls"):
            found[key] = {
                kind: joined_grades(old[key].get(kind), value.get(kind))
                for kind in {**old[key], **value}
            }
        else:
            found[key] = old[key] + value
    return found


def joined_grades(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any]:
    """The grades of two groups of documents."""
    parts = [part for part in (a, b) if part is not None]
    number = sum(part["questions"] for part in parts)
    found = {
        "questions": number,
        "by_document": [row for part in parts for row in part["by_document"]],
        "accuracy": sum(p["accuracy"] * p["questions"] for p in parts) / number,
    }
    if all("stale" in part for part in parts):
        found["stale"] = sum(p["stale"] * p["questions"] for p in parts) / number
    return found


def described(cell: dict[str, Any], whole: float) -> dict[str, Any]:
    """A cell per document: means, intervals, ratios."""
    count = cell["documents"]
    each = {
        key: value / count
        for key, value in cell.items()
        if key not in ("exam", "controls", "documents")
    }
    graded = {
        kind: {
            **{k: v for k, v in grades.items() if k != "by_document"},
            "interval": clustered_bootstrap(*zip(*grades["by_document"], strict=True)),
        }
        for part in ("exam", "controls")
        for kind, grades in cell[part].items()
    }
    return {
        **each,
        **graded,
        "documents": count,
        "share_of_context": each["resident_bytes"] / whole,
    }


def lead(cartridge: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Paired difference of retrieval, clustered by document."""
    ours, theirs = (
        np.array(c["exam"]["retrieval"]["by_document"], float) for c in (cartridge, other)
    )
    right, asked = ours[:, 0] - theirs[:, 0], ours[:, 1]
    return {
        "mean": float(right.sum() / asked.sum()),
        "interval": clustered_bootstrap(right.tolist(), asked.tolist()),
    }


def number(cell: dict[str, Any], lead: dict[str, Any] | None, column: str) -> float:
    """What a table's column says of a cell; nan where it says nothing."""
    found: Any = {**cell, "lead": lead or {}}
    for key in column.split("/"):
        found = found.get(key, {}) if isinstance(found, dict) else found[int(key)]
    return math.nan if isinstance(found, dict) else float(found)


class Groups:
    """The data: group i of fresh documents, of the seed."""

    def __init__(self, config: SelfStudyConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def batch(self, step: int) -> SelfStudyData:
        return SelfStudyData(self.config, seed=stream_seed(self.seed, "memory/group", step))

    def ids(self, step: int) -> list[str]:
        return [f"document {i} of group {step}" for i in range(self.config.documents)]

    @property
    def content_hash(self) -> str:
        return SelfStudyData(self.config, seed=0).content_hash


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("transformer",), (SelfStudyConfig,), "self_study")
    assert isinstance(config.recipe, MemoryBudgetConfig)
    if "full" not in config.recipe.memories:
        raise UserError("recipe.memories must have full: budgets are shares of its bytes")


def build(config: TrainConfig, processes: Processes, device: torch.device) -> MemoryBudget:
    """The recipe of `config`; the model from its checkpoint."""
    check(config)
    if processes.world > 1:
        raise UserError("recipe=memory_budget runs in one process: start it without torchrun")
    assert isinstance(config.data, SelfStudyConfig)
    return MemoryBudget(config, Groups(config.data, config.seed), processes, device)  # type: ignore[arg-type]


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run: of one cartridge's training, which is the largest part."""
    check(config)
    assert isinstance(config.recipe, MemoryBudgetConfig)
    assert isinstance(config.data, SelfStudyConfig)
    from training.data.config import statements_length

    rows = max(2, statements_length(config.data.statements[0]) // min(config.recipe.ratios))
    own = dataclasses.replace(
        config, recipe=CartridgesConfig(weights=config.recipe.weights, tokens=rows, page=1)
    )
    found = cartridges.estimate(own)
    trained = [name for name in config.recipe.memories if name in ("cartridge", "lora")]
    runs = len(trained) * len(config.recipe.ratios) * config.recipe.study_steps
    return dataclasses.replace(
        found,
        flops_per_step=found.flops_per_step * runs,
        units_per_step=config.data.documents,
        unit=MemoryBudget.unit,
    )
