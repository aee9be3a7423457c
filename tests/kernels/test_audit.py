"""The compile audit: it runs, its rules catch what they are for, its record is current.

All tiles are compiled by `make audit`, in a quarter of an hour; the record that it leaves is bound
to its sources, and what has passed with them is here compiled once more for a tile of each kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch

from kernels.audit import run, table
from kernels.audit.judge import controls, faults
from kernels.audit.run import all_specs, fingerprint, operations
from kernels.audit.worker import Worker
from kernels.launch import capture
from kernels.tiles import TUNED, Tile, override, pick, rows
from tests.helpers import ROOT


@pytest.mark.slow
def test_the_heaviest_tile_of_every_kernel_compiles_as_it_must() -> None:
    """`python -m kernels.audit tiles=heaviest`, its controls included."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.audit", "tiles=heaviest"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("control fails as it must") == len(list(controls()))


def test_the_heaviest_tiles_are_one_of_each_kernel_by_the_record() -> None:
    found = list(all_specs(operations()))
    record = run.read_record(version("triton"))
    assert record is not None
    budgets = {name: report["registers"] for name, report in record["tiles"].items()}
    chosen = {spec.compilation.kernel: spec for spec in run.heaviest(found, budgets)}
    assert set(chosen) == {spec.compilation.kernel for spec in found}
    for spec in found:
        assert budgets[spec.name] <= budgets[chosen[spec.compilation.kernel].name]


def test_every_row_of_every_table_is_audited() -> None:
    """A tile that ships without an audit would be found here."""
    compilations = [spec.compilation for spec in all_specs(operations())]
    for file in TUNED.glob("*.json"):
        for row in (row for row in rows(file.stem) if row.arch != 0):
            found = [
                c
                for c in compilations
                if c.arch == row.arch
                and (c.num_warps, c.num_stages) == (row.tile.num_warps, row.tile.num_stages)
                and row.tile.blocks.items() <= c.constants.items()
            ]
            assert found, f"{file.stem}: {row} is not audited"


def test_names_are_unique_so_that_no_report_hides_another() -> None:
    names = [spec.name for spec in all_specs(operations())]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def spec():
    """A forward tile of sm_90 that reads through descriptors."""
    return next(
        s
        for s in all_specs(["attention"], ["90"])
        if s.compilation.descriptors and not s.compilation.warp_specialize
    )


FINE = {
    "registers": 160,
    "stack": 0,
    "shared": 100_000,
    "instructions": {"HGMMA": 8, "UTMALDG": 4, "setmaxnreg": 0},
}


def test_a_clean_report_has_no_fault(spec) -> None:
    assert faults(spec, FINE, budget=155) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "spills"),
        ({"instructions": {**FINE["instructions"], "LDL": 1}}, "spills"),
        ({"instructions": {**FINE["instructions"], "STL": 2}}, "spills"),
        ({"shared": 232_449}, "shared memory"),
        ({"instructions": {"UTMALDG": 4}}, "no tensor-core instruction"),
        ({"instructions": {"HGMMA": 8, "HMMA": 1, "UTMALDG": 4}}, "other tensor-core"),
        ({"instructions": {"HGMMA": 8}}, "no UTMALDG"),
        ({"registers": 170}, "170 registers, 160 were recorded"),
        ({"error": "PassManager::run failed"}, "does not compile"),
    ],
)
def test_each_rule_catches_what_it_is_for(spec, change, fault) -> None:
    report = change if "error" in change else {**FINE, **change}
    assert any(fault in found for found in faults(spec, report, budget=160))


def test_warp_specialisation_without_setmaxnreg_is_a_fault(spec) -> None:
    split = replace(spec, compilation=replace(spec.compilation, warp_specialize=True))
    assert any("setmaxnreg" in found for found in faults(split, FINE))


@pytest.mark.parametrize("triton", ["3.6.0", "3.7.1", "3.9.0"])
def test_the_record_of_each_supported_triton_is_of_these_sources(triton) -> None:
    record = run.read_record(triton)
    assert record is not None, "python -m kernels.audit write=true"
    assert record["sources"] == fingerprint(), "kernels changed: python -m kernels.audit write=true"
    assert set(record["tiles"]) == {spec.name for spec in all_specs(operations())}


def test_the_installed_triton_is_one_of_those_recorded() -> None:
    assert version("triton") in [record["triton"] for record in table.records()]


