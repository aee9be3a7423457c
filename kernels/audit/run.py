"""The audit: gather specs, compile them several at a time, judge, record."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import os
import pkgutil
import sys
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from kernels.audit import specs as suites
from kernels.audit.judge import controls, faults
from kernels.audit.spec import Spec
from kernels.audit.worker import Worker

KERNELS = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "recorded"
HELP = """python -m kernels.audit [ops=NAME,...] [arch=N,...] [tiles=heaviest] [jobs=N] [write=true]

Compile every shipped tile for its chip, or some, without a GPU, and judge it.

  ops    {ops}; all without it
  arch   80, 90, 100 or gfx942; all without it
  tiles  heaviest: of each kernel the one that needs most registers by the record; all without it
  jobs   how many to compile at a time; as many as there are cores without it
  write  record the result for this Triton version in kernels/audit/recorded/
"""


def operations() -> list[str]:
    """Ops that have something to audit."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def all_specs(ops: Sequence[str], chips: Sequence[str] = ()) -> Iterator[Spec]:
    """Specs of some ops, for some chips (as text; none: all)."""
    for op in ops:
        for spec in importlib.import_module(f"kernels.audit.specs.{op}").specs():
            if not chips or str(spec.compilation.arch) in chips:
                yield spec


def compile_all(found: Sequence[Spec], jobs: int, say=print) -> dict[str, dict[str, Any]]:
    """Reports by name, with progress."""
    began, reports = time.monotonic(), {}
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker() for _ in range(jobs)]
    for worker in workers:
        free.put(worker)

    def compiled(spec: Spec) -> dict[str, Any]:
        worker = free.get()
        try:
            return worker.report(asdict(spec.compilation))
        finally:
            free.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        for spec, report in zip(found, pool.map(compiled, found), strict=True):
            reports[spec.name] = report
            if len(reports) % 20 == 0:
                say(f"{len(reports)} of {len(found)} compiled, {time.monotonic() - began:.0f} s")
    for worker in workers:
        worker.close()
    return reports


def heaviest(found: Sequence[Spec], budgets: Mapping[str, int]) -> list[Spec]:
    """Of each kernel the tile with most registers: the likeliest to spill."""
    heavy: dict[str, Spec] = {}
    for spec in sorted(found, key=lambda spec: budgets.get(spec.name, 0)):
        heavy[spec.compilation.kernel] = spec
    return list(heavy.values())


def judge(found: Sequence[Spec], reports: Mapping[str, Any], budgets: Mapping[str, int]) -> list:
    """(name, fault) of everything that does not come out as it must."""
    return [
        (spec.name, fault)
        for spec in found
        for fault in faults(spec, reports[spec.name], budgets.get(spec.name))
    ]


def judge_controls(say=print) -> list[tuple[str, str]]:
    """Controls that passed, or failed for another reason than they should."""
    wrong, worker = [], Worker()
    for spec, word in controls():
        found = faults(spec, worker.report(asdict(spec.compilation)))
        caught = any(word in fault for fault in found)
        say(f"control {'fails as it must' if caught else 'DOES NOT FAIL'}: {'; '.join(found)}")
        if not caught:
            wrong.append((spec.name, f"this control must fail with `{word}`, got {found}"))
    worker.close()
    return wrong


def read_record(triton_version: str) -> dict[str, Any] | None:
    """What was recorded for a Triton version."""
    file = RECORDED / f"{triton_version}.json"
    return json.loads(file.read_text()) if file.exists() else None


def fingerprint() -> str:
    """Hash of what is compiled: the kernels, and the signature and constants of every tile."""
    digest = source_hash("triton*.py", "language.py")
    for spec in sorted(all_specs(operations()), key=lambda spec: spec.name):
        digest.update(json.dumps([spec.name, asdict(spec.compilation)]).encode())
    return digest.hexdigest()[:16]


def source_hash(*patterns: str) -> Any:
    """Running hash of the files of kernels/ that match, without comments and docstrings."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in KERNELS.rglob(pattern)):
        digest.update("\n".join(code_lines(file.read_text())).encode())
    return digest


def code_lines(text: str) -> list[str]:
    """The lines of a module that are code, comments cut off: the same in every Python version."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.rstrip() for line in lines if line.strip()]


def parse(words: Sequence[str]) -> dict[str, str]:
    """key=value words, checked. Raises ValueError."""
    jobs = str(os.cpu_count() or 1)
    given = {"ops": "", "arch": "", "tiles": "all", "jobs": jobs, "write": "false"}
    for word in words:
        key, _, value = word.partition("=")
        if key not in given:
            raise ValueError(f"there is no key `{key}`: use {', '.join(given)}")
        given[key] = value
    for op in filter(None, given["ops"].split(",")):
        if op not in operations():
            raise ValueError(f"ops={op}: there is no such op: use {', '.join(operations())}")
    if given["tiles"] not in ("all", "heaviest"):
        raise ValueError(f"tiles={given['tiles']} must be all or heaviest")
    if not given["jobs"].isdigit() or int(given["jobs"]) < 1:
        raise ValueError(f"jobs={given['jobs']} must be a whole number, at least 1")
    if given["write"] not in ("true", "false"):
        raise ValueError(f"write={given['write']} must be true or false")
    some = given["ops"] or given["arch"] or given["tiles"] != "all"
    if given["write"] == "true" and some:
        raise ValueError("write=true records everything: leave ops, arch and tiles out")
    return given


def main(words: Sequence[str]) -> int:
    """Entry point; 0 if every tile passes and every control fails, else 1 (2: wrong words)."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP.format(ops=", ".join(operations())), end="")
        return 0
    try:
        given = parse(words)
    except ValueError as error:
        print(f"kernels.audit: {error}", file=sys.stderr)
        return 2
    ops = list(filter(None, given["ops"].split(","))) or operations()
    found = list(all_specs(ops, list(filter(None, given["arch"].split(",")))))
    if not found:
        print(f"kernels.audit: arch={given['arch']}: no tile is for it", file=sys.stderr)
        return 2
    installed = version("triton")
    record = read_record(installed)
    budgets = {} if record is None else {n: r["registers"] for n, r in record["tiles"].items()}
    if given["tiles"] == "heaviest":
        found = heaviest(found, budgets)
    print(f"Triton {installed}: {len(found)} tiles of {', '.join(ops)}", flush=True)
    began = time.monotonic()
    reports = compile_all(found, int(given["jobs"]))
    wrong = judge(found, reports, {} if given["write"] == "true" else budgets)
    wrong += judge_controls()
    for name, fault in wrong:
        print(f"FAULT {name}: {fault}")
    passed = len(found) - len({name for name, _ in wrong})
    print(f"{passed} of {len(found)} tiles pass, {time.monotonic() - began:.0f} s")
    if given["write"] == "true" and not wrong:
        write_record(installed, reports)
    return int(bool(wrong))


def write_record(triton_version: str, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the reports of a Triton version: budgets for the next audit, a table for the README."""
    RECORDED.mkdir(exist_ok=True)
    tiles = [
        f"    {json.dumps(name)}: "
        + json.dumps({key: report[key] for key in ("registers", "shared", "instructions")})
        for name, report in reports.items()
    ]
    head = {
        "triton": triton_version,
        "date": datetime.now(UTC).date().isoformat(),
        "sources": fingerprint(),
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    text = "\n".join(["{", *lines, '  "tiles": {', ",\n".join(tiles), "  }", "}", ""])
    file = RECORDED / f"{triton_version}.json"
    partial = file.with_suffix(".json.new")
    partial.write_text(text)
    partial.replace(file)
    print(file)
