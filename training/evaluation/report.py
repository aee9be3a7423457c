"""What a person sees of a run: a static page, and a short text at the end of `afferent train`.

    report.html   headline beside its floors, curves, sample, data, configuration, provenance

Both know no recipe: metrics are shown by their prefix (`train/`, `eval/`, `opt/`, `perf/`), and a
run that has not finished gets a page of what is there so far. The one thing they know by name is
the unit of `floors`: bits per byte.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.evaluation import page, plots
from training.evaluation.claims import EXPERIMENTS
from training.evaluation.page import Html, shown, tag
from training.files import write_atomic
from training.logging import Row, clock, human, read_rows

FLOORS_METRIC, FLOORS_LOSS = "eval/bpb", "eval/loss"
"The metric that a run's floors share a unit with, and the loss it is proportional to."
FLOOR_NOTES = {
    "uniform": "every token equally likely",
    "seen/": "n-gram model of that order, trained on exactly the text this model has been shown",
    "corpus/": "n-gram model of that order, trained on the whole training corpus",
    "gzip": "the held-out text compressed by itself",
    "xz": "the held-out text compressed by itself",
}
OWN = "this model"
STANDING = ("scale", "seed", "date", "run", "experiment", "stopped_by", "uniform_bpb")
SAMPLE_LINES, SAMPLE_WIDTH = 12, 96  # of the terminal's excerpt
MAX_DIFF = 20_000  # characters on the page
STATES = {"finished": "good", "running": "fair", "interrupted": "fair", "failed": "bad"}
PREFIXES = ("train", "eval", "opt", "perf")


def write_run_report(directory: Path) -> Path:
    """Write `directory`/report.html from what the run has left so far; returns its path."""
    run = RunFiles.read(directory)
    path = directory / "report.html"
    write_atomic(path, page.document(f"{run.experiment}: {run.name}", run_page(run)))
    return path


def write_paper_report(paper: str, experiments_root: Path = EXPERIMENTS) -> Path:
    """Write <runs>/reports/<paper>.html from experiments/<paper> alone; returns its path."""
    from training.evaluation.paper_page import paper_page

    path = Path(os.environ.get("AFFERENT_RUNS", "runs")) / "reports" / f"{paper}.html"
    title, parts = paper_page(paper, experiments_root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.document(title, parts))
    return path


@dataclass(frozen=True)
class RunFiles:
    """A run directory as it is on the disk; empty where a file is not there yet."""

    directory: Path
    results: dict[str, Any]
    status: dict[str, Any]
    config: dict[str, Any]
    env: dict[str, Any]
    rows: list[Row]
    perf: list[Row]

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Raises UserError if the directory does not hold a run."""
        if not is_run(directory):
            raise UserError(f"{directory} holds no run: there is neither config.yaml nor status")
        return cls(
            directory,
            *(read_json(directory / f"{name}.json") for name in ("results", "status")),
            read_config(directory / "config.yaml"),
            read_json(directory / "env.json"),
            read_rows(directory / "metrics.jsonl"),
            read_rows(directory / "perf.jsonl"),
        )

    @property
    def name(self) -> str:
        return self.results.get("run") or self.directory.resolve().name

    @property
    def experiment(self) -> str:
        return self.results.get("experiment") or self.config.get("experiment") or "unnamed"

    @property
    def metrics(self) -> dict[str, Any]:
        """The results' metrics; the newest of each logged one while there are none."""
        newest = {k: v for row in self.rows for k, v in row.items() if k[:5] in ("eval/", "train")}
        return self.results.get("metrics") or newest


def is_run(directory: Path) -> bool:
    """Whether a run has begun in this directory."""
    return any((directory / name).is_file() for name in ("config.yaml", "status.json"))


def read_json(path: Path) -> dict[str, Any]:
    """What a .json file holds, {} if there is none. Raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.exists():
        return {}
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return found if isinstance(found, dict) else {}  # type: ignore[return-value]


def ranking(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The model among its floors and the uniform distribution, worst first; [] without floors."""
    value = results.get("metrics", {}).get(FLOORS_METRIC)
    if not results.get("floors") or value is None:
        return []
    named = {**results["floors"], OWN: value}
    if results.get("uniform_bpb") is not None:
        named["uniform"] = results["uniform_bpb"]
    known = [(k, v) for k, v in named.items() if v is not None and math.isfinite(v)]
    return sorted(known, key=lambda item: -item[1])


