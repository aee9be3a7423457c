"""What the benchmark times is what it means to: its calls of our kernels, on their own oracles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.bench import SUITES
from kernels.bench.cases import Setting
from kernels.bench.measure import dry_run
from kernels.bench.suites import cases
from kernels.dispatch import interpreting, record

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("suite", SUITES)
def test_the_first_case_of_a_suite_runs_our_kernels(suite: str) -> None:
    case = next(cases(suite, Setting("tiny", "interpret", 0)))
    case = replace(case, entries=tuple(entry for entry in case.entries if entry.ours))
    row = dry_run(case)
    assert {entry["status"] for entry in row["entries"]} == {"right"}, row
    inputs = case.inputs(torch.device("cpu"), 0)
    with record() as choices:  # by what is timed alone: an oracle may be an op in plain torch
        for entry in case.entries:
            entry.prepare(inputs)()
    assert {choice.impl for choice in choices} == {"interpret"}
