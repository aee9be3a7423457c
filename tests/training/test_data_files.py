"""Readers of local files, with the messages of every way they can fail."""

from __future__ import annotations

import json

import pytest

from training.data.config import FilesConfig
from training.data.corpus import DataError
from training.data.files import read_documents
from training.data.language import build


def read(*paths, text_field="text"):
    return dict(read_documents([str(path) for path in paths], text_field))


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_a_directory_is_walked_for_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("bee")
    (tmp_path / "a.txt").write_bytes(b"\xff\x00")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"no")
    (tmp_path / "empty.py").write_text("")
    assert read(tmp_path) == {"a.txt": b"\xff\x00", "sub/b.md": b"bee"}


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "a.txt").write_text("a")
    assert (
        read(tmp_path / "one") == read(tmp_path / "two") == read(tmp_path / "one" / "*" / "*.txt")
    )


def test_each_file_comes_once_and_equal_names_are_told_apart(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text(place)
    documents = read(tmp_path / "one", tmp_path / "one" / "a.txt", tmp_path / "two")
    assert documents == {"a.txt": b"one", "a.txt~2": b"two"}


def test_a_file_of_unknown_suffix_is_text(tmp_path):
    (tmp_path / "LICENSE").write_text("free")
    assert read(tmp_path / "LICENSE") == {"LICENSE": b"free"}


def test_json_lines(tmp_path):
    rows = [{"text": "ä"}, {"text": ""}, {"text": "b", "id": 1}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read(tmp_path) == {"a.jsonl:1": "ä".encode(), "a.jsonl:5": b"b"}


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["x", None, "", "ü"], id=[0, 1, 2, 3])
    documents = read(tmp_path, text_field="body")
    assert documents == {"a.parquet:0": b"x", "a.parquet:3": "ü".encode()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a\.jsonl:2 is no JSON object"),
        ("[1]", r"a\.jsonl:2 holds a JSON list: expected an object"),
        ('{"body": "x"}', r"a\.jsonl:2 has no field data\.text_field=text; its fields: body"),
        ('{"text": 3}', r"a\.jsonl:2: data\.text_field=text holds a int"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_json_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        read(tmp_path)


def test_bad_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(DataError, match=r"no column data\.text_field=text; its columns: body"):
        read(tmp_path)
    with pytest.raises(DataError, match="holds int, expected strings"):
        read(tmp_path, text_field="number")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"a\.parquet is no parquet file"):
        read(tmp_path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        read()
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.txt")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt is an empty file"):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match="every file found there is empty"):
        read(tmp_path)


def test_bytes_need_no_utf8_but_a_tokenizer_does(tmp_path, tokenizer_file):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_bytes(b"hello \xff world " * 20)
    config = FilesConfig(paths=[str(tmp_path)], seq_len=8, batch_size=2)
    assert build(config, seed=0).batch(0)["tokens"].shape == (2, 9)
    config.tokenizer = str(tokenizer_file)
    with pytest.raises(DataError, match=r"\.txt is not UTF-8 at byte 6.*data\.tokenizer=null"):
        build(config, seed=0)


@pytest.fixture
def tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path
