"""Reads claims.yaml strictly: a typo, a missing key or a wrong type is one sentence that names the
file, the claim and the key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from training.config import did_you_mean
from training.errors import UserError
from training.evaluation.claims import (
    EXPERIMENTS,
    SCALES,
    Claim,
    Criterion,
    Direction,
    PaperClaims,
    Publication,
    Published,
    Ref,
    RunSpec,
)

OWNED = ("experiment", "scale", "seed", "run", "runs_dir", "dry_run")  # keys the protocol sets
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}
REQUIRED: Any = object()
T = TypeVar("T")


class Fields:
    """One mapping of the file, taken key by key; what is left over is unknown."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, not {value!r}")
        self.left, self.where, self.known = dict(value), where, []

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, checked; `default` where it is missing or null."""
        self.known.append(key)
        missing = key not in self.left
        value = self.left.pop(key, None)
        if value is None and default is not REQUIRED:
            return default
        if missing:
            near = did_you_mean(key, list(self.left))
            raise UserError(f"{self.where}: the key `{key}` is missing.{near}")
        return checked(value, kind, f"{self.where}: `{key}`")

    def raw(self, key: str) -> Any:
        """The value of an optional key whose type the caller checks."""
        self.known.append(key)
        return self.left.pop(key, None)

    def done(self) -> None:
        for key in self.left:
            raise UserError(
                f"{self.where}: there is no key `{key}`.{did_you_mean(str(key), self.known)} "
                f"Use: {', '.join(self.known)}"
            )


def checked(value: Any, kind: type, where: str) -> Any:
    """`value` as `kind`. Raises UserError; a bool is no number, an int is one."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        hint = "; put it in quotes" if kind is str else ""
        raise UserError(f"{where} must be {NAMES[kind]}, not {value!r}{hint}")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where} is empty")
    return float(value) if kind is float else value


def papers(experiments_root: Path = EXPERIMENTS) -> list[str]:
    """Folders that hold a claims.yaml."""
    return sorted(file.parent.name for file in experiments_root.glob("*/claims.yaml"))


def load_claims(paper: str, experiments_root: Path = EXPERIMENTS) -> PaperClaims:
    """Read and check a paper's claims. Raises UserError naming file, claim and key."""
    from omegaconf import OmegaConf

    known = papers(experiments_root)
    if paper not in known:
        near = did_you_mean(paper, known)
        raise UserError(f"There is no paper `{paper}`.{near} There are: {', '.join(known)}")
    file = experiments_root / paper / "claims.yaml"
    where = f"experiments/{paper}/claims.yaml"
    try:
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:  # YAML's and OmegaConf's share no base
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    fields = Fields(tree, where)
    title, about = fields.take("title", str), fields.take("about", str)
    paper_info = optional(fields, "paper", publication)
    runs = {
        str(name): run_spec(spec, f"{where}: run {name}")
        for name, spec in fields.take("runs", dict).items()
    }
    names = {
        known_scale(scale, f"{where}: `names`"): meanings(part, f"{where}: names.{scale}")
        for scale, part in fields.take("names", dict, {}).items()
    }
    claims = tuple(claim(item, where, runs) for item in fields.take("claims", list))
    shows = tuple(shown(item, f"{where}: `shows`") for item in fields.take("shows", list, []))
    fields.done()
    found = PaperClaims(paper, file, title, about, paper_info, runs, names, claims, shows)
    check_whole(found, where)
    return found


def meanings(value: Any, where: str) -> dict[str, str]:
    """What `<name>` stands for at a scale: words or numbers, as text."""
    for name, meaning in checked(value, dict, where).items():
        if not isinstance(meaning, str | int | float) or isinstance(meaning, bool):
            raise UserError(f"{where}.{name} must be a number or text, not {meaning!r}")
    return {str(name): str(meaning) for name, meaning in value.items()}


def shown(value: Any, where: str) -> tuple[str, str]:
    """`run/figure` as the two names."""
    run, _, figure = checked(value, str, where).partition("/")
    if not (run and figure) or "/" in figure:
        raise UserError(f"{where}: `{value}` must be a run and one of its figures, run/figure")
    return run, figure


