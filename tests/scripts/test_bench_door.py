"""`afferent bench`: what it takes, what it refuses, and that no call is lost to one bad kernel.

The workers here are stubs that hold no GPU and say so; what they answer is written to temporary
directories only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import SUITES, plot, table
from scripts import bench
from scripts.benchmarks import kernels as door
from tests.helpers import ROOT, environment
from training.errors import RunStopped, UserError

STUB = """
import json, os, sys, time
job = json.load(sys.stdin)
say = lambda event, **more: print(json.dumps({"event": event, **more}), flush=True)
rate = lambda x: {"rate": x}
ceilings = job["ceilings"] or {"copy": rate(4e12), "matmul": rate(8e14), "host": rate(5e10)}
say("entry", entry="ceilings", patience=30)
say("machine", gpu={"name": "a stub, not a GPU", "driver": "none"}, ceilings=ceilings)
for case in ("attention/a", "attention/b"):
    crashed = job["crashed"].get(case, {})
    if job["done"].get(case) == "f":
        say("left", case=case, why="done before")
        continue
    say("case", case=case, fingerprint="f")
    entries = []
    for name in ("triton", "triton [ws]", "flex"):
        entry = {"name": name, "ours": name != "flex", "variant": "[" in name, "note": ""}
        if name in crashed:
            entries.append({**entry, "status": "crashed", "reason": crashed[name]})
            continue
        say("entry", entry=name, patience=PATIENCE)
        if (case, name) == ("attention/a", "triton [ws]"):
            print("about to fail", file=sys.stderr, flush=True)
            BEHAVIOUR
        ms = {"p20": 1.0, "p50": 1.5 if name == "flex" else 1.0, "p80": 1.0, "samples": [1.0]}
        entries.append({**entry, "status": "timed", "reason": "", "ms": ms, "timed_by": "graph",
                        "kernels": ["k"]})
    target = {"name": "over flex", "entry": "triton", "over": "flex", "ceiling": "",
              "at_least": 1.7, "stretch": None, "value": 1.5, "met": False}
    say("row", row={"case": case, "fingerprint": "f", "complete": True, "shapes": {"t": 8},
                    "dtype": "bfloat16", "flops": 1e9, "bytes": 1e9, "through_host": False,
                    "entries": entries, "targets": [target]})
