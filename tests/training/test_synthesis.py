"""From a text to its cartridge with the models that users have: tiny Llama and Qwen3 checkpoints,
self-study in the process and through a server, training, answers in a fresh process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from models.language.cartridges_file import load_cartridge
from models.language.prefix import read
from scripts import answer, serve, synthesise
from scripts.words import parse
from tests.helpers import environment, model_keys, tiny_checkpoint
from tests.training.test_benchmarks import write_longhealth
from training.config import compose
from training.data.chat import Chat
from training.data.config import ConversationsConfig
from training.data.conversations import ConversationsData, read_shard, shard_path
from training.data.corpus import DataError
from training.data.tokenizer import FileTokenizer
from training.endpoint import Endpoint, InProcess, Request
from training.errors import UserError
from training.pretrained import load_decoder
from training.run import run
from training.run_directory import run_path
from training.synthesis import KINDS, Study
from training.synthesis import synthesise as study_corpus

TEXT = "The tide table of Port Ellen. High water at dawn. Low water at noon. " * 8


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def checkpoint(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "tides.txt"
    path.write_text(TEXT)
    return path


def words(checkpoint: Path, corpus: Path, out: Path, **changes) -> list[str]:
    keys = {
        "corpus": corpus, "weights": checkpoint, "out": out, "conversations": 6, "shard": 4,
        "chunk": "32,64", "question_tokens": 8, "answer_tokens": 12, "workers": 2, "device": "cpu",
        **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()]


def synthesised(checkpoint: Path, corpus: Path, out: Path, **changes) -> Path:
    given = parse(words(checkpoint, corpus, out, **changes), synthesise.Asked, "test")
    return synthesise.run(given)


@pytest.fixture(scope="module")
def conversations(checkpoint, corpus, tmp_path_factory) -> Path:
    return synthesised(checkpoint, corpus, tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[str]:
    asked = serve.Asked(weights=str(checkpoint), name="tiny", port=0, max_tokens=64, device="cpu")
    with serve.bound(asked) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/v1"
        found.shutdown()


def test_marks_are_single_tokens_and_never_come_from_text(checkpoint):
    tokenizer = FileTokenizer(str(checkpoint))
    chat = Chat(tokenizer)
    assert chat.name == ("llama3" if tokenizer.id_of("<|eot_id|>") is not None else "chatml")
    ids = chat.prompt([("system", "a"), ("user", "b<|eot_id|><|im_end|>")])
    marks = [i for i in ids if i >= 256]
    each = 3 if chat.name == "llama3" else 2
    begin = 1 if chat.name == "llama3" else 0
    assert len(marks) == begin + 2 * each + (each - 1)
    assert chat.until_stop([5, 6, chat.stop[0], 7]) == [5, 6]
    with pytest.raises(ValueError, match="none of system, user, assistant"):
        chat.open("tool")


def test_conversations_are_what_the_model_says_of_its_chunk(checkpoint, corpus, conversations):
    model, chat = load_decoder(checkpoint), Chat(FileTokenizer(str(checkpoint)))
    tokens = chat.encode(TEXT)
    found, header = read_shard(shard_path(conversations, 0))
    assert len(found) == 4 and header["chat"] == chat.name and header["top_k"] == 20
    for conversation in found:
        first, length = conversation.facts["chunk"]
        assert 32 <= length <= 64 and conversation.facts["kind"] in KINDS
        seen = [*chat.begin(), *chat.message("system", tokens[first : first + length])]
        whole = torch.tensor([[*seen, *conversation.tokens.tolist()]])
        logprobs = model(whole)[0, len(seen) - 1 : -1].log_softmax(-1)
        places = np.flatnonzero(conversation.weight)
        assert len(places) and (conversation.likely[~conversation.weight] == -1).all()
        expected = logprobs[places].topk(20)
        assert np.array_equal(conversation.likely[places], expected.indices.numpy())
        np.testing.assert_allclose(
            conversation.logprobs[places], expected.values.numpy(), atol=2e-4, rtol=1e-3
        )
        assert np.array_equal(conversation.tokens[places], expected.indices[:, 0].numpy())


def test_an_interrupted_study_goes_on_and_comes_to_the_same(
    checkpoint, corpus, conversations, tmp_path
):
    out = synthesised(checkpoint, corpus, tmp_path / "parts", conversations=4)
    assert not shard_path(out, 1).exists()
    synthesised(checkpoint, corpus, out)
    for index in (0, 1):
        parts, whole = (shard_path(d, index).read_bytes() for d in (out, conversations))
        assert parts == whole
    with pytest.raises(UserError, match="another study: seed differ"):
        synthesised(checkpoint, corpus, out, seed=1)


def test_a_server_of_the_same_model_gives_the_same_conversations(
    checkpoint, corpus, conversations, server, tmp_path
):
    out = synthesised(checkpoint, corpus, tmp_path, endpoint=server, served_as="tiny")
    for index in (0, 1):
        ours, theirs = (read_shard(shard_path(d, index))[0] for d in (conversations, out))
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.likely, b.likely)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_from_a_text_to_answers_in_a_fresh_process(checkpoint, conversations, tmp_path):
    config = compose(
        [
            "experiment=cartridges/corpus",
            f"recipe.weights={checkpoint}",
            f"data.path={conversations}",
            *model_keys(checkpoint),
            "recipe.tokens=64",
            "data.heldout=2",
            "data.seq_len=96",
            "data.batch_size=2",
            "loop.steps=3",
            "optim.warmup_steps=0",
            f"runs_dir={tmp_path}",
            "report=false",
        ]
    )
    results = run(config)
    assert np.isfinite(results["metrics"]["eval/divergence"])
    file = run_path(config) / "cartridge_0.safetensors"
    model = load_decoder(checkpoint)
    prefix, header = load_cartridge(file, model)
    data = ConversationsData(ConversationsConfig(path=str(conversations), heldout=2), seed=0)
    assert header.corpus == data.header["corpus"] and prefix.position == 64
    command = [
        sys.executable, "-m", "scripts.answer", f"cartridge={file}", f"weights={checkpoint}",
        "question=When is high water?", "max_tokens=5", "device=cpu",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    asked = answer.Asked(
        str(file), "When is high water?", weights=str(checkpoint), max_tokens=5, device="cpu"
    )
    assert done.stdout.strip() == answer.run(asked)

    source, out = write_longhealth(tmp_path / "health.json", 2), tmp_path / "answers.jsonl"
    whole = dataclasses.replace(
        asked, question="", benchmark="longhealth", source=str(source), out=str(out)
    )
    said = answer.run(whole)
    assert said == "longhealth: accuracy 0 of 2 questions", "a random model marks no answer"
    rows = out.read_text().splitlines()
    out.write_text(rows[0] + "\n")
    assert answer.run(whole) == said and out.read_text().splitlines() == rows
    out.write_text(json.dumps({"question": "other", "answer": ""}) + "\n")
    with pytest.raises(UserError, match="answers to other questions"):
        answer.run(whole)


def test_an_untrained_cartridge_of_the_whole_corpus_is_the_corpus(checkpoint, conversations):
    """Real checkpoints, real chat format: exactness again, where a corpus is a system message."""
    model, chat = load_decoder(checkpoint), Chat(FileTokenizer(str(checkpoint)))
    data = ConversationsData(ConversationsConfig(path=str(conversations), heldout=2), seed=0)
    corpus = torch.from_numpy(data.corpus[None].astype(np.int64))
    question = torch.tensor([[*chat.message("user", "hm?"), *chat.open("assistant")]])
    whole = model(torch.cat([corpus, question], dim=1))[:, corpus.shape[1] :]
    found = model(question, cache=read(model, corpus).prefix())
    assert (found - whole).abs().max() < 1e-5 * whole.abs().max()


def test_the_server_speaks_as_others_do(checkpoint, server):
    def post(path: str, body: object) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        call = urllib.request.Request(server + path, data)
        try:
            with urllib.request.urlopen(call, timeout=60) as answered:
                return answered.status, json.load(answered)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    code, found = post("/completions", {"prompt": "abc", "max_tokens": 3, "temperature": 0})
    assert code == 200 and found["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6,
    }  # fmt: skip
    model = load_decoder(checkpoint)
    chat = Chat(FileTokenizer(str(checkpoint)))
    greedy = InProcess(model).complete(Request(tuple(chat.encode("abc")), 3)).tokens
    assert found["choices"][0]["text"] == chat.tokenizer.decode(greedy)
    code, found = post(
        "/chat/completions",
        {"messages": [{"role": "user", "content": "hm"}], "max_tokens": 2, "temperature": 0},
    )
    assert code == 200 and found["choices"][0]["message"]["role"] == "assistant"
    with urllib.request.urlopen(server + "/models", timeout=60) as answered:
        assert json.load(answered)["data"][0]["id"] == "tiny"
    for path, body, expected in (
        ("/completions", {"prompt": 5}, 400),
        ("/completions", {"prompt": []}, 400),
        ("/completions", {"prompt": [10**6]}, 400),
        ("/completions", {"prompt": "a", "max_tokens": 65}, 400),
        ("/completions", {"prompt": "a", "temperature": -1}, 400),
        ("/completions", {"prompt": "a", "temperature": "hot"}, 400),
        ("/completions", b"{", 400),
        ("/completions", [1], 400),
        ("/chat/completions", {"messages": [{"role": "x", "content": "y"}]}, 400),
        ("/chat/completions", {"messages": "hm"}, 400),
        ("/elsewhere", {}, 404),
    ):
        code, found = post(path, body)
        assert code == expected and found["error"]["message"], (path, body)


class Bad(BaseHTTPRequestHandler):
    """A server that does not do what it should; how, is its class's `how`."""

    how = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.how == "slow":
            threading.Event().wait(3)
        if self.how == "broken":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        choice = {"text": "hello", "logprobs": None}
        if self.how == "foreign":
            choice["logprobs"] = {"tokens": ["token_id:99999"], "top_logprobs": [{"a": -1.0}]}
        if self.how == "few":
            choice["logprobs"] = {"tokens": ["token_id:3", "token_id:4"], "top_logprobs": [{}]}
        content = {"choices": [choice]} if self.how != "other" else {"hello": 1}
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("slow", "no answer within 0.5 s"),
        ("broken", "HTTP 500"),
        ("silent", "without log-probabilities"),
        ("foreign", "none of the tokenizer's"),
        ("few", "reports the most likely tokens of 1 of 2 steps"),
        ("other", "is it OpenAI-compatible"),
        ("absent", "does not serve /completions"),
    ],
)
def test_a_bad_endpoint_is_one_sentence_and_nothing_is_written(
    checkpoint, corpus, tmp_path, how, message
):
    tokenizer = FileTokenizer(str(checkpoint))
    with HTTPServer(("127.0.0.1", 0), type("Bad", (Bad,), {"how": how})) as bad:
        threading.Thread(target=bad.serve_forever, daemon=True).start()
        port = bad.server_port
        if how == "absent":
            bad.shutdown()
            bad.server_close()
        engine = Endpoint(f"http://127.0.0.1:{port}/v1", "m", tokenizer, timeout_s=0.5, retries=0)
        study = Study(4, 0, (32, 64), 8, 12, shard=2, workers=1)
        with pytest.raises(UserError, match=message):
            study_corpus(TEXT, engine, Chat(tokenizer), study, tmp_path / "out")
        if how != "absent":
            bad.shutdown()
    assert not list((tmp_path / "out").glob("conversations-*"))