def check_whole(found: PaperClaims, where: str) -> None:
    """Identifiers are unique, every run is of use, there is something to judge."""
    if not found.claims:
        raise UserError(f"{where}: `claims` is empty")
    unique([claim.id for claim in found.claims], f"{where}: claims")
    used = {ref.run for claim in found.claims for ref in claim.all_refs()}
    above: list[str] = []
    for name, figure in found.shows:
        if name not in found.runs:
            raise UserError(
                f"{where}: `shows`: {name}/{figure}: there is no run `{name}`."
                f"{did_you_mean(name, list(found.runs))} There are: {', '.join(found.runs)}"
            )
    for name, spec in found.runs.items():
        for other in spec.begins_from:
            check_begins(found, name, other, above, f"{where}: run {name}")
            used.add(other)
        above.append(name)
    for name in found.runs:
        if name not in used:
            raise UserError(f"{where}: no claim reads the run `{name}`; remove it or use it")
    for scale in found.scales():
        found.at(scale)


def check_begins(found: PaperClaims, name: str, other: str, above: list[str], where: str) -> None:
    """What a run begins from is above it, has its seeds, and does not wait for all others."""
    if other not in above:
        raise UserError(f"{where}: `<run:{other}>` must name a run above it; there are: {above}")
    if found.runs[other].alone:
        raise UserError(f"{where}: `<run:{other}>` is made alone, after all others")
    for scale in found.scales():
        own, its = (found.runs[each].at(scale)[0] for each in (name, other))
        if own > its:
            raise UserError(f"{where}: has {own} seeds at {scale}, and `<run:{other}>` only {its}")


