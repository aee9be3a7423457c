"""Re-run a paper's claims at a scale and judge them.

    claims.yaml -> runs (cached by their configuration) -> verdicts -> results/<scale>.json
                -> figures/<scale>_*.svg and the README tables, which read only that file, but for
                   the pictures that claims.yaml `shows`: those that a run's first seed left

Nothing is written when the runs are interrupted or when fewer seeds were asked for than the
protocol has: results/ only ever holds whole judgements.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.claims import EXPERIMENTS, ROOT, PaperClaims
from training.evaluation.claims_file import load_claims, one_of
from training.evaluation.launch import (
    Launch,
    PlannedRun,
    execute,
    plan,
    require_device,
    set_aside,
)
from training.evaluation.subprocesses import Subprocesses
from training.evaluation.tables import update_tables
from training.evaluation.verdicts import RunOutcome, judge_all
from training.files import write_atomic
from training.logging import Row, read_rows
from training.profiling import hardware
from training.provenance import commit, git, versions
from training.run_directory import digest, plain
from training.schema import identity

DRAWN_ONCE = ("paths/", "distance/")  # series of pictures: those of the first seed are kept
MAX_BYTES = 200_000  # of a results file
POINTS = 60  # of a curve
CODE = ("models", "training", "kernels", "configs", "scripts")


def reproduce(
    paper: str,
    scale: str = "cpu",
    *,
    seeds: int | None = None,
    fresh: bool = False,
    experiments_root: Path = EXPERIMENTS,
    launch: Launch | None = None,
    jobs: int = 1,
) -> tuple[dict[str, Any], Path | None]:
    """Make what is missing, judge, record. Returns the results and the file they are in.

    Args:
        seeds: seeds of every run instead of the protocol's; with fewer, nothing is written.
        fresh: put finished runs aside and make them again.
        launch: how runs are made; None means each in a process of its own.
        jobs: how many runs are made at a time.
    Raises UserError for what the user can mend, RunStopped when interrupted.
    """
    claims = load_claims(paper, experiments_root)
    check_scale(claims, scale)
    claims = claims.at(scale)
    runs = plan(claims, scale, seeds)
    if fresh:
        set_aside(runs)
    require_device(runs, scale)
    outcomes = execute(runs, launch or Subprocesses(jobs), jobs)
    results = json_ready(record(claims, scale, runs, outcomes))
    if is_trial(claims, scale, seeds):
        return results, None
    file = experiments_root / paper / "results" / f"{scale}.json"
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, fitting(results, runs))
    draw(file)
    show(claims, scale, runs)
    update_tables(experiments_root.parent)
    return json.loads(file.read_text()), file


def check_scale(claims: PaperClaims, scale: str) -> None:
    """Raise UserError where nothing is judged."""
    one_of(scale, claims.scales(), "scale with a threshold named", f"{claims.name}/claims.yaml")


def is_trial(claims: PaperClaims, scale: str, seeds: int | None) -> bool:
    """Whether fewer seeds were asked for than the protocol has."""
    asked = max(claims.runs[name].at(scale)[0] for name in claims.needed(scale))
    return seeds is not None and seeds < asked


def record(
    claims: PaperClaims,
    scale: str,
    runs: Sequence[PlannedRun],
    outcomes: Mapping[str, RunOutcome],
) -> dict[str, Any]:
    """What results/<scale>.json holds, without its curves."""
    environments = [env for run in runs if (env := run.env())]
    one = environments[0] if environments else {}
    return {
        "paper": claims.name,
        "scale": scale,
        "commit": commit(),
        "dirty": is_dirty(environments, claims.file),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": one.get("hardware") or hardware(),
        "versions": one.get("versions") or versions(),
        "wall_s": round(sum({run.path: run.wall_s() for run in runs}.values()), 1),
        "seeds": list(dict.fromkeys(run.config.seed for run in runs)),
        "runs": {
            name: record_run(claims, scale, [run for run in runs if run.name == name], outcome)
            for name, outcome in outcomes.items()
        },
        "claims": judge_all(claims, scale, outcomes),
    }


def record_run(
    claims: PaperClaims, scale: str, runs: Sequence[PlannedRun], outcome: RunOutcome
) -> dict[str, Any]:
    """What a named run was: enough to make it again."""
    spec = claims.runs[runs[0].name]
    found: dict[str, Any] = {
        "experiment": spec.experiment,
        "overrides": list(spec.at(scale)[1]),
        "seeds": [run.config.seed for run in runs],
        "config_hashes": [digest(plain(identity(run.config)))[:8] for run in runs],
        "train_s": [results.get("train_s") for results in outcome.results],
        "commits": sorted({env["commit"] for run in runs if (env := run.env())}),
    }
    parameters = {results.get("parameters") for results in outcome.results} - {None}
    if len(parameters) == 1:
        found["parameters"] = parameters.pop()
    for told in ("latency", "latency_graphed"):
        if any(told in results for results in outcome.results):
            found[told] = [results.get(told) for results in outcome.results]
    every = [results.get("metrics", {}) for results in outcome.results]
    names = sorted({key for metrics in every for key in metrics if key.startswith("eval/")})
    found["final"] = {key: [short(metrics.get(key)) for metrics in every] for key in names}
    if any("series" in results for results in outcome.results):
        found["series"] = [
            {
                name: [short(v) for v in values]
                for name, values in results["series"].items()
                if seed == 0 or not name.startswith(DRAWN_ONCE)
            }
            for seed, results in enumerate(outcome.results)
        ]
    return found if outcome.failure is None else {**found, "failure": outcome.failure}


def is_dirty(environments: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Whether code, configuration or claims differ from the commit, now or when a run was made."""
    pattern = re.compile(rf"^diff --git a/({'|'.join(CODE)})/", re.MULTILINE)
    paths = [*CODE, str(file)] if file.is_relative_to(ROOT) else CODE
    return bool(git("status", "--porcelain", "--", *paths)) or any(
        pattern.search(env.get("dirty_diff", "")) for env in environments
    )


