"""Conversations as token ids, in the format that a model was trained on.

    llama3   <|start_header_id|>role<|end_header_id|>\n\n ... <|eot_id|>        Llama 3
    chatml   <|im_start|>role\n ... <|im_end|>\n                                 Qwen
    plain    role: ...\n\n                                                      anything else

The format is the one whose marks the tokenizer knows. The templates that come with checkpoints are
programs; they are not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.data.corpus import DataError
from training.data.tokenizer import FileTokenizer, Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Format:
    """Marks around a message; those in `specials` are single tokens."""

    before: tuple[str, ...]
    "`{role}` stands for the role."
    after: tuple[str, ...]
    specials: tuple[str, ...]
    begin: str | None = None
    "Token that begins every sequence."


FORMATS = {
    "llama3": Format(
        ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"),
        ("<|eot_id|>",),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
        "<|begin_of_text|>",
    ),
    "chatml": Format(
        ("<|im_start|>", "{role}\n"), ("<|im_end|>", "\n"), ("<|im_start|>", "<|im_end|>")
    ),
    "plain": Format(("{role}: ",), ("\n\n",), ()),
}


class Chat:
    """Messages -> token ids.

    Attributes:
        name: of the format.
        stop: ids that end an assistant's message, any of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.id_of if isinstance(tokenizer, FileTokenizer) else (lambda text: None)
        self.name = next(
            name
            for name, marks in FORMATS.items()
            if all(known(mark) is not None for mark in marks.specials)
        )
        self.format = FORMATS[self.name]
        self._specials = {mark: known(mark) for mark in self.format.specials}
        first = self._specials.get(self.format.after[0])
        self.stop = (tokenizer.separator,) if first is None else (first, tokenizer.separator)

    def begin(self) -> list[int]:
        """What every sequence begins with."""
        mark = self.format.begin
        if mark is not None:
            return [self._specials[mark]]
        return [] if self.name == "chatml" else [self.tokenizer.separator]

    def message(self, role: str, text: str | Sequence[int]) -> list[int]:
        """A whole message; text may be token ids already."""
        ids = self.encode(text) if isinstance(text, str) else [int(i) for i in text]
        return [*self.open(role), *ids, *self._marks(self.format.after, role)]

    def open(self, role: str) -> list[int]:
        """What stands before a message of this role."""
        if role not in ROLES:
            raise ValueError(f"role={role!r} is none of {', '.join(ROLES)}")
        return self._marks(self.format.before, role)

    def encode(self, text: str) -> list[int]:
        """Plain text; marks that are spelled out in it stay text. Raises DataError."""
        try:
            return [int(i) for i in self.tokenizer.encode(text)]
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{text[:60]!r} holds something that the model's tokenizer has no token for"
            ) from error

    def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Messages (role, text), then the opening of the assistant's."""
        ids = self.begin()
        for role, text in messages:
            ids += self.message(role, text)
        return ids + self.open("assistant")

    def until_stop(self, ids: Sequence[int]) -> list[int]:
        """Generated ids up to the end of the message, without it."""
        found = []
        for i in ids:
            if i in self.stop:
                break
            found.append(int(i))
        return found

    def _marks(self, marks: Sequence[str], role: str) -> list[int]:
        ids = []
        for mark in marks:
            special = self._specials.get(mark)
            ids += self.encode(mark.format(role=role)) if special is None else [special]
        return ids
