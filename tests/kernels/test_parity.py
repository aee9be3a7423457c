"""The parity runs: the torch paths hold, the rule catches what it is for, words are checked."""

from __future__ import annotations

import json

import pytest
import torch

from kernels.parity import run, table
from kernels.parity.case import Case, Comparison, compare, guarded, poisoned

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", run.operations())
def test_plain_torch_holds_on_the_cases_that_judge_the_kernels(op) -> None:
    for case in run.cases_of(op, "small", 4, torch.float32):
        wrong = [c for c in case.run("torch", CPU) if not c.holds]
        assert not wrong, (case.name, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_rule_passes_rounding_and_catches_more(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert compare("x", rounded, rounded, exact, dtype).holds
    off = exact.clone()
    off[3, 2] += 64 * torch.finfo(dtype).eps * exact.abs().max()
    assert not compare("x", off, rounded, exact, dtype).holds  # one value
    assert not compare("x", exact * 1.05, exact * 1.05, exact, dtype).holds  # eager is bad too


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_never_passes(value) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    got = exact.clone()
    got[1] = value
    assert not compare("x", got, exact, exact, torch.float32).holds


def test_infinities_must_be_where_the_definition_has_them() -> None:
    exact = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert compare("lse", exact, exact, exact, torch.float32).holds
    assert not compare("lse", -exact, exact, exact, torch.float32).holds
    assert not compare("lse", torch.ones(2), exact, exact, torch.float32).holds


def test_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare("x", torch.ones(2), torch.ones(3), torch.ones(3), torch.float32)


def test_guards_surround_a_tensor_with_poison() -> None:
    x = guarded(torch.arange(6.0).reshape(2, 3))
    assert torch.equal(x, torch.arange(6.0).reshape(2, 3)) and x.stride(0) > 3
    outside = torch.as_strided(x, (1,), (1,), x.storage_offset() - 1)
    assert outside.isnan().all()
    assert x._base is not None and int(x._base.isnan().sum()) == x._base.numel() - 6


def test_outputs_start_as_poison() -> None:
    with poisoned():
        assert torch.empty(5).isnan().all()
        assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_other_bits_in_a_repetition_are_found() -> None:
    errors = iter([0.0, 0.0, 1e-9])

    def drifts(impl, device):
        return [Comparison("x", next(errors), 1.0, 0.0, 1.0)]

    case = Case("x", "drifting", torch.float32, drifts)
    assert all(c.holds for c in run.check(case, "torch", CPU, repeats=2))
    errors = iter([0.0, 1e-9])
    assert not all(c.holds for c in run.check(case, "torch", CPU, repeats=2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["impl=interpret"], "TRITON_INTERPRET=1"),
        (["impl=triton"], "there is none here: nothing was run"),
        (["impl=torch", "ops=nothing"], "there is no such one: use"),
        (["impl=torch", "count=0"], "at least 1"),
        (["implementation=torch"], "there is no key"),
    ],
)
def test_wrong_words_are_said_and_nothing_runs(words, message, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "impl=triton" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_run_prints_its_table_and_records_it(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "RECORDED", tmp_path)
    monkeypatch.setattr(table, "RECORDED", tmp_path)
    words = ["impl=torch", "ops=merge", "count=2", "dtypes=float32", "write=true"]
    assert run.main(words) == 0
    assert "2 of 2 cases hold" in capsys.readouterr().out
    record = json.loads((tmp_path / "torch.json").read_text())
    assert [row["hold"] for row in record["rows"]] == [2]
    (tmp_path / "torch.json").rename(tmp_path / "triton.json")
    assert table.markdown().startswith("Interpreted on a CPU:\n\n*not run*")
    assert "2 of 2" in table.markdown()


def test_the_record_of_the_interpreter_is_of_these_sources() -> None:
    record = json.loads((run.RECORDED / "interpret.json").read_text())
    assert record["sources"] == run.fingerprint(), (
        "TRITON_INTERPRET=1 python -m kernels.parity write=true"
    )
    assert {row["op"] for row in record["rows"]} == set(run.operations())
    assert all(row["hold"] == row["cases"] for row in record["rows"])
