"""The results file: what a call adds to it, what the next call may skip, and every ratio.

    calls   one for each call of the command: commit, date, versions, GPU, clocks, ceilings
    cases   one row for each case: the call it was measured in, the problem, and for each entry its
            times (with the samples), work, error and status; then the targets

A ratio is a quotient of medians that are in the file (`value`), so that whoever has the file can
compute it again. An entry's status:

    timed     right, seen to run as what it says it is, and timed
    wrong     too far from the oracle: not timed
    unseen    none of the GPU kernels it is named after ran: its time is no peer's
    refused   it raised: the reason is there (a peer that does not take these inputs)
    crashed   the process died or hung in it: later calls leave it out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kernels.bench.cases import Target

Row = dict[str, Any]
Document = dict[str, Any]

FORMAT = 1
LIMITS = {"copy": "bytes", "host": "bytes", "matmul": "flops"}
"Ceiling -> which part of the work it limits."


def empty() -> Document:
    return {"format": FORMAT, "calls": [], "cases": []}


def problem_with(document: Any, gpu: str | None) -> str | None:
    """Why the file cannot be continued on this GPU, or None."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"is not a results file of format {FORMAT}"
    names = {call["gpu"]["name"] for call in document["calls"]}
    if gpu is not None and names - {gpu}:
        return f"holds results of {', '.join(sorted(names))}, this is {gpu}"
    return None


def find(document: Document, case: str) -> Row | None:
    """The row of a case."""
    return next((row for row in document["cases"] if row["case"] == case), None)


def finished(document: Document, case: str, fingerprint: str) -> bool:
    """Whether the file has this case, of the same sources."""
    row = find(document, case)
    return row is not None and row["complete"] and row["fingerprint"] == fingerprint


def crashes(document: Document, case: str, fingerprint: str) -> dict[str, str]:
    """Entries that an earlier process died in, with what happened; not of other sources."""
    row = find(document, case)
    if row is None or row["fingerprint"] != fingerprint:
        return {}
    return {e["name"]: e["reason"] for e in row["entries"] if e["status"] == "crashed"}


def put(document: Document, row: Row) -> None:
    """Add a row, in the place of an older one of its case."""
    for index, old in enumerate(document["cases"]):
        if old["case"] == row["case"]:
            document["cases"][index] = row
            return
    document["cases"].append(row)


def put_crash(document: Document, case: str, fingerprint: str, entry: str, reason: str) -> None:
    """Note the entry that a process died in, until the case is measured without it."""
    row = find(document, case)
    if row is None or row["fingerprint"] != fingerprint or row["complete"]:
        row = {"case": case, "fingerprint": fingerprint, "complete": False, "entries": []}
        put(document, row)
    row["entries"].append({"name": entry, "status": "crashed", "reason": reason})


def timed(row: Row) -> dict[str, Row]:
    """Entries of a row whose times count, by name."""
    return {e["name"]: e for e in row["entries"] if e["status"] == "timed"}


def fastest(row: Row, name: str) -> Row | None:
    """The timed entry of that name; else the fastest of those whose names begin with it."""
    entries = timed(row)
    if name in entries:
        return entries[name]
    family = [entry for other, entry in entries.items() if other.startswith(f"{name} ")]
    return min(family, key=lambda entry: entry["ms"]["p50"], default=None)


def share(row: Row, entry: Row, ceiling: str, ceilings: Mapping[str, Any]) -> float:
    """The entry's rate over the ceiling's, from its median."""
    amount = entry.get(LIMITS[ceiling], row[LIMITS[ceiling]])
    return amount / (entry["ms"]["p50"] / 1e3) / ceilings[ceiling]["rate"]


def value(row: Row, target: Mapping[str, Any], ceilings: Mapping[str, Any]) -> float | None:
    """The ratio that a target asks for; None if one of its two sides was not timed."""
    ours = timed(row).get(target["entry"])
    if ours is None:
        return None
    if target["ms"] is not None:
        return target["ms"] / ours["ms"]["p50"]
    if target["ceiling"]:
        return share(row, ours, target["ceiling"], ceilings)
    peer = fastest(row, target["over"])
    return None if peer is None else peer["ms"]["p50"] / ours["ms"]["p50"]


def judged(row: Row, target: Target, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """A target with its ratio, and whether it is met (None: not timed)."""
    asked = {
        "name": target.name,
        "entry": target.entry,
        "over": target.over,
        "ceiling": target.ceiling,
        "ms": target.ms,
        "at_least": target.at_least,
        "stretch": target.stretch,
    }
    found = value(row, asked, ceilings)
    return {**asked, "value": found, "met": None if found is None else found >= target.at_least}


def ceilings_of(document: Document, row: Row) -> Mapping[str, Any]:
    """Those of the call in which a row was measured."""
    return document["calls"][row["call"]]["ceilings"]


def targets(document: Document) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every target of every complete row."""
    for row in document["cases"]:
        if row["complete"]:
            for target in row["targets"]:
                yield row, target


def wrong(document: Document) -> list[str]:
    """What must not be: a case that could not be set up, an entry of ours with its shipped tiles
    that was not timed."""
    return [f"{row['case']}: {row['reason']}" for row in document["cases"] if row.get("reason")] + [
        f"{row['case']}: {entry['name']} {entry['status']}: {entry['reason']}"
        for row in document["cases"]
        for entry in row["entries"]
        if row["complete"] and entry["ours"] and not entry["variant"]
        if entry["status"] != "timed"
    ]
