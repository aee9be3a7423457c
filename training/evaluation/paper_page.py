"""The page of a paper: every claim with its verdict, its numbers and its controls.

Reads experiments/<paper>/claims.yaml, results/<scale>.json and figures/, and nothing else: what is
shown is what was recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from training.evaluation import page, plots
from training.evaluation.claims import PaperClaims
from training.evaluation.claims_file import load_claims
from training.evaluation.page import Html, shown, tag
from training.evaluation.tables import explained, formula, limit, number, read_results, spread
from training.logging import clock

VERDICTS = {"reproduced": "good", "direction only": "fair", "not reproduced": "bad"}
Record = Mapping[str, Any]


def paper_page(paper: str, experiments_root: Path) -> tuple[str, list[Html | None]]:
    """Title and sections. Raises UserError for an unknown paper or a claims.yaml with a mistake."""
    claims = load_claims(paper, experiments_root)
    recorded = read_results(claims)
    sections = [scale_section(claims, results) for results in recorded.values()]
    if not recorded:
        sections = [not_run(claims)]
    return claims.title, [title(claims), *sections]


def title(claims: PaperClaims) -> Html:
    """What the folder is about, and the paper behind it."""
    cited = None
    if claims.paper is not None:
        arxiv = f", arXiv:{claims.paper.arxiv}" if claims.paper.arxiv else ""
        cited = tag("p", f"{claims.paper.title} ({claims.paper.year}{arxiv})", class_="quiet")
    return tag("header", tag("h1", claims.title), tag("p", claims.about), cited)


def not_run(claims: PaperClaims) -> Html:
    """The claims of a paper that nobody has judged here."""
    command = tag("code", f"afferent reproduce paper={claims.name} scale=cpu")
    said = claims.at(claims.scales()[0]).claims
    listed = [(claim.statement, page.badge("not run", "none")) for claim in said]
    return page.section(
        "Claims", tag("p", "No results are recorded. ", command), page.table([], listed)
    )


def scale_section(claims: PaperClaims, results: Record) -> Html:
    """Everything that was recorded at one scale."""
    folder = claims.file.parent / "figures"
    pictures = page.pictures(folder, f"{results['scale']}_*")
    return page.section(
        f"Scale {results['scale']}",
        tag("p", f"{verdicts(results)}. Intervals are 95 % (Student t over seeds)."),
        *(claim_card(record) for record in results["claims"]),
        tag("div", *pictures, class_="grid") if pictures else None,
        curves(results),
        provenance(results),
    )


def verdicts(results: Record) -> str:
    """`3 reproduced, 1 direction only`."""
    counts = Counter(record["verdict"] for record in results["claims"])
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "No claims"


def claim_card(record: Record) -> Html:
    """One claim: statement and verdict, numbers, the plot of its seeds, its controls."""
    verdict = record["verdict"]
    why = explained(record)
    return tag(
        "article",
        tag(
            "header",
            tag("h3", record["statement"]),
            page.badge(verdict, VERDICTS.get(verdict, "none")),
        ),
        tag("p", why, class_="notice") if why else None,
        tag("div", numbers(record), seeds_chart(record), class_="grid"),
        controls(record.get("controls") or []),
        class_="claim",
        id=record["id"],
    )


def numbers(record: Record) -> Html:
    """Published, measured, threshold, floors and ceilings."""
    published = record.get("published")
    rows: list[tuple[Any, Any]] = [("claim", tag("code", record["id"]))]
    if published:
        said = f"{number(published['value'])} {published['unit']} ({published['source']})"
        rows.append(("published", said))
    rows.append(("metric", tag("code", formula(record))))
    if record.get("values"):
        rows.append(("measured", tag("strong", spread(record))))
    if record.get("threshold") is not None:
        rows.append(("must be", limit(record)))
    for kind, key in (("part", "measured"), ("floor", "floors"), ("ceiling", "ceilings")):
        for name, value in (record.get(key) or {}).items():
            rows.append((kind, page.join([tag("code", name), " ", shown(value)])))
    return page.table([], rows, "facts")


def seeds_chart(record: Record) -> Html | None:
    """Each seed, mean and interval, beside the threshold; the controls on rows of their own."""
    groups = {"claim": finite(record.get("values"))}
    groups |= {
        f"control {control['id']}": finite(control.get("values"))
        for control in record.get("controls") or []
        if formula(control) == formula(record)
    }
    if not groups["claim"]:
        return None
    wanted = {"threshold": record.get("threshold"), "chance": record.get("chance")}
    marks = {name: value for name, value in wanted.items() if value is not None}
    xlabel = plots.label(record["metric"]) if record.get("minus") is None else formula(record)
    drawn = plots.dot_chart({k: v for k, v in groups.items() if v}, xlabel, marks)
    return page.chart(drawn, "a point per seed; mean and 95 % interval")


def finite(values: Iterable[float | None] | None) -> list[float]:
    return [value for value in values or [] if value is not None and math.isfinite(value)]


def controls(records: Iterable[Record]) -> Html | None:
    """What had to come out as well, or the claim would mean nothing."""
    rows = [
        (
            page.badge("holds", "good") if control["holds"] else page.badge("fails", "bad"),
            control["statement"],
            spread(control),
            limit(control),
        )
        for control in records
    ]
    return page.table(["control", "", "measured", "must be"], rows) if rows else None


def curves(results: Record) -> Html | None:
    """Mean over seeds of what each run logged, with its interval; one chart per metric."""
    lines: dict[str, list[plots.Line]] = {}
    for name, seeds in (results.get("curves") or {}).items():
        steps = seeds[0]["step"]
        if any(seed["step"] != steps for seed in seeds):
            seeds = seeds[:1]  # seeds that stopped at different steps have no mean curve
        for key in seeds[0]:
            if key != "step" and all(key in seed for seed in seeds):
                line = plots.mean_curve(name, steps, [seed[key] for seed in seeds])
                lines.setdefault(key, []).append(without_gaps(line))
    charts = [
        page.chart(plots.line_chart(found, plots.label(key)), tag("code", key))
        for key, found in lines.items()
        if any(len(line.x) > 1 and len(set(line.y)) > 1 for line in found)
    ]
    if not charts:
        return None
    return page.folded("Learning curves", tag("div", *charts, class_="grid"))


def without_gaps(line: plots.Line) -> plots.Line:
    """Only the steps at which a metric was logged: evaluations are rarer than training rows."""
    kept = [i for i, y in enumerate(line.y) if math.isfinite(y)]
    band = line.band and tuple([edge[i] for i in kept] for edge in line.band)
    x, y = ([values[i] for i in kept] for values in (line.x, line.y))
    return plots.Line(line.label, x, y, band)  # type: ignore[arg-type]


def provenance(results: Record) -> Html:
    """Where the numbers come from; the runs that made them."""
    known = ("commit", "dirty", "date", "hardware", "versions", "wall_s", "seeds")
    found = {key: results[key] for key in known if key in results}
    if "wall_s" in found:
        found["wall_s"] = clock(found["wall_s"])
    runs = [
        (
            tag("code", name),
            run.get("experiment", ""),
            tag("code", " ".join(run.get("overrides", []))),
            shown(run.get("seeds", [])),
            shown(run.get("failure", "finished")),
        )
        for name, run in (results.get("runs") or {}).items()
    ]
    table = page.table(["run", "experiment", "overrides", "seeds", ""], runs) if runs else None
    return page.folded("Runs and environment", table, page.facts(found))
