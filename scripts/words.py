"""key=value words of a door, as a dataclass: every door that is no experiment reads them here."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from training.errors import UserError

T = TypeVar("T")
KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple[int, int]": "two whole numbers, a,b",
}


def door(into: type[T], about: str, command: str, run: Callable[[T], None]) -> None:
    """What every door does: --help, the words, and what the user can mend in one sentence."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(help_of(into, about), end="")
        return
    try:
        run(parse(words, into, command))
    except UserError as error:
        print(f"afferent: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("afferent: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def device(name: str) -> str:
    """cpu or cuda. Raises UserError."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name} must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has no GPU that torch can use")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def parse(words: Sequence[str], into: type[T], command: str) -> T:
    """The words as the fields of a dataclass; those without a default must be given.

    Raises:
        UserError: an unknown or missing key, or a value of another kind.
    """
    fields = {item.name: item for item in dataclasses.fields(into)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}=...?" if near else ""
            raise UserError(
                f"{command} knows no `{word}`.{hint} Use: {', '.join(fields)} as key=value"
            )
        given[key] = value(key, text, str(fields[key].type))
    missing = [
        name
        for name, item in fields.items()
        if name not in given and item.default is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{command} needs {', '.join(f'{name}=...' for name in missing)}")
    return into(**given)


def value(key: str, text: str, kind: str) -> Any:
    """`text` as what the field holds."""
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text]
        if kind == "tuple[int, int]":
            low, high = text.split(",")
            return int(low), int(high)
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        raise UserError(f"{key}={text} must be {KINDS[kind]}") from None


def help_of(into: type, about: str) -> str:
    """What --help prints: the keys, their defaults and meanings."""
    import inspect

    lines = inspect.getsource(into).splitlines()
    meanings = {
        lines[i].split(":")[0].strip(): lines[i + 1].strip().strip('"')
        for i in range(len(lines) - 1)
        if ": " in lines[i] and lines[i + 1].strip().startswith('"')
    }
    rows = []
    for item in dataclasses.fields(into):
        default = "" if item.default is dataclasses.MISSING else f" [{shown(item.default)}]"
        rows.append(f"  {item.name + '=':<18} {meanings.get(item.name, '')}{default}")
    return "\n".join([about, "", *rows, ""])


def shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
