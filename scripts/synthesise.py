"""`afferent synthesise corpus=<file> weights=<model> out=<directory>`: self-study of a text.

A model makes conversations about the text with itself; `afferent train experiment=cartridges/corpus
data.path=<directory>` then trains a cartridge on them. The same command goes on where it ended.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.words import device, door
from training.errors import UserError


@dataclass
class Asked:
    """The command line."""

    weights: str
    "The model: a directory with safetensors, or a name on the hub; its tokenizer is used."
    out: str
    "Directory of the conversations."
    corpus: str = ""
    "Text file that is studied."
    benchmark: str = ""
    "Study a benchmark's documents instead: longhealth, qasper or mtob."
    source: str = ""
    "The benchmark's file or directory."
    endpoint: str = ""
    "URL of an OpenAI-compatible server of that model, up to /v1; empty: the model runs here."
    served_as: str = ""
    "Name that the server knows the model by; empty: that of weights."
    conversations: int = 1024
    "How many."
    seed: int = 0
    "Of everything that is drawn."
    chunk: tuple[int, int] = (512, 4096)
    "Least and most tokens of the text that are seen at a time."
    question_tokens: int = 512
    "Most tokens of a question."
    answer_tokens: int = 1024
    "Most tokens of an answer."
    temperature: float = 0.6
    "Of the questions; answers have 0."
    top_k: int = 20
    "Most likely tokens that are recorded of each step of an answer."
    shard: int = 64
    "Conversations per file."
    workers: int = 8
    "Requests at a time."
    timeout_s: float = 120.0
    "Of one answer of the server."
    context: int = 0
    "Most tokens that the model reads at once; 0: as its configuration says, if it does."
    device: str = "auto"
    "auto, cpu or cuda."


def main() -> None:
    """Entry point."""
    door(Asked, __doc__ or "", "synthesise", lambda asked: print(run(asked)))


def run(asked: Asked) -> Path:
    """Synthesise; returns the directory. Raises UserError."""
    from training.data.chat import Chat
    from training.data.tokenizer import FileTokenizer
    from training.endpoint import Endpoint, Engine, InProcess
    from training.pretrained import context_of, load_decoder, locate
    from training.synthesis import Study, synthesise

    corpus = text_of(asked)
    study = Study(
        asked.conversations, asked.seed, asked.chunk, asked.question_tokens, asked.answer_tokens,
        asked.temperature, asked.top_k, asked.shard, asked.workers,
    )  # fmt: skip
    directory = locate(asked.weights, "weights")
    tokenizer = FileTokenizer(str(directory))
    if asked.endpoint:
        name = asked.served_as or asked.weights
        engine: Engine = Endpoint(
            asked.endpoint, name, tokenizer, key=api_key(), timeout_s=asked.timeout_s
        )
    else:
        engine = InProcess(load_decoder(directory, device=device(asked.device)))
    context = asked.context or context_of(directory)
    out = Path(asked.out).expanduser()
    synthesise(corpus, engine, Chat(tokenizer), study, out, context=context, progress=progress)
    print(file=sys.stderr)
    return out


def text_of(asked: Asked) -> str:
    """What is studied. Raises UserError."""
    if asked.benchmark:
        from training.evaluation.benchmarks import load

        return load(asked.benchmark, asked.source).corpus
    if not asked.corpus:
        raise UserError("synthesise needs corpus=<text file>, or benchmark=... source=...")
    try:
        return Path(asked.corpus).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus={asked.corpus} cannot be read as text: {error}") from error


def progress(done: int, all_: int) -> None:
    print(f"\r{done} of {all_} conversations", end="", file=sys.stderr, flush=True)


def api_key() -> str:
    """The server's key, from the environment only: a command line is seen by others."""
    import os

    return os.environ.get("AFFERENT_API_KEY", "")


if __name__ == "__main__":
    main()
