"""The kernels on a GPU, at size: skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from kernels.parity import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("op", run.operations())
def test_every_case_holds_and_repeats_its_bits(op: str) -> None:
    assert run.main(["impl=triton", f"ops={op}", "count=20", "repeats=3"]) == 0
