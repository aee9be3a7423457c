"""The benchmark's rules, without a GPU: order, statistics, ratios, budget, resuming, honesty.

A pretended GPU (tensors on the CPU, torch.cuda's calls answered by nothing) shows what a row is
made of; no file of results is written from it.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.bench import SUITES, measure, results, timing
from kernels.bench.cases import Case, Entry, Setting, Target, Work, tile_label, variants
from kernels.bench.measure import dry_run, on_gpu
from kernels.bench.suites import attention, cases, decode, select
from kernels.tiles import pick

TINY = Setting("tiny", "torch", 0)
H200 = Setting("h200", "triton", 90)
CEILINGS = {
    "copy": {"rate": 4.0e12},
    "matmul": {"rate": 8.0e14},
    "host": {"rate": 5.0e10},
}


def double(scale: float = 2.0, name: str = "triton", **more: Any) -> Entry:
    """An entry of `doubling`."""
    return Entry(name, lambda inputs: lambda: inputs["x"] * scale, on_cpu=True, **more)


def doubling(*entries: Entry, targets: tuple[Target, ...] = ()) -> Case:
    """A case whose problem is 2 x."""
    return Case(
        "attention",
        "doubling",
        {"n": 8},
        torch.float32,
        Work(8.0, 64.0),
        lambda device, seed: {"x": torch.arange(1.0, 9.0, device=device) + seed},
        lambda inputs: {"y": inputs["x"].double() * 2},
        lambda out: {"y": out},
        1e-5,
        entries,
        targets,
        ("dispatch.py",),
    )


# ----------------------------------------------------------- composed and checked on the CPU


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.filterwarnings("ignore")
def test_every_case_composes_and_is_right_on_the_cpu(suite: str) -> None:
    for case in cases(suite, TINY):
        row = dry_run(case)
        status = {entry["name"]: entry["status"] for entry in row["entries"]}
        assert "wrong" not in status.values(), row
        assert any(e["ours"] and e["status"] == "right" for e in row["entries"]), case.id
        assert case.work.bytes > 0 and "ms" not in json.dumps(row)


@pytest.mark.parametrize("suite", SUITES)
def test_targets_name_entries_that_there_are(suite: str) -> None:
    for case in cases(suite, H200):
        names = [entry.name for entry in case.entries]
        assert len(set(names)) == len(names), f"{case.id}: entries of one name"
        for target in case.targets:
            assert target.entry in names, f"{case.id}: {target}"
            over = [n for n in names if n == target.over or n.startswith(f"{target.over} ")]
            assert target.ceiling or target.ms or over, f"{case.id}: {target}"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_our_tile_is_known_on_every_chip(arch: int) -> None:
    for case in select(SUITES, "", replace(H200, arch=arch)):
        ours = next(entry for entry in case.entries if entry.ours)
        if case.suite in ("attention", "decode", "append", "loss"):
            assert re.fullmatch(r"\d+(x\d+)* w\d+ s\d+( tma)?( ws)?", ours.note), case.id


def test_every_target_of_the_issue_is_asked_for() -> None:
    asked = {
        (target.name.split(" ")[0], target.at_least)
        for suite in SUITES
        for case in cases(suite, H200)
        for target in case.targets
    }
    assert asked >= {
        ("forward", 1.2),
        ("forward", 1.15),
        ("forward", 0.9),
        ("backward", 1.25),
        ("backward", 0.8),
        ("prefix", 1.3),
        ("paged", 0.88),
        ("cascade", 20.0),
        ("int8", 1.7),
        ("fp8", 1.7),
        ("int4", 2.6),
        ("append", 0.75),
        ("gather", 0.7),
        ("swap", 0.85),
        ("forward", 1.0),
    }


def test_targets_are_for_the_shapes_of_an_h200_alone() -> None:
    small = list(select(SUITES, "", replace(H200, scale="small")))
    assert small and not any(case.targets for case in small)


def test_extra_cases_come_after_those_of_every_suite() -> None:
    extra = [case.extra for case in select(SUITES, "", H200)]
    assert extra == sorted(extra) and True in extra and False in extra


@pytest.mark.parametrize("factor", [1.001, float("nan"), 0.0])
def test_an_entry_that_computes_something_else_is_wrong(factor: float) -> None:
    row = dry_run(doubling(double(), double(2.0 * factor, "off")))
    assert [e["status"] for e in row["entries"]] == ["right", "wrong"]
    assert "from the oracle, at most 1e-05" in row["entries"][1]["reason"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 5},
        {"documents": 3},
        {"p": 7},
        {"window": 3, "documents": 2},
    ],
)
def test_visible_pairs_are_counted_not_estimated(options: dict[str, Any]) -> None:
    problem = attention.Problem("any", 1, 24, 1, 1, 16, **options)
    document = torch.arange(problem.documents).repeat_interleave(
        torch.tensor(attention.lengths(problem))
    )
    i, j = torch.arange(24)[:, None], torch.arange(24)[None]
    seen = document[:, None] == document[None]
    if problem.causal:
        seen = seen & (j <= i)
    if problem.window:
        seen = seen & (j > i - problem.window)
    assert attention.pairs(problem) == int(seen.sum()) + 24 * problem.p
    assert sum(attention.lengths(problem)) == 24


def test_bytes_of_a_cache_are_those_it_takes() -> None:
    problem = next(decode.problems(TINY))
    inputs = decode.draw(problem, torch.device("cpu"), 0)
    for kind in problem.kinds:
        cache, _ = inputs[kind]
        counted = decode.bytes_per_token(kind, 2, problem.page, problem.kv, problem.d)
        assert counted == pytest.approx(cache.bytes_per_token), kind


def test_candidates_are_other_rows_of_the_same_problem() -> None:
    keys = {"bytes": 2, "head_dim": 128, "softcap": 0}
    labels = [label for label, _ in variants("attention_forward", 90, **keys)]
    chosen = tile_label(pick("attention_forward", 90, **keys))
    assert labels and chosen not in labels and len(set(labels)) == len(labels)
    assert any(label.endswith("tma ws") for label in labels), "the first GPU run decides on it"
    assert not any("tma" in label for label, _ in variants("attention_forward", 80, **keys))


# ------------------------------------------------------------------- samples and their order


class Clock:
    """Time that passes only when something is sampled."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def sampler(self, name: str, milliseconds: float, drift: float = 0.0) -> timing.Sampler:
        def sample() -> float:
            self.order += name
            taken = milliseconds * (1 + drift * self.now)
            self.now += taken / 1e3
            return taken

        return sample

    def __call__(self) -> float:
        return self.now


