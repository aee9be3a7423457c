"""What the READMEs say is true: commands compose, links exist, tables are those of the results."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.words import parse
from tests.helpers import ROOT
from training.config import compose
from training.evaluation.claims_file import load_claims, papers
from training.evaluation.tables import stale_results, stale_tables

READMES = sorted(
    file
    for file in [
        ROOT / "README.md",
        *ROOT.glob("experiments/*/README.md"),
        *ROOT.glob("scripts/**/README.md"),
    ]
)


def commands(file: Path) -> list[list[str]]:
    """Words of every command in a bash block, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", file.read_text(), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_train(words: list[str]) -> None:
    overrides = [word for word in words if not word.startswith("-")]
    if overrides:
        compose(overrides)


def check_reproduce(words: list[str]) -> None:
    for word in words:
        if word.startswith("paper="):
            load_claims(word.removeprefix("paper="))


def check_bench(words: list[str]) -> None:
    from scripts.bench import parse

    parse(words)


def check_module(words: list[str]) -> None:
    """`python -m kernels.audit ...`: the module exists, and takes these words."""
    name, *given = words
    run = importlib.import_module(f"{name}.run")
    run.parse(given)


def check_door(name: str) -> Callable[[list[str]], None]:
    """`afferent <name> key=value ...`: the door takes these words."""

    def check(words: list[str]) -> None:
        door = importlib.import_module(f"scripts.{name}")
        parse(words, door.Asked, name)

    return check


def check_nothing(words: list[str]) -> None:
    """Words that other tests check."""


AFFERENT = {
    "train": check_train,
    "reproduce": check_reproduce,
    "report": check_nothing,
    "bench": check_bench,
    "synthesise": check_door("synthesise"),
    "answer": check_door("answer"),
    "serve": check_door("serve"),
    "play": check_door("play"),
    "--help": check_nothing,
}


@pytest.mark.parametrize("file", READMES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_command_is_one_that_exists(file: Path) -> None:
    for words in commands(file):
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[0] == "afferent":
            AFFERENT[words[1]](words[2:])
        elif words[:2] == ["python", "-m"]:
            check_module(words[2:])
        else:
            assert words[0] == "source", f"{file}: nothing checks `{' '.join(words)}`"


@pytest.mark.parametrize("file", READMES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_run_that_a_command_needs_is_made_by_one_before_it(file: Path) -> None:
    made: set[str] = set()
    for words in commands(file):
        for needed in re.findall(r"\bruns/\w+/\w+/\w+", " ".join(words)):
            assert needed in made, f"{file}: `{' '.join(words)}`"
        given = dict(word.split("=", 1) for word in words if "=" in word)
        made.add(f"runs/{given.get('experiment')}/{given.get('run')}")


@pytest.mark.parametrize("file", READMES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_python_line_runs(file: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.S):
        subprocess.run([sys.executable, "-c", block], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("file", READMES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
        if "://" not in target:
            assert (file.parent / target).exists(), f"{file}: {target}"


def test_tables_are_those_of_the_results() -> None:
    assert stale_tables() == [], "afferent reproduce --tables"
    assert stale_results() == [], (
        "a claim changed after it was judged: afferent reproduce paper=..."
    )


def test_results_are_small_and_say_where_they_come_from() -> None:
    for paper in papers():
        folder = ROOT / "experiments" / paper
        assert (folder / "README.md").exists()
        for file in (folder / "results").glob("*.json"):
            results = json.loads(file.read_text())
            assert file.stat().st_size < 200_000
            for key in ("commit", "date", "hardware", "versions", "wall_s", "claims"):
                assert results[key], f"{file}: {key}"
        for figure in (folder / "figures").glob("*"):
            assert figure.stat().st_size < 300_000


def test_paper_scale_of_the_quickstart_has_gpt2_smalls_size() -> None:
    """GPT-2 small has 124M parameters (Radford et al., 2019, as nanoGPT counts them)."""
    from models.language.config import TransformerConfig
    from training.recipes.language_model import estimate

    config = compose(["experiment=quickstart/stdlib", "scale=paper"])
    assert isinstance(config.model, TransformerConfig)
    assert estimate(config).parameters == pytest.approx(124e6, rel=0.01)
