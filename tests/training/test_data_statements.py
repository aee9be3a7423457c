"""Documents of statements: every answer follows from the text, by a reader of the words alone."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.config import PROMPTS, SelfStudyConfig, StatementsConfig, statements_length
from training.data.self_study import SelfStudyData, scrambled
from training.data.statements import (
    WORDS,
    StatementsData,
    draw,
    prompt_about,
    prompt_unstated,
    spell,
    statements_for,
    vocabulary,
)
from training.evaluation.exam import FORMS, examine, questions


def read(text: str) -> list[tuple[str, str]]:
    """(subject, object) of each statement of a document, from its words."""
    found = []
    for sentence in text.removeprefix("<s> ").replace(",", ";").split(";"):
        words = [word for word in sentence.split() if not word.startswith("~")]
        if not words:
            continue
        if "of" in words:
            found.append((words[2], words[0]))
        else:
            found.append((words[0], words[-1]))
    return found


def expected(kind: str, key: str, facts: list[tuple[str, str]]) -> str:
    latest = dict(facts)
    if kind == "who":
        (subject,) = [s for s, o in facts if o == key]
        return subject
    if key not in latest:
        return "none"
    return latest[latest[key]] if kind == "hop" else latest[key]


@pytest.mark.parametrize("stated", [2, 5, 31])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_answer_follows_from_the_words(stated, seed):
    config = StatementsConfig(conflicts=0.3, links=0.4)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        (document,) = [draw(config, rng, 1, stated)]
        assert document.tokens.shape == (1, statements_length(stated))
        facts = read(spell(config, document.tokens[0]))
        assert len(facts) == stated == document.count
        for kind in ("what", "give", "who", "hop"):
            for slot in statements_for(document, kind):
                prompt = prompt_about(document, kind, slot)
                word, key, sign = spell(config, prompt.question[0]).split()
                assert (word, sign) == (kind, "=")
                assert spell(config, prompt.answer[0]) == f"{expected(kind, key, facts)} ;"
        for i in range(70):
            prompt = prompt_unstated(document, "what", i)
            key = spell(config, prompt.question[0]).split()[1]
            assert key.startswith("k") and key not in dict(facts)
        for kind, separator in (("list", ";"), ("json", ","), ("flip", ";")):
            for slot in statements_for(document, kind):
                answer = spell(config, prompt_about(document, kind, slot, items=1).answer[0])
                assert answer.endswith(separator) and read(answer) == [facts[slot]]


def test_a_later_statement_replaces_an_earlier_one_and_says_what_is_stale():
    config = StatementsConfig(conflicts=0.9, links=0.0)
    document = draw(config, np.random.default_rng(0), 1, 20)
    assert document.replaced
    for earlier, later in document.replaced.items():
        assert earlier < later
        assert document.subjects[0, earlier] == document.subjects[0, later]
        prompt = prompt_about(document, "what", later)
        assert prompt.stale is not None and prompt.stale[0] == document.objects[0, earlier]
        assert earlier not in statements_for(document, "what")
        assert earlier in statements_for(document, "what", last=later), "until it is replaced"


def test_the_weights_fall_on_answers_and_nothing_else_counts_fully():
    config = StatementsConfig(ask=0.0, statements=[4, 8], seq_len=120)
    batch = StatementsData(config, seed=0).batch(3)
    for row in range(4):
        words = spell(config, batch["tokens"][row]).split()
        weight = batch["weight"][row]
        for t, word in enumerate(words[1:]):
            if word in ("what", "give", "who", "hop", "list", "json", "flip", "="):
                assert weight[t] < 1
            if words[t] == "=":
                assert weight[t] == 1
    assert set(np.unique(batch["weight"])) == {np.float32(0.0), np.float32(0.1), np.float32(1.0)}


def test_what_is_stated_stands_where_each_statement_ends():
    config = StatementsConfig(conflicts=0.3, links=0.4, statements=[8], seq_len=120)
    for step in range(8):  # with and without prompts within the document
        batch = StatementsData(config, seed=0).batch(step)
        for tokens, stated in zip(batch["tokens"], batch["stated"], strict=True):
            at = np.flatnonzero(stated[:, 0] >= 0)
            assert len(at) == 8 and np.array_equal(at, np.flatnonzero(stated[:, 1] >= 0))
            for end in at:
                words = spell(config, tokens[: end + 1]).split()
                assert words[-1] in (";", ",")
                names = [w for w in words[-4:] if w[0] in "kv" and w[1:].isdecimal()][-2:]
                subject, obj = spell(config, stated[end]).split()
                assert sorted(names) == sorted((subject, obj))
                assert (words[-3] == "of") == (names[0] == obj)


def test_batches_are_functions_of_seed_and_step_and_split_over_processes():
    config = StatementsConfig(batch_size=8)
    one, two = StatementsData(config, seed=1), StatementsData(config, seed=1)
    for name, value in one.batch(5).items():
        assert np.array_equal(value, two.batch(5)[name])
    assert not np.array_equal(one.batch(5)["tokens"], one.batch(6)["tokens"])
    halves = [StatementsData(config, seed=1, rank=r, world=2).batch(5)["tokens"] for r in (0, 1)]
    assert np.array_equal(np.concatenate(halves), one.batch(5)["tokens"])


def test_the_curriculum_begins_with_the_shortest():
    config = StatementsConfig(statements=[4, 8, 31], from_step=[0, 10, 20])
    data = StatementsData(config, seed=0)
    rng = np.random.default_rng(0)
    for step, most in ((0, 4), (9, 4), (10, 8), (20, 31)):
        drawn = {data.stated(rng, step) for _ in range(60)}
        assert drawn == {n for n in (4, 8, 31) if n <= most}


def test_gaps_come_before_the_prompts_only():
    config = StatementsConfig(gap=32)
    for step in range(6):
        positions = StatementsData(config, seed=0).batch(step)["positions"]
        jumps = np.diff(positions)
        assert positions[0] == 0 and (jumps >= 1).all() and (jumps > 1).sum() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statements": [64]}, "data.statements"),
        ({"statements": [8, 4]}, "data.from_step"),
        ({"from_step": [5, 6, 7, 8]}, "data.from_step"),
        ({"conflicts": 0.7, "links": 0.6}, "data.links"),
        ({"prompts": {"where": 1.0}}, "data.prompts"),
        ({"prompts": {"what": 0.0}}, "data.prompts"),
        ({"seq_len": 128}, "data.seq_len"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StatementsConfig(**changes)


def test_self_study_asks_directly_only_for_what_may_be_asked():
    config = SelfStudyConfig(documents=2, conflicts=0.2, links=0.3)
    data = SelfStudyData(config, seed=0)
    directly, rewritten = [set(), set()], [set(), set()]
    facts = [read(spell(config, d.tokens[0])) for d in data.documents]
    for step in range(40):
        batch = data.batch(step)
        assert len(data.ids(step)) == len(batch["tokens"])
        assert batch["tokens"].shape == (16, 49) and batch["weight"].shape == (16, 48)
        for tokens, owner in zip(batch["tokens"], batch["owner"], strict=True):
            words = spell(config, tokens).split()
            for i, word in enumerate(words[:-2]):
                if word in ("what", "give", "who", "hop"):
                    directly[owner].add(words[i + 1])
                if word in ("list", "json", "flip"):
                    rewritten[owner].add(words[i + 1])
    for owner in (0, 1):
        keys = {facts[owner][i][0] for i in data.asked[owner]}
        known = {s for s, _ in facts[owner]}
        assert directly[owner] & known <= keys and len(data.asked[owner]) == round(0.5 * 31)
        assert rewritten[owner] - keys, "the others are seen in rewritings"


def test_conversations_of_a_chunk_need_nothing_else():
    config = SelfStudyConfig(documents=1, chunk=40, asked=1.0)
    data = SelfStudyData(config, seed=0)
    for step in range(10):
        batch = data.batch(step)
        for context, tokens in zip(batch["context"], batch["tokens"], strict=True):
            assert len(context) == 40 and context[0] == 0
            words = spell(config, tokens).split()
            known = set(spell(config, context).split())
            for i, word in enumerate(words[:-3]):
                if word in ("what", "list", "json", "flip") and words[i + 3] != "none":
                    assert words[i + 1] in known


def test_scrambling_moves_every_object_and_keeps_the_rest():
    config = StatementsConfig(conflicts=0.2, links=0.3)
    document = draw(config, np.random.default_rng(0), 1, 31)
    other = scrambled(document, np.random.default_rng(1))
    before, after = (read(spell(config, d.tokens[0])) for d in (document, other))
    assert [s for s, _ in before] == [s for s, _ in after]
    assert all(a != b for (_, a), (_, b) in zip(before, after, strict=True))
    assert sorted(o for _, o in before) == sorted(o for _, o in after)


def test_disjoint_documents_share_no_key():
    config = SelfStudyConfig(documents=4, statements=[8], disjoint=True)
    data = SelfStudyData(config, seed=0)
    keys = [set(d.subjects[0].tolist()) | set(d.absent[0].tolist()) for d in data.documents]
    assert sum(map(len, keys)) == len(set().union(*keys)) > 4 * 8
    with pytest.raises(ValueError, match=r"data\.disjoint"):
        SelfStudyConfig(documents=4, statements=[31], disjoint=True)


def test_an_exam_asks_everything_once_and_grades_by_document():
    config = StatementsConfig(conflicts=0.2, links=0.3)
    documents = StatementsData(config, seed=0).heldout(5, 31)
    facts = [dict(read(spell(config, d.tokens[0]))) for d in documents]

    def perfect(asked):
        words = [spell(config, row).split() for row in asked.tokens]
        every = [read(spell(config, documents[i].tokens[0])) for i in asked.owners]
        return np.array(
            [
                token(config, expected(word, key, facts))
                for (word, key, _), facts in zip(words, every, strict=True)
            ]
        )

    grades = examine(documents, perfect)
    assert set(grades) == set(FORMS)
    assert all(grade["accuracy"] == 1.0 for grade in grades.values())
    assert grades["conflict"]["stale"] == 0.0
    single = grades["retrieval"]["questions"] + grades["conflict"]["questions"]
    assert single == sum(map(len, facts))
    nothing = examine(documents, lambda asked: np.full(len(asked), WORDS.index("none")))
    assert nothing["unstated"]["accuracy"] == 1.0 and nothing["retrieval"]["accuracy"] == 0.0
    half = examine(documents, perfect, ("retrieval",), [[0, 1, 2]] * 5)
    assert half["retrieval"]["questions"] <= 15
    assert sum(asked for _, asked in half["retrieval"]["by_document"]) == len(
        questions(documents, "retrieval", [[0, 1, 2]] * 5)
    )


def test_the_vocabulary_is_as_large_as_the_configuration_says():
    config = StatementsConfig(keys=9, values=7, statements=[4], seq_len=64)
    assert len(vocabulary(config)) == config.vocab_size
    assert set(PROMPTS) == {*StatementsConfig().prompts}


def token(config: StatementsConfig, word: str) -> int:
    if word in WORDS:
        return WORDS.index(word)
    offset = len(WORDS) + (config.keys if word[0] == "v" else 0)
    return offset + int(word[1:])
