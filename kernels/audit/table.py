"""What was recorded of the audit, as a markdown table: one line per kernel and chip."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kernels.audit.run import RECORDED

PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "QGMMA", "UTCQMMA", "IMMA", "IGMMA", "mfma")


def records() -> list[dict[str, Any]]:
    """Every recorded audit, oldest Triton first."""
    found = [json.loads(file.read_text()) for file in RECORDED.glob("*.json")]
    return sorted(found, key=lambda record: [int(part) for part in record["triton"].split(".")])


def markdown() -> str:
    """Every version's verdict, then kernels and chips under the newest."""
    audits = records()
    if not audits:
        return "*not run*"
    return "\n\n".join("\n".join(part) for part in (versions(audits), kernels(audits[-1])))


def versions(audits: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| Triton | tiles that pass | date | sources |"
    yield "| --- | --- | --- | --- |"
    for audit in audits:
        yield (
            f"| {audit['triton']} | {len(audit['tiles'])} of {len(audit['tiles'])} "
            f"| {audit['date']} | `{audit['sources']}` |"
        )


def kernels(audit: Mapping[str, Any]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, report in audit["tiles"].items():
        words = name.split()
        chip = next(word for word in words if word.startswith(("sm_", "gfx")))
        groups.setdefault((words[0], chip), []).append(report)
    title = f"kernel (Triton {audit['triton']})"
    yield f"| {title} | chip | tiles | registers | shared, kB | instructions |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (kernel, chip), reports in groups.items():
        counts = [report["instructions"] for report in reports]
        used = sorted({name for count in counts for name in PRODUCTS if count.get(name)})
        used += ["TMA"] * any("UTMALDG" in count for count in counts)
        used += ["setmaxnreg"] * any(count.get("setmaxnreg") for count in counts)
        yield (
            f"| `{kernel}` | {chip} | {len(reports)} | {spread(r['registers'] for r in reports)} "
            f"| {spread(round(r['shared'] / 1000) for r in reports)} | {', '.join(used) or '-'} |"
        )


def spread(values: Iterator[int]) -> str:
    """`96-210`, or the one value."""
    every = list(values)
    low, high = min(every), max(every)
    return str(low) if low == high else f"{low}-{high}"
