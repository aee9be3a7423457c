"""`afferent serve weights=<model>`: an OpenAI-compatible server for one decoder.

    POST /v1/completions         prompt (text or token ids), max_tokens, temperature, seed,
                                 logprobs, stop_token_ids, return_tokens_as_token_ids
    POST /v1/chat/completions    messages, max_tokens, temperature, seed
    GET  /v1/models              its name

It answers one request at a time, binds to this machine unless told otherwise, and limits what it
takes: it is for self-study, tests and a look at a model, not for many users. With `cartridge=` all
requests are answered behind that cartridge.
"""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from scripts.words import device, door
from training.errors import UserError

BODY_BYTES = 8 * 2**20
WAITING = 16
"Requests that may wait for their turn."
READ_S = 30.0
"Time that a client has to send its request."


@dataclass
class Asked:
    """The command line."""

    weights: str
    "The model: a directory with safetensors, or a name on the hub."
    name: str = ""
    "What it is called; empty: as weights."
    host: str = "127.0.0.1"
    "Address to bind to."
    port: int = 8000
    "Port; 0 takes a free one."
    cartridge: str = ""
    "Cartridge that stands before every request."
    max_tokens: int = 4096
    "Most tokens of an answer."
    context: int = 32768
    "Most tokens of a prompt."
    device: str = "auto"
    "auto, cpu or cuda."


class BadRequest(ValueError):
    """What the client can mend."""


