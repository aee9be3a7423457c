"""The cartridge of a real corpus, from recorded conversations: the recipe behind
`data=conversations`. It is judged by held-out conversations; benchmarks ask it afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.cross_entropy.op import linear_cross_entropy, linear_distillation
from training.data.conversations import ConversationsData, padded
from training.distributed import Processes
from training.errors import UserError
from training.recipes.cartridges import Cartridges
from training.recipes.config import CartridgesConfig, Objective
from training.schema import TrainConfig

EVAL_ROWS = 8  # conversations that are scored together


class CorpusCartridge(Cartridges):
    """One cartridge, for the corpus that the conversations are about."""

    data: ConversationsData

    def __init__(
        self,
        config: TrainConfig,
        data: ConversationsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, CartridgesConfig)
        self.check_recorded(config.recipe, data)
        texts = data.corpus[None].astype(np.int64)
        super().__init__(config, data, processes, device, texts, self.unrelated(data, config))
        own = self.teacher.config.resolved_vocab_size
        largest = max(int(c.tokens.max()) for c in (*data.train, *data.heldout))
        if max(largest, int(texts.max())) >= own:
            raise UserError(
                f"data.path={data.config.path} has token ids up to {largest}, the model knows "
                f"{own}: the conversations were made with another tokenizer"
            )

    @staticmethod
    def check_recorded(recipe: CartridgesConfig, data: ConversationsData) -> None:
        """Raise UserError if there is nothing to distil."""
        first = data.train[0]
        recorded = first.likely.shape[1] > 0 and bool((first.likely >= 0).any())
        if recipe.objective == Objective.distill and not recorded:
            raise UserError(
                f"data.path={data.config.path} has no log-probabilities of the teacher to distil: "
                "synthesise them, or set recipe.objective=labels"
            )

    @staticmethod
    def unrelated(data: ConversationsData, config: TrainConfig) -> np.ndarray:
        """The corpus with its tokens in another order: text that says nothing."""
        rng = np.random.default_rng(config.seed)
        return np.concatenate([data.corpus[:1], rng.permutation(data.corpus[1:])])[None].astype(
            np.int64
        )

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """On held-out conversations: divergence from the teacher, and nats per token of answers."""
        heldout = self.data.heldout if final else self.data.heldout[:EVAL_ROWS]
        divergence, nats, count = 0.0, 0.0, 0
        with self.trainer.averaged_weights(), self.trainer.autocast():
            for first in range(0, len(heldout), EVAL_ROWS):
                rows = padded(heldout[first : first + EVAL_ROWS], self.data.config.seq_len)
                batch = self.trainer.to_device(rows)
                tokens, answers = batch["tokens"].long(), batch["weight"] > 0
                hidden = self.student.hidden(tokens[:, :-1], batch["owner"].long())[answers]
                head = self.head.to(hidden.dtype)
                number = int(answers.sum())
                nats += linear_cross_entropy(hidden, head, tokens[:, 1:][answers]).item() * number
                if batch["likely"].shape[-1]:
                    teacher = batch["likely"][answers].long(), batch["logprobs"][answers]
                    divergence += linear_distillation(hidden, head, *teacher).item() * number
                count += number
        return {"eval/divergence": divergence / count, "eval/answer_nats": nats / count}

    def summary(self) -> dict[str, Any]:
        """Sizes, and what the conversations are."""
        facts = {key: value for key, value in self.data.header.items() if key != "format"}
        return {**super().summary(), "study": facts, "conversations": len(self.data.train)}
