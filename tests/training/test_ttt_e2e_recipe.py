"""The recipe of TTT-E2E: what it trains, how it is judged, that it resumes, that it notices."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import train
from training.config import compose
from training.errors import RunStopped, UserError
from training.recipes.ttt_e2e import TTTE2ERecipe
from training.run import run

SMALL = [
    "experiment=ttt_e2e/markov",
    "model.d_model=16",
    "model.num_layers=2",
    "model.window=8",
    "model.chunk=8",
    "data.seq_len=32",
    "data.batch_size=4",
    "recipe.eval_documents=8",
    "recipe.eval_batch_size=4",
    "recipe.eval_lengths=[32,64]",
    "recipe.inner_warmup_steps=2",
    "optim.warmup_steps=2",
    "loop.steps=6",
    "loop.log_every=1",
    "loop.eval_every=0",
    "report=false",
]


def small(tmp_path: Path, *more: str):
    return run(compose([*SMALL, f"runs_dir={tmp_path}", *more]))


def test_every_way_of_reading_is_judged_on_the_same_documents(tmp_path: Path) -> None:
    results = small(
        tmp_path, "recipe.eval_inner_lrs=[0.1,1]", "recipe.eval_reread=true",
        "recipe.cost_lengths=[32,64]",
    )  # fmt: skip
    for length in ("32", "64"):
        arms = results["reading"][length]
        assert set(arms) == {
            "learning", "static", "lr_0.1", "lr_1", "naive", "reread", "floor",
        }  # fmt: skip
        assert arms["lr_1"]["eighths"] == arms["learning"]["eighths"]  # the model's own rate
        best = min(arms["lr_0.1"]["last_eighth"], arms["lr_1"]["last_eighth"])
        assert arms["naive"]["last_eighth"] == best
        assert arms["learning"]["eighths"] != arms["static"]["eighths"]
        assert arms["floor"]["mean"] < arms["learning"]["mean"] < results["uniform"] + 0.5
        first_chunk = 32 // 8 if length == "32" else 1  # eighths before anything was learned
        for part in range(min(first_chunk, 2)):
            assert arms["learning"]["eighths"][part] == pytest.approx(
                arms["static"]["eighths"][part], abs=1e-5
            )
        assert len(results["series"][f"{length}/naive"]) == 32
    assert (
        results["metrics"]["eval/last_eighth"]
        == results["reading"]["32"]["learning"]["last_eighth"]
    )
    assert results["cost"]["growth"] == 1.0 and len(results["series"]["cost/seconds"]) == 2


def test_without_inner_steps_the_same_network_is_trained(tmp_path: Path) -> None:
    window = small(tmp_path / "w", "recipe.order=none")
    full = small(tmp_path / "f", "recipe.order=none", "model.window=null")
    assert set(window["reading"]["32"]) == {"static", "floor"} == set(full["reading"]["32"])
    learning = small(tmp_path / "l", "loop.steps=1")
    assert window["parameters"] == full["parameters"] == learning["parameters"]


def test_the_inner_rate_warms_up(tmp_path: Path) -> None:
    config = compose([*SMALL, f"runs_dir={tmp_path}", "recipe.inner_warmup_steps=4", "run=warm"])
    run(config)
    rows = (tmp_path / "ttt_e2e/markov/warm/metrics.jsonl").read_text().splitlines()
    rates = [row["inner/lr"] for row in map(json.loads, rows) if "inner/lr" in row]
    np.testing.assert_allclose(rates, [0.1, 0.325, 0.55, 0.775, 1.0, 1.0], rtol=1e-6)


def test_a_rate_that_diverges_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"=nan at step .* Lower model\.inner_lr or optim\.lr"):
        small(tmp_path, "model.inner_lr=1e6", "model.inner_clip=null", "optim.lr=1e-6")
    recipe: Any = SimpleNamespace(
        recipe=SimpleNamespace(order="second"),
        model_config=SimpleNamespace(resolved_vocab_size=16, inner_lr=5.0),
    )
    TTTE2ERecipe.check_diverged(recipe, 2.9)
    for mean in (9.3, float("nan")):
        with pytest.raises(RunStopped, match=r"inner loop diverges: with model\.inner_lr=5"):
            TTTE2ERecipe.check_diverged(recipe, mean)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.seq_len=250"], "data.seq_len: 250 tokens are no whole number of chunks"),
        (["recipe.eval_lengths=[12]"], "recipe.eval_lengths: 12 tokens are no whole number"),
        (["model.fast=blocks.*.memory.*"], "matches no weight; there are blocks.0.attention"),
        (["model.fast=blocks.1.attention.*"], "set model.fast_attention=true"),
        (["model.window=null"], "set recipe.order=none"),
        (["data.successors=40"], "data.successors=40 is out of range"),
        (["recipe.cost_lengths=[64,32]"], "must be two or more, in rising order"),
        (["recipe.eval_inner_lrs=[0]"], "each must be above 0"),
    ],
)
def test_bad_input_is_one_sentence(overrides: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        small(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("ttt_e2e", "transformer", "markov"), "trains model=ttt_e2e, not model=transformer"),
        (("language_model", "ttt_e2e", "stdlib"), "trains model=transformer, not model=ttt_e2e"),
        (("language_model_jax", "ttt_e2e", "stdlib"), "trains model=transformer, not model="),
        (("language_model", "transformer", "markov"), "takes data=stdlib, files or hub, not data="),
        (("fast_weights", "ttt_e2e", "markov"), "trains model=transformer, not model=ttt_e2e"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    parts: tuple[str, str, str], said: str, tmp_path: Path
) -> None:
    chosen = [
        f"{key}={value}" for key, value in zip(("recipe", "model", "data"), parts, strict=True)
    ]
    with pytest.raises(UserError, match=said):
        run(compose([*chosen, f"runs_dir={tmp_path}", "run=x"]))


def test_a_run_may_start_from_the_weights_of_another(tmp_path: Path) -> None:
    small(tmp_path, "run=first")
    file = tmp_path / "ttt_e2e/markov/first/model.safetensors"
    still = ["loop.steps=1", "optim.lr=1e-12", f"recipe.start_from={file}"]
    small(tmp_path, "run=second", *still)
    before, after = load_file(file), load_file(file.parent.parent / "second" / file.name)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=1e-7)
    with pytest.raises(UserError, match=r"recipe\.start_from=.*weight has shape"):
        small(tmp_path, "run=third", "model.d_model=32", *still)
    with pytest.raises(UserError, match=r"recipe\.start_from=nowhere"):
        small(tmp_path, "run=fourth", "recipe.start_from=nowhere")


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Also over four devices, with accumulation and rematerialisation, in bf16."""
    more = [
        "data.batch_size=16", "optim.accumulate=2", "recipe.remat_group=2", "scale.precision=bf16",
        "optim.ema_decay=0.9", "loop.checkpoint_every=2", "run=it",
    ]  # fmt: skip
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    whole = train(tmp_path / "whole", *SMALL, *more, **devices)
    assert whole.returncode == 0, whole.stderr[-3000:]
    first = train(tmp_path / "parts", *SMALL, *more, "loop.max_units=1000", **devices)
    assert first.returncode == 0, first.stderr[-3000:]
    rest = train(tmp_path / "parts", *SMALL, *more, **devices)
    assert rest.returncode == 0, rest.stderr[-3000:]
    weights = [
        next((tmp_path / part).rglob("model.safetensors")).read_bytes()
        for part in ("whole", "parts")
    ]
    assert weights[0] == weights[1]


def test_a_dry_run_tells_sizes_and_cost(tmp_path: Path) -> None:
    done = train(tmp_path, *SMALL, "dry_run=true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters" in done.stdout and not list(tmp_path.rglob("metrics.jsonl"))
