"""From the results of runs to a verdict per claim.

    reproduced       the mean over seeds meets the threshold, the effect is clear of chance, and
                     every control behaves as it must
    direction only   no control is broken and the effect is clear of chance, but the threshold is
                     missed (`within`: the mean is inside, the interval reaches out)
    not reproduced   anything else: wrong side, not clear of chance, a value that is not finite, or
                     a broken control, after which the measured effect is evidence of nothing
    not run          no threshold at this scale, or a run it needs did not finish

Clear of chance means that the 95 % interval over seeds (Student t) lies wholly on the claimed side
of `chance`; one seed has no interval, its value must lie there, and it cannot earn *direction
only*. `within` is an equivalence claim: its whole interval must lie in [-threshold, threshold].
A control holds when its mean meets its own threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from training.config import did_you_mean
from training.errors import UserError
from training.evaluation import statistics
from training.evaluation.claims import Claim, Criterion, Direction, PaperClaims, Ref

Results = dict[str, Any]
Interval = tuple[float, float]


class Verdict(StrEnum):
    reproduced = "reproduced"
    direction_only = "direction only"
    not_reproduced = "not reproduced"
    not_run = "not run"


@dataclass
class RunOutcome:
    """results.json of each seed of a run, in the order of the seeds; or why there are none."""

    results: list[Results] = field(default_factory=list)
    failure: str | None = None


Outcomes = Mapping[str, RunOutcome]


def lookup(results: Results, metric: str) -> Any:
    """The value at `metric`: below `metrics`, or at a path whose keys may contain slashes."""
    found = descend(results.get("metrics", {}), metric)
    return descend(results, metric) if found is None else found


def descend(tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        return None
    if path in tree:
        return tree[path]
    found = (descend(tree[k], path[len(k) + 1 :]) for k in tree if path.startswith(f"{k}/"))
    return next((value for value in found if value is not None), None)


def numbers(results: Results, prefix: str = "") -> list[str]:
    """Every path of a results.json that leads to a number."""
    found = []
    for key, value in results.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            found += numbers(value, "" if path == "metrics" else f"{path}/")
        elif isinstance(value, int | float):
            found.append(path)
    return found


def read(ref: Ref, outcomes: Outcomes, where: str) -> list[float]:
    """The metric of every seed; null, which stands for a non-finite number, becomes nan."""
    values = []
    for results in outcomes[ref.run].results:
        value = lookup(results, ref.metric)
        known = numbers(results)
        if value is None and ref.metric not in null_paths(results):
            raise UserError(
                f"{where}: results.json of the run `{ref.run}` has no number `{ref.metric}`."
                f"{did_you_mean(ref.metric, known)} It has: {', '.join(known)}"
            )
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{where}: `{ref.metric}` of the run `{ref.run}` is no number")
        values.append(math.nan if value is None else float(value))
    return values


def read_groups(ref: Ref, outcomes: Outcomes, where: str) -> list[list[float]]:
    """The list of numbers of every seed, one per group of data."""
    found = [lookup(results, ref.metric) for results in outcomes[ref.run].results]
    if not all(isinstance(values, list) and values for values in found):
        raise UserError(
            f"{where}: results.json of the run `{ref.run}` has no list `{ref.metric}`, "
            "which `wins: true` compares group by group"
        )
    return [[math.nan if value is None else float(value) for value in row] for row in found]


def share_of_wins(values: list[float], others: list[float], where: str) -> float:
    """The share of groups in which the first is the smaller. Raises UserError if they differ."""
    if len(values) != len(others):
        raise UserError(f"{where}: {len(values)} and {len(others)} groups cannot be paired")
    return sum(a < b for a, b in zip(values, others, strict=True)) / len(values)


def null_paths(results: Results) -> list[str]:
    """Metrics that were recorded as null."""
    return [key for key, value in results.get("metrics", {}).items() if value is None]


def measure(criterion: Criterion, outcomes: Outcomes, where: str) -> list[float]:
    """One value per seed: the metric, less `minus`. Another run's is paired by the seed's index.

    Every run of a paper uses the first of the same seeds, so pairs exist up to the shorter one.
    """
    if criterion.wins:
        assert isinstance(criterion.minus, Ref)
        groups = [read_groups(ref, outcomes, where) for ref in (criterion.metric, criterion.minus)]
        return [share_of_wins(a, b, where) for a, b in zip(*groups, strict=False)]
    values = read(criterion.metric, outcomes, where)
    if isinstance(criterion.minus, Ref):
        other = read(criterion.minus, outcomes, where)
        return [a - b for a, b in zip(values, other, strict=False)]
    constant = criterion.minus or 0.0
    return [value - constant for value in values]


def summary(values: list[float]) -> tuple[float, Interval | None]:
    """Mean and 95 % interval over seeds; no interval for one seed or values that are not finite."""
    return statistics.mean(values), statistics.interval(values)


def meets(direction: Direction, value: float, threshold: float) -> bool:
    """Whether a value lies where it must; nan lies nowhere."""
    if direction == Direction.within:
        return abs(value) <= threshold
    return value <= threshold if direction == Direction.below else value >= threshold


def decide(
    claim: Claim, threshold: float, mean: float, spread: Interval | None, broken: list[str]
) -> tuple[Verdict, str | None]:
    """The verdict, and why where it is not *reproduced*."""
    if not math.isfinite(mean):
        return Verdict.not_reproduced, "a measured value is not finite"
    if broken:
        plural = "s do" if len(broken) > 1 else " does"
        return Verdict.not_reproduced, f"the control{plural} not hold: {', '.join(broken)}"
    met = meets(claim.direction, mean, threshold)
    clear = clear_of_chance(claim, threshold, mean, spread)
    if claim.direction == Direction.within:
        if met and not clear:
            return Verdict.direction_only, "the interval reaches beyond the threshold"
    elif not clear:
        return Verdict.not_reproduced, f"the effect is not clear of chance ({claim.chance:g})"
    if met:
        return Verdict.reproduced, None
    side = "outside" if claim.direction == Direction.within else f"not {claim.direction}"
    because = f"the mean {mean:.4g} is {side} the threshold {threshold:g}"
    effect = claim.chance is not None and spread is not None
    return (Verdict.direction_only if effect else Verdict.not_reproduced), because


def clear_of_chance(claim: Claim, threshold: float, mean: float, spread: Interval | None) -> bool:
    """Whether the interval (of one seed: the value) lies where noise alone would not put it."""
    low, high = spread or (mean, mean)
    if claim.direction == Direction.within:
        return -threshold <= low and high <= threshold
    if claim.chance is None:
        return True
    return high < claim.chance if claim.direction == Direction.below else low > claim.chance


def judge(claim: Claim, scale: str, outcomes: Outcomes, where: str) -> dict[str, Any]:
    """The record of a claim in results/<scale>.json."""
    home = claim.metric.run
    record: dict[str, Any] = {
        **described(claim, scale),
        "published": None if claim.published is None else vars(claim.published),
        "chance": claim.chance,
        **{key: None for key in ("values", "mean", "interval")},
        **{"measured": {}, "floors": {}, "ceilings": {}, "controls": []},
        "verdict": Verdict.not_run,
        "because": None,
        "reason": None,
    }
    if why := not_runnable(claim, scale, outcomes):
        return {**record, "because": why, "reason": claim.reason.get(scale)}
    where = f"{where}: claim {claim.id}"
    values = measure(claim, outcomes, where)
    mean, spread = summary(values)
    controls = [
        judge_control(control, scale, outcomes, f"{where}: control {control.id}")
        for control in claim.controls
    ]
    broken = [control["id"] for control in controls if not control["holds"]]
    verdict, because = decide(claim, claim.threshold[scale], mean, spread, broken)
    record |= {"values": values, "mean": mean, "interval": spread}
    for key, refs in (
        ("measured", [] if claim.wins else claim.refs()),
        ("floors", claim.floors),
        ("ceilings", claim.ceilings),
    ):
        record[key] = {ref.label(home): summary(read(ref, outcomes, where))[0] for ref in refs}
    reason = None if verdict == Verdict.reproduced else claim.reason.get(scale)
    return {
        **record,
        "controls": controls,
        "verdict": verdict,
        "because": because,
        "reason": reason,
    }


def described(criterion: Criterion, scale: str) -> dict[str, Any]:
    """What a claim or control says, as it was when it was judged."""
    minus, home = criterion.minus, criterion.metric.run
    return {
        "id": criterion.id,
        "statement": criterion.statement,
        "run": home,
        "metric": criterion.metric.metric,
        "minus": minus.label(home) if isinstance(minus, Ref) else minus,
        **({"wins": True} if criterion.wins else {}),
        "direction": criterion.direction,
        "threshold": criterion.threshold.get(scale),
    }


def judge_control(control: Criterion, scale: str, outcomes: Outcomes, where: str) -> dict[str, Any]:
    """The record of a control; `holds` when its mean meets its threshold."""
    values = measure(control, outcomes, where)
    mean, spread = summary(values)
    return {
        **described(control, scale),
        "values": values,
        "mean": mean,
        "interval": spread,
        "holds": meets(control.direction, mean, control.threshold[scale]),
    }


def not_runnable(claim: Claim, scale: str, outcomes: Outcomes) -> str | None:
    """Why a claim cannot be judged at a scale, if so."""
    if scale not in claim.threshold:
        return f"no threshold at scale {scale}"
    for name in dict.fromkeys(ref.run for ref in claim.all_refs()):
        if name not in outcomes:
            return f"the run `{name}` was not made"
        if failure := outcomes[name].failure:
            return f"the run `{name}` did not finish: {failure}"
    return None


def judge_all(claims: PaperClaims, scale: str, outcomes: Outcomes) -> list[dict[str, Any]]:
    """A record per claim. Raises UserError where a metric is not in the results."""
    where = f"experiments/{claims.name}/claims.yaml"
    return [judge(claim, scale, outcomes, where) for claim in claims.claims]


def failures(records: list[dict[str, Any]]) -> list[str]:
    """Claims that are judged at this scale and did not come out."""
    judged = [record for record in records if record["threshold"] is not None]
    return [record["id"] for record in judged if record["verdict"] != Verdict.reproduced]
