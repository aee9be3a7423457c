"""The page of a run holds its numbers, escapes its text, asks nothing of the network."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from training.errors import UserError
from training.evaluation import page, plots
from training.evaluation.report import (
    run_summary,
    write_paper_report,
    write_run_report,
)
from training.evaluation.run_files import ranking

VOID = {"meta", "img"}
EVIL = '<script>alert("x")</script> & \x1b[31mred\x1b[0m \x07 \u202e <svg onload=x>'
RESULTS: dict[str, Any] = {
    "experiment": "quickstart/stdlib",
    "run": "cpu-seed0-01234567",
    "scale": "cpu",
    "seed": 0,
    "steps": 1230,
    "tokens": 5_038_080,
    "stopped_by": "steps",
    "train_s": 132.4,
    "date": "2026-01-02T03:04:05Z",
    "metrics": {"eval/loss": 1.482, "eval/bpb": 2.1378, "eval/tokens": 239503.0},
    "parameters": 1_836_864,
    "uniform_bpb": 8.0056,
    "data": {"name": "stdlib", "train_bytes": 11_114_659},
    "floors": {"seen/order_0": 4.8502, "gzip": 1.983, "corpus/order_2": 2.4672, "xz": 1.7006},
    "sample": f"def f():\n\treturn {EVIL}\n",
}


class Structure(HTMLParser):
    """Checks that elements close in order; collects ids and everything that could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), f"{tag} has the handler {key}"
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(path: Path) -> str:
    """The page's text, after everything that holds for every page."""
    text = path.read_text(encoding="utf-8")
    structure = Structure()
    structure.feed(text)
    structure.close()
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert all(link.startswith(("data:image/", "#")) for link in structure.fetched)
    assert not structure.tags & {"script", "link", "iframe", "object", "base"}
    assert not re.search(r"https?://", text)
    assert "url(" not in re.sub(r"url\(#", "", text)
    return text


def write_run(
    directory: Path, results: dict[str, Any] | None = None, key: str = "loss", **status: Any
) -> Path:
    """A run directory as the loop leaves it."""
    (directory / "figures").mkdir(parents=True)
    (directory / "config.yaml").write_text(
        "experiment: quickstart/stdlib\nseed: 0\nloop:\n  steps: 1230\noptim:\n  lr: 0.5\n"
    )
    env = {"commit": "0123abcd", "dirty_diff": EVIL, "command": f"train {EVIL}"}
    (directory / "env.json").write_text(json.dumps({**env, "versions": {"torch": "2.11.0"}}))
    rows: list[dict[str, Any]] = []
    for step in range(10, 410, 10):
        value = None if step == 50 else 1.4 + math.exp(-step / 90)
        rows.append({"step": step, "tokens": step * 4096, f"train/{key}": value, "opt/lr": 1e-3})
        if step % 100 == 0:
            rows.append({"step": step, f"eval/{key}": 1.5 + 1 / step, "eval/bpb": 2.1 + 1 / step})
    lines = [json.dumps(row) for row in rows]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 420, "tr')
    perf = [json.dumps({"step": s, "perf/tokens_per_s": 38e3 + s}) for s in (10, 20)]
    (directory / "perf.jsonl").write_text("\n".join(perf) + "\n")
    (directory / "status.json").write_text(
        json.dumps({"status": "finished", "step": 1230} | status)
    )
    if results is not None:
        (directory / "results.json").write_text(json.dumps(results))
    return directory


def test_the_page_holds_the_numbers_of_the_results(tmp_path: Path) -> None:
    path = write_run_report(write_run(tmp_path / "run", RESULTS))
    text = checked(path)
    assert path == tmp_path / "run" / "report.html"
    for number in ("2.138", "1.482", "239,503", "1,230", "5.04M", "2:12", "1.84M", "11,114,659"):
        assert number in text
    for value in RESULTS["floors"].values():
        assert f"{value:.3f}" in text
    for said in ("quickstart/stdlib", "0123abcd", "with uncommitted changes", "2.11.0", "optim.lr"):
        assert said in text
    assert text.index("seen/order_0</td>") < text.index("<mark>this model") < text.index("xz</td>")


def test_untrusted_text_is_shown_and_not_run(tmp_path: Path) -> None:
    results = {**RESULTS, "experiment": EVIL, "data": {EVIL: EVIL}, "metrics": {f"eval/{EVIL}": 1}}
    text = checked(write_run_report(write_run(tmp_path / EVIL.replace("/", ""), results)))
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