def unique(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: the id `{name}` is given twice")


def optional(fields: Fields, key: str, build: Callable[[Any, str], T]) -> T | None:
    """`build` applied to a key that may be null or absent."""
    value = fields.raw(key)
    return None if value is None else build(value, f"{fields.where}: `{key}`")


def publication(value: Any, where: str) -> Publication:
    fields = Fields(value, where)
    found = Publication(
        fields.take("title", str), fields.take("year", int), fields.take("arxiv", str, None)
    )
    fields.done()
    return found


def published(value: Any, where: str) -> Published:
    fields = Fields(value, where)
    found = Published(
        fields.take("value", float), fields.take("unit", str), fields.take("source", str)
    )
    fields.done()
    return found


def run_spec(value: Any, where: str) -> RunSpec:
    fields = Fields(value, where)
    experiment = fields.take("experiment", str)
    seeds, overrides = seeds_and_overrides(fields, 1)
    assert seeds is not None
    scales = {}
    for scale, part in fields.take("scales", dict, {}).items():
        inner = Fields(part, f"{where}: scales.{known_scale(scale, f'{where}: `scales`')}")
        scales[scale] = seeds_and_overrides(inner, None)
        inner.done()
    alone = fields.take("alone", bool, False)
    fields.done()
    return RunSpec(experiment, seeds, overrides, scales, alone)


def seeds_and_overrides(fields: Fields, default: int | None) -> tuple[int | None, tuple[str, ...]]:
    seeds = fields.take("seeds", int, default)
    if seeds is not None and seeds < 1:
        raise UserError(f"{fields.where}: `seeds` must be at least 1, not {seeds}")
    overrides = fields.take("overrides", list, [])
    for item in overrides:
        checked(item, str, f"{fields.where}: an item of `overrides`")
        key = item.partition("=")[0].lstrip("+~")
        if "=" not in item or key in OWNED:
            why = "the protocol sets that key" if key in OWNED else "expected key=value"
            raise UserError(f"{fields.where}: override `{item}`: {why}")
    return seeds, tuple(overrides)


def known_scale(scale: Any, where: str) -> str:
    return one_of(scale, SCALES, "scale", where)


def one_of(given: Any, known: Sequence[str], what: str, where: str) -> str:
    """`given`, if it is known. Raises UserError with the nearest of `known`."""
    if given not in known:
        near = did_you_mean(str(given), known)
        raise UserError(f"{where}: there is no {what} `{given}`.{near} Use: {', '.join(known)}")
    return given


def claim(value: Any, where: str, runs: dict[str, RunSpec]) -> Claim:
    name = value.get("id") if isinstance(value, dict) else value
    fields = Fields(value, f"{where}: claim {name}")
    base = criterion(fields, runs)
    home = base.metric.run
    chance = fields.take("chance", float, None)
    controls = []
    for item in fields.take("controls", list, []):
        label = item.get("id") if isinstance(item, dict) else item
        inner = Fields(item, f"{fields.where}: control {label}")
        controls.append(criterion(inner, runs))
        inner.done()
        if lacking := [s for s in base.threshold if s not in controls[-1].threshold]:
            raise UserError(f"{inner.where}: `threshold` lacks the claim's {', '.join(lacking)}")
    unique([control.id for control in controls], f"{fields.where}: controls")
    found = Claim(
        **vars(base),
        published=optional(fields, "published", published),
        chance=chance,
        floors=refs(fields, "floors", home, runs),
        ceilings=refs(fields, "ceilings", home, runs),
        controls=tuple(controls),
        reason=reasons(fields),
    )
    fields.done()
    check_chance(found, fields.where)
    return found


def criterion(fields: Fields, runs: dict[str, RunSpec]) -> Criterion:
    """The keys that claims and controls share."""
    name = fields.take("id", str)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{fields.where}: `id` must be lower-case words joined by _, not {name!r}")
    home = fields.take("run", str)
    metric = ref({"run": home, "metric": fields.take("metric", str)}, fields.where, home, runs)
    minus = fields.raw("minus")
    if isinstance(minus, int | float) and not isinstance(minus, bool):
        minus = float(minus)
    elif minus is not None:
        minus = ref(minus, f"{fields.where}: `minus`", home, runs)
    statement, direction = fields.take("statement", str), fields.take("direction", str)
    direction = Direction(one_of(direction, list(Direction), "direction", fields.where))
    wins = fields.raw("wins") or False
    if not isinstance(wins, bool) or (wins and not isinstance(minus, Ref)):
        raise UserError(
            f"{fields.where}: `wins` must be true or false, and with true `minus` names what is "
            "compared, group by group"
        )
    limits = thresholds(fields, direction)
    return Criterion(name, statement, metric, minus, direction, limits, wins=wins)


def thresholds(fields: Fields, direction: Direction) -> dict[str, float]:
    """Scale -> limit. A scale that is left out is not judged."""
    found = {}
    for scale, limit in fields.take("threshold", dict).items():
        known_scale(scale, f"{fields.where}: `threshold`")
        found[scale] = checked(limit, float, f"{fields.where}: `threshold.{scale}`")
        if not math.isfinite(found[scale]) or (direction == Direction.within and found[scale] < 0):
            raise UserError(f"{fields.where}: `threshold.{scale}`={limit} cannot judge {direction}")
    if not found:
        raise UserError(f"{fields.where}: `threshold` is empty; give one for {', '.join(SCALES)}")
    return found


def ref(value: Any, where: str, home: str, runs: dict[str, RunSpec]) -> Ref:
    """A metric of the claim's own run, or {run, metric} of another one."""
    fields = Fields({"metric": value} if isinstance(value, str) else value, where)
    found = Ref(fields.take("run", str, home), fields.take("metric", str))
    fields.done()
    one_of(found.run, list(runs), "run", where)
    return found


def refs(fields: Fields, key: str, home: str, runs: dict[str, RunSpec]) -> tuple[Ref, ...]:
    items = fields.take(key, list, [])
    return tuple(ref(item, f"{fields.where}: `{key}`", home, runs) for item in items)


def reasons(fields: Fields) -> dict[str, str]:
    """Why a claim did not come out: one text for every scale, or one per scale."""
    value = fields.raw("reason")
    if value is None:
        return {}
    where = f"{fields.where}: `reason`"
    if not isinstance(value, dict):
        return dict.fromkeys(SCALES, checked(value, str, where))
    return {known_scale(k, where): checked(v, str, f"{where}.{k}") for k, v in value.items()}


def check_chance(found: Claim, where: str) -> None:
    """A threshold that chance itself meets would prove nothing."""
    if found.chance is None:
        return
    if found.direction == Direction.within:
        raise UserError(f"{where}: `chance` means nothing with `direction: within`; remove it")
    sign = 1 if found.direction == Direction.above else -1
    for scale, limit in found.threshold.items():
        if sign * (limit - found.chance) < 0:
            raise UserError(
                f"{where}: `threshold.{scale}`={limit:g} is met by chance itself "
                f"({found.chance:g}); `direction` is {found.direction}"
            )
