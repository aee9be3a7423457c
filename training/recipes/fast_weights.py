"""Next-token prediction on documents, for decoders of any mixer: `recipe=fast_weights`.

The objective is that of `language_model.py`. What differs is how a model is judged: by its loss
along held-out documents, beside the best possible one where it is known, by the facts of a document
that it can recall (`data=facts`), and by the time and the memory that reading takes. One recipe,
data and schedule for full attention, sliding attention and every layer with fast weights
(`model.mixing.pattern`), so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from training.data.config import CorpusConfig, FactsConfig, MarkovConfig
from training.data.facts import FactsData
from training.data.language import LanguageData, documents_for_run
from training.data.markov import MarkovData, bayes_losses
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.evaluation.cost import prefill_cost
from training.evaluation.positions import Score, read_documents, reading_summary
from training.evaluation.recall import read_facts
from training.recipes.config import FastWeightsConfig, check_parts
from training.recipes.language_model import FRAMEWORK as FRAMEWORK
from training.recipes.language_model import DecoderTraining, estimate_decoder
from training.schema import TrainConfig

DOCUMENTS = (CorpusConfig, MarkovConfig, FactsConfig), "markov, facts, stdlib, files or hub"
OWN = "static"  # the arm: nothing is set apart as learned at test time, it is part of the layers
WINDOW_FLOOR = "window_floor"  # the best loss with what sliding attention in every block could see


class FastWeights(DecoderTraining):
    """Trains a decoder on documents."""

    def __init__(
        self,
        config: TrainConfig,
        data: LanguageData | MarkovData | FactsData,
        processes: Processes,
        device: torch.device,
    ) -> None:
        assert isinstance(config.recipe, FastWeightsConfig)
        self.recipe, self.data, self.reading = config.recipe, data, None
        super().__init__(config, data, processes, device)

    @torch.no_grad()
    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Nats of each next token of held-out documents; every process scores all of them."""
        found, size = [], self.recipe.eval_batch_size
        for first in range(0, len(tokens), size):
            batch = self.trainer.to_device({"tokens": tokens[first : first + size]})
            found.append(self.token_losses(batch).float().cpu().numpy())
        return np.concatenate(found)

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Loss along held-out documents, or facts recalled; of all lengths if `final`."""
        count = self.recipe.eval_documents if final else -(-self.recipe.eval_documents // 4)
        with self.trainer.averaged_weights(), self.trainer.autocast():
            if isinstance(self.data, FactsData):
                return self.recall(self.data, count, final)
            return self.read(self.data, count, final)

    def recall(self, data: FactsData, count: int, final: bool) -> dict[str, float]:
        """Facts recalled, by their number."""
        found, series = read_facts(data, count, sorted(data.config.facts), self.score)
        if final:
            self.reading = {"recall": found, "series": series}
        return {f"eval/recalled_{number}": entry["recalled"] for number, entry in found.items()}

    def read(self, data: LanguageData | MarkovData, count: int, final: bool) -> dict[str, float]:
        """Loss along documents; while training, at the first length alone."""
        lengths = list(self.recipe.eval_lengths) or [data.config.seq_len]
        lengths = lengths if final else lengths[:1]
        reading, series = read_documents(data, count, lengths, self.arms())
        if final:
            self.reading = {"reading": reading, "series": series}
        found = reading[str(lengths[0])][OWN]
        return {f"eval/{key}": found[key] for key in ("mean", "first_eighth", "last_eighth")}

    def arms(self) -> dict[str, Score]:
        """What the held-out documents are scored with."""
        window = self.model_config.window
        if window is None or not isinstance(self.data, MarkovData):
            return {OWN: self.score}
        reach = self.model_config.num_layers * (window - 1) + 1
        return {
            OWN: self.score,
            WINDOW_FLOOR: partial(bayes_losses, self.data.config, reach=reach),
        }

    def summary(self) -> dict[str, Any]:
        """Sizes, the loss along held-out documents by length, and the cost of reading."""
        timed = self.recipe.cost_lengths and not self.trainer.sharded
        cost = self.cost() if timed else None
        vocab = self.model_config.resolved_vocab_size
        return reading_summary(self.parameters, vocab, self.data, self.reading, cost)

    def cost(self) -> dict[str, Any]:
        """Seconds to read one sequence of each length, and bytes of what is kept of it."""

        def prepare(length: int) -> Callable[[], object]:
            tokens = torch.zeros(1, length, dtype=torch.long, device=self.trainer.device)

            @torch.no_grad()
            def call() -> None:
                with self.trainer.autocast():
                    self.model.hidden(tokens)
                if tokens.is_cuda:
                    torch.cuda.synchronize()

            return call

        return prefill_cost(prepare, self.model.state_bytes, self.recipe.cost_lengths)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("transformer",), *DOCUMENTS)
    assert isinstance(config.recipe, FastWeightsConfig)
    if isinstance(config.data, FactsConfig) and config.recipe.eval_lengths:
        raise UserError(
            f"recipe.eval_lengths={config.recipe.eval_lengths}: with data=facts a model is asked "
            "for the numbers of facts in data.facts; leave it empty"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> FastWeights:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    if isinstance(config.data, FactsConfig):
        rank, world = processes.rank, processes.world
        data = FactsData(config.data, seed=config.seed, rank=rank, world=world)
    else:
        data = documents_for_run(config, processes)
    return FastWeights(config, data, processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is read."""
    check(config)
    return estimate_decoder(config)
