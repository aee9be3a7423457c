"""What was recorded of the parity runs, as markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kernels.parity.run import RECORDED

WHERE = {"interpret": "Interpreted on a CPU", "triton": "On a GPU"}


def markdown() -> str:
    """A table for each way the kernels run; *not run* where nothing is recorded."""
    parts = []
    for impl, title in WHERE.items():
        file = RECORDED / f"{impl}.json"
        lines = table(json.loads(file.read_text())) if file.exists() else ["*not run*"]
        parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def table(record: Mapping[str, Any]) -> Iterator[str]:
    yield "| op | dtype | cases that hold | largest relative error | of the tolerance |"
    yield "| --- | --- | --- | --- | --- |"
    for row in record["rows"]:
        if not row["cases"]:  # a dtype that the op does not have
            continue
        yield (
            f"| `{row['op']}` | {row['dtype']} | {row['hold']} of {row['cases']} "
            f"| {row['largest_relative_error']:.1e} | {row['largest_share_of_tolerance']:.0%} |"
        )
    yield ""
    yield (
        f"*{record['device']}, torch {record['torch']}, triton {record['triton']}, "
        f"{record['date']}, sources `{record['sources']}`.*"
    )