def test_the_hash_of_sources_sees_code_and_nothing_else() -> None:
    code = 'def f(x):\n    """What."""\n    y = x + 1  # why\n    return y\n'
    reworded = code.replace("What.", "Other\n    words.").replace("# why", "# because")
    assert (
        run.code_lines(code)
        == run.code_lines(reworded)
        == [
            "def f(x):",
            "    y = x + 1",
            "    return y",
        ]
    )
    assert run.code_lines(code) != run.code_lines(code.replace("+ 1", "+ 2"))


def test_the_launch_decides_what_is_compiled() -> None:
    """Types, divisibility and ones are those of the arguments, as Triton specialises them."""
    from kernels.attention.launch import forward

    q = torch.empty(2, 48, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 48, 1, 64, dtype=torch.bfloat16, device="meta")
    with capture(90) as launched:
        forward(q, k, k, None, None, None, None, 2**30, 0, 0.1, 0.0)
    (compilation,) = launched
    assert compilation.signature["q"] == "*bf16" and compilation.signature["scale"] == "fp32"
    assert compilation.signature["prefix_k"] == "constexpr"
    assert compilation.constants["prefix_k"] is None and compilation.constants["GROUP"] == 4
    assert {"q", "t", "q_t"} <= set(compilation.divisible) and "after" in compilation.divisible


def test_a_tile_is_that_of_the_nearest_row() -> None:
    def blocks_of(**keys):
        return pick("attention_forward", keys.pop("arch"), **keys)

    plain = {"bytes": 2, "softcap": 0}
    assert blocks_of(arch=90, head_dim=80, **plain) == blocks_of(arch=90, head_dim=128, **plain)
    assert blocks_of(arch=89, head_dim=64, **plain) == blocks_of(arch=80, head_dim=64, **plain)
    assert blocks_of(arch=120, head_dim=64, **plain) == blocks_of(arch=100, head_dim=64, **plain)
    assert not blocks_of(
        arch=90, head_dim=128, **plain
    ).warp_specialize  # candidates are not picked
    with pytest.raises(ValueError, match="no tile of attention_forward"):
        blocks_of(arch=90, head_dim=512, **plain)
    with override("attention_forward", Tile({"BLOCK_M": 1})):
        assert blocks_of(arch=90, head_dim=512, **plain).blocks == {"BLOCK_M": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops=attension"], "there is no such op: use"),
        (["op=attention"], "there is no key `op`"),
        (["jobs=0"], "at least 1"),
        (["write=yes"], "must be true or false"),
        (["write=true", "arch=90"], "leave ops, arch and tiles out"),
        (["write=true", "tiles=heaviest"], "leave ops, arch and tiles out"),
        (["tiles=some"], "must be all or heaviest"),
        (["arch=42"], "no tile is for it"),
    ],
)
def test_wrong_words_are_said_and_nothing_is_compiled(words, message, capsys) -> None:
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_record_is_written_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "RECORDED", tmp_path)
    monkeypatch.setattr(table, "RECORDED", tmp_path)
    run.write_record("3.7.1", {"attention_forward bfloat16 d64 causal sm_90 128x128 w8 s2": FINE})
    record = json.loads((tmp_path / "3.7.1.json").read_text())
    assert record["sources"] == fingerprint() and len(record["tiles"]) == 1
    text = table.markdown()
    assert (
        "| 3.7.1 | 1 of 1 |" in text and "| `attention_forward` | sm_90 | 1 | 160 | 100 |" in text
    )


ODD = """
import subprocess, sys
for line in sys.stdin:
    if "late" in line:
        subprocess.run(["sleep", "60"])
    if "dies" in line:
        print("assertion `x` failed", file=sys.stderr)
        sys.exit(6)
    print(line, end="", flush=True)
"""


def test_a_compiler_that_dies_or_hangs_is_replaced_and_its_last_words_are_told() -> None:
    worker = Worker(("-c", ODD))
    assert worker.report({"a": 1}) == {"a": 1}
    first = worker.process
    assert worker.report({"a": 2}) == {"a": 2} and worker.process is first
    assert worker.report({"a": "dies"}) == {"error": "assertion `x` failed"}
    assert worker.report({"a": 3}) == {"a": 3} and worker.process is not first
    assert worker.report({"a": "late"}, timeout_s=0.2)["error"].startswith("compiling took more")
    assert worker.report({"a": 4}) == {"a": 4}
    assert worker.close() == 0 and worker.close() is None


def test_a_kernel_that_does_not_compile_is_no_end_of_its_process(spec) -> None:
    worker, given = Worker(), asdict(spec.compilation)
    wrong = worker.report({**given, "constants": {}})
    assert set(wrong) == {"error"}
    process = worker.process
    assert worker.report(given)["registers"] > 0 and worker.process is process
    worker.close()
