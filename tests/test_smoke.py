"""Every experiment at cpu scale: build, two steps, checkpoint, resume, evaluate; in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import (
    SMALL_AGENT,
    SMALL_BATCH,
    SMALL_COLOURED_ROOMS,
    SMALL_FILM,
    SMALL_FILMS,
    SMALL_FORCED,
    SMALL_FROZEN,
    SMALL_GLIMPSES,
    SMALL_IMAGES,
    SMALL_MOVING,
    SMALL_PINFALL,
    SMALL_PUSH_T,
    SMALL_PUSHES,
    SMALL_ROOM_CLIPS,
    SMALL_ROOMS,
    SMALL_TABLES,
    SMALL_TABLETOP,
    SMALL_TRACKED,
    SMALL_WORLD,
    model_keys,
    tiny_study,
    tiny_teacher,
    write_corpus,
)
from tests.push_files import write_table
from tests.scene_files import write_colmap, write_dnerf
from training.config import compose, experiments
from training.data.config import CorpusConfig, FactsConfig
from training.errors import RunStopped, UserError
from training.logging import read_rows
from training.run import run
from training.run_directory import run_path

# What makes any experiment small; keys that an experiment's groups lack are left out.
SMOKE = {
    "model.d_model": "32",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "model.ngram_buckets": "64",
    "model.prime_layers": "1",
    "model.chunk": "16",
    "data.seq_len": "32",
    "data.eval_stride": "32",
    "data.facts": "[2,4]",
    "data.batch_size": "4",
    "data.heldout_fraction": "0.3",
    "recipe.floors": "false",
    "recipe.eval_documents": "8",
    "recipe.eval_lengths": "[32]",
    "optim.warmup_steps": "1",
}


def cartridge_overrides(name: str, tmp_path: Path) -> list[str]:
    """A model to read with, and what a cartridge of it needs."""
    sizes = ["model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.d_ff=48"]
    small = [
        f"experiment={name}", *sizes, f"runs_dir={tmp_path / 'runs'}", "loop.steps=4",
        "loop.log_every=1", "loop.checkpoint_every=2", "report=false", "optim.warmup_steps=1",
        "data.batch_size=4",
    ]  # fmt: skip
    if name in ("cartridges/teacher", "memory_budget/reader"):
        return [
            *small, "data.statements=[2,4]", "data.from_step=[0,1]", "data.seq_len=64",
            "recipe.eval_documents=4",
        ]  # fmt: skip
    if name in ("cartridges/corpus", "cartridges/longhealth"):
        checkpoint, study = tiny_study(tmp_path)
        return [
            *(part for part in small if not part.startswith("model.")),
            *model_keys(checkpoint), f"recipe.weights={checkpoint}", f"data.path={study}",
            "recipe.tokens=64", "data.heldout=2", "data.seq_len=48", "optim.warmup_steps=0",
        ]  # fmt: skip
    weights = tiny_teacher(tmp_path / "teacher")
    budget = [
        "recipe.study_steps=2",
        "recipe.ratios=[2,4]",
        "recipe.memories=[full,kvzip,cartridge]",
        "recipe.fast_weights=[]",
    ]
    return [
        *small, f"recipe.weights={weights}", "data.statements=[6]", "data.documents=2",
        "data.seq_len=24",
        *(budget if name.startswith("memory_budget") else ["recipe.tokens=8"]),
    ]  # fmt: skip


def smoke_overrides(name: str, tmp_path: Path) -> list[str]:
    if name.startswith(("cartridges/", "memory_budget/")):
        return cartridge_overrides(name, tmp_path)
    if name == "jepa_planning/two_rooms":
        return [
            *SMALL_ROOMS, f"runs_dir={tmp_path / 'runs'}", "loop.steps=4", "loop.log_every=1",
            "loop.checkpoint_every=2",
        ]  # fmt: skip
    paper, _, variant = name.partition("/")
    small = []
    if name == "gaussian_splatting/tabletop":
        small = [*SMALL_TABLETOP, "recipe.agreement=true"]
    elif name == "dynamic_gaussians/tabletop":
        small = SMALL_MOVING
    elif name == "dynamic_gaussians/tracking":
        small = [*SMALL_TRACKED, "data.first_steps=1", "data.steps_per_time=1"]
    elif name == "mro_gwm/table":
        small = [f"experiment={name}", *(w for w in SMALL_TABLETOP[1:] if "things" not in w)]
    elif name == "mro_gwm/push_world":
        small = [*SMALL_PUSHES, f"recipe.scene={write_table(tmp_path / 'table')}"]
    elif name == "dynamic_gaussians/dnerf":
        given = write_dnerf(tmp_path / "scene")
        few = ["model.capacity=200", "model.begin_count=100", "data.downscale=1", "report=false"]
        small = [f"experiment={name}", f"data.path={given}", *few]
    elif name == "gaussian_splatting/photos":
        given = write_colmap(tmp_path / "scene")
        few = ["model.capacity=200", "recipe.refine_every=2", "report=false"]
        small = [f"experiment={name}", f"data.path={given}", *few]
    elif paper in SMALL_GLIMPSES:
        small = [*SMALL_GLIMPSES[paper], *SMALL_TABLES]
    elif name == "diamond/agent":
        small = SMALL_AGENT
    elif paper == "self_forcing":
        of = [*SMALL_PINFALL["diffusion_forcing"], *SMALL_WORLD, f"runs_dir={tmp_path / 'of'}"]
        config = compose([*of, "loop.steps=1", "run=teacher"])
        run(config)
        small = [*SMALL_FORCED, f"recipe.teacher={run_path(config)}"]
    elif paper in SMALL_IMAGES:
        small = [*SMALL_IMAGES[paper], *SMALL_BATCH]
    elif paper == "jepa_video":
        small = [*SMALL_FILMS[variant], *SMALL_FILM]
    elif paper == "lewm":
        small = SMALL_PUSH_T if variant == "push_t" else SMALL_COLOURED_ROOMS
    elif name == "diamond/breakout":
        few = ("experiment", "data.worlds", "data.length", "recipe.splits")
        small = [o for o in (*SMALL_PINFALL["diamond"], *SMALL_WORLD) if not o.startswith(few)]
        small = [f"experiment={name}", *small, "data.frames=300"]
    elif paper in SMALL_PINFALL:
        small = [*SMALL_PINFALL[paper], *SMALL_WORLD]
    elif name == "vjepa2_ac/planning":
        small = SMALL_FROZEN
    elif name == "vjepa2_ac/encoder":
        small = SMALL_ROOM_CLIPS
    if small:
        return [
            *small, f"runs_dir={tmp_path / 'runs'}", "loop.steps=4", "loop.log_every=1",
            "loop.checkpoint_every=2",
        ]  # fmt: skip
    config = compose([f"experiment={name}"])
    corpus = ["data=files", write_corpus(tmp_path / "text")]
    if not isinstance(config.data, CorpusConfig) or getattr(config.data, "by_package", False):
        corpus = []  # it makes its documents, or cannot do without its own
    lengths = {"recipe.eval_lengths"} if isinstance(config.data, FactsConfig) else set()
    known = [key for key in SMOKE if hasattr(getattr(config, key.split(".")[0]), key.split(".")[1])]
    return [
        f"experiment={name}",
        *corpus,
        f"runs_dir={tmp_path / 'runs'}",
        *(f"{key}={SMOKE[key]}" for key in known if key not in lengths),
        "loop.steps=4",
        "loop.log_every=1",
        "loop.checkpoint_every=2",
        "report=false",
    ]


@pytest.mark.parametrize("name", experiments())
def test_experiment_trains_stops_resumes_and_evaluates(name: str, tmp_path: Path) -> None:
    overrides = smoke_overrides(name, tmp_path)
    stopped = run(compose([*overrides, "loop.max_units=1", "run=first"]))
    assert stopped["stopped_by"] == "budget" and stopped["steps"] == 1
    on = run(compose([*overrides, "run=first"]))
    assert on["stopped_by"] == "steps", "without the budget the same run goes on"

    config = compose([*overrides, "run=second"])
    results = run(config)
    directory = run_path(config)
    assert results["steps"] == 4
    assert json.loads((directory / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = read_rows(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert run(config) == json.loads(json.dumps(results)), "a finished run returns its results"

    (directory / "results.json").unlink()  # as if killed between the last save and the results
    again = run(config)
    assert again["metrics"] == results["metrics"]
    assert read_rows(directory / "metrics.jsonl") == rows


def test_changed_configuration_is_refused_by_name(tmp_path: Path) -> None:
    overrides = [*smoke_overrides("quickstart/stdlib", tmp_path), "run=x"]
    run(compose(overrides))
    with pytest.raises(Exception, match=r"optim\.lr: .* -> 0\.5") as caught:
        run(compose([*overrides, "optim.lr=0.5"]))
    assert "run=<another name>" in str(caught.value)


def test_changed_corpus_is_refused_on_resume(tmp_path: Path) -> None:
    overrides = [*smoke_overrides("quickstart/stdlib", tmp_path), "run=x"]
    config = compose(overrides)
    run(config)
    (run_path(config) / "results.json").unlink()
    (tmp_path / "text" / "doc00.txt").write_text("something else " * 100)
    with pytest.raises(Exception, match="data changed since this run began"):
        run(config)


def test_floors_that_cannot_be_counted_are_refused_before_training(tmp_path: Path) -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    overrides = smoke_overrides("quickstart/stdlib", tmp_path)
    overrides += ["recipe.floors=true", f"data.tokenizer={tmp_path}/tokenizer.json", "run=x"]
    config = compose(overrides)
    with pytest.raises(UserError, match=r"recipe\.floors=true needs a corpus of bytes"):
        run(config)
    assert not (run_path(config) / "metrics.jsonl").exists()


def test_diverging_run_stops_and_names_the_batch(tmp_path: Path) -> None:
    wild = ["optim=adamw", "optim.lr=1e30", "optim.clip_norm=null", "run=wild"]
    with pytest.raises(RunStopped, match=r"(loss|grad_norm)=(nan|inf).* batch window \d+ \(.*doc"):
        run(compose([*smoke_overrides("quickstart/stdlib", tmp_path), *wild]))
