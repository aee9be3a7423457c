"""Next-token prediction on documents, for decoders of any mixer: `recipe=fast_weights`.

The objective is that of `language_model.py`. What differs is how a model is judged: by its loss
along held-out documents, beside the best possible one where it is known, and by the time and the
memory that reading takes. One recipe, data and schedule for full attention, sliding attention and
every layer with fast weights (`model.mixing.pattern`), so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from training.data.config import CorpusConfig, MarkovConfig
from training.data.language import LanguageData, documents_for_run
from training.data.markov import MarkovData, bayes_losses
from training.distributed import Processes
from training.estimate import Estimate
from training.evaluation.cost import prefill_cost
from training.evaluation.positions import Score, read_documents, reading_summary
from training.recipes.config import FastWeightsConfig, check_parts
from training.recipes.language_model import FRAMEWORK as FRAMEWORK
from training.recipes.language_model import DecoderTraining, estimate_decoder
from training.schema import TrainConfig

DOCUMENTS = (CorpusConfig, MarkovConfig), "markov, stdlib, files or hub"
OWN = "static"  # the arm: nothing is set apart as learned at test time, it is part of the layers
WINDOW_FLOOR = "window_floor"  # the best loss with what sliding attention in every block could see


class FastWeights(DecoderTraining):
    """Trains a decoder on documents."""

    def __init__(
        self,
        config: TrainConfig,
        data: LanguageData | MarkovData,
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
        """Loss along held-out documents; at all lengths if `final`."""
        lengths = list(self.recipe.eval_lengths) or [self.data.config.seq_len]
        count = self.recipe.eval_documents if final else -(-self.recipe.eval_documents // 4)
        lengths = lengths if final else lengths[:1]
        with self.trainer.averaged_weights(), self.trainer.autocast():
            reading, series = read_documents(self.data, count, lengths, self.arms())
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


def build(config: TrainConfig, processes: Processes, device: torch.device) -> FastWeights:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check_parts(config, FastWeightsConfig, ("transformer",), *DOCUMENTS)
    return FastWeights(config, documents_for_run(config, processes), processes, device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device. No data is read."""
    check_parts(config, FastWeightsConfig, ("transformer",), *DOCUMENTS)
    return estimate_decoder(config)
