"""The architecture, asserted: arrows, lazy imports, stems, sizes, words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, environment

PACKAGES = ("models", "training", "kernels", "scripts")
HEAVY = ("jax", "flax", "wandb", "datasets", "matplotlib", "triton", "tensorboard", "transformers")


def sources(*below: str) -> list[Path]:
    return [file for name in below or PACKAGES for file in sorted((ROOT / name).rglob("*.py"))]


def test_imports_point_one_way() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        env={**environment(ROOT / "runs"), "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module", ["scripts.train", "scripts.cli", "training.run", "training.loop"]
)
def test_the_entry_point_loads_no_other_frameworks(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {*HEAVY, "torch"} & set(done.stdout.split())


def test_a_torch_run_loads_no_jax_and_a_jax_run_no_torch(tmp_path: Path) -> None:
    for recipe, other in (("language_model", "jax"), ("language_model_jax", "torch")):
        code = f"import sys, training.recipes.{recipe}; print('{other}' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "False", f"{recipe} loads {other}"


def test_every_paper_has_one_stem_everywhere() -> None:
    for claims in (ROOT / "experiments").glob("*/claims.yaml"):
        stem = claims.parent.name
        assert (ROOT / "configs" / "experiment" / stem).is_dir(), stem
        if yaml.safe_load(claims.read_text())["paper"] is None:
            continue  # a baseline of our own: shared recipe and model
        assert list((ROOT / "models").rglob(f"{stem}*.py")), stem
        recipes = {file.stem for file in (ROOT / "training" / "recipes").glob("*.py")}
        if not any(recipe.startswith(stem) for recipe in recipes):
            # The paper is about an architecture, which trains by the recipe of its rivals.
            for file in (ROOT / "configs" / "experiment" / stem).glob("*.yaml"):
                named = re.search(r"override /recipe: (\w+)", file.read_text())
                assert named and named[1] in recipes - {"config"}, file


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(f.relative_to(ROOT)): n for f in sources() if (n := lines(f)) > 500}
    assert not long, f"over 500 lines: {long}"
    assert lines(ROOT / "training" / "loop.py") <= 250


def test_the_core_stays_small() -> None:
    core = [
        "run",
        "loop",
        "schema",
        "checkpoint",
        "seeding",
        "data/order",
        "logging",
        "distributed",
    ]
    around = ["run_directory", "meter"]
    assert sum(lines(ROOT / "training" / f"{name}.py") for name in core) <= 1500
    assert sum(lines(ROOT / "training" / f"{name}.py") for name in core + around) <= 1750


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_one_concept_has_one_word() -> None:
    banned = r"\b(n_layers?|nlayers|n_heads?|n_embd|hidden_dim|learning_rate)\b"
    theirs = {"huggingface.py", "jax_step.py"}  # names of files and libraries that are not ours
    for file in sources("models", "training", "kernels"):
        if file.name not in theirs:
            names = {
                node.id
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Name)
            }
            assert not [name for name in names if re.fullmatch(banned, name)], file


def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = re.compile(r"pickle\.loads?\(|weights_only=False|(?<![\w.])eval\(|(?<![\w.])exec\(")
    for file in sources():
        assert not forbidden.search(file.read_text()), file


def test_every_module_says_what_it_is() -> None:
    for file in sources():
        assert ast.get_docstring(ast.parse(file.read_text())), file
