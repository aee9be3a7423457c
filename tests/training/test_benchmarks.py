"""Benchmarks of long documents: what their files say, and metrics worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.errors import UserError
from training.evaluation.benchmarks import chrf, f1, load, marked


def write_longhealth(path: Path, patients: int = 12) -> Path:
    def patient(i: int) -> dict:
        question = {f"answer_{letter}": f"{letter}{i} mg" for letter in "abcde"}
        question |= {"No": 0, "question": f"Which dose {i}?", "correct": f"c{i} mg"}
        return {
            "name": f"P{i}", "birthday": "1970-01-01", "diagnosis": "D", "questions": [question],
            "texts": {"text_0": f"The dose of P{i} is c{i} mg."},
        }  # fmt: skip

    path.write_text(json.dumps({f"patient_{i:02}": patient(i) for i in range(patients)}))
    return path


def test_longhealth_takes_ten_patients_and_the_nearest_option(tmp_path):
    found = load("longhealth", str(write_longhealth(tmp_path / "benchmark_v5.json")))
    assert len(found.questions) == 10 and "P9" in found.corpus and "P10" not in found.corpus
    assert found.questions[3].references == ("c3 mg",)
    perfect = [f"so <answer>{q.references[0]}</answer>" for q in found.questions]
    assert found.score(found.questions, perfect) == 1.0
    nearly = [answer.replace(" mg", "mg") for answer in perfect]
    assert found.score(found.questions, nearly) == 1.0
    unmarked = [q.references[0] for q in found.questions]
    assert found.score(found.questions, unmarked) == 0.0
    wrong = [f"<answer>{q.options[0]}</answer>" for q in found.questions]
    assert found.score(found.questions, [perfect[0], *wrong[1:]]) == 0.1


def test_qasper_reads_every_kind_of_answer_and_skips_what_has_none(tmp_path):
    def answer(**given) -> dict:
        empty = {"unanswerable": False, "yes_no": None, "free_form_answer": "",
                 "extractive_spans": []}  # fmt: skip
        return {"answer": {**empty, **given}}

    qas = [
        {"question": "a", "answers": [answer(yes_no=True), answer(yes_no=False)]},
        {"question": "b", "answers": [answer(extractive_spans=["two words", "more"])]},
        {"question": "c", "answers": [answer(free_form_answer="the free answer")]},
        {"question": "d", "answers": [answer(unanswerable=True)]},
    ]
    paper = {
        "title": "T", "abstract": "A", "qas": qas,
        "full_text": [{"section_name": "S", "paragraphs": ["one", "two"]}],
    }  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps({"1": paper}))
    found = load("qasper", str(tmp_path / "q.json"))
    assert [q.references for q in found.questions] == [
        ("yes", "no"), ("two words, more",), ("the free answer",),
    ]  # fmt: skip
    answers = ["<answer>No.</answer>", "<answer>two more</answer>", "<answer>free</answer>"]
    assert found.score(found.questions, answers) == pytest.approx((1 + 0.8 + 2 / 3) / 3)


def test_mtob_reads_both_directions_and_skips_the_canary(tmp_path):
    (tmp_path / "book.txt").write_text("grammar")
    for direction in ("ke", "ek"):
        items = [{"canary": "x"}, {"original": "ma", "ground_truth": "he"}]
        (tmp_path / f"test_examples_{direction}.json").write_text(json.dumps(items))
    found = load("mtob", str(tmp_path))
    assert found.corpus == "grammar" and len(found.questions) == 2
    assert "from English to Kalamang" in found.questions[0].prompt
    assert found.score(found.questions, ["<answer>he</answer>"] * 2) == pytest.approx(100.0)
    assert found.score(found.questions, ["he"] * 2) == 0.0


def test_chrf_by_hand():
    # abcd / abce: orders 1..4 of the reference: 3/4, 2/3, 1/2, 0/1 on both sides.
    average = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert chrf([("abcd", "abce")]) == pytest.approx(100 * average)
    assert chrf([("ab cd", "abcd")]) == pytest.approx(100.0), "blanks do not count"
    # beta = 2 weighs recall: a short answer that is all right scores below its precision.
    short = chrf([("ab", "abcd")], order=1)
    assert short == pytest.approx(100 * 5 * 1.0 * 0.5 / (4 * 1.0 + 0.5))
    assert chrf([("", "abc")]) == 0.0


def test_f1_and_marks_by_hand():
    assert f1("The cat, sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert f1("", "x") == 0.0 and f1("the", "a") == 1.0
    assert marked("<answer>a</answer> or <answer> b </answer>") == "b" and marked("b") is None


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": {"name": "n"}}')
    for name, source, message in (
        ("nosuch", "x.json", "is unknown"),
        ("longhealth", "nowhere.json", "does not exist"),
        ("longhealth", "x.json", "not what longhealth publishes"),
        ("qasper", "x.json", "not what qasper publishes"),
        ("mtob", "", "no questions"),
    ):
        with pytest.raises(UserError, match=message):
            load(name, str(tmp_path / source))