def test_entries_are_sampled_in_turn_forwards_and_backwards() -> None:
    clock = Clock()
    samplers = {name: clock.sampler(name, 1.0) for name in "ABC"}
    taken = timing.interleave(samplers, seconds=0, least=4, warmup=2, clock=clock)
    assert clock.order == "ABCCBA" * 3
    assert {name: len(samples) for name, samples in taken.items()} == {"A": 4, "B": 4, "C": 4}


def test_a_clock_that_drifts_does_not_move_the_ratio() -> None:
    clock = Clock()
    samplers = {name: clock.sampler(name, 1.0, drift=50.0) for name in "AB"}
    taken = timing.interleave(samplers, seconds=0, least=20, clock=clock)
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    assert medians["A"] / medians["B"] == pytest.approx(1.0, abs=0.1)
    # Control: one after the other, the same two functions look different.
    clock = Clock()
    first, second = (clock.sampler(name, 1.0, drift=50.0) for name in "AB")
    one_by_one = [[sampler() for _ in range(20)] for sampler in (first, second)]
    assert statistics.median(one_by_one[0]) / statistics.median(one_by_one[1]) < 0.5


def test_rounds_are_added_until_the_time_is_up() -> None:
    clock = Clock()
    taken = timing.interleave({"A": clock.sampler("A", 10.0)}, seconds=0.5, least=3, clock=clock)
    assert 45 <= len(taken["A"]) <= 50
    assert len(timing.interleave({"A": lambda: 1.0}, seconds=9e9, most=7)["A"]) == 7


