"""The tables of layers side by side say what the papers' results say, and what was not run."""

from __future__ import annotations

import json
from pathlib import Path

from training.evaluation.layer_tables import READING, RECALL, reading_table, recall_table


def write(experiments: Path, paper: str, runs: dict) -> None:
    folder = experiments / paper / "results"
    folder.mkdir(parents=True)
    (folder / "cpu.json").write_text(json.dumps({"runs": runs}))


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_last_eighth_of_every_layer_with_its_interval(tmp_path: Path) -> None:
    curves = [{"256/static": [9.0] * 28 + [1.0, 1.0, 2.0, 2.0 + 4 * gap]} for gap in (0.0, 0.1)]
    write(tmp_path, "gated_delta", {"delta": {"parameters": 44000, "series": curves}})
    table = cells(reading_table(tmp_path))
    delta = table["DeltaNet"]
    assert delta[0] == "44,000" and delta[1].startswith("1.550 [") and delta[2:] == ["", "2"]
    assert table["LaCT"] == ["", "", "", "not run"]
    assert len(table) == len(READING) + 2  # header and rule


def test_recall_by_the_number_of_facts(tmp_path: Path) -> None:
    series = [{"recall/facts": [4.0, 64.0], "recall/recalled": [1.0, 0.25]}]
    write(tmp_path, "gated_delta", {"recall_delta": {"parameters": 25664, "series": series}})
    table = cells(recall_table(tmp_path))
    assert table["layers"] == ["parameters", "of 4 facts", "of 64 facts", "seeds"]
    assert table["DeltaNet"] == ["25,664", "1.000", "0.250", "1"]
    assert table["TTT-Linear"][-1] == "not run" and len(table) == len(RECALL) + 2
