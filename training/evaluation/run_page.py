"""The page of a run: headline beside its floors, curves, sample, data, configuration, origin.

A section of which the run has left nothing is left out, so an unfinished run gets a page as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from training.evaluation import page, plots
from training.evaluation.page import Html, shown, tag
from training.evaluation.run_files import (
    FLOORS_LOSS,
    FLOORS_METRIC,
    OWN,
    RunFiles,
    experience,
    headline,
    ranking,
)
from training.logging import Row, clock, human

FLOOR_NOTES = {
    "uniform": "every token equally likely",
    "seen/": "n-gram model of that order, trained on exactly the text this model has been shown",
    "corpus/": "n-gram model of that order, trained on the whole training corpus",
    "gzip": "the held-out text compressed by itself",
    "xz": "the held-out text compressed by itself",
}
MAX_DIFF = 20_000  # characters on the page
STATES = {"finished": "good", "running": "fair", "interrupted": "fair", "failed": "bad"}
PREFIXES = ("train", "eval", "opt", "perf")


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
        by = run.results.get("stopped_by", "steps")
        return None if by == "steps" else tag("p", f"Ended early by its {by}.", class_="notice")
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
    from training.options import SCHEMAS
    from training.run_directory import plain
    from training.schema import TrainConfig

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