say("end", why="finished")
"""


def stub(behaviour: str, patience: float = 30.0) -> list[str]:
    text = STUB.replace("BEHAVIOUR", behaviour).replace("PATIENCE", str(patience))
    return [sys.executable, "-c", text]


def called(
    tmp_path: Path, command: list[str], document: Any = None, budget: float = 60.0
) -> tuple[str, dict[str, Any]]:
    """How a call ended, and what it wrote."""
    options = door.Options(
        ("attention",), tmp_path / "out.json", budget=budget, log=tmp_path / "log"
    )
    ended = door.Call(options, document or door.results.empty()).work(command)
    return ended, json.loads(options.out.read_text())


def statuses(document: dict[str, Any], case: str) -> dict[str, str]:
    row = next(row for row in document["cases"] if row["case"] == case)
    return {entry["name"]: entry["status"] for entry in row["entries"]}


def test_rows_are_written_as_they_come_and_say_where_they_come_from(tmp_path: Path) -> None:
    ended, document = called(tmp_path, stub("pass"))
    assert ended == "finished"
    assert [row["case"] for row in document["cases"]] == ["attention/a", "attention/b"]
    assert all(row["call"] == 0 and row["complete"] for row in document["cases"])
    (call,) = document["calls"]
    for key in ("commit", "date", "versions", "gpu", "ceilings", "dirty", "scale"):
        assert key in call, key


@pytest.mark.parametrize(
    ("behaviour", "patience", "reason"),
    [
        ("os._exit(3)", 30.0, "the process ended with code 3"),
        ("os.kill(os.getpid(), 11)", 30.0, "the process ended with code -11"),
        ("time.sleep(60)", 1.0, "no answer for 1 s"),
    ],
)
def test_an_entry_that_crashes_or_hangs_costs_itself_only(
    tmp_path: Path, behaviour: str, patience: float, reason: str
) -> None:
    began = time.monotonic()
    ended, document = called(tmp_path, stub(behaviour, patience))
    assert ended == "finished" and time.monotonic() - began < 30
    assert statuses(document, "attention/a") == {
        "triton": "timed",
        "triton [ws]": "crashed",
        "flex": "timed",
    }
    assert set(statuses(document, "attention/b").values()) == {"timed"}
    entry = document["cases"][0]["entries"][1]
    assert entry["reason"].startswith(reason) and "about to fail" in entry["reason"]
    assert len(document["calls"]) == 1, "two workers, one call"


def test_the_budget_ends_a_call_and_the_next_one_goes_on(tmp_path: Path) -> None:
    slow = stub("time.sleep(60) if not job['done'].get('attention/b') else None")
    ended, document = called(tmp_path, slow, budget=2.0)
    assert ended == "the budget is spent" and document["cases"] == []
    ended, document = called(tmp_path, stub("pass"), document)
    assert ended == "finished" and [row["call"] for row in document["cases"]] == [1, 1]
    before = document["cases"]
    ended, document = called(tmp_path, stub("os._exit(9)"), document)
    assert ended == "finished" and document["cases"] == before, "done before: nothing ran"
    assert len(document["calls"]) == 3


def test_a_worker_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RunStopped, match=r"worker failed: the process ended with code 1: .*no driver"
    ):
        called(tmp_path, [sys.executable, "-c", "import sys; sys.exit('no driver')"])


def test_tables_and_figure_come_from_the_file(tmp_path: Path) -> None:
    _, document = called(tmp_path, stub("os._exit(3)"))
    said = table.text(document)
    assert "crashed: the process ended with code 3" in said and "missed" in said
    missing = table.markdown(tmp_path / "none.json")
    assert "*not run*" in missing and "paged decode >= 0.88 of copy bandwidth" in missing
    markdown = table.markdown(tmp_path / "out.json")
    assert "| over flex | attention/a | 1.5 | **missed**: no reason is known yet |" in markdown
    assert "| attention/a | t8 bfloat16 | 1 ms | 1000 GB/s | 25 % of copy | flex 1.50 |" in markdown
    row = document["cases"][0]
    for stretch, said in ((1.4, "met, so is the stretch of 1.4"), (1.6, "met, not the stretch of")):
        row["targets"] = [{**row["targets"][0], "met": True, "stretch": stretch}]
        assert said in "\n".join(table.verdicts(document, {}))
    why = {"attention/a: over flex": "the tile spills"}
    (tmp_path / "out.reasons.json").write_text(json.dumps(why))
    assert "**missed**: the tile spills |" in table.markdown(tmp_path / "out.json")
    figures = plot.draw(document, tmp_path / "out.json")
    assert [figure.suffix for figure in figures] == [".svg", ".png"]
    first = figures[0].read_bytes()
    assert plot.draw(document, tmp_path / "out.json")[0].read_bytes() == first
    assert all(1000 < figure.stat().st_size < 300_000 for figure in figures)


def test_another_gpus_results_are_not_mixed_in(tmp_path: Path) -> None:
    called(tmp_path, stub("pass"))
    with pytest.raises(UserError, match="holds results of a stub, not a GPU, this is NVIDIA H200"):
        door.opened(tmp_path / "out.json", "NVIDIA H200")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        door.opened(tmp_path / "torn.json", "NVIDIA H200")


# ------------------------------------------------------------------------------- the command


def typed(*words: str, tmp_path: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """`afferent bench ...` in a process of its own; `code` runs first."""
    run = f"{code}\nimport sys; sys.argv = ['bench', *{list(words)!r}]\n"
    run += "from scripts.bench import main; main()"
    return subprocess.run(
        [sys.executable, "-c", run],
        cwd=ROOT,
        env=environment(tmp_path / "runs"),
        capture_output=True,
        text=True,
    )


WITHOUT_HYDRA = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf')))"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has the GPU that must be absent"
)
def test_without_a_gpu_nothing_is_timed_and_nothing_written(tmp_path: Path) -> None:
    out = tmp_path / "h200.json"
    done = typed("suite=attention,loss", f"out={out}", tmp_path=tmp_path, code=WITHOUT_HYDRA)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("afferent: no GPU: not run.") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_every_case_and_writes_nothing(tmp_path: Path) -> None:
    words = ("suite=decode,cascade,append,compaction,loss,fast_weights", "dry_run=true")
    done = typed(*words, tmp_path=tmp_path, code=WITHOUT_HYDRA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("dry run: nothing was timed")
    assert "decode/paged: " in done.stdout and " ms" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["suite=attentoin"], "Did you mean attention?"),
        (["suite=attention,los"], "Did you mean loss?"),
        ([], "Use: training, serving, attention"),
        (["suite=attention", "bugdet=9"], "Did you mean budget?"),
        (["suite=attention", "repeats=9"], "there is no key `repeats` for suite=attention"),
        (["suite=training", "budget=99"], "there is no key `budget` for suite=training"),
        (["suite=training,loss"], "training has keys of its own"),
        (["suite=attention", "budget=soon"], "must be whole seconds, at least 30"),
        (["suite=attention", "budget=5"], "must be whole seconds, at least 30"),
        (["suite=attention", "scale=h20"], "Did you mean h200?"),
        (["suite=attention", "dry_run=yes"], "Use: true, false"),
        (["suite=attention", "out=results"], "must end in .json"),
        (["suite=training", "repeats=0"], "at least 1"),
        (["suite=loss", "dry_run=true", "cases=backwards"], "has that in its name"),
    ],
)
def test_what_is_unknown_is_one_sentence(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["afferent bench", *words])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert said in err and err.startswith("afferent: ") and err.count("\n") == 1


def test_help_names_every_suite_and_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["afferent bench", "--help"])
    bench.main()
    out = capsys.readouterr().out
    keys = ("repeats", *bench.KERNEL_DEFAULTS)
    assert all(word in out for word in ("training", *SUITES, *(f"{key}=" for key in keys)))
