"""The torch recipe: what precision, checkpointing and compilation may and may not change."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import TINY, write_corpus
from training.config import compose
from training.distributed import Processes
from training.errors import UserError
from training.recipes import language_model


def build(tmp_path: Path, *more: str) -> language_model.LanguageModel:
    config = compose([*TINY, write_corpus(tmp_path / "text"), *more])
    return language_model.build(config, Processes(), torch.device("cpu"))


def losses(recipe: language_model.LanguageModel, steps: int = 4) -> list[float]:
    return [float(recipe.step(recipe.data.batch(i))["train/loss"]) for i in range(steps)]


def test_it_learns_what_it_sees(tmp_path: Path) -> None:
    recipe = build(tmp_path, "optim.lr=1e-2")
    batch = recipe.data.batch(0)
    first = float(recipe.step(batch)["train/loss"])
    for _ in range(60):
        last = float(recipe.step(batch)["train/loss"])
    assert last < 0.3 * first


def test_activation_checkpointing_changes_no_number(tmp_path: Path) -> None:
    plain = losses(build(tmp_path))
    assert plain == losses(build(tmp_path, "recipe.activation_checkpointing=true"))


def test_bfloat16_stays_close_and_keeps_fp32_weights(tmp_path: Path) -> None:
    recipe = build(tmp_path, "scale.precision=bf16")
    np.testing.assert_allclose(losses(recipe), losses(build(tmp_path)), rtol=2e-2)
    assert {p.dtype for p in recipe.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compilation_changes_no_number_beyond_rounding(tmp_path: Path) -> None:
    import shutil

    if not torch.cuda.is_available() and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    compiled = losses(build(tmp_path, "scale.compile=true"))
    np.testing.assert_allclose(compiled, losses(build(tmp_path)), rtol=1e-3)


def test_evaluation_scores_every_held_out_byte_once(tmp_path: Path) -> None:
    """Against the obvious way: one window after the other, one number at the end."""
    recipe = build(tmp_path)
    tokens = torch.from_numpy(recipe.data.heldout.tokens.astype(np.int64))
    size, nats = recipe.data.config.seq_len, 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, size):
            window = tokens[start : start + size + 1]
            logits = recipe.model(window[None, :-1])[0]
            each = F.cross_entropy(logits, window[1:], reduction="none")
            nats += each[window[1:] != recipe.data.separator].double().sum().item()
    found = recipe.evaluate(final=True)
    assert found["eval/bpb"] == pytest.approx(
        nats / math.log(2) / recipe.data.heldout_bytes, rel=1e-5
    )


def test_averaged_weights_are_the_ones_evaluated_and_exported(tmp_path: Path) -> None:
    recipe = build(tmp_path, "optim.ema_decay=0.9", "optim.lr=1e-2")
    losses(recipe)
    exported = recipe.trainer.full_weights()
    live = {name: p.detach().clone() for name, p in recipe.model.named_parameters()}
    assert any(not torch.equal(exported[name], live[name]) for name in live)
    recipe.export(tmp_path)
    assert all(torch.equal(p, live[name]) for name, p in recipe.model.named_parameters())


def test_a_vocabulary_too_small_for_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size=100 is smaller than the data's 257"):
        build(tmp_path, "model.vocab_size=100")


def test_the_memory_estimate_is_that_of_real_tensors(tmp_path: Path) -> None:
    overrides = ["optim=adamw", "model.d_model=64", "data.batch_size=16", "data.seq_len=64"]
    recipe = build(tmp_path, *overrides)
    estimate = language_model.estimate(recipe.config)
    assert estimate.parameters == recipe.parameters
    assert estimate.flops_per_step == recipe.flops_per_step
    state = recipe.trainer.optimiser_state()
    held = sum(v.numel() * 4 for values in state.values() for v in values.values() if v.ndim)
    assert estimate.memory["optimiser"] == held
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        recipe.loss(recipe.trainer.to_device(recipe.data.batch(0)))
    own = {p.untyped_storage().data_ptr() for p in recipe.model.parameters()}
    real = sum(size for pointer, size in kept.items() if pointer not in own)
    assert estimate.memory["activations"] == pytest.approx(real, rel=0.15)
