"""What the benchmark times is what it means to: its calls of our kernels, on their own oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernels.bench import SUITES
from kernels.bench.cases import Setting
from kernels.bench.measure import dry_run
from kernels.bench.suites import cases
from kernels.dispatch import interpreting, record

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("suite", SUITES)
def test_the_first_case_of_a_suite_runs_our_kernels(suite: str) -> None:
    case = next(cases(suite, Setting("tiny", "interpret", 0)))
    with record() as choices:
        row = dry_run(replace(case, entries=tuple(e for e in case.entries if e.ours)))
    assert {entry["status"] for entry in row["entries"]} == {"right"}, row
    assert {choice.impl for choice in choices} == {"interpret"}
