"""Bad input through the real door: one clear sentence, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import train as door
from tests.helpers import ROOT, TINY, environment, only_run, train, train_command, write_corpus
from training.errors import UserError

pytestmark = pytest.mark.slow
QUICKSTART, TTT = "experiment=quickstart/stdlib", "experiment=ttt_e2e/markov"


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "quickstart/stdlib"),
        ([QUICKSTART, "optim.lrr=1"], "Did you mean optim.lr"),
        ([QUICKSTART, "+optim.lrr=1"], "Did you mean optim.lr"),
        ([QUICKSTART, "optim.lr=fast"], "could not be converted to Float"),
        ([QUICKSTART, "model.num_heads=7"], "model.num_heads=7 does not divide"),
        (["experiment=quickstrat/stdlib"], "Did you mean quickstart/stdlib"),
        ([QUICKSTART, "scale=h200"], "scale.device=cuda, but torch sees no GPU"),
        ([QUICKSTART, "scale.devices=2"], "torchrun --nproc-per-node 2"),
        ([QUICKSTART, "recipe=language_model_jax", "scale.devices=64"], "set scale.devices="),
        ([QUICKSTART, "data=files", "data.paths=[/nonexistent/x.txt]"], "data.paths"),
        ([QUICKSTART, "data=hub", "recipe.floors=false"], "data=stdlib"),
        ([TTT, "model.window=8"], "model.chunk=16 must be at least 1 and at most model.window=8"),
        ([TTT, "recipe.remat_group=3"], "recipe.remat_group=3 does not divide the 16 chunks"),
    ],
)
def test_mistake_ends_in_one_sentence(overrides: list[str], expected: str, tmp_path: Path) -> None:
    if "scale=h200" in overrides:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the GPU whose absence is tested")
    refused(train(tmp_path, *overrides, AFFERENT_CACHE=str(tmp_path / "cache")), expected)


def test_console_script_refuses_an_unknown_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "trian"],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    refused(done, "Did you mean train?")


def test_empty_and_non_utf8_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("größer ".encode("latin-1") * 400)
    empty = train(tmp_path / "runs", *TINY, f"data.paths=[{tmp_path}/empty.txt]")
    refused(empty, "empty.txt")
    tokens = [f"data.paths=[{tmp_path}/latin.txt]", f"data.tokenizer={tokenizer(tmp_path)}"]
    refused(train(tmp_path / "runs", *TINY, *tokens), "latin.txt", "UTF-8", "data.tokenizer=null")
    bytes_are_fine = train(
        tmp_path / "runs", *TINY, f"data.paths=[{tmp_path}/latin.txt]", "loop.steps=1"
    )
    assert bytes_are_fine.returncode == 0, bytes_are_fine.stderr[-2000:]


def tokenizer(directory: Path) -> Path:
    """A tiny word-level tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def test_checkpoint_of_another_config_is_refused_and_kept(tmp_path: Path) -> None:
    overrides = [*TINY, write_corpus(tmp_path / "text"), "run=mine", "loop.steps=2"]
    assert train(tmp_path / "runs", *overrides).returncode == 0
    before = (only_run(tmp_path / "runs") / "metrics.jsonl").read_bytes()
    refused(
        train(tmp_path / "runs", *overrides, "model.d_model=64"),
        "model.d_model: 32 -> 64",
        "run=<another name>",
    )
    assert (only_run(tmp_path / "runs") / "metrics.jsonl").read_bytes() == before


def test_a_batch_that_does_not_divide_over_the_processes_says_so_once(tmp_path: Path) -> None:
    overrides = [*TINY, write_corpus(tmp_path / "text"), "data.batch_size=9"]
    done = train(tmp_path / "runs", *overrides, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("data.batch_size=9 does not divide over 2 processes") == 1


def test_another_process_speaks_only_if_the_first_does_not(monkeypatch, capsys) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(door.time, "sleep", lambda s: waited.append(s) or capsys.readouterr())
    with pytest.raises(SystemExit) as left:
        door.leave(UserError("no GPU here"))
    assert left.value.code == 2 and waited == [door.GRACE]
    assert capsys.readouterr().err == "afferent: no GPU here\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        door.leave(UserError("nor here"))
    assert waited == [door.GRACE] and "nor here" in capsys.readouterr().err


def test_what_the_first_process_refuses_ends_all_of_them(tmp_path: Path) -> None:
    overrides = [*TINY, write_corpus(tmp_path / "text"), "run=mine", "loop.steps=2"]
    assert train(tmp_path / "runs", *overrides, processes=2).returncode == 0
    done = train(tmp_path / "runs", *overrides, "model.d_model=64", processes=2)
    assert done.stderr.count("model.d_model: 32 -> 64") == 1
    assert "DistNetworkError" not in done.stderr and "Broken pipe" not in done.stderr


def test_run_directory_held_by_a_live_process_is_refused(tmp_path: Path) -> None:
    overrides = [*TINY, write_corpus(tmp_path / "text"), "run=mine", "loop.steps=100000"]
    holder = subprocess.Popen(
        train_command(*overrides),
        cwd=ROOT,
        env=environment(tmp_path / "runs"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        run = tmp_path / "runs" / "quickstart" / "stdlib" / "mine"
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        refused(train(tmp_path / "runs", *overrides), f"process {holder.pid}", "run=<another name>")
    finally:
        holder.terminate()
        assert holder.wait(60) == 85, "SIGTERM saves and asks to be requeued"
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    done = train(tmp_path / "runs", *TINY, write_corpus(tmp_path / "text"))
    refused(done, "runs_dir=<a writable directory>")


def test_runs_dir_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = train(tmp_path / "file", *TINY, write_corpus(tmp_path / "text"))
    refused(done, "runs_dir=<a writable directory>")


def test_an_error_after_composition_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import training.run as r, scripts.train as t, sys\n"
        "def boom(config): raise ZeroDivisionError('inside')\n"
        "r.run = boom\n"
        f"sys.argv = ['train', '{QUICKSTART}']\nt.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "in boom" in done.stderr