def test_a_budget_that_ends_too_early_gives_no_row() -> None:
    clock = Clock()
    with pytest.raises(timing.OutOfTime, match="of 20 rounds"):
        timing.interleave({"A": clock.sampler("A", 10.0)}, seconds=1, deadline=0.1, clock=clock)
    enough = timing.interleave(
        {"A": clock.sampler("A", 1.0)}, seconds=9, least=3, deadline=0.2, clock=clock
    )
    assert len(enough["A"]) >= 3


def test_a_summary_is_made_of_the_samples_it_keeps() -> None:
    rng = random.Random(0)
    samples = [rng.lognormvariate(0, 0.3) for _ in range(37)]
    made = timing.summary(samples)
    expected = torch.tensor(made["samples"], dtype=torch.float64)
    for name, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8)):
        assert made[name] == pytest.approx(expected.quantile(q).item())
    assert made["p50"] == pytest.approx(statistics.median(samples), rel=1e-3)


def test_sets_of_inputs_outgrow_the_cache() -> None:
    cache = 60e6
    for size in (1e3, 1e6, 7e6, 100e6, 5e9):
        count = timing.sets_of_inputs(size, cache)
        assert 2 <= count <= timing.MOST_SETS
        assert count * size > 3 * cache or count == timing.MOST_SETS


# --------------------------------------------------------------------------- a pretended GPU


class NoEvent:
    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 3.0


class NoGraph:
    def replay(self) -> None: ...


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    cuda = torch.cuda
    stream = SimpleNamespace(synchronize=nothing)
    for name, value in {
        "Stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "Event": NoEvent,
        "CUDAGraph": NoGraph,
        "graph": lambda *_, **__: nullcontext(),
        "synchronize": nothing,
        "_sleep": nothing,
        "current_stream": lambda *_: stream,
        "set_stream": nothing,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 4096,
        "reset_peak_memory_stats": nothing,
        "get_device_properties": lambda *_: SimpleNamespace(L2_cache_size=100),
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(measure, "gpu_kernels", lambda call, stream: ["flash_fwd_kernel<128>"])
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def refusing(inputs: Any) -> Any:
    import warnings

    warnings.warn("this backend wants head_dim <= 128", stacklevel=1)
    raise RuntimeError("No available kernel.")


@pytest.fixture
def row(pretended: None) -> dict[str, Any]:
    case = doubling(
        double(ours=True),
        double(name="flash", kernels=("flash_fwd",)),
        double(name="cudnn", kernels=("cudnn",)),
        double(2.1, name="off"),
        double(name="hangs"),
        Entry("refuses", refusing),
        double(name="slow", capturable=False),
        targets=(
            Target("a", 0.9, over="flash"),
            Target("b", 0.9, over="cudnn"),
            Target("c", 1e-9, ceiling="copy"),
        ),
    )
    told: list[str] = []
    found = on_gpu(
        case,
        torch.device("cpu"),
        CEILINGS,
        crashed={"hangs": "no answer for 75 s"},
        report=lambda name, patience: told.append(name),
    )
    assert told[0] == "inputs and oracle" and told[-1] == "samples" and "hangs" not in told
    return found


def test_a_row_says_what_became_of_every_entry(row: dict[str, Any]) -> None:
    entries = {entry["name"]: entry for entry in row["entries"]}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "triton": "timed",
        "flash": "timed",
        "cudnn": "unseen",
        "off": "wrong",
        "hangs": "crashed",
        "refuses": "refused",
        "slow": "timed",
    }
    assert "no GPU kernel named like cudnn ran" in entries["cudnn"]["reason"]
    assert "head_dim <= 128" in entries["refuses"]["reason"], "torch says why in a warning"
    assert entries["flash"]["kernels"] == ["flash_fwd_kernel<128>"]
    assert entries["triton"]["timed_by"] == "graph" and entries["slow"]["timed_by"] == "events"
    assert [name for name, entry in entries.items() if "ms" in entry] == ["triton", "flash", "slow"]
    assert row["input_sets"] == timing.sets_of_inputs(64.0, 100)


