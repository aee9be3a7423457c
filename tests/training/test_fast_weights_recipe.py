"""The recipe that decoders of any mixer share: what it trains on, and how it judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.config import compose
from training.data.facts import FactsData, answers
from training.distributed import Processes
from training.errors import UserError
from training.recipes.fast_weights import FastWeights, build
from training.run import run

SMALL = [
    "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.d_ff=16",
    "data.batch_size=4", "recipe.eval_documents=8", "recipe.eval_batch_size=4",
    "optim.warmup_steps=2", "loop.steps=3", "loop.log_every=1", "loop.eval_every=0",
    "report=false",
]  # fmt: skip
MARKOV = ["experiment=ttt_layers/markov", "data.seq_len=32", *SMALL]
FACTS = [
    "experiment=gated_delta/recall", "data.keys=8", "data.values=8", "data.facts=[2,4]",
    "data.seq_len=24", *SMALL,
]  # fmt: skip


def recipe(*words: str) -> FastWeights:
    return build(compose(list(words)), Processes(), torch.device("cpu"))


def test_documents_are_read_beside_the_floor_of_a_document_and_of_a_window(tmp_path: Path) -> None:
    words = ["recipe.eval_lengths=[32,64]", "recipe.cost_lengths=[16,32]", f"runs_dir={tmp_path}"]
    results = run(compose([*MARKOV, "model.window=4", *words]))
    for arms in results["reading"].values():
        assert set(arms) == {"static", "floor", "window_floor"}
        assert arms["floor"]["last_eighth"] < arms["window_floor"]["last_eighth"]
        assert arms["static"]["last_eighth"] > arms["floor"]["last_eighth"]
    assert results["cost"]["bytes"] and "64/window_floor" in results["series"]


def test_a_window_as_long_as_the_document_has_the_floor_of_the_document(tmp_path: Path) -> None:
    words = ["recipe.eval_lengths=[]", "model.window=32", "model.num_layers=1"]
    results = run(compose([*MARKOV, *words, f"runs_dir={tmp_path}"]))
    arms = results["reading"]["32"]
    assert arms["window_floor"]["eighths"] == arms["floor"]["eighths"]


def test_facts_are_asked_for_by_their_number(tmp_path: Path) -> None:
    results = run(compose([*FACTS, f"runs_dir={tmp_path}"]))
    assert set(results["recall"]) == {"2", "4"}
    for entry in results["recall"].values():  # three steps teach nothing
        assert entry["recalled"] < 0.5 and entry["nats"] > 1
    assert results["series"]["recall/facts"] == [2.0, 4.0]
    assert "eval/recalled_4" in results["metrics"]


def test_training_counts_answers_and_the_rest_with_its_weight() -> None:
    for weight in (0.0, 0.25):
        it = recipe(*FACTS, f"data.context_weight={weight}", "data.facts=[4]")
        assert isinstance(it.data, FactsData)
        batch = {key: torch.from_numpy(x) for key, x in it.data.batch(0).items()}
        tokens = batch["tokens"].long()
        logits = it.model(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        share = torch.from_numpy(np.where(answers(it.data.config, 4), 1.0, weight)).float()
        expected = (nats * share).sum() / (len(nats) * share.sum())
        torch.testing.assert_close(it.loss(batch), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*FACTS, "recipe.eval_lengths=[24]"], r"recipe\.eval_lengths=\[24\]: with data=facts"),
        ([*FACTS, "recipe=ttt_e2e"], "trains model=ttt_e2e, not model=transformer"),
        ([*MARKOV, "model.window=null", "model.mixing.pattern=[sliding]"], "set model.window"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        run(compose([*words, f"runs_dir={tmp_path}"]))