class Service:
    """One model, answering one request at a time."""

    def __init__(self, asked: Asked) -> None:
        from models.language.cartridges_file import CartridgeError, load_cartridge
        from training.data.chat import Chat
        from training.data.tokenizer import FileTokenizer
        from training.pretrained import load_decoder, locate

        directory, where = locate(asked.weights, "weights"), device(asked.device)
        self.asked, self.name = asked, asked.name or asked.weights
        self.model = load_decoder(directory, device=where)
        self.tokenizer = FileTokenizer(str(directory))
        self.chat = Chat(self.tokenizer)
        self.prefix = None
        if asked.cartridge:
            try:
                self.prefix = load_cartridge(Path(asked.cartridge), self.model, device=where)[0]
            except CartridgeError as error:
                raise UserError(str(error)) from error
        self.turn, self.places = threading.Lock(), threading.Semaphore(WAITING)

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """/v1/completions."""
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            ids = self.chat.encode(prompt)
        elif isinstance(prompt, list) and all(type(i) is int for i in prompt):
            ids = prompt
        else:
            raise BadRequest("prompt must be text or a list of token ids")
        count = number(body, "logprobs", int, 0, 0, 100)
        tokens, top, reason = self.generate(ids, body, count, body.get("stop_token_ids") or [])
        by_id = body.get("return_tokens_as_token_ids") is True
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.tokenizer.decode(tokens),
            "finish_reason": reason,
            "logprobs": None,
        }
        if count:
            name = (lambda i: f"token_id:{i}") if by_id else (lambda i: self.tokenizer.decode([i]))
            choice["logprobs"] = {
                "tokens": [name(i) for i in tokens],
                "token_logprobs": [dict(step).get(i) for i, step in zip(tokens, top, strict=True)],
                "top_logprobs": [{name(i): value for i, value in step} for step in top],
            }
        return self.envelope("text_completion", choice, len(ids), len(tokens))

    def chat_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """/v1/chat/completions."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of {role, content}")
        ids = [] if self.prefix is not None else self.chat.begin()
        for item in messages:
            role, content = (
                item.get(k) if isinstance(item, dict) else None for k in ("role", "content")
            )
            if not isinstance(role, str) or not isinstance(content, str):
                raise BadRequest("every message needs a role and a content, both text")
            try:
                ids += self.chat.message(role, content)
            except ValueError as error:
                raise BadRequest(str(error)) from error
        ids += self.chat.open("assistant")
        tokens, _, reason = self.generate(ids, body, 0, list(self.chat.stop))
        text = self.tokenizer.decode(self.chat.until_stop(tokens))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": reason,
        }
        return self.envelope("chat.completion", choice, len(ids), len(tokens))

    def generate(
        self, ids: list[int], body: dict[str, Any], count: int, stop: Any
    ) -> tuple[list[int], list[list[tuple[int, float]]], str]:
        """New tokens, their likeliest tokens, and why they end."""
        import torch

        from models.language.inference.completion import complete

        vocab = self.model.config.resolved_vocab_size
        if not ids or len(ids) > self.asked.context:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens, it may have 1 to {self.asked.context}"
            )
        if not all(0 <= i < vocab for i in ids):
            raise BadRequest(f"a token id is not below the vocabulary's {vocab}")
        if not isinstance(stop, list) or not all(type(i) is int for i in stop):
            raise BadRequest("stop_token_ids must be a list of token ids")
        most = number(body, "max_tokens", int, 16, 1, self.asked.max_tokens)
        temperature = number(body, "temperature", float, 1.0, 0.0, 100.0)
        seed = number(body, "seed", int, 0, 0, 2**63 - 1)
        device = self.model.embed.weight.device
        with self.turn:
            generator = torch.Generator(device=device).manual_seed(seed)
            tokens, top = complete(
                self.model, ids, most, temperature=temperature, top_logprobs=count,
                stop=stop, prefix=self.prefix, generator=generator,
            )  # fmt: skip
        return tokens, top, "stop" if tokens and tokens[-1] in stop else "length"

    def envelope(self, kind: str, choice: Any, read: int, written: int) -> dict[str, Any]:
        usage = {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }
        return {"object": kind, "model": self.name, "choices": [choice], "usage": usage}


def number(body: dict[str, Any], key: str, kind: type, default: Any, low: Any, high: Any) -> Any:
    """A number of the request within its limits. Raises BadRequest."""
    value = body.get(key)
    if value is None or value is False:
        return default
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        raise BadRequest(f"{key}={value!r} must be a number from {low} to {high}")
    return kind(value)


class Handler(BaseHTTPRequestHandler):
    """HTTP around a `Service`."""

    service: Service
    protocol_version = "HTTP/1.1"
    timeout = READ_S

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": self.service.name}]})
        else:
            self.reply(404, failure(f"there is no {self.path}"))

    def do_POST(self) -> None:
        routes = {
            "/v1/completions": self.service.completions,
            "/v1/chat/completions": self.service.chat_completions,
        }
        route = routes.get(self.path.rstrip("/"))
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > BODY_BYTES:
            self.close_connection = True
            return self.reply(413, failure(f"the body must have 1 to {BODY_BYTES} bytes"))
        raw = self.rfile.read(int(size))
        if route is None:
            return self.reply(404, failure(f"there is no {self.path}; use {', '.join(routes)}"))
        if not self.service.places.acquire(blocking=False):
            return self.reply(503, failure("too many requests wait: try again later"))
        try:
            body = json.loads(raw)
            if not isinstance(body, dict):
                raise BadRequest("the body must be a JSON object")
            return self.reply(200, route(body))
        except (BadRequest, ValueError) as error:
            return self.reply(400, failure(str(error)))
        finally:
            self.service.places.release()

    def reply(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client has gone

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: requests may hold what is nobody's business."""


def failure(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def bound(asked: Asked) -> ThreadingHTTPServer:
    """The server, listening; `serve_forever` answers. Raises UserError."""
    service = Service(asked)
    handler = type("BoundHandler", (Handler,), {"service": service})
    try:
        server = ThreadingHTTPServer((asked.host, asked.port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {asked.host}:{asked.port}: {error}") from error
    server.daemon_threads = True
    return server


def serve(asked: Asked) -> None:
    """Answer until a signal comes."""
    with bound(asked) as server:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"http://{asked.host}:{server.server_port}/v1", flush=True)
        server.serve_forever()


def main() -> None:
    """Entry point."""
    door(Asked, __doc__ or "", "serve", serve)


if __name__ == "__main__":
    main()