def headline(metrics: Mapping[str, Any]) -> str | None:
    """The metric that is shown largest: the floors' if there is one, else the first evaluated."""
    evaluated = [key for key in metrics if key.startswith("eval/")]
    return FLOORS_METRIC if FLOORS_METRIC in evaluated else next(iter(evaluated), None)


# --- the terminal ---------------------------------------------------------------------------------


def run_summary(results: Mapping[str, Any]) -> str:
    """A finished run in a few lines of plain text, safe to print whatever the model has said."""
    metrics = results.get("metrics", {})
    blocks = [summary_line(results)]
    if metrics:
        width = max(map(len, metrics))
        blocks.append("\n".join(f"  {k:<{width}}  {shown(v)}" for k, v in metrics.items()))
    if ranked := ranking(results):
        blocks.append("\n".join(ranking_lines(ranked)))
    if excerpt := sample_lines(results.get("sample", "")):
        blocks.append("\n".join(["sample", *(f"  | {line}" for line in excerpt)]))
    return page.printable("\n\n".join(blocks))


def summary_line(results: Mapping[str, Any]) -> str:
    """`quickstart/stdlib: 1,230 steps, 1.2M tokens, 2:10 of training, 837k parameters`."""
    parts = [f"{shown(results['steps'])} steps"] if "steps" in results else []
    parts += [f"{human(value)} {unit}" for unit, value in experience(results).items()]
    if "train_s" in results:
        parts.append(f"{clock(results['train_s'])} of training")
    if "parameters" in results:
        parts.append(f"{human(results['parameters'])} parameters")
    early = " (ended early by its budget)" if results.get("stopped_by") == "budget" else ""
    return f"{results.get('experiment') or 'unnamed'}: {', '.join(parts)}{early}"


def experience(results: Mapping[str, Any]) -> dict[str, float]:
    """Unit -> how much the run has seen: the top-level counts that have no name of their own."""
    named = (*STANDING, "steps", "train_s", "parameters")
    return {
        key: value
        for key, value in results.items()
        if key not in named and isinstance(value, int) and not isinstance(value, bool)
    }


def ranking_lines(ranked: list[tuple[str, float]]) -> list[str]:
    unit = plots.label(FLOORS_METRIC)
    lines = [f"{unit} of the same held-out data, worst first (lower is better)"]
    for name, value in ranked:
        lines.append(f"{'>' if name == OWN else ' '} {value:7.3f}  {name}")
    return lines


def sample_lines(sample: str) -> list[str]:
    """The first lines of a sample, without control characters, cut to the terminal."""
    lines = page.printable(sample).expandtabs(4).rstrip().splitlines()
    cut = [line[: SAMPLE_WIDTH - 3] + "..." if len(line) > SAMPLE_WIDTH else line for line in lines]
    return cut if len(cut) <= SAMPLE_LINES else [*cut[:SAMPLE_LINES], "..."]


# --- the page -------------------------------------------------------------------------------------


def run_page(run: RunFiles) -> list[Html | None]:
    """The sections of a run's page; None for what it has nothing for."""
    return [
        title(run),
        notice(run),
        tiles(run),
        floors(run),
        curves(run),
        figures(run),
        sample(run),
        data(run),
        configuration(run),
        provenance(run),
    ]


def title(run: RunFiles) -> Html:
    state = run.status.get("status", "finished" if run.results else "unknown")
    seed = run.config.get("seed", run.results.get("seed"))
    scale = run.results.get("scale") or run.config.get("scale", {}).get("name")
    date = run.results.get("date") or run.env.get("date")
    known = [("run", run.name), ("scale", scale), ("seed", seed), ("", date)]
    said = [f"{name} {value}".strip() for name, value in known if value is not None]
    return tag(
        "header",
        tag("h1", run.experiment, " ", page.badge(state, STATES.get(state, "none"))),
        tag("p", " · ".join(said), class_="quiet"),
    )


