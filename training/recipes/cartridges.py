"""Cartridges by self-study (arXiv:2506.06266): a document becomes a few rows of keys and values.

    Z: rows of every layer, started from some text               models/language/cartridges.py
    repeat:
        conversations x about the document, with answers         training/data/self_study.py
        teacher   p(. | document, x), of each answer's tokens the most likely 20
        student   q(. | Z, x)
        Z <- Adam step on the mean over answer tokens of  sum p (log p - log q)

The teacher and the student are one model, whose weights never change. The teacher sees the document
or a chunk of it, the student its cartridge: p positions, then the conversation.

The arms: the answers' tokens instead of the teacher's distribution (`objective=labels`), the
document instead of conversations about it (`next_token`), and low-rank weights in place of rows
(`adapter=lora`) at equal bytes. Several documents are trained side by side, each by itself; with
`distractors` others' cartridges stand before some conversations, so that a cartridge learns to keep
silent about what is not its own (mixed visibility: Cartridges at Scale, 2026, arXiv:2606.04557).

What differs from the paper: here Z is trained a fixed number of steps on fresh conversations, and
the learning rate is larger, as keys and values of a small model are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernels.cross_entropy.op import linear_cross_entropy, linear_distillation
from models.language.cartridges import (
    CartridgeRows,
    first_tokens,
    random_vectors,
    sampled_chunks,
)
from models.language.cartridges_file import fingerprint, save_cartridge
from models.language.config import TransformerConfig, flops_per_token
from models.language.lora import Lora, rank_for
from models.language.prefix import Prefix, join, read
from models.language.transformer import Transformer, num_parameters
from training.data.config import SelfStudyConfig
from training.data.self_study import SelfStudyData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, state_memory, torch_activations
from training.evaluation.exam import FORMS, Questions, examine
from training.evaluation.language import config_without_data
from training.pretrained import config_of, load_decoder, locate
from training.recipes.config import (
    Adapter,
    CartridgesConfig,
    Objective,
    Start,
    check_parts,
)
from training.schema import TrainConfig
from training.seeding import numpy_rng, torch_generator
from training.torch_step import Batch, TorchStep

FRAMEWORK = "torch"
EXAM_ROWS = 256  # questions that are answered together


class Student(nn.Module):
    """What is trained, for every document: rows before the sequence, or changes of the weights."""

    def __init__(self, teacher: Transformer, rows: CartridgeRows | None, loras: list[Lora]) -> None:
        super().__init__()
        self.rows, self.loras = rows, nn.ModuleList(loras)
        self._teacher = [teacher]  # in a list: it is not part of what is trained

    def hidden(
        self,
        tokens: Tensor,
        owner: Tensor,
        *,
        offset: int = 0,
        others: Tensor | None = None,
    ) -> Tensor:
        """[b, t, d] of conversations after the documents' cartridges.

        Args:
            owner: [b] document of each.
            offset: positions between the cartridge and the conversation.
            others: [b, n] documents whose cartridges stand there, too.
        """
        (teacher,) = self._teacher
        if self.rows is None:
            parts = [self.adapted(tokens[owner == i], i) for i in range(len(self.loras))]
            order = torch.cat([(owner == i).nonzero()[:, 0] for i in range(len(self.loras))])
            return torch.cat(parts)[order.argsort()]
        every = self.rows()
        shown = [owner, *([] if others is None else others.T)]
        prefix = join([every.map(lambda x, i=i: x[i]) for i in shown], every.position)
        start = prefix.position + offset
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        return teacher.hidden(tokens, cache=prefix, positions=positions)

    def adapted(self, tokens: Tensor, document: int) -> Tensor:
        """The same, of one document, by changed weights."""
        (teacher,) = self._teacher
        if not len(tokens):
            return tokens.new_zeros(0, tokens.shape[1], teacher.config.d_model, dtype=torch.float32)
        changed = self.loras[document].weights(teacher)  # type: ignore[operator]
        return torch.func.functional_call(
            _Hidden(teacher), {f"model.{k}": v for k, v in changed.items()}, (tokens,)
        )


class _Hidden(nn.Module):
    """A model whose call gives the residual stream instead of logits."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.hidden(tokens)


