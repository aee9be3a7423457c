"""The hub stream: blocks on disk, exact resume, corruption, several processes, no network."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from training.data.config import HubConfig
from training.data.corpus import DataError
from training.data.hub import HubDocuments, open_hub
from training.data.tokenizer import ByteTokenizer
from training.errors import RunStopped


class ListDocuments:
    """A document stream in memory that counts what is read."""

    def __init__(self, texts):
        self.texts, self.at, self.reads = texts, 0, 0

    def open(self, state):
        self.at = state["at"] if state else 0
        while self.at < len(self.texts):
            self.at += 1
            self.reads += 1
            yield self.texts[self.at - 1]

    def state(self):
        return {"at": self.at}


class NoDocuments:
    """What is left of the hub without a network."""

    def open(self, state):
        raise DataError("no network")

    def state(self):
        raise AssertionError


def make_texts(count=600, seed=0):
    rng = np.random.default_rng(seed)
    return [f"<{i}>" + "x" * int(rng.integers(0, 60)) for i in range(count)]


TEXTS = make_texts()


def make_config(folder, **options):
    given = {
        "dataset": "some/set",
        "seq_len": 16,
        "batch_size": 4,
        "block_tokens": 1000,
        "heldout_documents": 10,
        "cache_dir": str(folder),
    }
    return HubConfig(**(given | options))


def open_list(folder, documents=None, **options):
    documents = documents or ListDocuments(TEXTS)
    return open_hub(make_config(folder, **options), ByteTokenizer(), documents)


def batches(windows, steps, seed=0, batch_size=4):
    return np.stack(
        [windows.tokens(windows.order(step * batch_size, batch_size, seed)) for step in steps]
    )


def test_heldout_is_the_start_of_the_stream(tmp_path):
    heldout, windows = open_list(tmp_path)
    assert [content.decode() for _, content in heldout] == TEXTS[:10]
    (everything,) = _epoch_text(windows)
    assert everything.startswith(f"|{TEXTS[10]}|{TEXTS[11]}|")
    limited, _ = open_list(tmp_path, heldout_bytes=len(TEXTS[0]) + len(TEXTS[1]))
    assert len(limited) == 2


def _epoch_text(windows):
    """The blocks, joined; windows are checked against them elsewhere."""
    index, parts = 0, []
    while (block := windows._stream.block(index)) is not None:
        parts.append(bytes(np.where(block.tokens == 256, ord("|"), block.tokens).astype(np.uint8)))
        index += 1
    return [b"".join(parts).decode()]


def test_blocks_join_to_the_stream(tmp_path):
    _, windows = open_list(tmp_path)
    assert _epoch_text(windows) == ["".join(f"|{text}" for text in TEXTS[10:])]


def test_each_window_comes_once_per_epoch(tmp_path):
    _, windows = open_list(tmp_path)
    windows.order(10**6, 1, 0)
    total = windows._total
    for epoch in range(2):
        ids = windows.order(epoch * total, total, 0)
        assert len(np.unique(ids)) == total
        full = ids[: windows.windows_per_block]
        assert sorted(full) == list(range(windows.windows_per_block))
    assert windows.order(0, 9, 0).tolist() != windows.order(total, 9, 0).tolist()
    assert windows.order(0, 9, 0).tolist() != windows.order(0, 9, 1).tolist()


def test_resume_needs_only_the_step(tmp_path):
    steps = range(0, 400, 13)  # well into the second epoch
    _, whole = open_list(tmp_path / "a")
    expected = batches(whole, steps)
    for start in (5, 21):
        _, resumed = open_list(tmp_path / "a", NoDocuments())
        assert np.array_equal(batches(resumed, steps[start:]), expected[start:])
    _, elsewhere = open_list(tmp_path / "b")
    assert np.array_equal(batches(elsewhere, steps[21:]), expected[21:])


def test_blocks_are_built_once_and_the_stream_is_not_reread(tmp_path):
    documents = ListDocuments(TEXTS)
    _, windows = open_list(tmp_path, documents)
    batches(windows, range(400))
    assert documents.reads == len(TEXTS)
    half = ListDocuments(TEXTS)
    _, windows = open_list(tmp_path / "half", half)
    windows.order(0, 1, 0)
    documents = ListDocuments(TEXTS)
    _, windows = open_list(tmp_path / "half", documents)
    batches(windows, range(400))
    assert documents.reads == len(TEXTS) - half.reads


def test_window_names_and_chunks(tmp_path):
    _, windows = open_list(tmp_path)
    assert windows.name(0) == "window 0 of block 0 (some/set document 10)"
    ids = np.array([0, 1, 5, 61, 62])  # 62 windows a block
    chunks = windows.chunks(ids)
    assert [len(chunk) for chunk in chunks] == [33, 17, 17, 17]
    block = windows._stream.block(1)
    assert np.array_equal(chunks[3], block.tokens[:17])
    starts = np.cumsum([0, *(len(text) + 1 for text in TEXTS[10:])])
    for within in range(62):
        document = 9 + np.searchsorted(starts, 3000 + within * 16, side="right")
        assert windows.name(3 * 62 + within).endswith(f"(some/set document {document})")


def test_the_shuffle_control_is_refused_on_a_stream(tmp_path):
    with pytest.raises(DataError, match="data=stdlib"):
        open_list(tmp_path, shuffle_bytes=True)


def test_a_corrupted_block_is_rebuilt(tmp_path):
    _, windows = open_list(tmp_path)
    expected = batches(windows, range(0, 100, 9))
    for name in ("block_000001.bin", "block_000004.bin", "heldout.bin"):
        (path,) = tmp_path.glob(f"hub/*/{name}")
        content = bytearray(path.read_bytes())
        content[7] ^= 1
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="corrupted"):
        heldout, windows = open_list(tmp_path)
        assert np.array_equal(batches(windows, range(0, 100, 9)), expected)
    assert heldout[0][1].decode() == TEXTS[0]
    (path,) = tmp_path.glob("hub/*/block_000002.json")
    path.write_text("{")
    with pytest.warns(UserWarning, match="unreadable"):
        _, windows = open_list(tmp_path)
        assert np.array_equal(batches(windows, range(0, 100, 9)), expected)


def test_a_corrupted_block_of_a_data_set_that_changed_is_an_error(tmp_path):
    _, windows = open_list(tmp_path)
    batches(windows, range(40))
    (path,) = tmp_path.glob("hub/*/block_000000.bin")
    path.write_bytes(b"xx" + path.read_bytes()[2:])
    _, windows = open_list(tmp_path, ListDocuments(make_texts(seed=1)))
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"pin data\.revision"):
        batches(windows, range(1))


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    _, windows = open_list(tmp_path / "a")
    expected = batches(windows, range(0, 60, 9))
    _, windows = open_list(tmp_path / "b")

    def crash(_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(RunStopped, match="disk full"):
            windows.order(0, 4, 0)
    assert not list(tmp_path.glob("b/hub/*/block*"))
    assert np.array_equal(batches(windows, range(0, 60, 9)), expected)
    assert not list(tmp_path.glob("b/hub/*/*tmp*"))


def _read_some(folder, start):
    _, windows = open_list(folder)
    return batches(windows, range(start, 100, 7)).tolist()


def test_several_processes_share_the_blocks(tmp_path):
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        results = pool.map(partial(_read_some, tmp_path / "shared"), [0, 0, 0])
    assert results[0] == results[1] == results[2] == _read_some(tmp_path / "alone", 0)
    assert not list(tmp_path.glob("shared/hub/*/*tmp*"))


def test_threads_share_a_stream(tmp_path):
    _, windows = open_list(tmp_path / "shared")
    starts = [0, 30, 60, 90]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda start: batches(windows, range(start, 200, 9)), starts))
    _, alone = open_list(tmp_path / "alone")
    for start, result in zip(starts, results, strict=True):
        assert np.array_equal(result, batches(alone, range(start, 200, 9)))


def test_too_few_documents_or_tokens_say_what_to_change(tmp_path):
    with pytest.raises(DataError, match=r"only 600 documents"):
        open_list(tmp_path, heldout_documents=601)
    _, windows = open_list(tmp_path, heldout_documents=600)
    with pytest.raises(DataError, match=r"lower data\.seq_len"):
        windows.order(0, 4, 0)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_the_library_streams_local_files_exactly(tmp_path, kind):
    config = make_config(tmp_path, block_tokens=2000)
    load = partial(_load_local, kind, _write_shards(tmp_path, kind))
    _, windows = open_hub(config, ByteTokenizer(), HubDocuments(config, load))
    windows.order(0, 1, 0)  # then a new process goes on from the state of the first block
    _, windows = open_hub(config, ByteTokenizer(), HubDocuments(config, load))
    assert _epoch_text(windows) == ["".join(f"|{text}" for text in TEXTS[10:])]


def _write_shards(folder, kind):
    paths = []
    for shard in range(3):
        texts = TEXTS[shard * 200 : (shard + 1) * 200]
        paths.append(str(folder / f"{shard}.{kind}"))
        if kind == "json":
            with open(paths[-1], "w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table({"text": texts})
            pyarrow.parquet.write_table(table, paths[-1], row_group_size=37)
    return paths


def _load_local(kind, paths, config, revision):
    import datasets

    stream = datasets.load_dataset(kind, data_files=paths, split="train", streaming=True)
    return stream, "local"


def test_a_wrong_text_field_lists_the_columns(tmp_path):
    config = make_config(tmp_path, text_field="body")
    load = partial(_load_local, "json", _write_shards(tmp_path, "json"))
    with pytest.raises(DataError, match=r"data\.text_field=body; its columns: text"):
        open_hub(config, ByteTokenizer(), HubDocuments(config, load))


def test_offline_is_one_sentence(tmp_path):
    code = (
        "from training.data.config import HubConfig\n"
        "from training.data.corpus import DataError\n"
        "from training.data.language import build\n"
        f"config = HubConfig(dataset='some/set', cache_dir={str(tmp_path)!r})\n"
        "try: build(config, seed=0)\n"
        "except DataError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "data.dataset=some/set could not be opened" in done.stdout
    assert "data=stdlib" in done.stdout and "data=files" in done.stdout
