"""Text completion: by a model in this process, or by any OpenAI-compatible server.

Prompts are token ids, so that what the server reads is what was meant, whatever chat template it
has; of `/v1/completions` the fields prompt, max_tokens, temperature, seed and logprobs are used.
Answers come back as ids with the most likely tokens of each step. Servers name tokens by their
text, which may be ambiguous; those that can be asked to name them by id (vLLM and ours, with
`return_tokens_as_token_ids`) are asked to.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from training.data.tokenizer import FileTokenizer, Tokenizer
from training.errors import UserError

BY_ID = "token_id:"
LIMIT_BYTES = 256 * 2**20  # of an answer


@dataclass(frozen=True)
class Request:
    """What is to be completed, and how."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    "Most likely tokens to report for each new one; 0 for none."
    seed: int = 0
    stop: tuple[int, ...] = ()
    "Ids that end the text; the one that did is part of it."


@dataclass(frozen=True)
class Completion:
    """New tokens, and of each step the most likely ones, best first."""

    tokens: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    "(id, natural log-probability) of each step; empty if none were asked for."


class Engine(Protocol):
    """What completes text."""

    identity: str
    "Of the model behind it, for records."

    def complete(self, request: Request) -> Completion: ...


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: up to and with /v1.
        model: the name that the server knows it by.
        tokenizer: of that model.
        timeout_s: of one answer.
        retries: further attempts after a failure of the network or the server.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        key: str = "",
        timeout_s: float = 120.0,
        retries: int = 3,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"endpoint={url} must be a URL, e.g. http://127.0.0.1:8000/v1")
        self.url, self.model, self.tokenizer = url.rstrip("/"), model, tokenizer
        self.key, self.timeout_s, self.retries = key, timeout_s, retries
        self.identity = f"{self.url} {model}"

    def complete(self, request: Request) -> Completion:
        """Ask the server. Raises UserError, after the retries, in one sentence."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "return_tokens_as_token_ids": True,
            "logprobs": max(1, request.top_logprobs),
        }
        if request.stop:
            body["stop_token_ids"] = list(request.stop)
        return self._parsed(self._post("/completions", body), request)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                call = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(call, timeout=self.timeout_s) as answer:
                    return json.loads(answer.read(LIMIT_BYTES))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.read(300).decode(errors='replace')}".strip()
                if error.code < 500 and error.code != 429:
                    break  # it would say the same again
            except TimeoutError:
                why = f"no answer within {self.timeout_s:g} s"
            except (OSError, ValueError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(8.0, 0.25 * 2**attempt))
        raise UserError(
            f"the endpoint {self.url} does not serve {path}: {' '.join(why.split())[:200]}. Check "
            "that it runs and serves this model; what was synthesised before is kept, the same "
            "command goes on"
        )

    def _parsed(self, answer: Any, request: Request) -> Completion:
        try:
            choice = answer["choices"][0]
            logprobs = choice.get("logprobs")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"the endpoint {self.url} answered without choices: is it OpenAI-compatible?"
            ) from None
        if not logprobs or not logprobs.get("tokens"):
            if not choice.get("text"):
                return Completion(())
            raise UserError(
                f"the endpoint {self.url} answered without log-probabilities: start the server "
                "with them (vLLM: --max-logprobs 20), or synthesise in this process"
            )
        tokens = tuple(self.id_of(text) for text in logprobs["tokens"])
        if not request.top_logprobs:
            return Completion(tokens)
        steps = logprobs.get("top_logprobs") or []
        if len(steps) != len(tokens) or not all(steps):
            raise UserError(
                f"the endpoint {self.url} reports the most likely tokens of {len(steps)} of "
                f"{len(tokens)} steps: start the server with at least {request.top_logprobs}"
            )
        top = []
        for step in steps:
            ranked = sorted(step.items(), key=lambda item: -item[1])[: request.top_logprobs]
            top.append(tuple((self.id_of(text), float(value)) for text, value in ranked))
        return Completion(tokens, tuple(top))

    def id_of(self, text: str) -> int:
        """The id of a token that the server names by id or by text."""
        if text.startswith(BY_ID) and text[len(BY_ID) :].isdigit():
            found: int | None = int(text[len(BY_ID) :])
        else:
            known = (
                self.tokenizer.id_of(text) if isinstance(self.tokenizer, FileTokenizer) else None
            )
            ids: Sequence[int] = [known] if known is not None else self.tokenizer.encode(text)
            found = int(ids[0]) if len(ids) == 1 else None
        if found is None or not 0 <= found < self.tokenizer.vocab_size:
            raise UserError(
                f"the endpoint {self.url} names a token {text!r} that is none of the tokenizer's: "
                "serve with token ids (vLLM: --return-tokens-as-token-ids), and with the same "
                "tokenizer as the model that the cartridge is for"
            )
        return found


class InProcess:
    """A decoder in this process; requests of several threads take turns."""

    def __init__(self, model: Any) -> None:
        from models.language.cartridges_file import fingerprint

        self.model, self.turn = model, threading.Lock()
        self.identity = fingerprint(model)

    def complete(self, request: Request) -> Completion:
        """Generate here."""
        import torch

        from models.language.inference.completion import complete

        device = self.model.embed.weight.device
        with self.turn:
            generator = torch.Generator(device=device).manual_seed(request.seed)
            tokens, top = complete(
                self.model, request.prompt, request.max_tokens, temperature=request.temperature,
                top_logprobs=request.top_logprobs, stop=request.stop, generator=generator,
            )  # fmt: skip
        return Completion(tuple(tokens), tuple(tuple(step) for step in top))
