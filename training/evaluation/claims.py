"""experiments/<paper>/claims.yaml: what a paper claims, how it is measured, what must fail.

    title, about        the paper's short name and its line in the README's table
    paper               null, or {title, year, arxiv}; null is a baseline of our own
    runs                name -> {experiment, seeds, overrides, alone,
                                 scales: {scale: {seeds, overrides}}}
                        `<run:name>` in an override stands for the directory of that run, of the
                        same seed, which is made first: a run above that this one begins from
    names               scale -> {name: value}; `<name>` in any text stands for the scale's value
    claims              [{id, statement, published, run, metric, minus, wins, direction,
                          threshold, chance, floors, ceilings, controls, reason}]

A metric is a key of the run's results.json: `eval/bpb` below `metrics`, or any nested path such as
`floors/seen/order_2`. A claim compares `metric`, or `metric - minus`, with the threshold of the
scale; a scale without a threshold is not judged. With `wins: true` both are lists, measured on the
same groups of data, and what is compared is the share of groups in which `metric` is the smaller.
claims_file.py reads the file, verdicts.py judges.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from training.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERIMENTS = ROOT / "experiments"
RUN = re.compile(r"<run:(\w+)>")
SCALES = ("cpu", "h200", "paper")


class Direction(StrEnum):
    """How the mean must stand to the threshold: <=, >=, or |mean| <= threshold."""

    below = "below"
    above = "above"
    within = "within"


@dataclass(frozen=True)
class Publication:
    """The paper behind a folder."""

    title: str
    year: int
    arxiv: str | None


@dataclass(frozen=True)
class Published:
    """A number as the paper prints it."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class RunSpec:
    """Runs of one experiment, one per seed. `scales` replaces seeds and adds overrides.

    `alone`: what it measures is time, so that no other run may be at work beside it.
    """

    experiment: str
    seeds: int
    overrides: tuple[str, ...]
    scales: dict[str, tuple[int | None, tuple[str, ...]]]
    alone: bool

    @property
    def begins_from(self) -> list[str]:
        """Names of the runs that overrides speak of."""
        every = [self.overrides, *(overrides for _, overrides in self.scales.values())]
        return [name for overrides in every for text in overrides for name in RUN.findall(text)]

    def at(self, scale: str) -> tuple[int, tuple[str, ...]]:
        """Number of seeds and overrides at a scale."""
        seeds, overrides = self.scales.get(scale, (None, ()))
        return seeds or self.seeds, self.overrides + overrides


@dataclass(frozen=True)
class Ref:
    """One number of the results of a run."""

    run: str
    metric: str

    def label(self, home: str) -> str:
        """The metric, with its run where that is not `home`."""
        return self.metric if self.run == home else f"{self.run}: {self.metric}"


@dataclass(frozen=True)
class Criterion:
    """A measured number and where it must lie. A control is one of its own."""

    id: str
    statement: str
    metric: Ref
    minus: Ref | float | None
    direction: Direction
    threshold: dict[str, float]
    wins: bool = field(default=False, kw_only=True)

    def refs(self) -> list[Ref]:
        """Everything that is read from runs."""
        return [ref for ref in (self.metric, self.minus) if isinstance(ref, Ref)]


@dataclass(frozen=True)
class Claim(Criterion):
    """What the paper says, beside what is trivial and what is best possible."""

    published: Published | None
    chance: float | None
    floors: tuple[Ref, ...]
    ceilings: tuple[Ref, ...]
    controls: tuple[Criterion, ...]
    reason: dict[str, str]

    def all_refs(self) -> list[Ref]:
        """Everything that is read from runs, controls included."""
        return [
            *self.refs(),
            *self.floors,
            *self.ceilings,
            *(ref for control in self.controls for ref in control.refs()),
        ]


@dataclass(frozen=True)
class PaperClaims:
    """A whole claims.yaml; `name` is the folder's."""

    name: str
    file: Path
    title: str
    about: str
    paper: Publication | None
    runs: dict[str, RunSpec]
    names: dict[str, dict[str, str]]
    claims: tuple[Claim, ...]
    shows: tuple[tuple[str, str], ...] = ()
    "Run, figure: what is kept of the pictures that its first seed left."

    def at(self, scale: str) -> PaperClaims:
        """The same with every `<name>` replaced. Raises UserError for one that the scale lacks."""
        return filled(
            self, self.names.get(scale, {}), f"experiments/{self.name}/claims.yaml: names.{scale}"
        )

    def scales(self) -> list[str]:
        """Scales at which at least one claim is judged."""
        return [s for s in SCALES if any(s in claim.threshold for claim in self.claims)]

    def needed(self, scale: str) -> list[str]:
        """Names of the runs that the claims judged at `scale` read, after those they begin from."""
        judged = [claim for claim in self.claims if scale in claim.threshold]
        used = {ref.run for claim in judged for ref in claim.all_refs()}
        for name in reversed(self.runs):  # those that others begin from are above them
            used |= set(self.runs[name].begins_from) if name in used else set()
        return [name for name in self.runs if name in used]


def filled(value: Any, names: Mapping[str, str], where: str) -> Any:
    """A copy in which `<name>`, in whatever text, is what `names` says."""

    def meaning(found: re.Match[str]) -> str:
        if found[1] not in names:
            raise UserError(f"{where} has no `{found[1]}`, which `{found.string}` needs")
        return names[found[1]]

    match value:
        case Enum():
            return value
        case str():
            return re.sub(r"<([a-z_]+)>", meaning, value)
        case tuple():
            return tuple(filled(item, names, where) for item in value)
        case dict():
            return {key: filled(item, names, where) for key, item in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            changed = {f.name: filled(getattr(value, f.name), names, where) for f in fields(value)}
            return replace(value, **changed)
    return value