def json_ready(value: Any) -> Any:
    """Plain JSON values; a number that is not finite becomes null, which every reader can parse."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return plain(value)


def fitting(results: dict[str, Any], runs: Sequence[PlannedRun]) -> str:
    """The file's text, with as many points of the curves as its size allows."""
    points = POINTS
    while True:
        text = to_text({**results, "curves": curves(runs, points)})
        if len(text.encode()) <= MAX_BYTES or points == 0:
            return text
        points = points // 2 if points > 5 else 0


def to_text(results: Mapping[str, Any]) -> str:
    """Indented JSON with every list of numbers on one line."""
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub(r"\[\n[\s\d.,eE+null-]*\]", lambda found: joined(found[0]), text) + "\n"


def joined(text: str) -> str:
    return " ".join(text.split()).replace("[ ", "[").replace(" ]", "]")


def curves(runs: Sequence[PlannedRun], points: int) -> dict[str, list[dict[str, list[Any]]]]:
    """Name of a run -> per seed {"step": [...], metric: [...]}, at most `points` long.

    What was measured once, at the end, is no curve: `record_run` has it.
    """
    found: dict[str, list[dict[str, list[Any]]]] = {}
    if points == 0:
        return found
    for run in runs:
        rows = thinned(read_rows(run.path / "metrics.jsonl"), points)
        known = Counter(key for row in rows for key in row if key.startswith(("train/", "eval/")))
        keys = [key for key, count in known.items() if count >= min(2, len(rows))]
        curve = {key: [short(row.get(key)) for row in rows] for key in ["step", *sorted(keys)]}
        found.setdefault(run.name, []).append(curve)
    return found


def thinned(rows: Sequence[Row], points: int) -> list[Row]:
    """One row per step; evenly spaced ones, of which up to half are evaluations."""
    merged: dict[int, Row] = {}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    evaluated = [s for s, row in merged.items() if any(key.startswith("eval/") for key in row)]
    kept = set(spaced(evaluated, points // 2))
    kept |= set(spaced([step for step in merged if step not in kept], points - len(kept)))
    return [merged[step] for step in sorted(kept)]


def spaced(steps: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the steps, first and last included."""
    if len(steps) <= count:
        return list(steps)
    if count < 2:
        return list(steps[-1:])[:count]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def short(value: Any) -> Any:
    """Five significant digits are enough for a curve."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def draw(file: Path) -> None:
    """Let the paper's plot.py, if there is one, draw from results/<scale>.json."""
    folder = file.parent.parent
    script = folder / "plot.py"
    if not script.exists():
        return
    spec = importlib.util.spec_from_file_location(f"plot_{folder.name}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "figures").mkdir(exist_ok=True)
    module.figures(json.loads(file.read_text()), folder / "figures")


def show(claims: PaperClaims, scale: str, runs: Sequence[PlannedRun]) -> None:
    """Keep the pictures that the claims show, of each run's first seed, in the paper's folder."""
    for name, figure in claims.shows:
        for run in (run for run in runs if run.name == name and run.index == 0):
            picture = run.path / "figures" / f"{figure}.svg"
            if not picture.exists():
                print(f"{name}/{figure} is not shown: there is no {picture}")
                continue
            kept = claims.file.parent / "figures" / f"{scale}_{name}_{figure}.svg"
            kept.parent.mkdir(exist_ok=True)
            write_atomic(kept, picture.read_text())
