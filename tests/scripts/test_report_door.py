"""`afferent report` finds what is meant, or says what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.report import main

CLAIMS = """
title: A fake paper
paper: null
about: what it is about
runs: {main: {experiment: quickstart/stdlib, seeds: 1}}
claims:
  - {id: low, statement: it is low, run: main, metric: eval/bpb, direction: below,
     threshold: {cpu: 2.5}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/ with two experiments, experiments/ with one paper."""
    for name in ("quickstart/stdlib/a", "quickstart/stdlib/b", "ppo/cartpole/only"):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        (directory / "status.json").write_text('{"status": "running", "step": 3}')
    (tmp_path / "experiments" / "fake").mkdir(parents=True)
    (tmp_path / "experiments" / "fake" / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setenv("AFFERENT_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, last line of stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["afferent report", *words])
    code = 0
    try:
        main(place / "experiments")
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, (out.splitlines() or [""])[-1], err


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("quickstart/stdlib/a", "runs/quickstart/stdlib/a/report.html"),
        ("runs/quickstart/stdlib/b/", "runs/quickstart/stdlib/b/report.html"),
        ("ppo/cartpole", "runs/ppo/cartpole/only/report.html"),
        ("fake", "runs/reports/fake.html"),
        ("experiments/fake", "runs/reports/fake.html"),
    ],
)
def test_the_last_line_is_the_page(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    page: str,
) -> None:
    code, last, _ = report(place, monkeypatch, capsys, name)
    assert code == 0
    assert Path(last).resolve() == (place / page).resolve()
    assert Path(last).read_text().startswith("<!doctype html>")


def test_a_sweep(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = place / "runs" / "sweeps" / "one"
    sweep.mkdir(parents=True)
    note = {"overrides": ["seed=0"], "path": str(place / "runs/quickstart/stdlib/a")}
    (sweep / "run_0000.json").write_text(json.dumps(note))
    code, last, _ = report(place, monkeypatch, capsys, "sweeps/one")
    assert (code, last) == (0, str(sweep / "summary.md"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fakee"], "Did you mean fake?"),
        (["quickstart/stdlib/c"], "Did you mean quickstart/stdlib/"),
        (["quickstrt"], "Did you mean quickstart"),
        (["quickstart/stdlib"], "has 2 runs, name one: quickstart/stdlib/"),
        ([], "Papers: fake"),
        (["a", "b"], "name one run"),
        (["runs/quickstart/stdlib/c"], "no run or paper"),
    ],
)
def test_what_is_unknown_is_one_sentence(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    code, last, err = report(place, monkeypatch, capsys, *words)
    assert (code, last) == (2, "")
    assert said in err and err.startswith("afferent: ") and err.count("\n") == 1


def test_help(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, last, _ = report(place, monkeypatch, capsys, "--help")
    assert code == 0 and "<paper>" in last
