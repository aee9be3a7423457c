"""Benchmarks of long documents, from files that their authors publish, with their metrics.

    longhealth  20 multiple-choice questions about each of 20 patients' records (Adams et al., 2024,
                arXiv:2401.14490); Cartridges takes the first 10 patients. Metric: accuracy.
                source: benchmark_v5.json of github.com/kbressem/LongHealth
    qasper      questions about research papers (Dasigi et al., 2021, arXiv:2105.03011).
                Metric: F1 over words, the best of the annotators' answers.
                source: qasper-train-v0.3.json and the like
    mtob        translation from one grammar book (Tanzer et al., 2023, arXiv:2309.16575).
                Metric: chrF of the corpus. source: a directory with .txt files to learn from and
                test_examples_<from><to>.json

Files are read as text and JSON. An answer without the marks that were asked for counts as wrong.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import UserError

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MARKED = "Write the answer between <answer> and </answer>."


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right."""

    prompt: str
    references: tuple[str, ...]
    options: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Benchmark:
    """A corpus, questions about it, and a metric of answers."""

    name: str
    corpus: str
    questions: tuple[Question, ...]
    metric: str
    score: Callable[[Sequence[Question], Sequence[str]], float]


def load(name: str, source: str) -> Benchmark:
    """A benchmark from its files. Raises UserError."""
    loaders = {"longhealth": longhealth, "qasper": qasper, "mtob": mtob}
    if name not in loaders:
        raise UserError(f"benchmark={name} is unknown: use {', '.join(loaders)}")
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"source={source} does not exist: download the files of {name} there")
    try:
        found = loaders[name](path)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"source={source} is not what {name} publishes: {error!r}") from error
    if not found.questions or not found.corpus.strip():
        raise UserError(f"source={source} holds no questions or no text")
    return found


def longhealth(path: Path, patients: int = 10) -> Benchmark:
    """Multiple choice about patients' records."""
    content = dict(list(json.loads(path.read_text()).items())[:patients])
    parts, questions = [], []
    for patient in content.values():
        who = f"{patient['name']}, born {patient['birthday']}"
        parts.append(f"# Records of {who}. Diagnosis: {patient['diagnosis']}")
        parts += [f"## {title}\n{text}" for title, text in patient["texts"].items()]
        for item in patient["questions"]:
            options = tuple(item[f"answer_{letter}"] for letter in "abcde")
            listed = "\n".join(f"- {option}" for option in options)
            prompt = f"About {who}: {item['question']}\n{listed}\nGive one of these. {MARKED}"
            questions.append(Question(prompt, (item["correct"],), options))
    return Benchmark("longhealth", "\n\n".join(parts), tuple(questions), "accuracy", choices)


def qasper(path: Path, papers: int = 16) -> Benchmark:
    """Free answers about papers; questions that have none are left out."""
    content = dict(list(json.loads(path.read_text()).items())[:papers])
    parts, questions = [], []
    for paper in content.values():
        parts.append(f"# {paper['title']}\n{paper['abstract']}")
        for section in paper["full_text"]:
            parts.append(f"## {section['section_name']}\n" + "\n".join(section["paragraphs"]))
        for item in paper["qas"]:
            references = tuple(filter(None, (told(a["answer"]) for a in item["answers"])))
            if references:
                prompt = f"About the paper {paper['title']!r}: {item['question']} {MARKED}"
                questions.append(Question(prompt, references))
    return Benchmark("qasper", "\n\n".join(parts), tuple(questions), "F1", best_f1)


def told(answer: dict[str, Any]) -> str:
    """An annotator's answer as text; empty if there is none."""
    if answer.get("unanswerable"):
        return ""
    if answer.get("yes_no") is not None:
        return "yes" if answer["yes_no"] else "no"
    return answer.get("free_form_answer") or ", ".join(answer.get("extractive_spans") or [])


def mtob(path: Path) -> Benchmark:
    """Translation of sentences, in every direction that has a file."""
    texts = [file.read_text() for file in sorted(path.rglob("*.txt"))]
    questions = []
    for file in sorted(path.rglob("test_examples_*.json")):
        source, target = (LANGUAGES.get(letter, letter) for letter in file.stem[-2:])
        for item in json.loads(file.read_text()):
            if "original" not in item:
                continue  # a note that asks not to train on it
            prompt = f"Translate from {source} to {target}: {item['original']}\n{MARKED}"
            questions.append(Question(prompt, (item["ground_truth"],)))
    return Benchmark("mtob", "\n\n".join(texts), tuple(questions), "chrF", corpus_chrf)


LANGUAGES = {"k": "Kalamang", "e": "English"}


def marked(answer: str) -> str | None:
    """What stands between the marks, in the last pair of them; None without."""
    found = ANSWER.findall(answer)
    return found[-1].strip() if found else None


def choices(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of answers whose nearest option is the right one."""
    right = 0
    for question, answer in zip(questions, answers, strict=True):
        given = marked(answer)
        near = difflib.get_close_matches(given, question.options, n=1, cutoff=0.0) if given else []
        right += near[:1] == list(question.references)
    return right / len(questions)


def best_f1(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Mean over the questions of the best F1 over words."""
    total = 0.0
    for question, answer in zip(questions, answers, strict=True):
        given = marked(answer) or ""
        total += max(f1(given, reference) for reference in question.references)
    return total / len(questions)


def f1(given: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, articles and punctuation aside (SQuAD)."""
    a, b = plain_words(given), plain_words(reference)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def plain_words(text: str) -> list[str]:
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def corpus_chrf(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """chrF of all answers together, 0 to 100."""
    pairs = [(marked(a) or "", q.references[0]) for q, a in zip(questions, answers, strict=True)]
    return chrf(pairs)


def chrf(pairs: Sequence[tuple[str, str]], order: int = 6, beta: float = 2.0) -> float:
    """F-score of character n-grams, blanks aside (Popovic, 2015, W15-3049), 0 to 100.

    Counts are summed over the pairs (given, reference); precision and recall are averaged over the
    orders 1..`order` that occur in both, as sacrebleu does.
    """
    precisions, recalls = [], []
    for n in range(1, order + 1):
        matched = given = wanted = 0
        for answer, reference in pairs:
            a, b = (Counter(ngrams("".join(text.split()), n)) for text in (answer, reference))
            matched += sum((a & b).values())
            given += sum(a.values())
            wanted += sum(b.values())
        if given and wanted:
            precisions.append(matched / given)
            recalls.append(matched / wanted)
    if not precisions:
        return 0.0
    precision, recall = (sum(x) / len(x) for x in (precisions, recalls))
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def ngrams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]