def notice(run: RunFiles) -> Html | None:
    """How far an unfinished run is and why it stands there; None for one that is complete."""
    if run.results:
        if run.results.get("stopped_by") in (None, "steps"):
            return None
        return tag("p", f"Ended early: stopped by its {run.results['stopped_by']}.", class_="notice")
    step = run.status.get("step", run.rows[-1]["step"] if run.rows else 0)
    steps = run.config.get("loop", {}).get("steps")
    said = [f"Not finished: this is what there is after step {step:,}"]
    said[0] += f" of {steps:,}." if steps else "."
    if message := run.status.get("message"):
        said.append(f"It ended with: {message.rstrip('.')}.")
    if beat := run.status.get("heartbeat"):
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(beat))
        said.append(f"Last sign of life: {moment}.")
    return tag("p", " ".join(said), class_="notice")


def tiles(run: RunFiles) -> Html | None:
    """The headline, the other metrics, and what the run has cost."""
    metrics, results = run.metrics, run.results
    first = headline(metrics)
    found = [page.tile(metric_name(first), shown(metrics[first]), "headline")] if first else []
    found += [page.tile(metric_name(k), shown(v)) for k, v in metrics.items() if k != first]
    if "steps" in results:
        found.append(page.tile("steps", shown(results["steps"])))
    found += [page.tile(unit, human(value)) for unit, value in experience(results).items()]
    if "train_s" in results:
        found.append(page.tile("training time", clock(results["train_s"])))
    if "parameters" in results:
        found.append(page.tile("parameters", human(results["parameters"])))
    return tag("div", *found, class_="tiles") if found else None


def metric_name(key: str) -> str:
    """`eval/bpb` -> 'bits per byte (eval)'."""
    return f"{plots.label(key)} ({key.partition('/')[0]})"


def floors(run: RunFiles) -> Html | None:
    """The model's row among its floors, beside the curve that went through them."""
    ranked = ranking(run.results)
    if not ranked:
        return None
    unit, worst = plots.label(FLOORS_METRIC), ranked[0][1]
    own = dict(ranked)[OWN]
    rows = []
    for name, value in ranked:
        bar = tag("span", class_=f"bar{' own' * (name == OWN)}", style=f"width:{value / worst:.1%}")
        difference = "" if name == OWN else f"{value - own:+.3f}"
        written = tag("mark", name) if name == OWN else name
        rows.append((written, bar, numeral(f"{value:.3f}"), numeral(difference)))
    prefixes = {key: any(name.startswith(key) for name, _ in ranked) for key in FLOOR_NOTES}
    notes = [f"{key.rstrip('/')}: {FLOOR_NOTES[key]}" for key, there in prefixes.items() if there]
    return page.section(
        f"Beside its floors: {unit}, lower is better",
        tag(
            "div",
            page.chart(floors_chart(run), "the lines are the floors, on the same held-out data"),
            page.table(["", "", numeral(unit), numeral("to the model")], rows, "ranking"),
            class_="grid",
        ),
        page.folded("What the floors are", *(tag("p", note) for note in notes)),
    )


def numeral(text: str) -> Html:
    """Right-aligned."""
    return tag("div", text, class_="numeral")


def floors_chart(run: RunFiles) -> str:
    """Training loss and held-out metric over the steps, in the unit of the floors."""
    metrics = run.results["metrics"]
    lines = [plots.curve(run.rows, FLOORS_METRIC, "held out")]
    if metrics.get(FLOORS_LOSS):
        per_nat = metrics[FLOORS_METRIC] / metrics[FLOORS_LOSS]
        train = plots.curve(run.rows, f"train/{FLOORS_LOSS.partition('/')[2]}", "training")
        lines.insert(0, plots.Line(train.label, train.x, [y * per_nat for y in train.y]))
    levels = {name: value for name, value in ranking(run.results) if name not in (OWN, "uniform")}
    return plots.line_chart(lines, plots.label(FLOORS_METRIC), levels=levels)


