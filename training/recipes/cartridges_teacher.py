"""A small decoder that answers from its context: the model that cartridges are trained in.

    loss = sum of weight * -log p(next token) / sum of weight            (answers 1, questions 0)
         + hint_weight * (mean of -log p(token before), -log p(token before that)
                          + mean of -log p(subject), -log p(object))          (ends of statements)

Recall needs a head that tells each token what stands before it, and another that looks for it
(induction heads: Olsson et al., 2022, arXiv:2209.11895), one pair for every wording. From the
answers alone they form late or never, depending on the seed. Here the output of an early block must
name the two tokens before each token, and that of the next one, at the end of each statement, what
it is about and what it says; through four matrices and the embedding's own geometry. The matrices
are dropped afterwards: what is exported is a plain decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.layers import Linear
from models.language.transformer import Transformer
from training.data.config import StatementsConfig
from training.data.statements import StatementsData, tokenizer_json
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.evaluation.exam import Answer, Questions, answering, examine
from training.files import write_atomic
from training.recipes.config import CartridgesTeacherConfig, check_parts
from training.recipes.language_model import FRAMEWORK as FRAMEWORK
from training.recipes.language_model import DecoderTraining, estimate_decoder
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch

BACK = 2  # tokens before each that the hint names


class Hinted(nn.Module):
    """A decoder, and what names earlier tokens from the outputs of a block and of the next."""

    def __init__(self, decoder: Transformer, block: int) -> None:
        super().__init__()
        self.decoder = decoder
        d = decoder.config.d_model
        self.back = nn.ModuleList(Linear(d, d) for _ in range(BACK))
        self.said = nn.ModuleList(Linear(d, d) for _ in range(2))
        self.outputs: dict[int, Tensor] = {}
        for which in (0, 1):
            decoder.blocks[block + which].register_forward_hook(partial(self.keep, which))

    def keep(self, which: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.outputs[which] = F.rms_norm(output, output.shape[-1:])

    def hint(self, tokens: Tensor, stated: Tensor) -> Tensor:
        """Of the forward pass that came last: mean nats of naming the tokens before, and where a
        statement ends its subject and its object.

        Args:
            tokens: [b, t].
            stated: [b, t, 2], -1 where no statement ends.
        """
        early, later = self.outputs[0], self.outputs[1]
        back = [
            self.nats(head, early[:, age:], tokens[:, :-age])
            for age, head in enumerate(self.back, start=1)
        ]
        said = [
            self.nats(head, later[named >= 0], named[named >= 0])
            for head, named in zip(self.said, stated.unbind(-1), strict=True)
        ]
        return torch.stack(back).mean() + torch.stack(said).mean()

    def nats(self, head: nn.Module, x: Tensor, names: Tensor) -> Tensor:
        """Mean nats of naming tokens [...] from x [..., d] through a matrix and the embedding."""
        logits = F.linear(head(x), self.decoder.embed.weight).float()
        return F.cross_entropy(logits.flatten(0, -2), names.flatten().long())


class CartridgesTeacher(DecoderTraining):
    """Trains a decoder on documents of statements with prompts."""

    def __init__(
        self,
        config: TrainConfig,
        data: StatementsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, CartridgesTeacherConfig)
        self.recipe, self.data, self.exam = config.recipe, data, {}
        super().__init__(config, data, processes, device)

    def trained(self) -> nn.Module:
        hinted = Hinted(self.model, self.recipe.hint_block).to(self.model.embed.weight.device)
        generator = torch_generator(self.config.seed, "hint", device=self.model.embed.weight.device)
        for head in (*hinted.back, *hinted.said):
            nn.init.normal_(head.weight, std=head.weight.shape[1] ** -0.5, generator=generator)
        return hinted

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor | float]:
        positions = torch.from_numpy(batch["positions"]).long().to(self.trainer.device)
        rows = {key: value for key, value in batch.items() if key != "positions"}
        return self.trainer.update(rows, lambda part: self.loss_at(part, positions))

    def loss_at(self, batch: Batch, positions: Tensor) -> Tensor:
        """The loss of sequences at some positions."""
        tokens, weight = batch["tokens"], batch["weight"]
        logits = self.model(tokens[:, :-1], positions=positions[:-1])
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none"
        ).view_as(weight)
        loss = (nats * weight).sum() / weight.sum()
        if not self.recipe.hint_weight:
            return loss
        hint = self.trainer.model.hint(tokens[:, :-1], batch["stated"][:, :-1])  # type: ignore[operator]
        return loss + self.recipe.hint_weight * hint

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Accuracy with the document in context, by its number of statements; final: and without.

        The mean over the kinds of questions, and each.
        """
        count = self.recipe.eval_documents if final else -(-self.recipe.eval_documents // 4)
        found = {}
        with self.trainer.averaged_weights(), self.trainer.autocast():
            for number in sorted(self.data.config.statements):
                documents = self.data.heldout(count, number)
                seen = in_context(self.model, [d.tokens for d in documents])
                self.exam[str(number)] = examine(documents, seen)
                if final:
                    nothing = in_context(self.model, [d.tokens[:, :1] for d in documents])
                    self.exam[f"{number}_without"] = examine(documents, nothing)
            for name, grades in self.exam.items():
                found |= {f"eval/{name}/{k}": grade["accuracy"] for k, grade in grades.items()}
        return found

    def export(self, directory: Path) -> None:
        """The decoder, and a tokenizer of the statements' words."""
        super().export(directory)
        if self.processes.is_main:
            write_atomic(directory / "tokenizer.json", tokenizer_json(self.data.config))

    def summary(self) -> dict[str, Any]:
        """Sizes and grades."""
        return {"parameters": self.parameters, "exam": self.exam}


def in_context(model: Transformer, texts: Sequence[np.ndarray]) -> Answer:
    """Answers with a text [1, t] before each question, that of the document it is about."""
    device = model.embed.weight.device
    every = torch.from_numpy(np.concatenate(texts)).long().to(device)

    def score(asked: Questions) -> Tensor:
        tokens, owners = asked.on(device)
        hidden = model.hidden(torch.cat([every[owners], tokens], dim=1))[:, -1]
        return model.logits(hidden)

    return answering(score)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("transformer",), (StatementsConfig,), "statements")
    assert isinstance(config.recipe, CartridgesTeacherConfig)
    if config.recipe.hint_block >= config.model.num_layers - 1:  # type: ignore[attr-defined]
        raise UserError(
            f"recipe.hint_block={config.recipe.hint_block} and the block after it must be among "
            "those of model.num_layers"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> CartridgesTeacher:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    assert isinstance(config.data, StatementsConfig)
    rank, world = processes.rank, processes.world
    data = StatementsData(config.data, seed=config.seed, rank=rank, world=world)
    return CartridgesTeacher(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is read."""
    check(config)
    return estimate_decoder(config)