def test_what_cannot_be_studied_is_refused(checkpoint, corpus, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for changes, message in (
        ({"corpus": empty}, "the corpus is empty"),
        ({"corpus": tmp_path / "nowhere"}, "cannot be read as text"),
        ({"context": 100}, "the model reads 100"),
        ({"chunk": "64,32"}, "the least and the most"),
        ({"conversations": 0}, "conversations=0 must be at least 1"),
        ({"weights": tmp_path / "none"}, "there is no such directory"),
        ({"endpoint": "ftp://x"}, "must be a URL"),
    ):
        with pytest.raises(UserError, match=message):
            synthesised(checkpoint, changes.pop("corpus", corpus), tmp_path / "out", **changes)
    with pytest.raises(UserError, match="Did you mean corpus="):
        parse(["corpsu=x"], synthesise.Asked, "synthesise")
    with pytest.raises(UserError, match="needs weights="):
        parse([], synthesise.Asked, "synthesise")
    with pytest.raises(UserError, match="chunk=5 must be two whole numbers"):
        parse(["chunk=5"], synthesise.Asked, "synthesise")


def test_damaged_or_foreign_conversations_are_refused(checkpoint, conversations, tmp_path):
    config = ConversationsConfig(path=str(tmp_path))
    with pytest.raises(DataError, match="afferent synthesise"):
        ConversationsData(config, seed=0)
    for file in conversations.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="leaves none to train on"):
        ConversationsData(config, seed=0)
    config = ConversationsConfig(path=str(tmp_path), heldout=2)
    ConversationsData(config, seed=0)
    shard = shard_path(tmp_path, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or holds no conversations"):
        ConversationsData(config, seed=0)
    (tmp_path / "corpus.safetensors").unlink()
    shard.write_bytes(whole)
    with pytest.raises(DataError, match=r"corpus\.safetensors is missing"):
        ConversationsData(config, seed=0)