class Cartridges:
    """Trains a cartridge for each of the data's documents."""

    framework = FRAMEWORK
    unit = "tokens"
    remedy = "Lower optim.lr"

    def __init__(
        self, config: TrainConfig, data: SelfStudyData, processes: Processes, device: torch.device
    ) -> None:
        assert isinstance(config.recipe, CartridgesConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes, self.device, self.exam = processes, device, {}
        directory = locate(config.recipe.weights)
        check_model(config, directory)
        self.teacher = load_decoder(directory, device=device)
        self.teacher.checkpoint_blocks = config.recipe.activation_checkpointing
        self.fingerprint = fingerprint(self.teacher)
        self.student = self.started()
        self.parameters = num_parameters(self.student)
        self.whole = self.read([document.tokens for document in data.studied])
        self.trainer = TorchStep(
            self.student, [], config.optim, config.scale, processes, config.loop.steps
        )
        rows = data.config.batch_size * data.config.documents
        self.units_per_step = rows * data.config.seq_len
        length = data.config.seq_len + config.recipe.tokens
        per_token = flops_per_token(self.teacher.config, length)
        self.flops_per_step = self.units_per_step * per_token * 4 / 3  # and the teacher's forward

    @torch.no_grad()
    def read(self, texts: Sequence[np.ndarray]) -> Prefix:
        """What the teacher keeps of texts of one length, [documents, t, kv, hd]."""
        tokens = torch.from_numpy(np.concatenate(texts)).long().to(self.device)
        return read(self.teacher, tokens).prefix()

    def started(self) -> Student:
        """The student before its first step."""
        recipe, data = self.recipe, self.data
        generator = torch_generator(self.config.seed, "cartridge")
        if recipe.adapter == Adapter.lora:
            rank = rank_for(self.teacher.config, recipe.tokens)
            loras = [Lora(self.teacher, rank, generator=generator) for _ in data.documents]
            return Student(self.teacher, None, loras)
        texts = data.others if recipe.start == Start.unrelated else data.studied
        tokens = torch.from_numpy(np.concatenate([d.tokens for d in texts])).long().to(self.device)
        if recipe.start == Start.random:
            start = random_vectors(self.teacher, tokens[:, :1], recipe.tokens, generator)
        elif recipe.start == Start.chunks:
            start = sampled_chunks(self.teacher, tokens, recipe.tokens, generator)
        else:
            start = first_tokens(self.teacher, tokens, recipe.tokens)
        return Student(self.teacher, CartridgeRows(start, recipe.frozen), [])

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        rng = numpy_rng(self.config.seed, "cartridge/step", self.trainer.count)
        offset = int(rng.integers(self.recipe.jitter + 1))
        if self.recipe.objective == Objective.next_token:
            batch = self.recitation()
        batch["others"] = self.distractors(batch["owner"], rng)
        return self.trainer.update(batch, lambda part: self.loss(part, offset))

    def recitation(self) -> dict[str, np.ndarray]:
        """The documents themselves, to be continued token by token."""
        tokens = np.concatenate([document.tokens for document in self.data.studied])
        weight = np.ones((len(tokens), tokens.shape[1] - 1), np.float32)
        return {"tokens": tokens, "weight": weight, "owner": np.arange(len(tokens), dtype=np.int32)}

    def distractors(self, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[b, n] other documents whose cartridges are visible, too; n = 0 in most steps."""
        count, documents = self.recipe.distractors, self.data.config.documents
        if not count or rng.random() >= self.recipe.distracted:
            return np.zeros((len(owner), 0), np.int64)
        return others_than(owner, documents, count, rng)

    def loss(self, batch: Batch, offset: int) -> Tensor:
        """Mean over the answers' tokens."""
        tokens, owner = batch["tokens"].long(), batch["owner"].long()
        answers = batch["weight"] > 0  # [b, t]
        hidden = self.student.hidden(
            tokens[:, :-1], owner, offset=offset, others=batch["others"].long()
        )[answers]
        head = self.head
        if self.recipe.objective != Objective.distill:
            return linear_cross_entropy(hidden, head.to(hidden.dtype), tokens[:, 1:][answers])
        likely, logprobs = self.teach(batch, answers)
        return linear_distillation(hidden, head.to(hidden.dtype), likely, logprobs)

    @torch.no_grad()
    def teach(self, batch: Batch, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's most likely tokens of each answer's token, and their log-probabilities."""
        tokens, owner = batch["tokens"].long(), batch["owner"].long()
        if self.data.config.chunk is None:
            seen = self.whole.map(lambda x: x[owner])
        else:
            seen = read(self.teacher, batch["context"].long()).prefix()
        hidden = self.teacher.hidden(tokens[:, :-1], cache=seen)[answers]
        logprobs = self.teacher.logits(hidden).float().log_softmax(-1)
        found = logprobs.topk(min(self.recipe.top_k, logprobs.shape[-1]), dim=-1)
        return found.indices, found.values

    @property
    def head(self) -> Tensor:
        """[vocab, d] of the output."""
        head = self.teacher.lm_head or self.teacher.embed
        return head.weight

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Exams on statements that were asked for in training and on those that were not; final:
        also with others' cartridges beside, at other positions, about another document, and the
        loss of the documents themselves."""
        every, kinds = range(self.data.config.statements[0]), tuple(FORMS)
        asked = self.data.asked
        held = [sorted(set(every) - set(own)) for own in asked]
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
                found["eval/document_nats"] = self.document_nats()
        return found

    def final_exams(self, held: list[list[int]]) -> dict[str, Any]:
        """Part -> kind -> grade."""
        documents = self.data.config.documents
        found = {"all": self.examined(tuple(FORMS))}
        if documents > 1:
            found["foreign"] = self.examined(("retrieval",), shift=1)
        for offset in self.recipe.eval_offsets:
            found[f"offset_{offset}"] = self.examined(("retrieval",), among=held, offset=offset)
        for count in self.recipe.eval_composed:
            found[f"composed_{count}"] = self.examined(("retrieval",), composed=count)
        return found

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
        count = self.data.config.documents

        def answer(questions: Questions) -> np.ndarray:
            found = []
            for first in range(0, len(questions), EXAM_ROWS):
                part = slice(first, first + EXAM_ROWS)
                owner = (questions.owners[part] + shift) % count
                rng = numpy_rng(self.config.seed, "exam/others", first)
                others = others_than(owner, count, composed - 1, rng)
                hidden = self.student.hidden(
                    torch.from_numpy(questions.tokens[part]).long().to(self.device),
                    torch.from_numpy(owner).long().to(self.device),
                    offset=offset,
                    others=torch.from_numpy(others).to(self.device),
                )[:, -1]
                found.append(self.teacher.logits(hidden).argmax(-1).cpu().numpy())
            return np.concatenate(found)

        return examine(self.data.documents, answer, kinds, among)

    def document_nats(self) -> float:
        """Mean nats per token of the documents, read after their cartridges."""
        batch = self.trainer.to_device(self.recitation())
        tokens, owner = batch["tokens"].long(), batch["owner"].long()
        hidden = self.student.hidden(tokens[:, :-1], owner)
        return linear_cross_entropy(hidden, self.head.to(hidden.dtype), tokens[:, 1:]).item()

    def summary(self) -> dict[str, Any]:
        """Sizes, grades, and whether the model is what it was."""
        itemsize = self.teacher.embed.weight.element_size()
        rows = 2 * self.teacher.config.num_layers * itemsize
        rows *= self.teacher.config.resolved_kv_heads * self.teacher.config.resolved_head_dim
        return {
            "parameters": self.parameters,
            "bytes": 4 * self.parameters // self.data.config.documents
            if self.student.rows is None
            else rows * self.recipe.tokens,
            "context_bytes": rows * self.data.length,
            "exam": self.exam,
            "model_changed": float(fingerprint(self.teacher) != self.fingerprint),
        }

    def export(self, directory: Path) -> None:
        """Write the cartridge of each document, cartridge_<i>.safetensors, if it fills pages."""
        from training.files import replace_with

        if self.processes.is_main and self.student.rows is not None:
            if self.recipe.tokens % self.recipe.page:
                return
            with torch.no_grad(), self.trainer.averaged_weights():
                rows = self.student.rows()
            for i in range(self.data.config.documents):
                replace_with(
                    directory / f"cartridge_{i}.safetensors",
                    partial(self.save, rows.map(lambda x, i=i: x[i]), i),
                )

    def save(self, prefix: Prefix, document: int, path: Path) -> None:
        """Write one cartridge."""
        from hashlib import sha256

        from training.provenance import commit

        corpus = sha256(self.data.studied[document].tokens.tobytes()).hexdigest()
        lineage = {
            "parents": [],
            "experiment": self.config.experiment or "",
            "seed": self.config.seed,
            "document": document,
            "steps": self.trainer.count,
            "code": commit(),
        }
        save_cartridge(
            path, prefix, model=self.fingerprint, corpus=corpus, page=self.recipe.page,
            lineage=lineage,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def others_than(
    owner: np.ndarray, documents: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """[b, count] different documents, none of them a row's own."""
    ranks = rng.random((len(owner), documents))
    ranks[np.arange(len(owner)), owner] = np.inf
    return ranks.argsort(axis=1)[:, :count].astype(np.int64)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, CartridgesConfig, ("transformer",), (SelfStudyConfig,), "self_study")
    assert isinstance(config.recipe, CartridgesConfig)
    assert isinstance(config.data, SelfStudyConfig)
    most = max([config.recipe.distractors + 1, *config.recipe.eval_composed])
    if most > config.data.documents:
        raise UserError(
            f"recipe.distractors={config.recipe.distractors} and recipe.eval_composed="
            f"{list(config.recipe.eval_composed)} need {most} documents: raise data.documents="
            f"{config.data.documents}"
        )


def check_model(config: TrainConfig, directory: Path) -> None:
    """Raise UserError unless the checkpoint is the model of the configuration."""
    ours, theirs = config_without_data(config), config_of(directory)
    different = [
        f"model.{key}={getattr(theirs, key)}"
        for key in vars(ours)
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if different:
        raise UserError(
            f"recipe.weights={directory} holds another model than the configuration says: set "
            f"{' '.join(different)}"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> Cartridges:
    """The recipe of `config` with its data; the model from its checkpoint."""
    check(config)
    assert isinstance(config.data, SelfStudyConfig)
    rank, world = processes.rank, processes.world
    data = SelfStudyData(config.data, seed=config.seed, rank=rank, world=world)
    return Cartridges(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data and no checkpoint is read."""
    check(config)
    assert isinstance(config.data, SelfStudyConfig)
    assert isinstance(config.recipe, CartridgesConfig)
    model_config: TransformerConfig = config_without_data(config)
    with torch.device("meta"):
        model = Transformer(model_config)
    model.requires_grad_(False)
    documents, p = config.data.documents, config.recipe.tokens
    rows = max(1, documents * config.data.batch_size // config.optim.accumulate)
    width = (model_config.resolved_kv_heads, model_config.resolved_head_dim)
    start = torch.zeros(documents, p, *width, device="meta")
    student = CartridgeRows(Prefix(((start, start),) * model_config.num_layers, p))
    tokens = torch.zeros(rows, config.data.seq_len, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        prefix = student().map(lambda x: x.repeat_interleave(-(-rows // documents), 0)[:rows])
        return model.logits(model.hidden(tokens, cache=prefix)).float().logsumexp(-1).mean()

    trained = num_parameters(student)
    memory = state_memory(trained, 0, config.optim, config.scale)
    units = documents * config.data.batch_size * config.data.seq_len
    per_token = flops_per_token(model_config, config.data.seq_len + p)
    return Estimate(
        trained,
        units * per_token * 4 / 3,
        units,
        Cartridges.unit,
        {
            **memory,
            "model": 4 * num_parameters(model),
            "activations": torch_activations(model, loss),
        },
    )
