"""Sinks: files by default; wandb and tensorboard by configuration, offline, in the run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.helpers import TINY, only_run, train, write_corpus
from training.errors import UserError
from training.logging import JsonlFile, Progress, WandbSink, clock, human, read_rows
from training.schema import LoggerConfig, WandbMode


def test_rewind_drops_later_rows_and_a_row_cut_short(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "rows.jsonl")
    for step in (1, 2, 3):
        file.write({"step": step})
    file.close()
    with open(file.path, "a") as raw:
        raw.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(file.path)] == [1, 2, 3]
    file.rewind(step=3, rows=2)
    assert file.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_progress_is_plain_lines_when_piped() -> None:
    stream = io.StringIO()
    progress = Progress(stream, every_s=0.0)
    progress.show("one")
    progress.show("two", final=True)
    assert stream.getvalue() == "one\ntwo\n"


def test_numbers_and_times_read_well() -> None:
    assert [human(n) for n in (0.5, 999, 1234, 2.5e6, 3e9)] == ["0.5", "999", "1.23k", "2.5M", "3G"]
    assert [clock(s) for s in (0, 61, 3725)] == ["0:00", "1:01", "1:02:05"]


def test_wandb_online_without_a_key_asks_nobody(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        WandbSink(LoggerConfig(wandb=WandbMode.online), tmp_path, "name", "id")


@pytest.mark.slow
def test_wandb_and_tensorboard_write_below_the_run_directory_only(tmp_path: Path) -> None:
    """Also without a network, an account or a terminal; a resume keeps the same identifier."""
    home = tmp_path / "home"
    home.mkdir()
    overrides = [*TINY, write_corpus(tmp_path / "text"), "run=x", "logger=wandb"]
    overrides += ["logger.tensorboard=true", "loop.steps=4"]
    for steps in ("loop.max_units=1", "loop.max_units=null"):
        done = train(
            tmp_path / "runs",
            *overrides,
            steps,
            cwd=tmp_path,
            HOME=str(home),
            HTTPS_PROXY="http://127.0.0.1:9",  # nothing listens there
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (only_run(tmp_path / "runs") / "results.json").unlink()
    run = only_run(tmp_path / "runs")
    names = {path.name.split("-")[-1] for path in (run / "wandb").glob("offline-run-*")}
    assert len(names) == 1, "both parts of the run carry one identifier"
    assert list((run / "tensorboard").glob("events.*"))
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "outputs").exists()
    assert not list(home.rglob("*.netrc"))
