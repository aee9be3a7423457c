"""`afferent answer cartridge=<file> question=<text>`: ask a cartridge, in a process of its own.
With benchmark=longhealth source=<file> out=<file.jsonl>: all questions of a benchmark, and a score.

The document is not read: all that is known of it is in the file. The model must be the one that the
cartridge was trained in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.words import device, door
from training.errors import UserError
from training.files import write_atomic


@dataclass
class Asked:
    """The command line."""

    cartridge: str
    "File that a training run has written."
    question: str = ""
    "What is asked."
    benchmark: str = ""
    "Ask a benchmark's questions instead: longhealth, qasper or mtob."
    source: str = ""
    "The benchmark's file or directory."
    out: str = ""
    "File of the benchmark's answers, one JSON object per line; the same command goes on in it."
    weights: str = "experiments/cartridges/teacher"
    "The model: a directory with safetensors, or a name on the hub."
    raw: bool = False
    "Continue the question as it stands, instead of a conversation; always so for our small models."
    max_tokens: int = 256
    "Most tokens of the answer."
    temperature: float = 0.0
    "0 takes the most likely tokens."
    seed: int = 0
    "Of the sampling."
    device: str = "auto"
    "auto, cpu or cuda."


def main() -> None:
    """Entry point."""
    door(Asked, __doc__ or "", "answer", lambda asked: print(run(asked)))


def run(asked: Asked) -> str:
    """The answer. Raises UserError."""
    import torch

    from models.language.cartridges_file import CartridgeError, load_cartridge
    from models.language.inference.completion import complete
    from training.data.chat import Chat
    from training.data.tokenizer import FileTokenizer
    from training.pretrained import load_decoder, locate

    if asked.max_tokens < 1 or asked.temperature < 0:
        raise UserError("max_tokens must be at least 1 and temperature at least 0")
    directory, where = locate(asked.weights, "weights"), device(asked.device)
    model = load_decoder(directory, device=where)
    try:
        prefix, _ = load_cartridge(Path(asked.cartridge).expanduser(), model, device=where)
    except CartridgeError as error:
        raise UserError(str(error)) from error
    tokenizer = FileTokenizer(str(directory))
    chat = Chat(tokenizer)
    raw = asked.raw or (directory / "model.json").is_file()

    def answer(question: str) -> str:
        if not question.strip():
            raise UserError("question is empty: give question=<text>, or benchmark=... source=...")
        if raw:
            prompt = chat.encode(question)
        else:
            prompt = [*chat.message("user", question), *chat.open("assistant")]
        generator = torch.Generator(device=where).manual_seed(asked.seed)
        tokens, _ = complete(
            model, prompt, asked.max_tokens, temperature=asked.temperature, stop=chat.stop,
            prefix=prefix, generator=generator,
        )  # fmt: skip
        return tokenizer.decode(tokens if raw else chat.until_stop(tokens)).strip()

    return judged(asked, answer) if asked.benchmark else answer(asked.question)


def judged(asked: Asked, answer: Callable[[str], str]) -> str:
    """Answer a benchmark's questions, keep them, and say what they are worth. Raises UserError."""
    from training.evaluation.benchmarks import load

    benchmark = load(asked.benchmark, asked.source)
    if not asked.out.endswith(".jsonl"):
        raise UserError(f"out={asked.out} must be a file that ends in .jsonl")
    out = Path(asked.out).expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"out={asked.out} cannot be used: {error}") from error
    if any(
        row["question"] != question.prompt
        for row, question in zip(kept, benchmark.questions, strict=False)
    ):
        raise UserError(f"out={asked.out} holds answers to other questions: give another file")
    for number in range(len(kept), len(benchmark.questions)):
        question = benchmark.questions[number].prompt
        kept.append({"question": question, "answer": answer(question)})
        write_atomic(out, "".join(json.dumps(row) + "\n" for row in kept))
        print(f"\r{number + 1} of {len(benchmark.questions)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    score = benchmark.score(benchmark.questions, [row["answer"] for row in kept])
    return f"{benchmark.name}: {benchmark.metric} {score:.4g} of {len(kept)} questions"


if __name__ == "__main__":
    main()
