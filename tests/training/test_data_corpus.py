"""Packing, splitting, windows and the held-out protocol of text corpora."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from training.data.config import CorpusConfig, DataConfig, FilesConfig, HubConfig, StdlibConfig
from training.data.corpus import (
    BYTE_SEPARATOR,
    BYTE_VOCAB_SIZE,
    DataError,
    pack,
    segment_ids,
    split,
)
from training.data.language import LanguageData, build
from training.data.stdlib import stdlib_documents
from training.data.tokenizer import ByteTokenizer
from training.evaluation.ngram import bits_per_byte


def byte_pack(documents, **options):
    return pack(
        documents,
        ByteTokenizer().encode,
        separator=BYTE_SEPARATOR,
        vocab_size=BYTE_VOCAB_SIZE,
        **options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 documents of 20 to 600 bytes."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(60):
        words = rng.choice(["alpha", "beta", "gamma", "delta\n"], size=int(rng.integers(5, 100)))
        (root / f"{i:02d}.txt").write_text(" ".join(words))
    return root


def files(folder, **options):
    given = {"seq_len": 32, "batch_size": 8, "heldout_fraction": 0.2, "paths": [str(folder)]}
    return FilesConfig(**(given | options))


def test_pack_puts_a_separator_before_every_document():
    corpus = byte_pack([("a", b"xy"), ("b", b""), ("c", b"z")])
    assert corpus.tokens.tolist() == [256, 120, 121, 256, 256, 122]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.offsets.tolist() == [0, 3, 4, 6]
    assert [corpus.bytes_of(i) for i in range(3)] == [b"xy", b"", b"z"]
    assert [corpus.document_at(p) for p in range(6)] == ["a", "a", "a", "b", "c", "c"]
    assert corpus.num_bytes == 3


def test_content_hash_sees_names_and_contents():
    hashes = {
        byte_pack(documents).content_hash
        for documents in ([("a", b"bc")], [("ab", b"c")], [("a", b"bd")], [("a", b""), ("b", b"c")])
    }
    assert len(hashes) == 4


def test_split_is_disjoint_complete_and_stable():
    documents = [(f"doc{i}", b"x" * 10) for i in range(500)]
    train, held = split(documents, 0.1, None)
    assert sorted(train + held) == sorted(documents)
    assert 25 <= len(held) <= 80
    fewer_train, fewer_held = split(documents[:300], 0.1, None)
    assert set(fewer_held) <= set(held)
    assert set(fewer_train) <= set(train)


def test_split_does_not_change_between_releases():
    _, held = split([(f"doc{i}", b"x") for i in range(60)], 0.1, None)
    assert [name for name, _ in held] == ["doc16", "doc25", "doc26", "doc38"]


def test_split_respects_the_byte_limit():
    documents = [(f"doc{i}", b"x" * 10) for i in range(500)]
    _, held = split(documents, 0.1, 100)
    assert len(held) == 10
    _, held = split(documents, 1e-9, 5)
    assert len(held) == 1


def test_a_lone_document_is_cut_near_its_end():
    content = "".join(f"zeile {i} ä\n" for i in range(100)).encode()
    train, held = split([("book", content)], 0.1, None)
    assert train[0][1] + held[0][1] == content
    assert train[0][1].endswith(b"\n")
    held[0][1].decode()
    train, held = split([("euro", "€".encode() * 50)], 0.1, None)
    assert held[0][1].decode() in "€" * 50


def test_segments_change_at_separators():
    tokens = np.array([[5, 256, 7, 256], [256, 1, 2, 3]])
    assert segment_ids(tokens, 256).tolist() == [[0, 1, 1, 2], [0, 0, 0, 0]]


def test_batches_are_windows_of_the_corpus(folder):
    data = build(files(folder, document_mask=True), seed=0)
    batch = data.batch(3)
    assert batch["tokens"].shape == batch["segments"].shape == (8, 33)
    assert batch["tokens"].dtype == batch["segments"].dtype == np.int32
    for row, name in zip(batch["tokens"], data.ids(3), strict=True):
        window = int(name.split()[1])
        assert np.array_equal(row, data.train.tokens[window * 32 : window * 32 + 33])
        assert name.endswith(f"({data.train.document_at(window * 32)})")
    assert "segments" not in build(files(folder), seed=0).batch(0)


def test_world_size_does_not_change_the_batch(folder):
    whole = build(files(folder), seed=1).batch(11)["tokens"]
    for world in (2, 4):
        parts = [
            build(files(folder), seed=1, rank=r, world=world).batch(11)["tokens"]
            for r in range(world)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        build(files(folder), seed=1, rank=0, world=3)


@pytest.mark.parametrize(("stride", "batch_size"), [(None, 4), (32, 7), (8, 5), (1, 64), (5, 1)])
def test_every_heldout_token_is_scored_exactly_once(folder, stride, batch_size):
    data = build(files(folder, eval_stride=stride), seed=0)
    scored = []
    for batch in data.heldout_batches(batch_size):
        assert batch["tokens"].shape == (batch_size, 33)
        assert batch["weight"].shape == (batch_size, 32)
        scored.append(batch["tokens"][:, 1:][batch["weight"] > 0])
    expected = data.heldout.tokens[data.heldout.tokens != data.separator]
    assert np.array_equal(np.concatenate(scored), expected)
    assert len(expected) == data.heldout_bytes


def test_a_smaller_stride_gives_every_token_more_context(folder):
    def least_context(stride):
        data = build(files(folder, eval_stride=stride), seed=0)
        rows = np.concatenate([batch["weight"] for batch in data.heldout_batches(4)])[1:]
        return min(int(np.flatnonzero(row)[0]) for row in rows if row.any())

    assert least_context(32) <= 1  # a separator may stand first
    assert least_context(8) >= 24


def test_a_heldout_part_shorter_than_a_window(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text("abc" * 10)
    data = build(files(tmp_path, seq_len=64, heldout_bytes=30), seed=0)
    (batch,) = data.heldout_batches(2)
    assert batch["weight"].sum() == data.heldout_bytes == 30


def test_seen_is_what_the_batches_held(folder):
    data = build(files(folder), seed=2)
    assert data.seen(0) == []
    chunks = data.seen(4)
    rows = np.concatenate([data.batch(step)["tokens"] for step in range(4)])
    starts = [range(0, len(chunk) - 1, 32) for chunk in chunks]
    windows = [
        tuple(chunk[start : start + 33])
        for chunk, range_ in zip(chunks, starts, strict=True)
        for start in range_
    ]
    assert sorted(windows) == sorted({tuple(row) for row in rows})
    (whole,) = data.seen(10_000)
    assert np.array_equal(whole, data.train.tokens[: len(whole)])


def test_shuffle_control_keeps_counts_and_destroys_order(folder):
    plain = build(files(folder), seed=0)
    control = build(files(folder, shuffle_bytes=True), seed=0)
    for corpus, permuted in [(plain.train, control.train), (plain.heldout, control.heldout)]:
        assert sorted(corpus.tokens) == sorted(permuted.tokens)
        assert np.array_equal(corpus.tokens == 256, permuted.tokens == 256)
    assert plain.content_hash != control.content_hash

    def bits(data):
        return bits_per_byte([data.train.tokens], [data.heldout.tokens], 2)

    assert abs(bits(plain)[0] - bits(control)[0]) < 1e-9
    assert bits(plain)[1] < bits(plain)[0] - 1.0
    assert bits(control)[1] > bits(control)[0] - 0.05


def test_text_goes_there_and_back(folder):
    data = build(files(folder), seed=0)
    assert data.decode(data.encode("grün €")) == "grün €"
    assert data.decode([256, 97, 256, 98]) == "ab"
    assert data.vocab_size == 257


def test_a_corpus_shorter_than_a_window_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"lower data\.seq_len"):
        build(files(tmp_path, seq_len=64), seed=0)


def test_stdlib_corpus():
    data = LanguageData(StdlibConfig(), seed=0)
    facts = data.describe()
    assert facts["train_bytes"] > 5e6
    assert 1e5 < facts["heldout_bytes"] <= 400_000
    assert not set(data.train.names) & set(data.heldout.names)
    assert list(data.train.names) == sorted(data.train.names)
    assert not any("test" in name.split("/")[:-1] for name in data.train.names)
    assert build(StdlibConfig(), seed=3).content_hash == data.content_hash


def test_packages_become_long_documents_of_all_their_files(tmp_path):
    for name, text in [("a/b.py", "x = 1"), ("a/c/d.py", "y = 2"), ("a.py", "z = 3"), ("e.py", "")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = dict(stdlib_documents(tmp_path, by_package=True))
    assert list(found) == ["a", "a.py"]
    assert found["a"] == b"# a/b.py\nx = 1\n# a/c/d.py\ny = 2"
    alone = dict(stdlib_documents())
    together = dict(stdlib_documents(by_package=True))
    assert len(together["asyncio"]) > sum(len(alone[n]) for n in alone if n.startswith("asyncio/"))


def test_an_interpreter_without_sources_says_so(tmp_path):
    with pytest.raises(DataError, match="use data=files"):
        list(stdlib_documents(tmp_path))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CorpusConfig, {"seq_len": 0}),
        (CorpusConfig, {"batch_size": 0}),
        (CorpusConfig, {"heldout_fraction": 1.0}),
        (CorpusConfig, {"heldout_bytes": 0}),
        (CorpusConfig, {"eval_stride": 257}),
        (CorpusConfig, {"tokenizer": " "}),
        (HubConfig, {"block_tokens": 256}),
        (HubConfig, {"heldout_documents": 0}),
        (HubConfig, {"dataset": ""}),
    ],
)
def test_config_errors_name_the_key(config, options):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError) as raised:
        config(**options)
    assert f"data.{key}={value!r}" in str(raised.value)


def test_a_config_that_is_no_corpus_is_refused():
    with pytest.raises(DataError, match="no text corpus"):
        build(DataConfig(name="two_rooms"), seed=0)


def test_importing_the_data_layer_loads_no_framework():
    code = (
        "import sys, training.data.language, training.data.hub, training.data.files, "
        "training.evaluation.ngram\n"
        "heavy = {'torch', 'jax', 'datasets', 'pyarrow', 'tokenizers', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heldout_sequences_lie_within_documents_and_are_spread_over_them(folder):
    data = build(files(folder), seed=0)
    assert isinstance(data, LanguageData)
    tokens = data.heldout_sequences(10_000, 40)["tokens"]
    assert tokens.shape[1] == 41 and tokens.dtype == np.int32
    assert not (tokens == BYTE_SEPARATOR).any()
    text = {data.heldout.bytes_of(i) for i in range(len(data.heldout.names))}
    for row in tokens:
        assert any(bytes(row.astype(np.uint8)) in document for document in text)
    starts = {bytes(row[:-1].astype(np.uint8)) for row in tokens}
    longest = sorted(text, key=len)[-1]
    assert longest[:40] in starts and longest[40:80] in starts
    few = data.heldout_sequences(3, 40)["tokens"]
    np.testing.assert_array_equal(few[[0, -1]], tokens[[0, -1]])
    with pytest.raises(DataError, match=r"no held-out document has 5001 tokens \(the longest has"):
        data.heldout_sequences(1, 5000)
