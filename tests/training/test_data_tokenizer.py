"""Tokenizers: round trips, the separator's rule, and what happens offline."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from training.data.config import FilesConfig
from training.data.corpus import DataError
from training.data.language import build
from training.data.tokenizer import ByteTokenizer, FileTokenizer, build_tokenizer

TEXT = "the cat sat on the mat; grün € 汉字\n"


@pytest.fixture
def make_tokenizer(tmp_path):
    """Train a byte-level BPE and save it with the given special tokens and config."""

    def make(special=(), **config):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=list(special),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT] * 10, trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_bytes_round_trip():
    tokenizer = build_tokenizer(None)
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(b"\xff").tolist() == [255]


def test_file_round_trip(make_tokenizer):
    folder = make_tokenizer(["<|endoftext|>"])
    for source in (folder, folder / "tokenizer.json"):
        tokenizer = FileTokenizer(str(source))
        ids = tokenizer.encode(TEXT)
        assert ids.dtype == np.uint16 and len(ids) < len(TEXT.encode())
        assert tokenizer.decode([tokenizer.separator, *ids]) == TEXT
        assert np.array_equal(tokenizer.encode_batch([TEXT, "a"])[0], ids)


def test_the_separator_rule(make_tokenizer):
    folder = make_tokenizer(["<pad>", "<s>", "<|endoftext|>", "[END]"])
    assert FileTokenizer(str(folder)).separator == 2
    folder = make_tokenizer(["<pad>", "<s>", "<|endoftext|>", "[END]"], bos_token="<s>")
    assert FileTokenizer(str(folder)).separator == 1
    end = {"content": "[END]"}
    folder = make_tokenizer(["<pad>", "<s>", "[END]"], bos_token="<s>", eos_token=end)
    assert FileTokenizer(str(folder)).separator == 2
    folder = make_tokenizer([], eos_token="absent")
    tokenizer = FileTokenizer(str(folder))
    assert tokenizer.separator == tokenizer.vocab_size - 1
    assert tokenizer.encode(TEXT).max() < tokenizer.separator


def test_a_special_token_spelled_out_in_a_text_is_text(make_tokenizer):
    tokenizer = FileTokenizer(str(make_tokenizer(["<|endoftext|>"])))
    ids = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_a_tokenized_corpus_counts_bytes(make_tokenizer, tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (texts / f"{i}.txt").write_text(TEXT * 5)
    folder = make_tokenizer(["<|endoftext|>"])
    config = FilesConfig(
        paths=[str(texts)], tokenizer=str(folder), seq_len=16, batch_size=2, heldout_fraction=0.2
    )
    data = build(config, seed=0)
    assert data.heldout_bytes == len(data.heldout.names) * len(TEXT.encode()) * 5
    weight = sum(float(batch["weight"].sum()) for batch in data.heldout_batches(4))
    assert weight == len(data.heldout.tokens) - len(data.heldout.names)
    with pytest.raises(DataError, match=r"data\.tokenizer=null"):
        data.heldout.bytes_of(0)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*absent\.json"):
        build_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="there is no file"):
        build_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer\.json"):
        build_tokenizer(str(tmp_path))


def test_a_hub_name_offline_is_one_sentence(tmp_path):
    code = (
        "from training.data.tokenizer import build_tokenizer\n"
        "from training.data.corpus import DataError\n"
        "try: build_tokenizer('someone/some-tokenizer')\n"
        "except DataError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "data.tokenizer='someone/some-tokenizer'" in done.stdout
    assert "null for bytes" in done.stdout
