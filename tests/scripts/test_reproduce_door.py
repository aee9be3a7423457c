"""`afferent reproduce` on a made-up paper whose runs are recorded, not trained."""

from __future__ import annotations

import fcntl
import json
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from scripts.reproduce import main
from training.errors import RunStopped
from training.evaluation import launch as launching
from training.evaluation.claims_file import load_claims
from training.evaluation.launch import Launch, PlannedRun, execute, judging_seeds, plan
from training.evaluation.subprocesses import Subprocesses
from training.files import write_json
from training.run_directory import plain
from training.schema import identity

CLAIMS = """
title: A fake paper
paper: null
about: what it is about
runs:
  main: {experiment: quickstart/stdlib, seeds: 2}
  wide: {experiment: quickstart/stdlib, seeds: 1, overrides: [optim.lr=0.5]}
claims:
  - id: good
    statement: it is below two
    run: main
    metric: eval/bpb
    direction: below
    threshold: {cpu: 2.0, h200: 1.0}
  - id: other
    statement: the wide run is below two as well
    run: wide
    metric: eval/bpb
    direction: below
    threshold: {cpu: THRESHOLD}
"""
PLOT = """
def figures(results, directory):
    (directory / f"{results['scale']}_claims.svg").write_text(str(len(results["curves"]["main"])))
"""
PYTHON = sys.executable
SCALE_CUDA = "scale=h200 needs a GPU and this machine has none"


class FakeLaunch(Launch):
    """Records results as a run would; `reply` may fail or stop a run."""

    def __init__(self, reply: Callable[[PlannedRun], str | None] = lambda run: None) -> None:
        self.reply = reply
        self.made: list[tuple[str, int]] = []

    def __call__(self, run: PlannedRun, label: str) -> str | None:
        if failure := self.reply(run):
            return failure
        self.made.append((run.name, run.index))
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / "identity.json", plain(identity(run.config)))
        (run.path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.23456789}\n')
        results = {"metrics": {"eval/bpb": 1.5 + run.index / 10}, "train_s": 2.0}
        write_json(run.path / "results.json", results)
        return None


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFFERENT_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "experiments" / "fake"
    folder.mkdir(parents=True)
    (folder / "claims.yaml").write_text(CLAIMS.replace("THRESHOLD", "2.0"))
    (folder / "plot.py").write_text(PLOT)
    (folder / "README.md").write_text("<!-- generated:results -->\n<!-- /generated -->\n")
    return folder.parent


