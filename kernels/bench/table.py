"""The results file as tables: text after a call, markdown for the README. Nothing is typed by hand.

A target that is missed carries its reason from `<results>.reasons.json` beside the file, {"<case>:
<target>": "why"}; without one the table says that none is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.bench import results
from kernels.bench.cases import Setting
from kernels.bench.results import Document, Row

NOT_RUN = "not run"


def load(path: Path) -> Document | None:
    """The results at a path; None where there are none."""
    return json.loads(path.read_text()) if path.exists() else None


def reasons_beside(path: Path) -> dict[str, str]:
    """Why targets were missed, by "<case>: <target>"."""
    file = path.with_suffix(".reasons.json")
    return json.loads(file.read_text()) if file.exists() else {}


def rate(row: Row, entry: Row, ceilings: Mapping[str, Any]) -> tuple[str, str]:
    """Achieved rate and its share of the nearer ceiling, as text."""
    seconds = entry["ms"]["p50"] / 1e3
    amounts = {"matmul": entry.get("flops", row["flops"]), "copy": entry.get("bytes", row["bytes"])}
    if row["through_host"]:
        amounts = {"host": amounts["copy"]}
    shares = {name: results.share(row, entry, name, ceilings) for name in amounts}
    name = max(shares, key=lambda each: shares[each])
    speed = amounts[name] / seconds
    shown = f"{speed / 1e12:.0f} TFLOP/s" if name == "matmul" else f"{speed / 1e9:.0f} GB/s"
    return shown, f"{100 * shares[name]:.0f} % of {name}"


def verdict(target: Mapping[str, Any]) -> str:
    """met, missed or not timed."""
    if target["met"] is None:
        return "not timed"
    return "met" if target["met"] else "missed"


def shown(value: float | None) -> str:
    """A ratio, to three digits; - if there is none."""
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def why_not(row: Row, target: Mapping[str, Any]) -> str:
    """Which side of a target was not timed, and what is known of it."""
    sides = (target["entry"], target["over"])
    missing = [
        f"{e['name']} {e['status']}: {e['reason']}"
        for e in row["entries"]
        if e["status"] != "timed" and any(e["name"].startswith(side) for side in sides if side)
    ]
    return "; ".join(missing) or "there is no such entry"


def baseline(row: Row) -> Row | None:
    """The entry that the others of its row are compared with: ours, the first."""
    return next((e for e in results.timed(row).values() if e["ours"]), None)


def lines(row: Row, ceilings: Mapping[str, Any]) -> Iterator[str]:
    """A case as text: each entry's time, rate, and how much longer it takes than ours."""
    shapes = " ".join(f"{name}{size}" for name, size in row["shapes"].items())
    yield f"{row['case']}  ({shapes}, {row['dtype']})"
    ours = baseline(row)
    for entry in row["entries"]:
        if entry["status"] != "timed":
            yield f"  {entry['name']:<34} {entry['status']}: {entry['reason'][:100]}"
            continue
        ms = entry["ms"]
        speed, share = rate(row, entry, ceilings)
        ratio = "" if ours is None else f"{ms['p50'] / ours['ms']['p50']:7.2f}x"
        spread = f"({ms['p20']:.4g}-{ms['p80']:.4g})"
        note = "" if entry["timed_by"] == "graph" else "  (events)"
        note += "" if entry["kernels"] else "  (its GPU kernels were not seen)"
        yield (
            f"  {entry['name']:<34} {ms['p50']:9.4g} ms {spread:<19} {ratio} "
            f"{speed:>12}  {share}{note}"
        )


def target_lines(document: Document) -> Iterator[str]:
    """Every target as text."""
    for row, target in results.targets(document):
        yield (
            f"  {shown(target['value']):>6}  asked {target['at_least']:<5g} {verdict(target):<9}  "
            f"{target['name']}  [{row['case']}]"
        )


def text(document: Document) -> str:
    """What a call prints last."""
    said = []
    for row in document["cases"]:
        if row["complete"]:
            said += lines(row, results.ceilings_of(document, row))
    return "\n".join([*said, "targets:", *target_lines(document)])


def markdown(path: Path) -> str:
    """GPU, ceilings, targets and times of a results file; every target as *not run* without it."""
    document = load(path)
    if document is None:
        return "\n".join(not_run())
    reasons = reasons_beside(path)
    return "\n\n".join(
        "\n".join(part)
        for part in (machines(document), verdicts(document, reasons), times(document))
    )


def not_run() -> Iterator[str]:
    """Every target there is; it has no figure."""
    from kernels.bench import SUITES
    from kernels.bench.suites import cases

    yield "| target | case | ratio | verdict |"
    yield "| --- | --- | --- | --- |"
    for suite in SUITES:
        for case in cases(suite, Setting("h200", "triton", 0)):
            for target in case.targets:
                yield f"| {target.name} | {case.id} | - | *{NOT_RUN}* |"


def machines(document: Document) -> Iterator[str]:
    """The calls: what they ran on, and its ceilings."""
    yield "| GPU | date | commit | torch, triton, driver | copy | 8192^3 bf16 matmul | host |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for call in document["calls"]:
        gpu, versions = call["gpu"], call["versions"]
        rates = {name: ceiling["rate"] for name, ceiling in call["ceilings"].items()}
        software = ", ".join(
            str(x) for x in (versions.get("torch"), versions.get("triton"), gpu.get("driver"))
        )
        yield (
            f"| {gpu['name']} | {call['date']} | {call['commit'][:10]} | {software} "
            f"| {rates['copy'] / 1e9:.0f} GB/s | {rates['matmul'] / 1e12:.0f} TFLOP/s "
            f"| {rates['host'] / 1e9:.1f} GB/s |"
        )


def verdicts(document: Document, reasons: Mapping[str, str]) -> Iterator[str]:
    """Every target with its ratio; one that is missed, with its reason."""
    yield "| target | case | ratio | verdict |"
    yield "| --- | --- | --- | --- |"
    for row, target in results.targets(document):
        said, key = verdict(target), f"{row['case']}: {target['name']}"
        if said == "met" and target["stretch"] is not None:
            reached = target["value"] >= target["stretch"]
            said += f", {'so is' if reached else 'not'} the stretch of {target['stretch']:g}"
        if said == "not timed":
            said = f"*{said}*: {why_not(row, target)}".replace("|", "/")
        elif said == "missed":
            said = f"**{said}**: {reasons.get(key, 'no reason is known yet')}"
        yield f"| {target['name']} | {row['case']} | {shown(target['value'])} | {said} |"


def times(document: Document) -> Iterator[str]:
    """Every case: ours, and how many times as long each peer takes."""
    yield "| case | shapes | ours | rate | of the ceiling | peers, times ours |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in document["cases"]:
        ours = baseline(row) if row["complete"] else None
        if ours is None:
            yield f"| {row['case']} | | *not timed* | | | |"
            continue
        speed, share = rate(row, ours, results.ceilings_of(document, row))
        peers = ", ".join(
            f"{name} {entry['ms']['p50'] / ours['ms']['p50']:.2f}"
            for name, entry in results.timed(row).items()
            if entry is not ours and not entry["variant"]
        )
        shapes = " ".join(f"{name}{size}" for name, size in row["shapes"].items())
        yield (
            f"| {row['case']} | {shapes} {row['dtype']} | {ours['ms']['p50']:.4g} ms | {speed} "
            f"| {share} | {peers} |"
        )
