"""Run the random cases of some ops and hold every result against its definition."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels import parity
from kernels.dispatch import interpreting
from kernels.parity.case import Case, Comparison

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECORDED = Path(__file__).parent / "recorded"
NOT_OPS = ("case", "run", "table")
HELP = """{python} -m kernels.parity [impl=interpret|triton|torch] [ops=NAME,...] [count=N] ...

The kernels of every op against their float64 definitions, on random inputs.

  impl     interpret (default): on the CPU, in a process with TRITON_INTERPRET=1; triton: on a GPU;
           torch: the plain paths
  ops      {ops}; all without it
  count    cases of each op and dtype; 12 without it
  dtypes   float32,float16,bfloat16 without it
  size     small (default for interpret and torch) or large (for triton)
  repeats  run every case that often and ask for the same bits; 1 without it
  write    true: record the result in kernels/parity/recorded/
"""


def operations() -> list[str]:
    """Ops that have cases."""
    found = sorted(module.name for module in pkgutil.iter_modules(parity.__path__))
    return [name for name in found if name not in NOT_OPS and not name.startswith("_")]


def cases_of(op: str, size: str, count: int, dtype: torch.dtype) -> Iterable[Case]:
    """Random cases of one op."""
    return importlib.import_module(f"kernels.parity.{op}").cases(size, count, dtype)


def check(case: Case, impl: str, device: torch.device, repeats: int = 1) -> list[Comparison]:
    """The case's comparisons; with repeats, those of the first run, and one for equal bits."""
    first = case.run(impl, device)
    same = all(case.run(impl, device) == first for _ in range(repeats - 1))
    if not same:
        first.append(Comparison("the same errors again", float("inf"), 0.0, float("inf"), 0.0))
    return first


def summary(op: str, dtype: str, results: Sequence[list[Comparison]], seconds: float) -> dict:
    """A row of the table: how many cases, how many hold, how close the closest call was."""
    every = [comparison for result in results for comparison in result]
    used = [c.error / c.allowed for c in every if c.allowed > 0]
    return {
        "op": op,
        "dtype": dtype,
        "cases": len(results),
        "results": len(every),
        "hold": sum(all(c.holds for c in result) for result in results),
        "largest_share_of_tolerance": max(used, default=0.0),
        "largest_relative_error": max((c.relative for c in every), default=0.0),
        "seconds": round(seconds, 1),
    }


def main(words: Sequence[str]) -> int:
    """Entry point; 0 if everything holds, else 1 (2: wrong words)."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP.format(python=Path(sys.executable).name, ops=", ".join(operations())), end="")
        return 0
    try:
        given = parse(words)
    except ValueError as error:
        print(f"kernels.parity: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if given["impl"] == "triton" else "cpu")
    rows, failed = [], defaultdict(list)
    for op in given["ops"]:
        for name in given["dtypes"]:
            began, results = time.monotonic(), []
            for case in cases_of(op, given["size"], given["count"], DTYPES[name]):
                result = check(case, given["impl"], device, given["repeats"])
                results.append(result)
                for comparison in (c for c in result if not c.holds):
                    failed[op].append(case.name)
                    print(f"FAULT {op} {name} ({case.name}): {comparison}", flush=True)
            rows.append(summary(op, name, results, time.monotonic() - began))
            print(line(rows[-1]), flush=True)
    print(f"{sum(row['hold'] for row in rows)} of {sum(row['cases'] for row in rows)} cases hold")
    if given["write"] and not failed:
        print(write_record(given, rows))
    return int(bool(failed))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    return (
        f"{row['op']:<16} {row['dtype']:<9} {row['hold']:>4} of {row['cases']:<4} hold, "
        f"largest relative error {row['largest_relative_error']:.1e}, "
        f"{row['largest_share_of_tolerance']:.0%} of the tolerance, {row['seconds']:.0f} s"
    )


def parse(words: Sequence[str]) -> dict[str, Any]:
    """key=value words, checked. Raises ValueError."""
    given: dict[str, Any] = {
        "impl": "interpret", "ops": "", "count": "12", "dtypes": ",".join(DTYPES), "size": "",
        "repeats": "1", "write": "false",
    }  # fmt: skip
    for word in words:
        key, _, value = word.partition("=")
        if key not in given:
            raise ValueError(f"there is no key `{key}`: use {', '.join(given)}")
        given[key] = value
    if given["impl"] not in ("interpret", "triton", "torch"):
        raise ValueError(f"impl={given['impl']}: use interpret, triton or torch")
    if given["impl"] == "interpret" and not interpreting():
        raise ValueError(
            "impl=interpret needs a process with TRITON_INTERPRET=1 in its environment"
        )
    if given["impl"] == "triton" and not torch.cuda.is_available():
        raise ValueError("impl=triton needs a GPU, and there is none here: nothing was run")
    given["size"] = given["size"] or ("large" if given["impl"] == "triton" else "small")
    if given["size"] not in ("small", "large"):
        raise ValueError(f"size={given['size']}: use small or large")
    for key, known in (("ops", operations()), ("dtypes", list(DTYPES))):
        given[key] = list(filter(None, given[key].split(","))) or known
        for name in given[key]:
            if name not in known:
                raise ValueError(f"{key}={name}: there is no such one: use {', '.join(known)}")
    for key in ("count", "repeats"):
        if not given[key].isdigit() or int(given[key]) < 1:
            raise ValueError(f"{key}={given[key]} must be a whole number, at least 1")
        given[key] = int(given[key])
    if given["write"] not in ("true", "false"):
        raise ValueError(f"write={given['write']} must be true or false")
    given["write"] = given["write"] == "true"
    return given


def fingerprint() -> str:
    """Hash of what the cases run through: kernels, launchers, public functions, tile tables."""
    from kernels.audit.run import KERNELS, source_hash

    digest = source_hash("triton*.py", "language.py", "launch.py", "op.py", "merge.py")
    for file in sorted((KERNELS / "tuned").glob("*.json")):
        digest.update(json.dumps(json.loads(file.read_text())["rows"]).encode())
    return digest.hexdigest()[:16]


def write_record(given: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Keep the table of an implementation for the README."""
    import triton

    on = torch.cuda.get_device_name() if given["impl"] == "triton" else platform.machine()
    record = {
        "impl": given["impl"],
        "device": on,
        "size": given["size"],
        "repeats": given["repeats"],
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": fingerprint(),
        "rows": rows,
    }
    RECORDED.mkdir(exist_ok=True)
    file = RECORDED / f"{given['impl']}.json"
    partial = file.with_suffix(".json.new")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)
    return file