@pytest.fixture
def reproduce(
    experiments: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The command; returns its exit code and what it said."""

    def call(*words: str, launch: Any = None) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["afferent reproduce", *words])
        try:
            main(experiments, launch or FakeLaunch())
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def recorded(experiments: Path) -> dict[str, Any]:
    return json.loads((experiments / "fake" / "results" / "cpu.json").read_text())


def test_a_whole_reproduction(reproduce: Any, experiments: Path) -> None:
    launch = FakeLaunch()
    code, said = reproduce("paper=fake", launch=launch)
    assert code == 0, said
    assert launch.made == [("main", 0), ("wide", 0), ("main", 1)]
    results = recorded(experiments)
    assert [claim["verdict"] for claim in results["claims"]] == ["reproduced"] * 2
    assert results["claims"][0]["values"] == [1.5, 1.6]
    assert results["seeds"] == judging_seeds("fake", 2)
    assert results["runs"]["wide"]["overrides"] == ["optim.lr=0.5"]
    assert len(results["runs"]["main"]["config_hashes"]) == 2
    assert results["runs"]["main"]["train_s"] == [2.0, 2.0]
    assert results["wall_s"] == 6.0
    assert results["curves"]["main"][0] == {"step": [1], "train/loss": [1.2346]}
    assert {"commit", "dirty", "date", "hardware", "versions"} <= set(results)
    assert (experiments / "fake" / "figures" / "cpu_claims.svg").read_text() == "2"
    assert "figures/cpu_claims.svg" in (experiments / "fake" / "README.md").read_text()
    again = FakeLaunch()
    assert reproduce("paper=fake", launch=again)[0] == 0
    assert again.made == []


def test_pictures_that_are_shown_are_those_of_the_first_seed(
    reproduce: Any, experiments: Path
) -> None:
    folder = experiments / "fake"
    (folder / "claims.yaml").write_text(
        CLAIMS.replace("THRESHOLD", "2.0") + "shows: [main/film, wide/nothing]\n"
    )

    def draw(run: PlannedRun) -> None:
        (run.path / "figures").mkdir(parents=True)
        (run.path / "figures" / "film.svg").write_text(f"<svg>{run.name} {run.index}</svg>")

    code, said = reproduce("paper=fake", launch=FakeLaunch(draw))
    assert code == 0 and "wide/nothing is not shown: there is no " in said
    assert (folder / "figures" / "cpu_main_film.svg").read_text() == "<svg>main 0</svg>"
    assert not (folder / "figures" / "cpu_nothing.svg").exists()
    assert "figures/cpu_main_film.svg" in (folder / "README.md").read_text()


def test_a_failing_claim_exits_1(reproduce: Any, experiments: Path) -> None:
    (experiments / "fake" / "claims.yaml").write_text(CLAIMS.replace("THRESHOLD", "1.0"))
    code, said = reproduce("paper=fake")
    assert code == 1
    assert "not reproduced" in said and "the mean 1.5 is not below the threshold 1" in said
    assert [claim["verdict"] for claim in recorded(experiments)["claims"]] == [
        "reproduced",
        "not reproduced",
    ]


def test_a_crash_costs_only_the_claims_that_read_the_run(reproduce: Any, experiments: Path) -> None:
    crash = FakeLaunch(lambda run: "out of memory" if run.name == "main" else None)
    code, said = reproduce("paper=fake", launch=crash)
    assert code == 1 and "main, seed" in said and "failed: out of memory" in said
    assert crash.made == [("wide", 0)]
    good, other = recorded(experiments)["claims"]
    assert (good["verdict"], other["verdict"]) == ("not run", "reproduced")
    assert good["because"] == "the run `main` did not finish: out of memory"


def test_an_interrupted_reproduction_goes_on(reproduce: Any, experiments: Path) -> None:
    def stop(run: PlannedRun) -> None:
        if (run.name, run.index) == ("main", 1):
            raise RunStopped("interrupted", 130)

    code, said = reproduce("paper=fake", launch=FakeLaunch(stop))
    assert code == 130 and "afferent: interrupted" in said
    assert not (experiments / "fake" / "results").exists()
    rest = FakeLaunch()
    assert reproduce("paper=fake", launch=rest)[0] == 0
    assert rest.made == [("main", 1)]


def test_fewer_seeds_are_a_trial_and_fresh_makes_runs_again(
    reproduce: Any, experiments: Path, tmp_path: Path
) -> None:
    code, said = reproduce("paper=fake", "seeds=1")
    assert code == 0 and "a trial" in said
    assert not (experiments / "fake" / "results").exists()
    launch = FakeLaunch()
    assert reproduce("paper=fake", "fresh=true", launch=launch)[0] == 0
    assert len(launch.made) == 3
    assert len(list((tmp_path / "runs").rglob("*.before-*"))) == 2


def test_fresh_leaves_a_live_run_alone(reproduce: Any, experiments: Path) -> None:
    reproduce("paper=fake")
    run = one_run(experiments)
    with open(run.path / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = reproduce("paper=fake", "fresh=true")
    assert code == 2 and "is still running" in said
    assert run.results() is not None


def test_dry_run_and_listing(reproduce: Any) -> None:
    code, said = reproduce("paper=fake", "--dry-run")
    assert code == 0
    assert "3 runs:" in said and said.count("to run") == 3
    assert "2 of 2 claims are judged at scale=cpu" in said and "good (≤ 2)" in said
    reproduce("paper=fake")
    assert reproduce("paper=fake", "--dry-run")[1].count("cached") == 3
    code, said = reproduce()
    assert code == 0
    assert "what it is about (cpu: 2 reproduced; h200: not run; paper: not run)" in said
    assert reproduce("--help")[0] == 0


def test_tables_alone(reproduce: Any, experiments: Path) -> None:
    reproduce("paper=fake")
    readme = experiments / "fake" / "README.md"
    whole = readme.read_text()
    readme.write_text(whole.replace("1.55", "1.45"))
    assert reproduce("--tables") == (0, "updated experiments/fake/README.md\n")
    assert readme.read_text() == whole
    assert reproduce("--tables") == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paper=fke"], "There is no paper `fke`. Did you mean fake?"),
        (["paper=fake", "scale=gpu"], "there is no scale `gpu`"),
        (["paper=fake", "scale=paper"], "Use: cpu, h200"),
        (["papr=fake"], "reproduce knows no `papr=fake`. Did you mean paper"),
        (["paper=fake", "--dryrun"], "Did you mean --dry-run"),
        (["paper=fake", "seeds=0"], "seeds=0 must be"),
        (["paper=fake", "jobs=two"], "jobs=two must be"),
        (["paper=fake", "jobs=100000"], "jobs=100000: this machine has"),
        (["paper=fake", "fresh=yes"], "there is no value `yes`"),
        (["paper=fake", "scale=h200"], SCALE_CUDA),
    ],
)
def test_mistakes_are_one_sentence(
    reproduce: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(launching, "has_gpu", lambda: False)
    code, said = reproduce(*words)
    assert code == 2
    assert message in said and "Traceback" not in said


def test_an_override_that_does_not_compose_names_the_run(reproduce: Any, experiments: Path) -> None:
    file = experiments / "fake" / "claims.yaml"
    file.write_text(CLAIMS.replace("optim.lr", "optim.lrr").replace("THRESHOLD", "2"))
    code, said = reproduce("paper=fake")
    assert code == 2
    assert "experiments/fake/claims.yaml: run wide: " in said and "optim.lr" in said


def one_run(experiments: Path) -> PlannedRun:
    return plan(load_claims("fake", experiments), "cpu")[0]


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Replace the interpreter that trains by a small program."""
    program = tmp_path / "child"
    program.write_text(f"#!{PYTHON}\nimport os, signal, sys, time\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_failed_process_gives_its_last_words(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_run(experiments)
    fail = "print('step 1/2', file=sys.stderr); sys.exit(f'afferent: bad {sys.argv[-1]}')"
    child(tmp_path, monkeypatch, fail)
    assert Subprocesses()(run, "label") == f"bad {run.overrides[-1]}"
    assert "step 1/2" in (run.path / "reproduce.log").read_text()
    child(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)")
    assert Subprocesses()(run, "label") == "killed by SIGKILL"
    rows = [json.loads(line) for line in (run.path / "launches.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == [1, -9]
    assert run.wall_s() == pytest.approx(sum(row["wall_s"] for row in rows))


def test_an_interrupt_reaches_the_process_once(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_run(experiments)
    child(
        tmp_path,
        monkeypatch,
        """
count = []
signal.signal(signal.SIGINT, lambda *_: count.append(1))
os.kill(os.getppid(), signal.SIGINT)
time.sleep(0.5)
print(len(count), flush=True)
sys.exit(130)
""",
    )
    with pytest.raises(RunStopped) as stopped:
        Subprocesses()(run, "label")
    assert stopped.value.code == 130
    assert (run.path / "reproduce.log").read_text() == "1\n"


def test_a_run_that_was_past_stopping_still_ends_the_reproduction(
    experiments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_run(experiments)
    late = "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGTERM)"
    child(tmp_path, monkeypatch, f"{late}\ntime.sleep(0.5)")
    with pytest.raises(RunStopped) as stopped:
        Subprocesses()(run, "label")
    assert stopped.value.code == 85


def test_runs_are_made_side_by_side_but_for_those_that_measure_time(
    experiments: Path, tmp_path: Path
) -> None:
    runs = alone_last(experiments)
    together = threading.Barrier(2, timeout=30)  # breaks unless two are at work at once
    at_work, most = [], {}

    def reply(run: PlannedRun) -> None:
        at_work.append(run.name)
        if run.name == "main":
            together.wait()
        most[run.name] = max(most.get(run.name, 0), len(at_work))
        together.wait() if run.name == "main" else time.sleep(0.1)
        at_work.remove(run.name)

    outcomes = execute(runs, FakeLaunch(reply), jobs=2)
    assert most == {"main": 2, "wide": 1}
    assert [len(outcome.results) for outcome in outcomes.values()] == [2, 1]


def begins_from(experiments: Path) -> list[PlannedRun]:
    """Runs of which `wide` begins from `main`."""
    file = experiments / "fake" / "claims.yaml"
    tree = OmegaConf.create(CLAIMS.replace("THRESHOLD", "2.0"))
    OmegaConf.update(
        tree,
        "runs.wide.overrides",
        ["optim.lr=0.5", "recipe.sample_prompt='<run:main>'"],
        force_add=True,
    )
    OmegaConf.update(tree, "runs.wide.seeds", 2, force_add=True)
    file.write_text(OmegaConf.to_yaml(tree))
    return plan(load_claims("fake", experiments), "cpu")


def test_a_run_waits_for_the_one_that_it_begins_from(experiments: Path) -> None:
    runs = begins_from(experiments)
    launch = FakeLaunch(lambda run: time.sleep(0.5) if run.name == "main" else None)
    outcomes = execute(runs, launch, jobs=4)
    paths = {(run.name, run.index): run.path for run in runs}
    for run in runs:
        if run.name == "wide":
            assert run.after == (paths["main", run.index],)
            assert str(paths["main", run.index]) in run.overrides[-1]
            order = launch.made
            assert order.index(("main", run.index)) < order.index(("wide", run.index))
    assert len(outcomes["wide"].results) == 2


def test_nobody_is_idle_while_a_run_waits(experiments: Path) -> None:
    runs = begins_from(experiments)
    assert [run.name for run in runs[:2]] == ["main", "wide"]
    together = threading.Barrier(2, timeout=30)  # breaks unless both are at work at once

    def reply(run: PlannedRun) -> None:
        if run.name == "main":
            together.wait()

    outcomes = execute(runs, FakeLaunch(reply), jobs=2)
    assert [len(outcome.results) for outcome in outcomes.values()] == [2, 2]


def test_without_it_the_run_is_not_made(experiments: Path) -> None:
    launch = FakeLaunch(lambda run: "broken" if run.name == "main" else None)
    outcomes = execute(begins_from(experiments), launch, jobs=2)
    assert launch.made == []
    assert outcomes["main"].failure == "broken"
    assert outcomes["wide"].failure == "a run that it begins from failed"


def test_a_run_that_two_names_share_is_made_once(experiments: Path) -> None:
    runs = alone_last(experiments)
    twin = replace(runs[0], name="twin")
    launch = FakeLaunch()
    outcomes = execute([runs[0], twin], launch, jobs=2)
    assert len(launch.made) == 1
    assert outcomes["twin"].results == outcomes["main"].results != []


def test_an_interrupt_reaches_every_process_and_no_more_begin(
    experiments: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runs = alone_last(experiments, seeds=3)
    child(
        tmp_path,
        monkeypatch,
        f"""
count = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: count.append(1))
assert os.environ["OMP_NUM_THREADS"]
open({str(tmp_path)!r} + f"/began-{{os.getpid()}}", "w").close()
while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("began")]) < 2:
    time.sleep(0.01)
if "seed={runs[0].config.seed}" in sys.argv:
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(2 - ('seed={runs[0].config.seed}' in sys.argv))
print(len(count), flush=True)
sys.exit(130)
""",
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(RunStopped) as stopped:
        execute(runs, Subprocesses(2), jobs=2)
    assert stopped.value.code == 130
    at_work, waiting = runs[:1] + runs[2:3], [runs[1], *runs[3:]]
    assert [run.name for run in at_work] == ["main", "main"]
    assert [(run.path / "reproduce.log").read_text() for run in at_work] == ["1\n", "1\n"]
    said = capfd.readouterr().err
    assert len(waiting) == 2 and not any(str(run.path) in said for run in waiting)
    assert not any(run.path.exists() for run in waiting)


def alone_last(experiments: Path, seeds: int = 2) -> list[PlannedRun]:
    """Seeds of `main`, and `wide`, beside which nothing may run."""
    file = experiments / "fake" / "claims.yaml"
    text = CLAIMS.replace("seeds: 1,", "seeds: 1, alone: true,").replace("THRESHOLD", "2")
    file.write_text(text.replace("seeds: 2", f"seeds: {seeds}"))
    return plan(load_claims("fake", experiments), "cpu")