@pytest.mark.parametrize("state", ["running", "interrupted", "failed"])
def test_an_unfinished_run_gets_a_page(tmp_path: Path, state: str) -> None:
    directory = write_run(tmp_path / "run", status=state, step=400, message="out of memory")
    text = checked(write_run_report(directory))
    assert state in text and "after step 400 of 1,230" in text and "out of memory" in text
    assert "2.103" in text, "the newest evaluation"
    assert "<svg" in text


def test_a_run_that_has_only_begun_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"status": "running", "step": 0}')
    assert "<svg" not in checked(write_run_report(tmp_path))
    (tmp_path / "status.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        write_run_report(tmp_path)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(UserError, match=r"status.json cannot be read"):
        write_run_report(tmp_path)


def test_metrics_of_another_field(tmp_path: Path) -> None:
    """Reinforcement learning: other names, other units, no floors."""
    results = {
        "experiment": "ppo/cartpole",
        "steps": 100,
        "env_steps": 204_800,
        "train_s": 61.0,
        "metrics": {"eval/return": 487.25, "eval/psnr_db": 31.5},
    }
    text = checked(write_run_report(write_run(tmp_path / "run", results, key="return")))
    assert "487.2" in text and "return (eval)" in text and "psnr (dB) (eval)" in text
    assert "205k" in text and "env_steps" in text
    assert "floors" not in text
    summary = run_summary(results)
    assert "487.2" in summary and "205k env_steps" in summary and "bits per byte" not in summary


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_metric_that_is_not_finite_is_said(tmp_path: Path, value: float | None) -> None:
    results = {**RESULTS, "metrics": {"eval/bpb": value, "eval/loss": value}}
    assert "not finite" in checked(write_run_report(write_run(tmp_path / "run", results)))
    assert "not finite" in run_summary(results)


def test_pictures_are_embedded(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", RESULTS)
    (directory / "figures" / "a_picture.svg").write_text("<svg><script>alert(1)</script></svg>")
    (directory / "figures" / "b.png").write_bytes(b"\x89PNG")
    (directory / "figures" / "trace.json").write_text("{}")
    text = checked(write_run_report(directory))
    assert text.count('src="data:image/') == 2 and "a picture" in text


def test_the_summary_is_sorted_and_plain() -> None:
    text = run_summary(RESULTS)
    lines = text.splitlines()
    ranked = [line for line in lines if re.match(r"[> ] +\d\.\d{3}  ", line)]
    values = [float(line[1:].split()[0]) for line in ranked]
    assert values == sorted(values, reverse=True) and len(values) == 6
    assert [line for line in ranked if line.startswith(">")] == [">   2.138  this model"]
    assert "uniform" in ranked[0] and "lower is better" in text
    assert "1,230 steps" in text and "2:12" in text and "1.84M parameters" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text) and "[31m" not in text
    assert run_summary({})


def test_ranking_needs_floors_and_a_number() -> None:
    assert ranking({**RESULTS, "floors": {}}) == []
    assert ranking({**RESULTS, "metrics": {"eval/bpb": math.nan}}) == []


def test_charts_are_deterministic_and_undated() -> None:
    lines = [plots.Line("a $b$ <c>", [1, 2, 3], [1.0, math.nan, 2.0])]
    first, second = (plots.line_chart(lines, "y", levels={"floor": 1.5}) for _ in range(2))
    assert first == second and first.startswith("<svg")
    assert "a $b$ &lt;c&gt;" in plots.line_chart(lines * 2, "y")
    assert "2026" not in first and "<dc:date" not in first


def test_a_dozen_curves_look_different_from_each_other() -> None:
    chart = plots.line_chart([plots.Line("a", [1, 2], [1.0, 2.0])] * 12, "y")
    curves = re.findall(r'style="fill: none; (stroke[^"]*stroke-width: 1.5[^"]*)"', chart)
    assert len(curves) >= 12 and len(set(curves)) == 12


def test_few_whole_numbers_have_no_fractions_between_them() -> None:
    def written(*x: float) -> list[str]:
        chart = plots.line_chart([plots.Line("a", x, [1.0] * len(x))], "y")
        return re.findall(r">(\d+|\d+\.\d+)</text>", chart.split("step</text>")[0])

    assert written(1, 2, 3) == ["1", "2", "3"]
    assert any("." in number for number in written(1, 2.5, 3)), "control"


def test_labels_keep_clear_of_each_other() -> None:
    heights = {"a": 0.0, "b": 0.01, "c": 0.02, "d": 0.5, "e": 0.99, "f": 1.0}
    placed = plots.spread_out(heights, 0.05)
    order = [placed[name] for name in heights]
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(order))
    assert min(order) >= 0 and max(order) <= 1 and placed["d"] == 0.5