def curves(run: RunFiles) -> Html | None:
    """A chart per metric; training and evaluation of the same name share one."""
    rows = run.rows + run.perf
    charts, constant = [], []
    for name, keys in grouped(rows).items():
        if keys == [FLOORS_METRIC] and ranking(run.results):
            continue  # it has been drawn among its floors
        lines = [plots.curve(rows, key) for key in keys]
        if all(len(line.x) < 2 for line in lines):
            continue
        if all(len(set(line.y)) == 1 for line in lines):
            constant += [f"{line.label} = {shown(line.y[0])}" for line in lines]
            continue
        caption = join_codes(keys)
        zero = keys[0].startswith("perf/")  # noise should look as small as it is
        drawn = plots.line_chart(lines, plots.label(name), from_zero=zero)
        charts.append(page.chart(drawn, caption))
    if not charts:
        return None
    still = tag("p", f"Constant: {', '.join(constant)}.", class_="quiet") if constant else None
    return page.section("Curves", tag("div", *charts, class_="grid"), still)


def join_codes(keys: list[str]) -> Html:
    return page.join([tag("code", keys[0]), *(page.join([", ", tag("code", k)]) for k in keys[1:])])


def grouped(rows: list[Row]) -> dict[str, list[str]]:
    """Name of a chart -> its keys: train/x and eval/x together, others alone, by prefix."""
    keys = dict.fromkeys(key for row in rows for key in row if "/" in key)
    known = {prefix: number for number, prefix in enumerate(PREFIXES)}
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=lambda key: known.get(key.partition("/")[0], len(known))):
        prefix, _, name = key.partition("/")
        found.setdefault(name if prefix in ("train", "eval") else key, []).append(key)
    return found


def figures(run: RunFiles) -> Html | None:
    found = page.pictures(run.directory / "figures")
    return page.section("Figures", tag("div", *found, class_="grid")) if found else None


def sample(run: RunFiles) -> Html | None:
    text = run.results.get("sample")
    return page.section("Sample", tag("pre", text)) if text else None


def data(run: RunFiles) -> Html | None:
    known = run.results.get("data")
    return page.section("Data", page.facts(known)) if isinstance(known, Mapping) else None


def configuration(run: RunFiles) -> Html | None:
    """What differs from the schema's defaults; everything, folded."""
    if not run.config:
        return None
    from omegaconf import OmegaConf

    changed = [
        (tag("code", key), shown_setting(value), shown_setting(default))
        for key, value, default in differences(run.config)
    ]
    whole = OmegaConf.to_yaml(OmegaConf.create(run.config))
    return page.section(
        "Configuration",
        page.table(["changed from its default", "value", "default"], changed, "facts"),
        page.folded("All values (config.yaml)", tag("pre", whole)),
    )


def shown_setting(value: Any) -> str:
    """As YAML has it, so that it can be given on the command line."""
    return "null" if value is None else json.dumps(value) if not isinstance(value, str) else value


def differences(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, default) of every setting that is not the schema's default."""
    from training.run_directory import plain
    from training.schema import SCHEMAS, TrainConfig

    free = {item.name for item in fields(TrainConfig) if item.metadata.get("free")} - {"logger"}
    defaults = plain(TrainConfig())
    for group, options in SCHEMAS.items():
        given = config.get(group)
        for option in options.values():
            if isinstance(given, Mapping) and given.keys() == {f.name for f in fields(option)}:
                defaults[group] = plain(option())
    before = dict(page.flat(defaults))
    return [
        (key, value, before.get(key))
        for key, value in page.flat(config)
        if value != before.get(key) and key not in (*free, "experiment")
    ]


def provenance(run: RunFiles) -> Html | None:
    """Where the numbers come from: what it takes to make them again."""
    if not run.env:
        return None
    env = dict(run.env)
    diff = env.pop("dirty_diff", "")
    if "commit" in env:
        env["commit"] = f"{env['commit']}{' with uncommitted changes' if diff else ''}"
    parts = [page.facts(env)]
    if diff:
        rest = f"\n... {len(diff) - MAX_DIFF:,} more characters in env.json"
        text = diff[:MAX_DIFF] + (rest if len(diff) > MAX_DIFF else "")
        parts.append(page.folded("Uncommitted changes", tag("pre", text)))
    return page.section("Environment", *parts)