def test_a_profiler_that_sees_nothing_hides_nothing(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "gpu_kernels", lambda call, stream: [])
    case = doubling(double(ours=True, kernels=("doubling_kernel",)))
    (found,) = on_gpu(case, torch.device("cpu"), CEILINGS, crashed={})["entries"]
    assert found["status"] == "timed" and found["kernels"] == []


def test_only_a_peer_that_was_timed_is_compared_with(row: dict[str, Any]) -> None:
    assert [target["met"] for target in row["targets"]] == [True, None, True]
    assert row["targets"][1]["value"] is None
    json.loads(json.dumps(row, allow_nan=False))


def test_lost_devices_end_the_process_not_the_row(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(measure.DeviceLost, match="illegal memory access"):
        on_gpu(doubling(double(ours=True)), torch.device("cpu"), CEILINGS, crashed={})


def test_a_graph_that_cannot_be_captured_is_replaced_and_said(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_capture(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", no_capture)
    calls = []
    sampler, how = timing.gpu_sampler([lambda: calls.append(1)] * 2, torch.cuda.Stream())
    assert how == (
        "events, as no graph could be captured: operation not permitted when stream is capturing"
    )
    before = len(calls)
    assert sampler() == 1.5 and len(calls) == before + 2


# ------------------------------------------------------------------------ ratios and targets


def entry(name: str, *samples: float, **more: Any) -> dict[str, Any]:
    ms = timing.summary(samples)
    return {
        "name": name,
        "ours": name == "triton",
        "variant": False,
        "status": "timed",
        "reason": "",
        "ms": ms,
        **more,
    }


def measured(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": "attention/x",
        "fingerprint": "f",
        "complete": True,
        "flops": 4e12,
        "bytes": 2e9,
        "entries": list(entries),
        "targets": [],
        "call": 0,
        "through_host": False,
        "shapes": {"n": 8},
        "dtype": "bfloat16",
    }


def test_every_ratio_follows_from_the_samples_in_the_file() -> None:
    rng = random.Random(1)
    draws = {
        name: [rng.uniform(low, low * 1.2) for _ in range(25)]
        for name, low in (("triton", 2.0), ("tutorial 64x64", 3.0), ("tutorial 128x64", 2.5))
    }
    row = measured(*(entry(name, *samples) for name, samples in draws.items()))
    text = json.loads(json.dumps(row))
    medians = {e["name"]: statistics.median(e["ms"]["samples"]) for e in text["entries"]}
    over = results.judged(row, Target("t", 1.2, over="tutorial"), CEILINGS)
    assert over["value"] == pytest.approx(medians["tutorial 128x64"] / medians["triton"])
    copy = results.judged(row, Target("t", 0.88, ceiling="copy"), CEILINGS)
    assert copy["value"] == pytest.approx(2e9 / (medians["triton"] / 1e3) / 4.0e12)
    matmul = results.judged(row, Target("t", 0.5, ceiling="matmul"), CEILINGS)
    assert matmul["value"] == pytest.approx(4e12 / (medians["triton"] / 1e3) / 8.0e14)


def test_a_format_with_less_to_read_is_measured_by_its_own_bytes() -> None:
    row = measured(entry("triton", 1.0), entry("triton int8", 0.6, bytes=1e9, flops=4e12))
    target = Target("t", 0.5, "triton int8", ceiling="copy")
    assert results.judged(row, target, CEILINGS)["value"] == pytest.approx(1e9 / 0.6e-3 / 4e12)


@pytest.mark.parametrize("status", ["wrong", "unseen", "refused", "crashed"])
def test_what_was_not_timed_has_no_ratio(status: str) -> None:
    row = measured(entry("triton", 1.0), entry("flex", 2.0, status=status))
    judged = results.judged(row, Target("t", 1.15, over="flex"), CEILINGS)
    assert judged["value"] is None and judged["met"] is None


def test_a_name_is_itself_before_it_is_a_family() -> None:
    row = measured(entry("triton", 2.0), entry("triton again", 1.9), entry("triton [64x64]", 1.0))
    again = Target("control", 0.97, "triton again", over="triton")
    assert results.judged(row, again, CEILINGS)["value"] == pytest.approx(2.0 / 1.9)


def test_a_time_that_is_allowed_is_met_by_a_shorter_one() -> None:
    row = measured(entry("triton", 4.0))
    for allowed in (5.0, 3.0):
        judged = results.judged(row, Target("t", 1.0, ms=allowed), CEILINGS)
        assert judged["value"] == pytest.approx(allowed / 4.0)
        assert judged["met"] == (allowed == 5.0)


def test_a_target_has_one_side_to_be_compared_with() -> None:
    for sides in ({}, {"over": "flex", "ceiling": "copy"}, {"ceiling": "copy", "ms": 1.0}):
        with pytest.raises(ValueError, match="one of `over`, `ceiling` and `ms`"):
            Target("t", 1.0, **sides)


# ---------------------------------------------------------------------------------- resuming


def test_a_case_is_skipped_while_its_kernels_are_the_same(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.bench.cases.KERNELS", tmp_path)
    (tmp_path / "dispatch.py").write_text("x = 1\n")
    case = doubling(double(ours=True))
    document = results.empty()
    results.put(document, {**measured(), "case": case.id, "fingerprint": case.fingerprint()})
    assert results.finished(document, case.id, case.fingerprint())
    (tmp_path / "dispatch.py").write_text("x = 2\n")
    assert not results.finished(document, case.id, case.fingerprint())
    (tmp_path / "dispatch.py").unlink()
    with pytest.raises(ValueError, match=r"no file below kernels/ matches 'dispatch\.py'"):
        case.fingerprint()


def test_a_new_row_replaces_the_old_one_of_its_case() -> None:
    document = results.empty()
    for flops in (1.0, 2.0):
        results.put(document, {**measured(), "flops": flops})
    assert [row["flops"] for row in document["cases"]] == [2.0]


def test_entries_that_ended_a_process_are_remembered_until_their_source_changes() -> None:
    document = results.empty()
    results.put_crash(document, "attention/x", "f", "triton [ws]", "no answer for 75 s")
    results.put_crash(document, "attention/x", "f", "triton [tma]", "code 3")
    assert results.crashes(document, "attention/x", "f") == {
        "triton [ws]": "no answer for 75 s",
        "triton [tma]": "code 3",
    }
    assert results.crashes(document, "attention/x", "g") == {}
    assert not results.finished(document, "attention/x", "f")
    results.put_crash(document, "attention/x", "g", "triton", "code 3")
    assert results.crashes(document, "attention/x", "g") == {"triton": "code 3"}


def test_results_of_another_gpu_are_not_continued() -> None:
    document = {**results.empty(), "calls": [{"gpu": {"name": "NVIDIA H200"}}]}
    assert results.problem_with(document, "NVIDIA H200") is None
    said = results.problem_with(document, "NVIDIA H100 80GB HBM3")
    assert said == "holds results of NVIDIA H200, this is NVIDIA H100 80GB HBM3"
    assert "is not a results file" in str(results.problem_with({"suite": "training"}, "any"))


def test_a_shipped_tile_that_fails_is_a_failure_and_a_candidate_is_not() -> None:
    failed = entry("triton", 1.0, status="wrong", reason="far off")
    candidate = {**failed, "name": "triton [64x64]", "variant": True}
    document = {**results.empty(), "cases": [measured(failed, candidate)]}
    assert results.wrong(document) == ["attention/x: triton wrong: far off"]
    assert math.isinf(
        measure.relative_errors({"y": torch.tensor([math.nan])}, {"y": torch.ones(1)})["y"]
    )