def test_units_in_labels() -> None:
    assert plots.label("perf/tokens_per_s") == "tokens per second"
    assert plots.label("perf/memory_gb") == "memory (GB)"
    assert plots.label("eval/bpb") == "bits per byte"
    assert plots.label("eval/rollout_error_m") == "rollout error m"


def test_mean_curve_has_an_interval_of_three_seeds_where_two_have_values() -> None:
    seeds = [[1.0, 2.0, None], [3.0, None, None], [None, None, None]]
    line = plots.mean_curve("a", [1, 2, 3], seeds)
    assert line.y[:2] == [2.0, 2.0] and math.isnan(line.y[2])
    assert line.band is not None and line.band[0][0] < 1.0 and math.isnan(line.band[0][1])
    assert plots.mean_curve("a", [1, 2, 3], seeds[:2]).band is None


def test_escaping_happens_where_text_enters() -> None:
    assert page.tag("p", "<b>", page.tag("i", "&")) == "<p>&lt;b&gt;<i>&amp;</i></p>"
    assert page.tag("p", class_='a"b') == '<p class="a&quot;b"></p>'


CRITERION = {"run": "main", "metric": "eval/bpb", "minus": None, "direction": "below"}
CLAIM = {
    **CRITERION,
    "id": "beats_chance",
    "statement": f"it beats chance {EVIL}",
    "published": {"value": 1.5, "unit": "bits per byte", "source": "Table 1"},
    "threshold": 2.5,
    "chance": 3.0,
    "values": [2.1, 2.2, 2.3],
    "mean": 2.2,
    "interval": [1.9516, 2.4484],
    "measured": {"eval/bpb": 2.2},
    "floors": {"floors/xz": 1.7006},
    "ceilings": {},
    "controls": [
        {
            **CRITERION,
            "id": "shuffled",
            "statement": "on shuffled bytes it is at chance",
            "direction": "above",
            "threshold": 2.9,
            "values": [3.0, 3.01, 2.99],
            "mean": 3.0,
            "interval": None,
            "holds": True,
        }
    ],
    "verdict": "direction only",
    "because": "the mean 2.2 is not below",
    "reason": "too small a model",
}
CLAIMS_YAML = """
title: A fake paper
paper: {title: A fake paper at length, year: 2024, arxiv: '2401.00010'}
about: what it is about
runs: {main: {experiment: quickstart/stdlib, seeds: 3}}
claims:
  - {id: beats_chance, statement: it beats chance, run: main, metric: eval/bpb, direction: below,
     threshold: {cpu: 2.5}, chance: 3.0}
"""


def write_paper(root: Path, recorded: bool = True) -> Path:
    """experiments/ with one paper; returns it."""
    folder = root / "experiments" / "fake"
    (folder / "results").mkdir(parents=True)
    (folder / "figures").mkdir()
    (folder / "claims.yaml").write_text(CLAIMS_YAML)
    curve = {"step": [10, 20, 30], "train/loss": [3.0, 2.0, 1.5], "eval/bpb": [None, None, 2.1]}
    whole = {
        "paper": "fake",
        "scale": "cpu",
        "commit": "0123456789",
        "wall_s": 61.0,
        "seeds": [1, 2, 3],
        "runs": {"main": {"experiment": "quickstart/stdlib", "overrides": [], "seeds": [1, 2, 3]}},
        "claims": [CLAIM],
        "curves": {"main": [curve, curve]},
    }
    if recorded:
        (folder / "results" / "cpu.json").write_text(json.dumps(whole))
        (folder / "figures" / "cpu_curves.svg").write_text("<svg/>")
    return folder.parent


def test_the_page_of_a_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFERENT_RUNS", str(tmp_path / "runs"))
    path = write_paper_report("fake", write_paper(tmp_path))
    text = checked(path)
    assert path == tmp_path / "runs" / "reports" / "fake.html"
    for said in ("direction only", "2.2 [1.952, 2.448], 3 seeds", "≤ 2.5", "1.5 bits per byte"):
        assert said in text
    for said in ("holds", "Too small a model", "1.701", "arXiv:2401.00010", "0123456789"):
        assert said in text
    assert text.count('src="data:image/') == 1


def test_a_paper_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFERENT_RUNS", str(tmp_path / "runs"))
    text = checked(write_paper_report("fake", write_paper(tmp_path, recorded=False)))
    assert "not run" in text and "afferent reproduce paper=fake" in text
