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

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernels.cross_entropy.op import linear_cross_entropy, linear_distillation
from models.language.cartridges import (
    CartridgeRows,
    compose,
    first_tokens,
    random_vectors,
    sampled_chunks,
)
from models.language.cartridges_file import (
    CartridgeError,
    fingerprint,
    load_cartridge,
    save_cartridge,
)
from models.language.config import TransformerConfig, flops_per_token
from models.language.lora import Lora, rank_for
from models.language.prefix import Prefix
from models.language.transformer import Transformer, num_parameters
from training.data.config import ConversationsConfig, SelfStudyConfig
from training.data.conversations import ConversationsData
from training.data.self_study import SelfStudyData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, state_memory, torch_activations
from training.evaluation.language import config_without_data
from training.files import replace_with
from training.pretrained import config_of, load_decoder, locate
from training.provenance import commit
from training.recipes.config import (
    Adapter,
    CartridgesConfig,
    Objective,
    Start,
    check_parts,
)
from training.schema import Precision, TrainConfig
from training.seeding import numpy_rng, torch_generator
from training.torch_step import Batch, TorchStep

FRAMEWORK = "torch"


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
        start = every.position + offset
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        if len(every.layers[0][0]) == 1:  # one document: its rows are shared, not copied
            return teacher.hidden(tokens, cache=every.map(lambda x: x[0]), positions=positions)
        shown = [owner, *([] if others is None else others.T)]
        prefix = compose([every.map(lambda x, i=i: x[i]) for i in shown])
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
    """Trains a cartridge for each of some documents; a subclass says how they are judged.

    Args:
        texts: token ids [documents, t] of what the cartridges are to stand for.
        unrelated: as many of something else.
    """

    framework = FRAMEWORK
    unit = "tokens"
    remedy = "Lower optim.lr"
    alarm = None

    def __init__(
        self,
        config: TrainConfig,
        data: SelfStudyData | ConversationsData,
        processes: Processes,
        device: torch.device,
        texts: np.ndarray,
        unrelated: np.ndarray,
    ) -> None:
        assert isinstance(config.recipe, CartridgesConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes, self.device = processes, device
        directory = locate(config.recipe.weights)
        check_model(config, directory)
        self.teacher = load_decoder(directory, device=device)
        self.teacher.checkpoint_blocks = config.recipe.activation_checkpointing
        self.fingerprint = fingerprint(self.teacher)
        self.texts, self.documents = texts, len(texts)
        self.parents: list[str] = []  # of each document, the content hash of what it goes on from
        self.student = self.started(unrelated)
        self.parameters = num_parameters(self.student)
        self.trainer = TorchStep(
            self.student, [], config.optim, config.scale, processes, config.loop.steps
        )
        rows = len(data.ids(0))
        self.units_per_step = rows * data.config.seq_len
        length = data.config.seq_len + config.recipe.tokens
        per_token = flops_per_token(self.teacher.config, length)
        self.flops_per_step = self.units_per_step * per_token * 4 / 3  # and the teacher's forward

    def started(self, unrelated: np.ndarray) -> Student:
        """The student before its first step."""
        recipe = self.recipe
        generator = torch_generator(self.config.seed, "cartridge")
        if recipe.adapter == Adapter.lora:
            rank = rank_for(self.teacher.config, recipe.tokens)
            loras = [Lora(self.teacher, rank, generator=generator) for _ in self.texts]
            return Student(self.teacher, None, loras)
        if recipe.start_from is not None:
            return Student(self.teacher, CartridgeRows(self.earlier(), recipe.frozen), [])
        text = unrelated if recipe.start == Start.unrelated else self.texts
        tokens = torch.from_numpy(text).long().to(self.device)
        try:
            if recipe.start == Start.random:
                start = random_vectors(self.teacher, tokens[:, :1], recipe.tokens, generator)
            elif recipe.start == Start.chunks:
                start = sampled_chunks(self.teacher, tokens, recipe.tokens, generator)
            else:
                start = first_tokens(self.teacher, tokens, recipe.tokens)
        except ValueError as error:
            raise UserError(f"recipe.tokens={recipe.tokens}: {error}; lower it") from error
        # In float32 whatever the model is in: a step of Adam is lost on 16 bits.
        rows = CartridgeRows(start.map(lambda x: x.float()), recipe.frozen)
        return Student(self.teacher, rows, [])

    def earlier(self) -> Prefix:
        """The cartridges of another run, one for each document. Raises UserError."""
        every = []
        for i in range(self.documents):
            file = Path(str(self.recipe.start_from)).expanduser() / f"cartridge_{i}.safetensors"
            try:
                prefix, header = load_cartridge(file, self.teacher, device=self.device)
            except CartridgeError as error:
                raise UserError(f"recipe.start_from={self.recipe.start_from}: {error}") from error
            if header.tokens != self.recipe.tokens:
                raise UserError(
                    f"recipe.start_from={self.recipe.start_from} has {header.tokens} rows: set "
                    f"recipe.tokens={header.tokens}"
                )
            every.append(prefix)
            self.parents.append(header.content)
        layers = zip(*(prefix.layers for prefix in every), strict=True)
        stacked = tuple(
            (torch.stack([k for k, _ in own]).float(), torch.stack([v for _, v in own]).float())
            for own in layers
        )
        return Prefix(stacked, every[0].position)

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        rng = numpy_rng(self.config.seed, "cartridge/step", self.trainer.count)
        offset = int(rng.integers(self.recipe.jitter + 1))
        if self.recipe.objective == Objective.next_token:
            batch = self.recitation(rng)
        batch["others"] = self.distractors(batch["owner"], rng)
        return self.trainer.update(batch, lambda part: self.loss(part, offset))

    def recitation(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The texts themselves, or windows of them, to be continued token by token."""
        size = self.data.config.seq_len + 1
        windows = self.texts
        if windows.shape[1] > 4 * size:
            starts = rng.integers(windows.shape[1] - size + 1, size=len(self.data.ids(0)))
            owner = np.arange(len(starts)) % self.documents
            tokens = np.stack(
                [windows[i, a : a + size] for i, a in zip(owner, starts, strict=True)]
            )
        else:
            tokens, owner = windows, np.arange(self.documents)
        weight = np.ones((len(tokens), tokens.shape[1] - 1), np.float32)
        return {"tokens": tokens, "weight": weight, "owner": owner.astype(np.int32)}

    def distractors(self, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[b, n] other documents whose cartridges are visible, too; n = 0 in most steps."""
        count = self.recipe.distractors
        if not count or rng.random() >= self.recipe.distracted:
            return np.zeros((len(owner), 0), np.int64)
        return others_than(owner, self.documents, count, rng)

    def loss(self, batch: Batch, offset: int) -> Tensor:
        """Mean over the answers' tokens."""
        tokens, owner = batch["tokens"].long(), batch["owner"].long()
        answers = batch["weight"] > 0  # [b, t]
        hidden = self.student.hidden(
            tokens[:, :-1], owner, offset=offset, others=batch["others"].long()
        )[answers]
        head = self.head.to(hidden.dtype)
        if self.recipe.objective != Objective.distill:
            return linear_cross_entropy(hidden, head, tokens[:, 1:][answers])
        return linear_distillation(hidden, head, *self.teach(batch, answers))

    @torch.no_grad()
    def teach(self, batch: Batch, answers: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's most likely tokens of each answer's token, and their log-probabilities."""
        if "likely" in batch:  # recorded when the conversations were made
            return batch["likely"][answers].long(), batch["logprobs"][answers]
        tokens = batch["tokens"].long()[:, :-1]
        hidden = self.teacher.hidden(tokens, cache=self.seen(batch))[answers]
        logprobs = self.teacher.logits(hidden).float().log_softmax(-1)
        found = logprobs.topk(min(self.recipe.top_k, logprobs.shape[-1]), dim=-1)
        return found.indices, found.values

    def seen(self, batch: Batch) -> Prefix:
        """What stands before the teacher's conversations."""
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """[vocab, d] of the output."""
        head = self.teacher.lm_head or self.teacher.embed
        return head.weight

    def summary(self) -> dict[str, Any]:
        """Sizes, and whether the model is what it was."""
        itemsize = self.teacher.embed.weight.element_size()
        each = 2 * self.teacher.config.num_layers * itemsize
        each *= self.teacher.config.resolved_kv_heads * self.teacher.config.resolved_head_dim
        lora = self.student.rows is None
        return {
            "parameters": self.parameters,
            "bytes": 4 * self.parameters // self.documents if lora else each * self.recipe.tokens,
            "context_bytes": each * self.texts.shape[1],
            "model_changed": float(fingerprint(self.teacher) != self.fingerprint),
        }

    def export(self, directory: Path) -> None:
        """Write the cartridge of each document, cartridge_<i>.safetensors; LoRA is not stored."""
        if not self.processes.is_main or self.student.rows is None:
            return
        with torch.no_grad(), self.trainer.averaged_weights():
            rows = self.student.rows()
        for i in range(self.documents):
            own = rows.map(lambda x, i=i: x[i].to(self.teacher.embed.weight.dtype))
            replace_with(directory / f"cartridge_{i}.safetensors", partial(self.save, own, i))

    def save(self, prefix: Prefix, document: int, path: Path) -> None:
        """Write one cartridge."""
        text = np.ascontiguousarray(self.texts[document], np.int32)
        lineage = {
            "parents": self.parents[document : document + 1],
            "experiment": self.config.experiment or "",
            "seed": self.config.seed,
            "document": document,
            "steps": self.trainer.count,
            "code": commit(),
        }
        save_cartridge(
            path, prefix, model=self.fingerprint, corpus=sha256(text.tobytes()).hexdigest(),
            page=self.recipe.page, lineage=lineage,
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
    kinds = (SelfStudyConfig, ConversationsConfig)
    check_parts(config, ("transformer",), kinds, "self_study or conversations")
    assert isinstance(config.recipe, CartridgesConfig)
    documents = config.data.documents if isinstance(config.data, SelfStudyConfig) else 1
    if config.model.vocab_size is None and isinstance(config.data, ConversationsConfig):  # type: ignore[attr-defined]
        raise UserError("model.vocab_size=null: set it to that of the model in recipe.weights")
    most = max([config.recipe.distractors + 1, *config.recipe.eval_composed])
    if most > documents:
        raise UserError(
            f"recipe.distractors={config.recipe.distractors} and recipe.eval_composed="
            f"{list(config.recipe.eval_composed)} need {most} documents: there "
            f"{'is' if documents == 1 else 'are'} {documents}; raise data.documents"
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
    if processes.world > 1:
        raise UserError("recipe=cartridges runs in one process: start it without torchrun")
    place: dict[str, Any] = {"seed": config.seed}
    if isinstance(config.data, SelfStudyConfig):
        from training.recipes.cartridges_documents import DocumentCartridges

        return DocumentCartridges(config, SelfStudyData(config.data, **place), processes, device)
    from training.recipes.cartridges_corpus import CorpusCartridge

    assert isinstance(config.data, ConversationsConfig)
    return CorpusCartridge(config, ConversationsData(config.data, **place), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data and no checkpoint is read."""
    check(config)
    assert isinstance(config.data, SelfStudyConfig | ConversationsConfig)
    assert isinstance(config.recipe, CartridgesConfig)
    model_config: TransformerConfig = config_without_data(config)
    with torch.device("meta"):
        model = Transformer(model_config)
    model.requires_grad_(False)
    model.checkpoint_blocks = config.recipe.activation_checkpointing
    if config.scale.precision == Precision.bf16:
        model.to(torch.bfloat16)  # there is no autocast on meta
    documents = config.data.documents if isinstance(config.data, SelfStudyConfig) else 1
    p = config.recipe.tokens
    rows = max(1, documents * config.data.batch_size // config.optim.accumulate)
    width = (model_config.resolved_kv_heads, model_config.resolved_head_dim)
    start = torch.zeros(documents, p, *width, device="meta")
    student = CartridgeRows(Prefix(((start, start),) * model_config.num_layers, p))
    tokens = torch.zeros(rows, config.data.seq_len, dtype=torch.long, device="meta")

    def loss() -> Tensor:
        prefix = student().map(lambda x: x.repeat_interleave(-(-rows // documents), 0)[:rows])
        return model.hidden(tokens, cache=prefix).float().square().mean()  # the loss is fused

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
            "model": sum(p.numel() * p.itemsize for p in model.parameters()),
            "activations": torch_activations(model, loss),
        },
    )
